"""What one gateway's placer has done so far, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.routing.replica_router import Routed  # and with it redis

# Upper bounds of the decision time's histogram; the last bucket is open.
DECISION_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


@dataclass(slots=True)
class Warmth:
    """Prompt tokens that one replica was expected to have cached, and had. `error` sums their differences' sizes."""

    requests: int = 0
    expected: int = 0
    found: int = 0
    error: int = 0


@dataclass(slots=True)
class PlacementCounts:
    """Counters since the start."""

    by_reason: dict[str, int] = field(default_factory=dict)
    moved: int = 0  # requests that Serve could not place as wished
    local: int = 0  # decisions without the shared state
    failed_reports: int = 0
    decision_s: float = 0.0
    decision_buckets: list[int] = field(default_factory=lambda: [0] * (len(DECISION_BUCKETS_S) + 1))
    warmth: dict[str, Warmth] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)  # decisions that a replica's engine had not spoken before

    @property
    def decisions(self) -> int:
        """Requests that were placed, those with no known replica included."""
        return sum(self.by_reason.values())

    def decided(self, seconds: float, routed: Routed | None) -> None:
        reason = "blind" if routed is None else routed.decision.reason
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
        self.decision_s += seconds
        self.decision_buckets[bisect_left(DECISION_BUCKETS_S, seconds)] += 1
        if routed is None:
            return
        if routed.explained.view.source != "shared":
            self.local += 1
            return
        states = routed.explained.view.replicas
        for candidate in routed.explained.candidates:
            if not states[candidate.replica].leased:
                self.silent[candidate.replica] = self.silent.get(candidate.replica, 0) + 1

    def found(self, replica: str, expected: int, found: int) -> None:
        """The engine said how many of the prompt's tokens were cached."""
        warmth = self.warmth.setdefault(replica, Warmth())
        warmth.requests += 1
        warmth.expected += expected
        warmth.found += found
        warmth.error += abs(expected - found)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Others are gone: their series end."""
        running = set(replicas)
        self.warmth = {name: warmth for name, warmth in self.warmth.items() if name in running}
        self.silent = {name: count for name, count in self.silent.items() if name in running}
