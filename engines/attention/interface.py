"""What an attention backend is: it writes a step's keys and values to their slots, then attends through block tables.

Paged attention: arXiv 2309.06180. A slot is block_id * block_size + offset; slots that no sequence has written may hold
anything, NaN included, and must not reach an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.attention.int8_kv import stored_dim
from engines.batch import RaggedBatch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """KV shape of one attention layer, observed in a forward pass. Head counts are those of this process."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    def bytes_per_token(self, kv_dtype: torch.dtype) -> int:
        """Bytes that one token's key and value take in caches of `kv_dtype`."""
        dims = (stored_dim(dim, kv_dtype) for dim in (self.head_dim, self.value_head_dim))
        return self.num_kv_heads * sum(dims) * kv_dtype.itemsize


class AttentionBackend(Protocol):
    """Stateless towards sequences; may keep per-step indices and work space, so one thread at a time."""

    name: str
    block_multiple: int
    """KV blocks have to be a multiple of so many tokens."""

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
        """Attention output [num_tokens, num_heads, value_head_dim] in the query's dtype.

        query [num_tokens, num_heads, head_dim]; key, value [num_tokens, num_kv_heads, head_dim | value_head_dim], any
        strides; caches [num_blocks, block_size, num_kv_heads, head_dim | value_head_dim], contiguous, modified: key
        and value go to `batch.slot_mapping` first, and are attended as they then are (int8_kv.py says how an int8
        cache has them). Query head h reads KV head h // (num_heads / num_kv_heads).

        The row at position p sees positions in (p - sliding_window, p] of its own sequence; None is no limit. Scores
        are query . key * scaling, then softcap * tanh(scores / softcap); `sinks` [num_heads] joins the softmax as one
        more score per head that carries no value.
        """
        ...
