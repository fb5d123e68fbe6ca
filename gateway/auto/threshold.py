"""The gap at or above which the strongest model answers, for each kind of goal."""

from __future__ import annotations

from typing import Protocol

from gateway.auto.live_router import LiveRouter
from router_models.online_quantile import OnlineQuantile
from router_models.policy_config import BoundGoal, Goal, ShareGoal


class Threshold(Protocol):
    """Asked before and told after every decision; used from one thread."""

    def value(self) -> float | None:
        """None: the goal needs none."""
        ...

    def observe(self, need: float, is_strong: bool) -> None:
        """A request was decided, whatever decided it."""
        ...


class FixedThreshold:
    """Of a goal with a price, which needs none, and of one with a bound, which was calibrated beforehand."""

    def __init__(self, value: float | None) -> None:
        self._value = value

    def value(self) -> float | None:
        return self._value

    def observe(self, need: float, is_strong: bool) -> None:
        """Nothing is learnt."""


class ShareThreshold:
    """Of a promised share: the quantile of recent needs, corrected by what the promise is behind."""

    def __init__(self, quantile: OnlineQuantile) -> None:
        self._quantile = quantile

    def value(self) -> float | None:
        return self._quantile.threshold()

    def observe(self, need: float, is_strong: bool) -> None:
        self._quantile.observe(need, is_strong)


def threshold_of(goal: Goal, router: LiveRouter) -> Threshold:
    """A threshold that begins with what the router says of usual prompts."""
    if isinstance(goal, ShareGoal):
        return ShareThreshold(OnlineQuantile(goal.strong_share, router.usual_needs()))
    return FixedThreshold(router.safe_threshold if isinstance(goal, BoundGoal) else None)
