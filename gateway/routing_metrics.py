"""How replicas were chosen, for Prometheus: read at scrape time from the engines of this gateway.

Series of a replica end with it: their number is that of the replicas that run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Protocol, runtime_checkable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.protocol import Engine
from gateway.routing.placement_counts import DECISION_BUCKETS_S, PlacementCounts
from gateway.routing.retry_budget import RetryBudget

_PREFIX = "outrider_replica_"
_LABELS = ("ingress", "model")


@runtime_checkable
class CountsPlacements(Protocol):
    """An engine whose requests are placed by this gateway."""

    @property
    def budget(self) -> RetryBudget: ...

    def counted(self) -> PlacementCounts | None:
        """None where Serve chooses."""
        ...


class RoutingCollector(Collector):
    """The engines' placements by model name; `ingress` names this process."""

    def __init__(self, ingress: str, engines: Mapping[str, Engine]) -> None:
        self._ingress = ingress
        self._engines = {name: engine for name, engine in engines.items() if isinstance(engine, CountsPlacements)}

    def collect(self) -> Iterable[Metric]:
        yield self._retries()
        placed = {name: counts for name, engine in self._engines.items() if (counts := engine.counted()) is not None}
        if placed:
            yield self._decisions(placed)
            yield self._decision_time(placed)
            yield from self._state(placed)
            yield from self._warmth(placed)
            yield self._silent(placed)

    def _retries(self) -> Metric:
        family = _counter("retries", "Requests that lost their replica before the first byte", "outcome")
        for model, engine in self._engines.items():
            family.add_metric([self._ingress, model, "retried"], engine.budget.num_retries)
            family.add_metric([self._ingress, model, "refused"], engine.budget.num_refused)
        return family

    def _decisions(self, placed: Mapping[str, PlacementCounts]) -> Metric:
        family = _counter("decisions", "Decisions by what led to them; blind: no replica was known", "reason")
        for model, counts in placed.items():
            for reason, count in sorted(counts.by_reason.items()):
                family.add_metric([self._ingress, model, reason], count)
        return family

    def _decision_time(self, placed: Mapping[str, PlacementCounts]) -> Metric:
        text = "Time of a decision, the shared state's answer included"
        family = HistogramMetricFamily(_PREFIX + "decision_seconds", text, labels=_LABELS)
        bounds = [*map(str, DECISION_BUCKETS_S), "+Inf"]
        for model, counts in placed.items():
            buckets = list(zip(bounds, map(float, accumulate(counts.decision_buckets)), strict=True))
            family.add_metric([self._ingress, model], buckets, counts.decision_s)
        return family

    def _state(self, placed: Mapping[str, PlacementCounts]) -> Iterator[Metric]:
        local = _counter("local_decisions", "Decisions without the shared state: it did not answer in time")
        unsaid = _counter("state_failures", "Reports to the shared state that did not get through")
        moved = _counter("moved", "Requests that Serve put elsewhere than wished, or that had no wish")
        text = "Local decisions over all since the start; rate(local_decisions) / rate(decisions) tells of lately"
        share = GaugeMetricFamily(_PREFIX + "fallback_share", text, labels=_LABELS)
        for model, counts in placed.items():
            labels = [self._ingress, model]
            local.add_metric(labels, counts.local)
            unsaid.add_metric(labels, counts.failed_reports)
            moved.add_metric(labels, counts.moved)
            share.add_metric(labels, counts.local / counts.decisions if counts.decisions else 0.0)
        yield from (local, unsaid, moved, share)

    def _warmth(self, placed: Mapping[str, PlacementCounts]) -> Iterator[Metric]:
        for name, text in _WARMTH.items():
            family = _counter(f"cached_tokens_{name}", text, "replica")
            for model, counts in placed.items():
                for replica, warmth in counts.warmth.items():
                    family.add_metric([self._ingress, model, replica], getattr(warmth, name))
            yield family

    def _silent(self, placed: Mapping[str, PlacementCounts]) -> Metric:
        text = (
            "Decisions by which the lease of a replica that runs had ended: its engine does not reach the shared state"
        )
        family = _counter("silent_decisions", text, "replica")
        for model, counts in placed.items():
            for replica, count in counts.silent.items():
                family.add_metric([self._ingress, model, replica], count)
        return family


_WARMTH = {
    "expected": "Prompt tokens that the gateway expected a replica to have cached",
    "found": "Prompt tokens that the engine found cached",
    "error": "Sum of the differences between expected and found, without their signs",
}


def _counter(name: str, text: str, *more_labels: str) -> CounterMetricFamily:
    """Prometheus adds `_total` to the name."""
    return CounterMetricFamily(_PREFIX + name, text, labels=[*_LABELS, *more_labels])
