"""Paged attention by the kernels in `src/attention.h`: one step's batch, called once a layer."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engines.batch import RaggedBatch
from engines.native.library import library
from engines.native.threads import num_threads

_KV_SCALE_BYTES = 4


class _AttentionArgs(ctypes.Structure):
    """AttentionArgs of src/attention.h."""

    _fields_ = (
        ("block_table", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("kv_lens", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("key_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("is_fp32", ctypes.c_int32),
        ("is_int8", ctypes.c_int32),
    )


def takes(query: Tensor, value: Tensor, key_cache: Tensor) -> bool:
    """Whether AttentionStep can be given these; see its `attend`."""
    dtype = query.dtype
    return (
        (dtype is torch.bfloat16 or dtype is torch.float32)
        and (key_cache.dtype is dtype or key_cache.dtype is torch.int8)
        and query.shape[2] % 8 == value.shape[2] % 8 == 0
    )


class AttentionStep:
    """The attention of one step, for any number of layers; keeps `batch`, whose tensors are on the CPU, alive."""

    def __init__(self, batch: RaggedBatch) -> None:
        kernels = library()
        assert kernels is not None
        assert batch.cu_seqlens_q.dtype == batch.kv_lens.dtype == batch.block_table.dtype == torch.int32
        assert batch.slot_mapping.dtype == torch.int64
        indices = (batch.block_table, batch.cu_seqlens_q, batch.kv_lens, batch.slot_mapping)
        assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in indices)
        self.batch = batch
        self._num_tokens = len(batch.slot_mapping)
        self._attend = kernels.outrider_attend
        self._attend.argtypes, self._attend.restype = (ctypes.c_void_p,), None
        self._args = _AttentionArgs(
            *(tensor.data_ptr() for tensor in indices),
            num_sequences=batch.num_seqs,
            max_blocks=batch.block_table.shape[1],
            num_tokens=self._num_tokens,
            block_size=batch.block_size,
            num_threads=num_threads(),
        )
        self.address = ctypes.addressof(self._args)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """What AttentionBackend.attend does. Dtypes are bf16 or fp32, the same for query, key and value.

        The caches are of that dtype, or int8 with a last dimension that is 4 longer: each vector's fp32 scale. Last
        dimensions of query, key and value are multiples of 8 and contiguous.
        """
        num_tokens, num_heads, head_dim = query.shape
        _, num_kv_heads, value_dim = value.shape
        query_stride, query_head_stride, query_step = query.stride()
        key_stride, key_head_stride, key_step = key.stride()
        value_stride, value_head_stride, value_step = value.stride()
        assert num_tokens == self._num_tokens
        assert num_heads % num_kv_heads == 0
        assert query.dtype is key.dtype is value.dtype
        assert query_step == key_step == value_step == 1
        output = query.new_empty((num_tokens, num_heads, value_dim))
        if sinks is not None and (sinks.dtype is not torch.float32 or not sinks.is_contiguous()):
            sinks = sinks.float().contiguous()
        args = self._args
        args.query, args.key, args.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        self.set_caches(key_cache, value_cache, num_kv_heads, head_dim, value_dim)
        args.output = output.data_ptr()
        args.sinks = None if sinks is None else sinks.data_ptr()
        args.query_stride, args.query_head_stride = query_stride, query_head_stride
        args.key_stride, args.key_head_stride = key_stride, key_head_stride
        args.value_stride, args.value_head_stride = value_stride, value_head_stride
        args.num_heads, args.num_kv_heads, args.head_dim, args.value_dim = num_heads, num_kv_heads, head_dim, value_dim
        args.window = sliding_window or 0
        args.scaling, args.softcap = scaling, softcap or 0.0
        args.is_fp32 = query.dtype is torch.float32
        self._attend(self.address)
        return output

    def set_caches(
        self, key_cache: Tensor, value_cache: Tensor, num_kv_heads: int, head_dim: int, value_dim: int | None = None
    ) -> None:
        """Attend these from now on; `value_dim` is `head_dim` where it is not given."""
        is_int8 = key_cache.dtype is torch.int8
        extra = _KV_SCALE_BYTES if is_int8 else 0
        assert key_cache.shape[2:] == (num_kv_heads, head_dim + extra)
        assert value_cache.shape[2:] == (num_kv_heads, (value_dim or head_dim) + extra)
        assert key_cache.is_contiguous()
        assert value_cache.is_contiguous()
        args = self._args
        args.key_cache, args.value_cache, args.is_int8 = key_cache.data_ptr(), value_cache.data_ptr(), is_int8
