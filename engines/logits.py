"""From raw logits to the law that is sampled: the processors of one step's rows.

Order: logit bias, repetition / presence / frequency penalties, suppressed tokens, temperature, top-k, top-p, min-p.

Every function takes float32 logits [num_rows, vocab] and touches only the rows it is told to, so a row that uses no
processor costs nothing. The first three change logits in place. `scale` turns logits into scores, whose largest is 0;
top-k, top-p and min-p are then floors under the scores: what lies below a row's floor cannot be drawn. A floor keeps
tokens of equal score together, so a filter never decides between equals by their ids.

-inf logits stay -inf and never become NaN. Ids outside the vocabulary have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.staging import send
from engines.types import SamplingParams

# Below this the law is greedy to within the precision of logits; dividing by less would only amplify rounding.
MIN_TEMPERATURE = 1e-5
_NEG_INF = float("-inf")
_MAX_FLOAT32 = torch.finfo(torch.float32).max


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most likely token (the lowest id among equals) is taken without noise."""
    return params.temperature < MIN_TEMPERATURE or params.top_k == 1 or params.top_p == 0.0


def needs_history(params: SamplingParams) -> bool:
    """Whether any penalty is on, so that a TokenHistory has to be kept."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class TokenHistory:
    """The distinct tokens of one sequence and how often each was emitted, kept up as tokens are committed.

    Prompt tokens that were never emitted have count 0. `observe` is O(1) amortised; nothing is recounted per step.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._token_ids = np.fromiter(self._slots, np.int64, len(self._slots))
        self._counts = np.zeros(len(self._slots), np.float32)

    def observe(self, token_id: int) -> None:
        """Count one committed output token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._counts):
            self._grow()
        self._token_ids[slot] = token_id
        self._counts[slot] += 1

    def _grow(self) -> None:
        spare = max(64, len(self._counts))
        self._token_ids = np.concatenate([self._token_ids, np.zeros(spare, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(spare, np.float32)])

    def counts(self, draft_prefix: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct token ids and their output counts, [num_distinct] each, as if `draft_prefix` were emitted too."""
        num = len(self._slots)
        if not draft_prefix:
            return self._token_ids[:num], self._counts[:num]
        drafted = {token_id: draft_prefix.count(token_id) for token_id in dict.fromkeys(draft_prefix)}
        new = [token_id for token_id in drafted if token_id not in self._slots]
        token_ids = np.concatenate([self._token_ids[:num], np.array(new, np.int64)])
        counts = np.concatenate([self._counts[:num], np.array([drafted[token_id] for token_id in new], np.float32)])
        for token_id in drafted.keys() & self._slots.keys():
            counts[self._slots[token_id]] += drafted[token_id]
        return token_ids, counts


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """One row's penalties, over the distinct tokens seen by that row, drafts before it included."""

    token_ids: NDArray[np.int64]  # [num_distinct], prompt and output
    output_counts: NDArray[np.float32]  # [num_distinct], 0: in the prompt only
    repetition: float
    presence: float
    frequency: float


def add_logit_bias(logits: Tensor, biases: Mapping[int, Mapping[int, float]]) -> None:
    """Add `biases[row][token id]` to the logits, in place."""
    tokens = {row: np.fromiter(bias.keys(), np.int64, len(bias)) for row, bias in biases.items()}
    values = np.concatenate([np.fromiter(bias.values(), np.float32, len(bias)) for bias in biases.values()])
    index, (added,) = _entries(logits, tokens, [values])
    logits[index] += added


def suppress_tokens(logits: Tensor, banned: Mapping[int, Sequence[int]]) -> None:
    """Set the logits of `banned[row]` to -inf, in place."""
    tokens = {row: np.array(ids, np.int64) for row, ids in banned.items()}
    index = _entries(logits, tokens)[0]
    logits[index] = _NEG_INF


def apply_penalties(logits: Tensor, penalties: Mapping[int, RowPenalties]) -> None:
    """Apply `penalties[row]` in place.

    Repetition (arXiv 1909.05858) divides positive and multiplies negative logits of prompt and output tokens. Presence
    is subtracted once and frequency per occurrence, for output tokens only (as in OpenAI's API).
    """
    rows = list(penalties.values())
    sizes = [len(row.token_ids) for row in rows]

    def per_token(values: list[float]) -> NDArray[np.float32]:
        return np.repeat(np.array(values, np.float32), sizes)

    counts = np.concatenate([row.output_counts for row in rows])
    presence, frequency = per_token([row.presence for row in rows]), per_token([row.frequency for row in rows])
    index, (repetition, subtracted) = _entries(
        logits,
        {row: penalty.token_ids for row, penalty in penalties.items()},
        [per_token([row.repetition for row in rows]), presence * (counts > 0) + frequency * counts],
    )
    seen = logits[index]
    logits[index] = torch.where(seen > 0, seen / repetition, seen * repetition) - subtracted


def _entries(
    logits: Tensor, tokens: Mapping[int, NDArray[np.int64]], values: Sequence[NDArray[np.float32]] = ()
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Index (rows, token ids) of all `tokens` and the `values` beside them, as tensors on the logits' device.

    `tokens` maps a row to its token ids; each of `values` has one number per token, row after row. Ids outside the
    vocabulary are left out.
    """
    rows = np.repeat(np.fromiter(tokens.keys(), np.int64, len(tokens)), [len(ids) for ids in tokens.values()])
    columns = np.concatenate(list(tokens.values()))
    valid = (columns >= 0) & (columns < logits.shape[1])

    on_device = send([array[valid] for array in (rows, columns, *values)], logits.device)
    return (on_device[0], on_device[1]), on_device[2:]


def ensure_choice(logits: Tensor) -> None:
    """Give rows whose every token is banned one token to emit, the lowest id, in place: they have no law of their own.

    NaN counts as banned and +inf as the largest number, so that a model which overflows cannot make an id out of range.
    """
    logits.nan_to_num_(nan=_NEG_INF, posinf=_MAX_FLOAT32, neginf=_NEG_INF)
    no_choice = logits.amax(-1) == _NEG_INF
    logits[:, 0].masked_fill_(no_choice, 0.0)


def scale(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Scores (logits - row maximum) / temperature, [num_rows, vocab], in place; the best is exactly 0.

    `temperatures`, float32 [num_rows], are at least MIN_TEMPERATURE, and every row has a token that is not banned
    (`ensure_choice`).
    """
    # Subtracting first keeps the differences exact and lets a division overflow to -inf only.
    logits -= logits.amax(-1, keepdim=True)
    logits /= temperatures[:, None]
    return logits


def floors(scores: Tensor, rows: Sequence[SamplingParams]) -> Tensor:
    """The lowest score that each row may draw, float32 [num_rows]: the highest of the floors of top-k, top-p and min-p.

    top-p works on what top-k left, renormalised; min-p compares with the best token, which is always kept.
    """
    by_count = [i for i, row in enumerate(rows) if 0 < row.top_k < scores.shape[1]]
    by_mass = [i for i, row in enumerate(rows) if row.top_p < 1.0]
    numbers = (
        np.array([math.log(row.min_p) if row.min_p > 0 else _NEG_INF for row in rows], np.float32),
        np.array(by_count, np.int64),
        np.array([rows[i].top_k for i in by_count], np.int64),
        np.array(by_mass, np.int64),
        np.array([rows[i].top_p for i in by_mass], np.float64),
    )
    best, few, counts, many, masses = send(numbers, scores.device)
    top_k = torch.full_like(best, _NEG_INF)
    if by_count:
        top_k[few] = _top_k_floor(scores[few], counts, max(rows[i].top_k for i in by_count))
    if by_mass:
        kept = scores[many]
        kept.masked_fill_(kept < top_k[many, None], _NEG_INF)
        best[many] = best[many].maximum(_top_p_floor(kept, masses))
    return best.maximum(top_k)


def _top_k_floor(scores: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """The k-th largest score of each row, [num_rows]; `top_k` int64 [num_rows], the largest of which the host knows."""
    best = scores.topk(largest).values
    return best.gather(1, top_k[:, None] - 1)[:, 0]


def _top_p_floor(scores: Tensor, top_p: Tensor) -> Tensor:
    """The score at which the mass of the better tokens and its own reaches `top_p` (arXiv 1904.09751), [num_rows].

    `top_p` is float64 [num_rows].
    """
    # The best score is 0, so its probability is 1 / mass. Unlike sum(), softmax adds up a row in the same order
    # whatever the number of rows.
    mass = scores.softmax(-1).amax(-1, keepdim=True).double().reciprocal()
    wanted = mass * top_p[:, None]
    if scores.device.type != "cpu":
        ordered = scores.sort(-1, descending=True).values
        reached = torch.searchsorted(ordered.double().exp_().cumsum(-1), wanted).clamp_(max=scores.shape[1] - 1)
        return ordered.gather(1, reached)[:, 0]
    nuclei = zip(scores.numpy(), mass[:, 0].tolist(), wanted[:, 0].tolist(), strict=True)
    return torch.tensor([_nucleus_floor(*nucleus) for nucleus in nuclei], dtype=torch.float32)


def _nucleus_floor(scores: NDArray[np.float32], mass: float, wanted: float) -> float:
    """The score at which the sorted exp(scores) [vocab] of one row, `mass` in all, add up to `wanted`.

    Only what can be inside is sorted: tokens that each have less than an equal share of the mass outside add up to less
    than that mass, so none of them is needed.
    """
    negligible = max(mass - wanted, 0.0) / (2 * len(scores))  # half of the share, so that rounding decides nothing
    if negligible > 0.0:
        scores = scores[scores >= math.log(negligible)]
    ordered = np.sort(scores)[::-1]  # numpy's sort of floats is vectorised, torch's is 10 times slower
    reached = int(np.searchsorted(np.cumsum(np.exp(ordered.astype(np.float64))), wanted))
    return float(ordered[min(reached, len(ordered) - 1)])
