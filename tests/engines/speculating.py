"""Speculation around a scripted drafter, for tests of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from drafting.acceptance import Acceptance
from drafting.cost import StepCost
from drafting.draft_length import FixedLength, LengthPolicy, Market, Option, Order
from drafting.draft_model import DraftModel
from drafting.prices import Prices
from drafting.protocol import Drafter, Source
from drafting.speculator import Speculator
from engines.draft_reader import DraftReader
from engines.speculation import SpeculativeDecoding

T = TypeVar("T")


def speculating(
    lookups: dict[Source, Drafter],
    policy: LengthPolicy | int,
    reader: DraftReader | None = None,
    max_draft_tokens: int = 64,
) -> SpeculativeDecoding:
    """These drafters, and a draft model if it has a reader, under this policy or fixed length."""
    acceptance: dict[Source, Acceptance] = {source: Acceptance() for source in lookups}
    model, prices = None, Prices(StepCost(), StepCost())
    if reader is not None:
        acceptance["model"] = Acceptance()
        model = DraftModel(reader, acceptance["model"], prices.draft)
    policy = FixedLength(policy) if isinstance(policy, int) else policy
    speculator = Speculator(policy, lookups, model, acceptance, prices)
    return SpeculativeDecoding(speculator, reader, max_draft_tokens, shares_unsalted=True)


class ScriptedLength:
    """Orders and keeps what it is told to, clamped to what there is: any decision is a legal one."""

    explores = False

    def __init__(self, orders: Sequence[int], kept: Sequence[int] = (64,), by_model: Sequence[bool] = (False,)) -> None:
        self._orders, self._kept, self._by_model = orders, kept, by_model
        self._turn = 0

    def order(self, options: Sequence[Option], market: Market) -> list[Order]:
        """See LengthPolicy."""
        return [self._order(option) for option in options]

    def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
        """See LengthPolicy."""
        return [min(self._next(self._kept), len(one)) for one in survivals]

    def _order(self, option: Option) -> Order:
        by_model = bool(option.model) and (self._next(self._by_model) or not option.found)
        count = self._next(self._orders)
        return Order(min(count, len(option.model if by_model else option.found)), by_model)

    def _next(self, script: Sequence[T]) -> T:
        self._turn += 1
        return script[self._turn % len(script)]
