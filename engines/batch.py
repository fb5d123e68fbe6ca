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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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
    """The items' rows one after another, as tensors on `device`."""
    q_lens = tuple(item.q_len for item in items)
    kv_lens = tuple(item.start + item.q_len for item in items)
    ends = np.cumsum(q_lens)
    input_ids = np.concatenate([np.array((*item.token_ids[item.start : item.stop], *item.drafts)) for item in items])
    positions = np.concatenate([np.arange(kv - q, kv) for q, kv in zip(q_lens, kv_lens, strict=True)])
    tables = np.zeros((len(items), max(-(-kv // block_size) for kv in kv_lens)), dtype=np.int32)
    for row, (item, kv_len) in enumerate(zip(items, kv_lens, strict=True)):
        num_blocks = -(-kv_len // block_size)
        tables[row, :num_blocks] = np.frombuffer(item.block_table, dtype=np.int32, count=num_blocks)
    row_of_token = np.repeat(np.arange(len(items)), q_lens)
    slots = tables[row_of_token, positions // block_size].astype(np.int64) * block_size + positions % block_size
    logit_rows = [
        row
        for item, end in zip(items, ends, strict=True)
        for row in (*range(end - item.num_logit_rows, end), *([end - 1] * item.num_copies))
    ]

    def tensor(values: npt.ArrayLike, dtype: torch.dtype) -> Tensor:
        return to_device(torch.as_tensor(np.asarray(values)).to(dtype), device)

    return RaggedBatch(
        input_ids=tensor(input_ids, torch.int64),
        positions=tensor(positions, torch.int64),
        slot_mapping=tensor(slots, torch.int64),
        cu_seqlens_q=tensor(np.concatenate(([0], ends)), torch.int32),
        kv_lens=tensor(kv_lens, torch.int32),
        block_table=tensor(tables, torch.int32),
        logit_rows=tensor(logit_rows, torch.int64),
        q_lens_cpu=q_lens,
        kv_lens_cpu=kv_lens,
        block_size=block_size,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; to a GPU through pinned memory, so that the host does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
