"""Chooses tokens: one for each row of logits, by argmax or by Gumbel-max over the processed law.

A row's randomness is `drafting.noise` of (seed, position, token id), so its token depends on its own logits and
parameters only: never on the other rows, on the step it falls into, or on whether a draft led to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafting.noise import noise, request_seed
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
from engines.types import SamplingParams

MAX_TOP_LOGPROBS = 20
# Rows are processed in groups of about this many logits. On a CPU their float32 copies then stay in its caches (twice
# as fast as all rows together at 152k tokens); elsewhere they stay below 256 MiB each, in few launches.
_GROUP_ELEMENTS = {"cpu": 2**18}
_GROUP_ELEMENTS_ELSEWHERE = 2**26
# Noise is made in blocks, likewise; its 64-bit words need more room.
_NOISE_BLOCK_ELEMENTS = {"cpu": 2**16}
_NOISE_BLOCK_ELEMENTS_ELSEWHERE = 2**24


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


@dataclass(frozen=True, slots=True)
class TokenLogprobIds:
    """Log-softmax of the raw logits, before any processor; `top_*` run from the most likely on."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprobIds | None = None


class Sampler:
    """Samples rows of logits. `vocab_size` cuts off the padding that some models have beyond their tokens."""

    def __init__(self, vocab_size: int | None = None) -> None:
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
        """One token per row of `logits` [num_rows, vocab], any float dtype, left unchanged; one copy to the host.

        Greedy rows take the lowest id among equals. A row whose every token is banned emits token 0.
        """
        assert logits.shape[0] == len(rows)
        if not rows:
            return []
        logits = logits[:, : self._vocab_size]
        token_ids = self._choose(logits, rows)
        asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        if not asking:
            return [SampledToken(token_id) for token_id in token_ids.tolist()]
        table = self._logprobs(logits, token_ids, asking)
        # Ids are exact in float64, so everything travels in one copy.
        packed = torch.cat([token_ids.double(), table.flatten()]).cpu()
        chosen, answers = packed[: len(rows)].tolist(), packed[len(rows) :].view(table.shape).tolist()
        unpacked = {i: _unpack(answer, rows[i].params.logprobs or 0) for i, answer in zip(asking, answers, strict=True)}
        return [SampledToken(int(token_id), unpacked.get(i)) for i, token_id in enumerate(chosen)]

    def _choose(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """Token ids, int64 [num_rows], on the logits' device."""
        has_kernel = native.takes(logits)
        special = [i for i, row in enumerate(rows) if not (row.is_free if has_kernel else row.is_plain_greedy)]
        if has_kernel:
            token_ids = _draw_free(logits, rows, special)
        elif len(special) == len(rows):
            token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        else:
            token_ids = logits.max(-1).indices  # not argmax, which is 50 times slower on bf16 rows of a CPU
        for group in _groups(special, logits):
            index = torch.tensor(group, device=logits.device)
            token_ids[index] = _draw(logits[index].float(), [rows[i] for i in group])
        return token_ids

    def _logprobs(self, logits: Tensor, token_ids: Tensor, asking: list[int]) -> Tensor:
        """`_row_logprobs` of the rows `asking`."""
        parts = []
        for group in _groups(asking, logits):
            index = torch.tensor(group, device=logits.device)
            parts.append(_row_logprobs(logits[index], token_ids[index]))
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
    token_ids = logits.max(-1).indices
    sampled = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
    if sampled:
        index = torch.tensor(sampled, device=logits.device)
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
    scores = scale(logits, [row.params.temperature for row in rows])
    seeds = torch.tensor([request_seed(row.seed) for row in rows], device=scores.device)
    positions = torch.tensor([row.position for row in rows], device=scores.device)
    filtered = [i for i, row in enumerate(rows) if row.is_filtered]
    if not filtered:
        return _race_all(scores, seeds, positions)
    params = [row.params for row in rows]
    if scores.device.type != "cpu":
        # Counting survivors would stop the host until the GPU is done, and noise costs next to nothing there.
        return _race_all(scores.masked_fill_(scores < floors(scores, params)[:, None], float("-inf")), seeds, positions)
    token_ids = torch.empty(len(rows), dtype=torch.int64)
    index = torch.tensor(filtered)
    few = scores[index]
    floor = floors(few, [params[i] for i in filtered])
    token_ids[index] = _race_survivors(few, floor, seeds[index], positions[index])
    unfiltered = sorted(set(range(len(rows))) - set(filtered))
    if unfiltered:
        index = torch.tensor(unfiltered)
        token_ids[index] = _race_all(scores[index], seeds[index], positions[index])
    return token_ids


def _race_all(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """argmax(scores + noise) over the whole vocabulary, int64 [num_rows]."""
    block = _NOISE_BLOCK_ELEMENTS.get(scores.device.type, _NOISE_BLOCK_ELEMENTS_ELSEWHERE)
    num_rows = max(1, block // scores.shape[1])
    parts = zip(scores.split(num_rows), seeds.split(num_rows), positions.split(num_rows), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_race_block(*part, block) for part in parts])


def _race_block(scores: Tensor, seeds: Tensor, positions: Tensor, width: int) -> Tensor:
    """`_race_all` of a few rows, `width` columns at a time."""
    best = torch.full((len(scores),), float("-inf"), device=scores.device)
    winner = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    for start in range(0, scores.shape[1], width):
        part = scores[:, start : start + width]
        token_ids = torch.arange(start, start + part.shape[1], device=scores.device)
        value, column = (part + noise(seeds[:, None], positions[:, None], token_ids)).max(-1)
        winner = torch.where(value > best, column + start, winner)  # strictly: the lowest id wins among equals
        best = best.maximum(value)
    return winner


def _race_survivors(scores: Tensor, floor: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """argmax(scores + noise) over the scores that are not below `floor` [num_rows], int64 [num_rows]."""
    row, token_id = (scores >= floor[:, None]).nonzero(as_tuple=True)
    value = scores[row, token_id] + noise(seeds[row], positions[row], token_id)
    best = torch.full_like(floor, float("-inf")).scatter_reduce_(0, row, value, "amax")
    at_best = value == best[row]
    last = torch.full_like(seeds, scores.shape[1])
    return last.scatter_reduce_(0, row[at_best], token_id[at_best], "amin")


def _row_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """logprob, MAX_TOP_LOGPROBS ids, as many logprobs: float64 [num_rows, 1 + 2 * num_top].

    The number is fixed and `logits` are not processed, so that an answer does not depend on what other rows asked for.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top = logprobs.topk(min(MAX_TOP_LOGPROBS, logits.shape[1]))
    return torch.cat([chosen.double(), top.indices.double(), top.values.double()], -1)


def _unpack(answer: list[float], num_top: int) -> TokenLogprobIds:
    """One row of `_row_logprobs`; equals are ordered by id, since topk leaves their order open."""
    half = 1 + len(answer) // 2
    top = sorted(zip(answer[1:half], answer[half:], strict=True), key=lambda pair: (-pair[1], pair[0]))[:num_top]
    return TokenLogprobIds(answer[0], tuple(int(i) for i, _ in top), tuple(value for _, value in top))
