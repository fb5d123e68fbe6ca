"""A language model without weights, whose logits depend on every token of the context, read through the block table.

A wrong slot, a stale block, a missed copy or a wrong position changes the output, which makes it a strict witness for
scheduling and KV bookkeeping at no cost. As a real model's keys and values, what a slot holds depends on all that was
in the slots before it when it was written: a context that was put right only afterwards is caught as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from engines.batch import RaggedBatch
from engines.sampler import Sampler, SampleRow
from engines.types import SamplingParams
from tests.engines.fake_device import FakeDevice

_EMPTY = -1


def context_logits(context: Sequence[int], vocab_size: int, sharpness: float = 3.0) -> Tensor:
    """Logits [vocab] that are a function of the whole context."""
    digest = hashlib.blake2b(repr(tuple(context)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(vocab_size, generator=generator) * sharpness


class ContextRunner:
    """The Runner protocol. Its "KV cache" holds the token id written to each slot; `num_forwards` counts steps.

    `perturbation` is the size of what is added to `context_logits`, so that a draft model agrees with a target in part;
    `padding` is the number of logits beyond the vocabulary, all of them attractive. With `may_repeat`, a slot may be
    written twice in a forward, by sequences that share it, as long as they agree on its content.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        *,
        perturbation: float = 0.0,
        padding: int = 0,
        may_repeat: bool = False,
    ) -> None:
        self.slots = torch.full((num_blocks, block_size), _EMPTY, dtype=torch.int64)
        self.vocab_size = vocab_size
        self.num_forwards = 0
        self.batches: list[RaggedBatch] = []
        self.copies: list[tuple[int, int]] = []
        self._states = torch.full((num_blocks, block_size), _EMPTY, dtype=torch.int64)
        self._perturbation = perturbation
        self._padding = torch.full((padding,), 50.0)
        self._may_repeat = may_repeat

    def forward(self, batch: RaggedBatch) -> Tensor:
        self.num_forwards += 1
        self.batches.append(batch)
        self._write(batch)
        ends = batch.cu_seqlens_q.tolist()
        rows = []
        for row in batch.logit_rows.tolist():
            seq = next(i for i in range(batch.num_seqs) if ends[i] <= row < ends[i + 1])
            length = int(batch.positions[row]) + 1
            assert length == batch.kv_lens_cpu[seq] - (ends[seq + 1] - 1 - row)
            context = self.slots[batch.block_table[seq].long()].view(-1)[:length].tolist()
            assert _EMPTY not in context, "read a slot that was never written"
            state = reduce(_next_state, context, 0)
            assert state == self._states.view(-1)[batch.slot_mapping[row]], "written when the context was another"
            rows.append(self._logits(context))
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size + len(self._padding))

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.copies.extend(copies)
        sources, destinations = zip(*copies, strict=True)
        assert len(set(destinations)) == len(destinations)
        for cache in (self.slots, self._states):
            cache[list(destinations)] = cache[list(sources)]

    def _write(self, batch: RaggedBatch) -> None:
        slots, states = batch.slot_mapping.tolist(), self._states.view(-1)
        ends, token_ids = batch.cu_seqlens_q.tolist(), batch.input_ids.tolist()
        assert all(0 <= token_id < self.vocab_size for token_id in token_ids), "no token"
        written: dict[int, int] = {}
        for seq in range(batch.num_seqs):
            first = ends[seq]
            before = int(batch.positions[first]) - 1
            block = int(batch.block_table[seq, before // batch.block_size]) if before >= 0 else 0
            state = int(self._states[block, before % batch.block_size]) if before >= 0 else 0
            for i in range(first, ends[seq + 1]):
                state = _next_state(state, token_ids[i])
                repeats = slots[i] in written
                assert not repeats or (self._may_repeat and written[slots[i]] == state), "two tokens in one slot"
                written[slots[i]] = state
        self.slots.view(-1)[batch.slot_mapping] = batch.input_ids
        states[list(written)] = torch.tensor(list(written.values()))

    def _logits(self, context: list[int]) -> Tensor:
        logits = context_logits(context, self.vocab_size)
        if self._perturbation:
            logits += context_logits([*context, _EMPTY], self.vocab_size, self._perturbation)
        return torch.cat([logits, self._padding])


class QueuedRunner(ContextRunner):
    """A ContextRunner on a fake device, which a forward keeps `busy` if so said: until the test says otherwise."""

    def __init__(
        self, device: FakeDevice, num_blocks: int, block_size: int, vocab_size: int, *, keeps_busy: bool, **options: Any
    ) -> None:
        super().__init__(num_blocks, block_size, vocab_size, **options)
        self._device = device
        self._keeps_busy = keeps_busy

    def forward(self, batch: RaggedBatch) -> Tensor:
        tensors = {name: getattr(batch, name) for name in RaggedBatch.__slots__}
        sent = {name: self._device.values(value) for name, value in tensors.items() if isinstance(value, Tensor)}
        logits = super().forward(replace(batch, **sent))
        self._device.busy |= self._keeps_busy
        return self._device.hold(logits)


def _next_state(state: int, token_id: int) -> int:
    return hash((state, token_id))


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
