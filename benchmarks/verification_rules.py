"""What each rule of verification accepts, computed exactly from texts that the target itself wrote.

Let p be the target's law of a token, q the drafter's, y a text sampled from the target, and ratio[t] = q(y_t) / p(y_t)
given the tokens before. The rules are lossless, so their output may be taken to be y. Given that the output is y, the
probability that a step starting at t accepts at least i drafts (its *survival*) is

- matching (the draft is kept while it equals the target's own sample): 1 or 0, whether all of the first i match;
- the ratio test (arXiv 2211.17192): prod_{l < i} min(1, ratio[t + l]), since a token is drafted and accepted with
  probability min(p, q) = p min(1, q / p);
- block verification (arXiv 2403.10444): min_{j <= i} prod_{l < j} ratio[t + l], since at least i of the drafts x are
  accepted with probability w_i = min(1, w_{i-1} p / q), and q(x_1..x_i) w_i / p(x_1..x_i) is that minimum.

No draft block has to be sampled, all rules are compared on the same texts, and because what follows a step is again
the target's law, the steps along a text are a Markov chain whose expected number of visits is found in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over texts and its standard error, which treats a text as one observation."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Expected numbers of one text when every step drafts `draft_length` tokens, or what is left of the text."""

    tokens: float
    steps: float
    drafted: float
    accepted: float


def chain_survival(accept: Tensor, draft_length: int) -> Tensor:
    """Survival where each draft is judged alone: float64 [length, draft_length + 1], entry [t, i] as in the module.

    `accept` [length] is the probability that the draft for a position is accepted given that its step got there: 0 or 1
    for matching, min(1, ratio) for the ratio test.
    """
    return _windows(accept.double(), draft_length).cumprod(1)


def block_survival(ratios: Tensor, draft_length: int) -> Tensor:
    """Survival under block verification, from `ratios` q / p of a text's tokens [length]; as `chain_survival` else."""
    return _windows(ratios.double(), draft_length).cumprod(1).cummin(1).values


def _windows(factors: Tensor, draft_length: int) -> Tensor:
    """Row t: 1, then the factors of positions t to t + draft_length - 1, 0 beyond the text's end."""
    padded = torch.cat([factors, factors.new_zeros(draft_length)])
    windows = padded.unfold(0, draft_length, 1)[: len(factors)]
    return torch.cat([factors.new_ones(len(factors), 1), windows], 1)


def count_steps(survival: Tensor) -> StepCounts:
    """Expected counts over a text, from the survival [length, draft_length + 1] of its positions.

    The first step starts at 0; one that accepts i drafts at t is followed by one at t + i + 1, until the text ends.
    """
    length, width = survival.shape
    stops_at = survival.clone()
    stops_at[:, :-1] -= survival[:, 1:]
    visits = survival.new_zeros(length + width)
    visits[0] = 1.0
    for t in range(length):
        visits[t + 1 : t + 1 + width] += visits[t] * stops_at[t]
    visits = visits[:length]
    drafted = torch.arange(length, 0, -1).clamp(max=width - 1)
    accepted = survival[:, 1:].sum(1)
    return StepCounts(length, visits.sum().item(), (visits @ drafted.double()).item(), (visits @ accepted).item())


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum / sum over texts, with the standard error of the linearised ratio; NaN error for a single text."""
    top, bottom = torch.tensor(numerators, dtype=torch.float64), torch.tensor(denominators, dtype=torch.float64)
    value = (top.sum() / bottom.sum()).item()
    count = len(top)
    spread = ((top - value * bottom) ** 2).sum().item() * count / (count - 1) if count > 1 else math.nan
    return Estimate(value, math.sqrt(spread) / bottom.sum().item())
