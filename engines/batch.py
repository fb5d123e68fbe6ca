"""One engine step's work as tensors: a ragged batch without padding.

    tokens      a a a a | b | c c c        num_tokens = 8, num_seqs = 3
    cu_seqlens_q  0       4   5     8
    kv_lens       9       17  3            tokens in the cache *after* this step's are written

The query rows of sequence i are its last `q_len` known positions: row j sits at position kv_len - q_len + j and sees
every cached position up to its own. Prefill, chunked prefill, decode and verification differ in their counts only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.staging import send


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Tensors are on the model's device; the `_cpu` lists spare the backends a synchronisation.

    A slot is block_id * block_size + offset. `block_table` rows are padded with 0 beyond a sequence's own blocks.
    """

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    cu_seqlens_q: Tensor  # [num_seqs + 1] int32
    kv_lens: Tensor  # [num_seqs] int32
    block_table: Tensor  # [num_seqs, max_blocks] int32
    logit_rows: Tensor  # [num_rows] int64, indices into the tokens whose logits are wanted
    q_lens_cpu: tuple[int, ...]
    kv_lens_cpu: tuple[int, ...]
    block_size: int

    @property
    def num_seqs(self) -> int:
        return len(self.q_lens_cpu)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sequence's rows: tokens `start` to `stop` of `token_ids`, then `drafts`; logits of the last `num_logit_rows`.

    `num_copies` further copies of the last logits row are asked for (one for each choice that forks here).
    """

    token_ids: Sequence[int]
    start: int
    stop: int
    drafts: tuple[int, ...]
    block_table: array[int]
    num_logit_rows: int
    num_copies: int = 0

    @property
    def q_len(self) -> int:
        return self.stop - self.start + len(self.drafts)


def build_batch(items: Sequence[BatchItem], block_size: int, device: torch.device) -> RaggedBatch:
    """The items' rows one after another, as tensors on `device`, sent in one copy."""
    q_lens = tuple(item.q_len for item in items)
    kv_lens = tuple(item.start + item.q_len for item in items)
    ends = np.cumsum(q_lens)
    # Where each sequence's position 0 would lie among the rows: position = row - origin.
    positions = np.arange(ends[-1]) - np.repeat(ends - np.array(kv_lens), q_lens)
    tables = _block_tables(items, [-(-kv_len // block_size) for kv_len in kv_lens])
    blocks = tables[np.repeat(np.arange(len(items)), q_lens), positions // block_size]
    arrays = {
        "input_ids": np.array(_token_ids(items), np.int64),
        "positions": positions,
        "slot_mapping": blocks.astype(np.int64) * block_size + positions % block_size,
        "cu_seqlens_q": np.concatenate(([0], ends)).astype(np.int32),
        "kv_lens": np.array(kv_lens, np.int32),
        "block_table": tables,
        "logit_rows": np.array(_logit_rows(items, ends.tolist()), np.int64),
    }
    sent: dict[str, Any] = dict(zip(arrays, send(list(arrays.values()), device), strict=True))
    return RaggedBatch(**sent, q_lens_cpu=q_lens, kv_lens_cpu=kv_lens, block_size=block_size)


def _token_ids(items: Sequence[BatchItem]) -> list[int]:
    token_ids: list[int] = []
    for item in items:
        token_ids += item.token_ids[item.start : item.stop]
        token_ids += item.drafts
    return token_ids


def _block_tables(items: Sequence[BatchItem], num_blocks: Sequence[int]) -> npt.NDArray[np.int32]:
    tables = np.zeros((len(items), max(num_blocks)), np.int32)
    for row, item, num in zip(tables, items, num_blocks, strict=True):
        row[:num] = np.frombuffer(item.block_table, np.int32, num)
    return tables


def _logit_rows(items: Sequence[BatchItem], ends: Sequence[int]) -> list[int]:
    rows: list[int] = []
    for item, end in zip(items, ends, strict=True):
        rows += range(end - item.num_logit_rows, end)
        rows += [end - 1] * item.num_copies
    return rows
