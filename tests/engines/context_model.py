"""A language model without weights, whose logits depend on every token of the context, read through the block table.

A wrong slot, a stale block, a missed copy or a wrong position changes the output, which makes it a strict witness for
scheduling and KV bookkeeping at no cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from engines.batch import RaggedBatch
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams

_EMPTY = -1


def context_logits(context: Sequence[int], vocab_size: int, sharpness: float = 3.0) -> Tensor:
    """Logits [vocab] that are a function of the whole context."""
    digest = hashlib.blake2b(repr(tuple(context)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(vocab_size, generator=generator) * sharpness


class ContextRunner:
    """The Runner protocol. Its "KV cache" holds the token id written to each slot; `num_forwards` counts steps."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self.slots = torch.full((num_blocks, block_size), _EMPTY, dtype=torch.int64)
        self.vocab_size = vocab_size
        self.num_forwards = 0
        self.batches: list[RaggedBatch] = []

    def forward(self, batch: RaggedBatch) -> Tensor:
        self.num_forwards += 1
        self.batches.append(batch)
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping), "two tokens in one slot"
        self.slots.view(-1)[batch.slot_mapping] = batch.input_ids
        ends = batch.cu_seqlens_q.tolist()
        rows = []
        for row in batch.logit_rows.tolist():
            seq = next(i for i in range(batch.num_seqs) if ends[i] <= row < ends[i + 1])
            length = int(batch.positions[row]) + 1
            assert length == batch.kv_lens_cpu[seq] - (ends[seq + 1] - 1 - row)
            context = self.slots[batch.block_table[seq].long()].view(-1)[:length].tolist()
            assert _EMPTY not in context, "read a slot that was never written"
            rows.append(context_logits(context, self.vocab_size))
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        sources, destinations = zip(*copies, strict=True)
        assert len(set(destinations)) == len(destinations)
        self.slots[list(destinations)] = self.slots[list(sources)]


def expected_tokens(
    prompt: Sequence[int], params: SamplingParams, seed: int, vocab_size: int, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    """What a request must yield: one token at a time, alone, with no cache and no batch. No penalties."""
    sampler = Sampler(vocab_size=vocab_size)
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens:
        row = SampleRow(
            params=params,
            seed=seed,
            position=len(tokens),
            num_output=len(tokens) - len(prompt),
            history=None,
            draft_prefix=(),
            suppressed=(),
        )
        tokens.append(sampler.sample(context_logits(tokens, vocab_size)[None], [row])[0].token_id)
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]
