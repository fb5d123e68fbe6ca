"""Index tensors of one step, built once and used by every layer.

Sequences with few query rows (decode, verification) are cut into chunks of keys at fixed positions:

    sequence a, 300 positions   | chunk 0 | chunk 1 | 2..
    sequence b, 90 positions    | 0...

Each (sequence, chunk) is one item of batched products whose shapes never change, so that a row's result does not
depend on who else is in the batch, and a long neighbour costs short sequences nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.batch import RaggedBatch

CHUNK_TOKENS = 128


class ShortQueries:
    """The sequences of a step whose query rows, rounded up to a power of two, number `width`, under one window.

    Padded positions repeat the sequence's last position: a slot that is its own and written, so that nothing foreign
    is ever read. Padded query rows repeat the last row; their outputs are dropped.

    query_rows [num_sequences * width]: batch rows of the padded queries.
    kept_rows: which of those are not padding, None if all are; target_rows: the batch rows of the kept ones.
    owner [num_items]: each item's sequence, counted in this group.
    rectangle [num_sequences * max_chunks]: items as a table of sequences by chunks, missing ones as num_items, and
    present [num_items], where the items are in it; both None if the items are such a table already.
    bias [num_sequences, 1, width, 1, max_chunks * CHUNK_TOKENS], fp32: 0 where a row sees a position, else -inf.
    """

    def __init__(self, batch: RaggedBatch, sequences: list[int], width: int, sliding_window: int | None) -> None:
        self.width = width
        self.num_sequences = len(sequences)
        device = batch.block_table.device
        kv_lens = [batch.kv_lens_cpu[i] for i in sequences]
        q_lens = [batch.q_lens_cpu[i] for i in sequences]
        oldest = [
            0 if sliding_window is None else max(0, kv_len - q_len + 1 - sliding_window)
            for kv_len, q_len in zip(kv_lens, q_lens, strict=True)
        ]
        first = [position // CHUNK_TOKENS for position in oldest]
        counts = [-(-kv_len // CHUNK_TOKENS) - start for kv_len, start in zip(kv_lens, first, strict=True)]
        self.num_items, self.max_chunks = sum(counts), max(counts)
        self.owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)
        self.rectangle = _rectangle(counts, device)
        self.present = None if self.rectangle is None else (self.rectangle < self.num_items).nonzero().squeeze(1)
        chunk = [start + j for start, count in zip(first, counts, strict=True) for j in range(count)]
        members = torch.tensor(sequences, device=device)
        bounds = torch.tensor([oldest, kv_lens, q_lens, first], device=device)
        self._slots = _item_slots(batch, members[self.owner], torch.tensor(chunk, device=device), bounds[:, self.owner])
        self.bias = _visibility(bounds, width, self.max_chunks, sliding_window)
        row = torch.arange(width, device=device)
        q_len = bounds[2].unsqueeze(1)
        self.query_rows = (batch.cu_seqlens_q[members].long().unsqueeze(1) + torch.minimum(row, q_len - 1)).flatten()
        self.kept_rows = None if min(q_lens) == width else (row < q_len).flatten().nonzero().squeeze(1)
        self.target_rows = self.query_rows if self.kept_rows is None else self.query_rows[self.kept_rows]
        self._cache_rows: dict[tuple[int, int], Tensor] = {}

    def cache_rows(self, num_kv_heads: int, repeats: int = 1) -> Tensor:
        """Rows of a cache seen as [num_slots * num_kv_heads, dim] that the items' positions have.

        [num_items * num_kv_heads * repeats, CHUNK_TOKENS] int64, equal along `repeats`.
        """
        key = (num_kv_heads, repeats)
        if key not in self._cache_rows:
            heads = torch.arange(num_kv_heads, device=self._slots.device).view(1, -1, 1, 1)
            rows = self._slots[:, None, None, :] * num_kv_heads + heads
            self._cache_rows[key] = rows.expand(-1, -1, repeats, -1).reshape(-1, CHUNK_TOKENS)
        return self._cache_rows[key]


def _item_slots(batch: RaggedBatch, sequence: Tensor, chunk: Tensor, bounds: Tensor) -> Tensor:
    """Slots [num_items, CHUNK_TOKENS] of each item's positions."""
    oldest, kv_len, _, _ = bounds.unsqueeze(2)
    positions = chunk.unsqueeze(1) * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS, device=chunk.device)
    positions = torch.where(positions < oldest, kv_len - 1, torch.minimum(positions, kv_len - 1))
    blocks = batch.block_table[sequence.unsqueeze(1), positions // batch.block_size].long()
    return blocks * batch.block_size + positions % batch.block_size


def _rectangle(counts: list[int], device: torch.device) -> Tensor | None:
    if min(counts) == max(counts):
        return None
    missing, item = sum(counts), 0
    table: list[int] = []
    for count in counts:
        table += [*range(item, item + count), *([missing] * (max(counts) - count))]
        item += count
    return torch.tensor(table, device=device)


def _visibility(bounds: Tensor, width: int, max_chunks: int, sliding_window: int | None) -> Tensor:
    _, kv_len, q_len, first = bounds.unsqueeze(2)
    row = torch.arange(width, device=bounds.device)
    row_position = (kv_len - q_len + torch.minimum(row, q_len - 1)).unsqueeze(2)
    column = torch.arange(max_chunks * CHUNK_TOKENS, device=bounds.device)
    position = (first * CHUNK_TOKENS + column).unsqueeze(1)
    hidden = position > row_position
    if sliding_window is not None:
        hidden |= position <= row_position - sliding_window
    bias = torch.zeros(hidden.shape, device=bounds.device).masked_fill_(hidden, -torch.inf)
    return bias[:, None, :, None, :]
