"""How many drafts to verify: a purchase, priced by measured step time (SmartSpec, arXiv 2406.14066).

A draft token *survives* if it and all before it in its draft are right. A step emits one token for each decoding
sequence and one more for each surviving draft; verifying costs what the forward takes longer. What is bought is what
makes tokens per second greatest, of the whole batch: the likeliest tokens first, whoever they belong to. Survival
never rises along a draft, so what is bought of each draft is a prefix of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Below this believed gain speculation stays off: it is within what the estimates can be wrong by.
MIN_GAIN = 1.02
# So many rounds of the draft model are thought through although none has made the step better.
_MIN_DEPTHS = 4


@dataclass(frozen=True, slots=True)
class Market:
    """What a step's tokens cost. `num_decodes` tokens are emitted whatever is bought.

    verify_s[n]: seconds of the target's forward with n draft tokens, float64 [most + 2] where `most` is all that may
    be bought, without what prefill chunks in the same step cost by themselves. `draft_s(depth, num_seqs)`: seconds of
    so many rounds of the draft model for that many sequences.
    """

    num_decodes: int
    verify_s: npt.NDArray[np.float64]
    draft_s: Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Option:
    """What one sequence could be drafted by: survivals of a draft that is at hand, and of one the model would make.

    `reading_s` is what the model has to catch up on first, spread over the steps that profit from it.
    """

    found: tuple[float, ...] = ()
    model: tuple[float, ...] = ()
    reading_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Order:
    """Of one sequence: how many tokens, and whether the model is to make them.

    The model may stop earlier, where further tokens are expected to bring less than what they take: `second_price` is
    what a second is worth, in emitted tokens.
    """

    num_drafts: int = 0
    by_model: bool = False
    second_price: float = 0.0


class LengthPolicy(Protocol):
    """Decides draft lengths, before and after the draft model has run."""

    explores: bool
    """Whether idle drafters are to be tried now and then."""

    def order(self, options: Sequence[Option], market: Market) -> list[Order]:
        """What to draft, for each option in order."""
        ...

    def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
        """How many of the tokens at hand to verify; drafting them is paid for."""
        ...


class FixedLength:
    """Always `length` tokens, by the model where it promises more than the draft at hand."""

    explores = False

    def __init__(self, length: int) -> None:
        self._length = length

    def order(self, options: Sequence[Option], market: Market) -> list[Order]:
        """See LengthPolicy."""
        by_model = [sum(one.model[: self._length]) > sum(one.found[: self._length]) for one in options]
        return [
            Order(min(self._length, len(one.model if model else one.found)), model)
            for one, model in zip(options, by_model, strict=True)
        ]

    def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
        """See LengthPolicy."""
        return [min(self._length, len(one)) for one in survivals]


class AdaptiveLength:
    """As many as pay, none when none do."""

    explores = True

    def order(self, options: Sequence[Option], market: Market) -> list[Order]:
        """See LengthPolicy.

        The model's depth is raised until, having made the step better, another round makes it worse: survival falls
        along a draft, so it stays so. The first tokens may still cost more than they bring where later ones do not,
        since the forward of a single row is often a cheaper one.
        """
        best, best_rate = self._order(options, market, 0)
        has_risen = False
        for depth in range(1, max((len(one.model) for one in options), default=0) + 1):
            deeper, rate = self._order(options, market, depth)
            if rate > best_rate:
                best, best_rate, has_risen = deeper, rate, True
            elif has_risen or depth >= _MIN_DEPTHS:
                break
        plain_rate = market.num_decodes / float(market.verify_s[0])
        return best if best_rate > plain_rate * MIN_GAIN else [Order() for _ in options]

    def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
        """See LengthPolicy."""
        return buy(survivals, market)[0]

    def _order(self, options: Sequence[Option], market: Market, depth: int) -> tuple[list[Order], float]:
        """The best orders with the model `depth` tokens deep, and the tokens per second they promise."""
        by_model = [sum(one.model[:depth]) > sum(one.found) for one in options]
        offers = [one.model[:depth] if model else one.found for one, model in zip(options, by_model, strict=True)]
        num_by_model = sum(by_model)
        reading_s = sum(one.reading_s for one, model in zip(options, by_model, strict=True) if model)
        sunk_s = market.draft_s(depth, num_by_model) + reading_s if num_by_model else 0.0
        counts, rate = buy(offers, market, sunk_s)
        # What the model makes is bought when its beliefs are known; until then its depth is what stands.
        return [
            Order(min(depth, len(one.model)), True, rate) if model else Order(count)
            for one, model, count in zip(options, by_model, counts, strict=True)
        ], rate


def buy(offers: Sequence[Sequence[float]], market: Market, sunk_s: float = 0.0) -> tuple[list[int], float]:
    """How many tokens of each offer (survivals, never rising) to verify, and the tokens per second that gives.

    `sunk_s` is spent in any case.
    """
    owners = np.repeat(np.arange(len(offers)), [len(offer) for offer in offers])
    survivals = np.array([survival for offer in offers for survival in offer])
    order = np.argsort(-survivals, kind="stable")
    gained = np.concatenate(([0.0], np.cumsum(survivals[order])))[: len(market.verify_s) - 1]
    rates = (market.num_decodes + gained) / (sunk_s + market.verify_s[: len(gained)])
    best = int(rates.argmax())
    return np.bincount(owners[order[:best]], minlength=len(offers)).tolist(), float(rates[best])


def survivals(rates: Sequence[float]) -> tuple[float, ...]:
    """Survival of each token of a draft, from its conditional acceptance rates."""
    return tuple(accumulate(rates, mul))
