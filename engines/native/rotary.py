"""Per-head RMSNorm and rotary embedding of queries and keys, in place, in native code."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from engines.native.dtype import DTYPE_CODES
from engines.native.library import library
from engines.native.threads import num_threads

MAX_HEAD_DIM = 1024


class _HeadNorm(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _RotaryLayer(ctypes.Structure):
    _fields_ = (
        ("num_query_heads", ctypes.c_int64),
        ("num_key_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_norm", _HeadNorm),
        ("key_norm", _HeadNorm),
        ("dtype", ctypes.c_int32),
    )


class RotaryLayer:
    """What one layer does to its queries and keys. A norm is (scale [head_dim] in fp32, epsilon); None: no norm."""

    def __init__(
        self,
        num_query_heads: int,
        num_key_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        query_norm: tuple[Tensor, float] | None = None,
        key_norm: tuple[Tensor, float] | None = None,
    ) -> None:
        assert head_dim <= MAX_HEAD_DIM
        for norm in (query_norm, key_norm):
            assert norm is None or (norm[0].shape == (head_dim,) and norm[0].dtype == torch.float32)
        self.num_query_heads = num_query_heads
        self.num_key_heads = num_key_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self._scales = (query_norm, key_norm)  # the pointers below live as long as these
        self._layer = _RotaryLayer(
            num_query_heads, num_key_heads, head_dim, _pointed(query_norm), _pointed(key_norm), DTYPE_CODES[dtype]
        )
        self.address = ctypes.addressof(self._layer)
        self._rotary = _kernel()

    def rotate_(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """Norm each query and key head, then turn value i with i + rotary_dim / 2; rounded once. Modifies `heads`.

        heads [..., width], each row its query heads, then its key heads, then what is left alone (values); cosines,
        sines [..., rotary_dim], rotary_dim <= head_dim. All contiguous, of `dtype`, on the CPU.
        """
        width, rotary_dim = heads.shape[-1], cosines.shape[-1]
        assert heads.dtype == cosines.dtype == sines.dtype == self.dtype
        assert heads.is_cpu
        assert heads.is_contiguous()
        assert cosines.is_contiguous()
        assert sines.is_contiguous()
        assert heads.shape[:-1] == cosines.shape[:-1]
        assert cosines.shape == sines.shape
        assert width >= (self.num_query_heads + self.num_key_heads) * self.head_dim
        assert rotary_dim <= self.head_dim
        assert rotary_dim % 2 == 0
        self._rotary(
            self.address,
            heads.data_ptr(),
            width,
            cosines.data_ptr(),
            sines.data_ptr(),
            rotary_dim,
            heads.numel() // width,
            num_threads(),
        )


def _pointed(norm: tuple[Tensor, float] | None) -> _HeadNorm:
    return _HeadNorm(None, 0.0) if norm is None else _HeadNorm(norm[0].data_ptr(), norm[1])


@cache
def _kernel() -> ctypes._NamedFuncPointer:
    kernels = library()
    assert kernels is not None
    function = kernels.outrider_rotary
    function.restype = None
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int32),
    )
    return function
