"""Paged attention by flash-attn 2, an optional package (arXiv 2307.08691).

Sequences with few query rows (decode, verification) go to `flash_attn_with_kvcache`, which splits long contexts over
the GPU but wants equally many rows from each: shorter ones are padded in front. Its causal mask is aligned to the last
row, so padding sits before the real rows, sees less than they do, and is dropped. Prompts go to
`flash_attn_varlen_func`, which takes them as they are.

flash-attn chooses its splits by the load: the law of the output is right, but the last bits of a row may depend on its
neighbours. Where they must not, take the backend "triton".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engines.attention.tiles import SHORT_QUERY_ROWS
from engines.batch import RaggedBatch
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.staging import to_device

PAGE_TOKENS = 256
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of a batch that go into one call.

    rows [num_rows] int32: rows of the batch to send, all of a sequence together; kept [num_kept] int32: which of those
    are no padding; targets [num_kept] int64: the batch rows of the kept ones. starts and kv_starts [num_seqs + 1],
    kv_lens [num_seqs], block_table [num_seqs, max_blocks], all int32. `width` is the most rows of a sequence.
    """

    rows: Tensor
    kept: Tensor
    targets: Tensor
    starts: Tensor
    kv_starts: Tensor
    kv_lens: Tensor
    block_table: Tensor
    width: int
    max_kv_len: int

    @classmethod
    def of(cls, batch: RaggedBatch, sequences: list[int], *, padded: bool) -> _Group:
        """With `padded`, each sequence sends `width` rows, its first one repeated in front."""
        ends = np.cumsum(batch.q_lens_cpu)[sequences]
        q_lens = np.array([batch.q_lens_cpu[i] for i in sequences])
        kv_lens = np.array([batch.kv_lens_cpu[i] for i in sequences])
        widths = np.full_like(q_lens, q_lens.max()) if padded else q_lens
        back = np.concatenate([np.arange(width, 0, -1) for width in widths])  # rows from here to the sequence's end
        own = np.repeat(q_lens, widths)
        rows = np.repeat(ends, widths) - np.minimum(back, own)
        parts = (rows, np.flatnonzero(back <= own), np.cumsum((0, *widths)), np.cumsum((0, *kv_lens)), sequences)
        sent = to_device(torch.from_numpy(np.concatenate(parts).astype(np.int32)), batch.block_table.device)
        on_device, kept, starts, kv_starts, members = torch.split(sent, [len(part) for part in parts])
        return cls(
            rows=on_device,
            kept=kept,
            targets=on_device.index_select(0, kept).long(),
            starts=starts,
            kv_starts=kv_starts,
            kv_lens=batch.kv_lens.index_select(0, members),
            block_table=batch.block_table.index_select(0, members),
            width=int(widths.max()),
            max_kv_len=int(kv_lens.max()),
        )


class FlashAttention:
    """AttentionBackend for CUDA devices in bf16 or fp16, with blocks of a multiple of 256 tokens.

    `attend` raises UnsupportedModelError for what flash-attn cannot do; the parity probe meets that at load.
    """

    name = "flash"
    block_multiple = PAGE_TOKENS

    def __init__(self, package: ModuleType | None = None) -> None:
        """`package` is flash_attn, imported if it is not given. Raises ModelLoadError where it is not installed."""
        flash_attn = package or _import_flash_attn()
        self._with_kvcache: Callable[..., Tensor] = flash_attn.flash_attn_with_kvcache
        self._varlen: Callable[..., Tensor] = flash_attn.flash_attn_varlen_func
        self._batch: RaggedBatch | None = None
        self._short: _Group | None = None
        self._long: _Group | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: RaggedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        _check(query, key_cache, value_cache, sinks)
        key_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, key)
        value_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, value)
        self._group(batch)
        options = {
            "softmax_scale": scaling,
            "causal": True,
            # Positions to the left besides the own one, and to the right.
            "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
            "softcap": softcap or 0.0,
        }
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self._short:
            self._attend_short(query, key_cache, value_cache, self._short, options, output)
        if self._long:
            self._attend_long(query, key_cache, value_cache, self._long, options, output)
        return output

    def _group(self, batch: RaggedBatch) -> None:
        if batch is self._batch:
            return
        few = [i for i, q_len in enumerate(batch.q_lens_cpu) if q_len <= SHORT_QUERY_ROWS]
        many = [i for i, q_len in enumerate(batch.q_lens_cpu) if q_len > SHORT_QUERY_ROWS]
        self._short = _Group.of(batch, few, padded=True) if few else None
        self._long = _Group.of(batch, many, padded=False) if many else None
        self._batch = batch

    def _attend_short(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        group: _Group,
        options: dict[str, object],
        output: Tensor,
    ) -> None:
        padded = query.index_select(0, group.rows).view(-1, group.width, *query.shape[1:])
        result = self._with_kvcache(
            padded,
            key_cache,
            value_cache,
            cache_seqlens=group.kv_lens,
            block_table=group.block_table,
            **options,
        )
        output.index_copy_(0, group.targets, result.flatten(0, 1).index_select(0, group.kept))

    def _attend_long(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        group: _Group,
        options: dict[str, object],
        output: Tensor,
    ) -> None:
        result = self._varlen(
            query.index_select(0, group.rows),
            key_cache,
            value_cache,
            cu_seqlens_q=group.starts,
            cu_seqlens_k=group.kv_starts,
            max_seqlen_q=group.width,
            max_seqlen_k=group.max_kv_len,
            block_table=group.block_table,
            **options,
        )
        output.index_copy_(0, group.targets, result)


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, sinks: Tensor | None) -> None:
    _, block_size, _, head_dim = key_cache.shape
    value_dim = value_cache.shape[3]
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise _refusal(f"computes in bfloat16 and float16, not in {str(query.dtype).removeprefix('torch.')}")
    if block_size % PAGE_TOKENS:
        raise _refusal(f"takes a block_size that is a multiple of {PAGE_TOKENS}, not {block_size}")
    if sinks is not None:
        raise _refusal("knows no attention sinks, which this model has")
    if head_dim != value_dim or head_dim > _MAX_HEAD_DIM or head_dim % 8:
        raise _refusal(
            f"takes keys and values of one size, a multiple of 8 up to {_MAX_HEAD_DIM}, not {head_dim} and {value_dim}"
        )


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The attention backend 'flash' {what}; 'triton' has no such limit.")


def _import_flash_attn() -> ModuleType:
    try:
        import flash_attn
    except ImportError as error:
        raise ModelLoadError(
            f"The attention backend 'flash' needs the package flash-attn, which cannot be imported: {error}"
        ) from error
    package: ModuleType = flash_attn
    return package
