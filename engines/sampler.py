"""Chooses tokens: one for each row of logits, by argmax or by Gumbel-max over the processed law.

A row's randomness is `drafting.noise` of (seed, position, token id), so its token depends on its own logits and
parameters only: never on the other rows, on the step it falls into, or on whether a draft led to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafting.noise import request_seed
from engines.drawn import Drawn, SampledToken, logprob_rows
from engines.logits import (
    RowPenalties,
    TokenHistory,
    add_logit_bias,
    apply_penalties,
    ensure_choice,
    floors,
    is_greedy,
    needs_history,
    scale,
    suppress_tokens,
)
from engines.native import sampling as native
from engines.race import race_all, race_survivors
from engines.staging import send, send_indices
from engines.types import SamplingParams

# Rows are processed in groups of about this many logits. On a CPU their float32 copies then stay in its caches (twice
# as fast as all rows together at 152k tokens); elsewhere they stay below 256 MiB each, in few launches.
_GROUP_ELEMENTS = {"cpu": 2**18}
_GROUP_ELEMENTS_ELSEWHERE = 2**26


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is sampled for.

    `position` is the absolute index in the sequence of the token being sampled. `num_output` counts the output tokens
    before it, drafts of this step included. `history` (needed with penalties only) counts committed tokens, and
    `draft_prefix` are the drafts between them and this row. `suppressed` ids are masked while `num_output` is below
    `params.min_tokens`.
    """

    params: SamplingParams
    seed: int
    position: int
    num_output: int
    history: TokenHistory | None = None
    draft_prefix: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()

    @property
    def is_suppressing(self) -> bool:
        return self.num_output < self.params.min_tokens and bool(self.suppressed)

    @property
    def is_processed(self) -> bool:
        """Whether its logits are changed before a token is chosen by them."""
        return bool(self.params.logit_bias) or needs_history(self.params) or self.is_suppressing

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are ruled out by how likely they are."""
        params = self.params
        return not is_greedy(params) and bool(params.top_k or params.top_p < 1.0 or params.min_p > 0.0)

    @property
    def is_free(self) -> bool:
        """Whether every token may be drawn, by its raw logit."""
        return not (self.is_processed or self.is_filtered)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the argmax of the raw logits."""
        return is_greedy(self.params) and not self.is_processed


class Sampler:
    """Samples rows of logits. `vocab_size` cuts off the padding that some models have beyond their tokens."""

    def __init__(self, vocab_size: int | None = None) -> None:
        self._vocab_size = vocab_size

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
        """As `draw`, and read at once."""
        return self.draw(logits, rows).read()

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[SampleRow]) -> Drawn:
        """One token per row of `logits` [num_rows, vocab], any float dtype, left unchanged. Does not wait for a GPU.

        Greedy rows take the lowest id among equals. A row whose every token is banned emits token 0.
        """
        token_ids = self.choose(logits, rows)
        num_tops = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
        if not num_tops:
            return Drawn(token_ids)
        return Drawn(token_ids, _logprobs(logits[:, : self._vocab_size], token_ids, list(num_tops)), num_tops)

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """The ids of `draw`, int64 [num_rows], on the logits' device, contiguous."""
        assert logits.shape[0] == len(rows)
        if not rows:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        logits = logits[:, : self._vocab_size]
        has_kernel = native.takes(logits)
        special = [i for i, row in enumerate(rows) if not (row.is_free if has_kernel else row.is_plain_greedy)]
        if has_kernel:
            token_ids = _draw_free(logits, rows, special)
        elif len(special) == len(rows):
            token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        else:
            token_ids = logits.max(-1).indices  # not argmax, which is 50 times slower on bf16 rows of a CPU
        for group in _groups(special, logits):
            if len(group) == len(rows):
                whole = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                return _draw(whole, rows)
            index = send_indices(group, logits.device)
            token_ids[index] = _draw(logits[index].float(), [rows[i] for i in group])
        return token_ids


def _logprobs(logits: Tensor, token_ids: Tensor, asking: list[int]) -> Tensor:
    """`logprob_rows` of the rows `asking`."""
    parts = []
    for group in _groups(asking, logits):
        index = send_indices(group, logits.device)
        parts.append(logprob_rows(logits[index], token_ids[index]))
    return torch.cat(parts)


def _groups(rows: list[int], logits: Tensor) -> list[list[int]]:
    """`rows` cut into groups of about _GROUP_ELEMENTS logits."""
    size = max(1, _GROUP_ELEMENTS.get(logits.device.type, _GROUP_ELEMENTS_ELSEWHERE) // logits.shape[1])
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Token ids of rows that are not plain greedy, int64 [num_rows]; overwrites `logits`, float32 [num_rows, vocab]."""
    _process(logits, rows)
    if native.takes(logits) and not any(row.is_filtered for row in rows):
        return _draw_natively(logits, rows)
    sampled = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
    if len(sampled) == len(rows):
        return _draw_sampled(logits, rows)
    token_ids = logits.max(-1).indices
    if sampled:
        index = send_indices(sampled, logits.device)
        token_ids[index] = _draw_sampled(logits[index], [rows[i] for i in sampled])
    return token_ids


def _draw_free(logits: Tensor, rows: Sequence[SampleRow], special: list[int]) -> Tensor:
    """Token ids by the kernel, int64 [num_rows], of all rows but the `special` ones, whose places are left open."""
    if not special:
        return _draw_natively(logits, rows)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    others = set(special)
    free = [i for i in range(len(rows)) if i not in others]
    if free:
        index = torch.tensor(free)
        token_ids[index] = _draw_natively(logits[index], [rows[i] for i in free])
    return token_ids


def _draw_natively(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Token ids by the kernel, int64 [num_rows]; right for rows that are not filtered."""
    return native.draw(
        logits,
        [0.0 if is_greedy(row.params) else row.params.temperature for row in rows],
        [request_seed(row.seed) for row in rows],
        [row.position for row in rows],
    )


def _process(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Bias, penalties and suppression, in place, for the rows that have them."""
    biases = {i: row.params.logit_bias for i, row in enumerate(rows) if row.params.logit_bias}
    penalties = {i: _penalties(row) for i, row in enumerate(rows) if needs_history(row.params)}
    banned = {i: row.suppressed for i, row in enumerate(rows) if row.is_suppressing}
    if biases:
        add_logit_bias(logits, biases)
    if penalties:
        apply_penalties(logits, penalties)
    if banned:
        suppress_tokens(logits, banned)
    ensure_choice(logits)


def _penalties(row: SampleRow) -> RowPenalties:
    assert row.history is not None, "a row with penalties needs its history"
    token_ids, counts = row.history.counts(row.draft_prefix)
    params = row.params
    return RowPenalties(token_ids, counts, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)


def _draw_sampled(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Gumbel-max over processed logits, which are overwritten; int64 [num_rows]."""
    numbers = (
        np.array([row.params.temperature for row in rows], np.float32),
        np.array([request_seed(row.seed) for row in rows], np.int64),
        np.array([row.position for row in rows], np.int64),
    )
    temperatures, seeds, positions = send(numbers, logits.device)
    scores = scale(logits, temperatures)
    filtered = [i for i, row in enumerate(rows) if row.is_filtered]
    if not filtered:
        return race_all(scores, seeds, positions)
    params = [row.params for row in rows]
    if scores.device.type != "cpu":
        # Counting survivors would stop the host until the GPU is done, and noise costs next to nothing there.
        return race_all(scores.masked_fill_(scores < floors(scores, params)[:, None], float("-inf")), seeds, positions)
    if len(filtered) == len(rows):
        return race_survivors(scores, floors(scores, params), seeds, positions)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    index = torch.tensor(filtered)
    few = scores[index]
    floor = floors(few, [params[i] for i in filtered])
    token_ids[index] = race_survivors(few, floor, seeds[index], positions[index])
    index = torch.tensor(sorted(set(range(len(rows))) - set(filtered)))
    token_ids[index] = race_all(scores[index], seeds[index], positions[index])
    return token_ids
