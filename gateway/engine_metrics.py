"""The engines' own numbers for Prometheus, read at scrape time, each summed over a model's replicas.

Plain fields are gauges: they fall when a replica restarts. What drafters did is counters, so that rates over them mean
something; to Prometheus a replica's restart is a reset of the sum, which a rate over that moment overstates once.

Labels are bounded by configuration: models, times drafters (four kinds), times positions (`max_draft_tokens`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.types import DrafterStats, EngineStats

_PREFIX = "outrider_engine_"
_GAUGES = tuple(field.name for field in fields(EngineStats) if field.name != "drafters")


class EngineCollector(Collector):
    """Snapshots by model name, as metric families."""

    def __init__(self, engines: Mapping[str, EngineStats]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        yield from (self._gauge(name) for name in _GAUGES)
        yield self._gain()
        yield from self._drafter_counters()
        yield self._accepted_at()

    def _gauge(self, name: str) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, "Engine: " + name.replace("_", " "), labels=["model"])
        for model, stats in self._engines.items():
            family.add_metric([model], getattr(stats, name))
        return family

    def _gain(self) -> Metric:
        text = "Speed over plain decoding, as the cost model believes; absent until a step could speculate"
        family = GaugeMetricFamily(_PREFIX + "speculation_gain", text, labels=["model"])
        for model, stats in self._engines.items():
            if stats.speculation_time_s > 0:
                family.add_metric([model], stats.speculation_plain_time_s / stats.speculation_time_s)
        return family

    def _drafter_counters(self) -> Iterator[Metric]:
        drafts = _counter("drafts", "Drafts that reached verification")
        drafted = _counter("drafted_tokens", "Draft tokens that reached verification")
        accepted = _counter("accepted_draft_tokens", "Draft tokens that stood")
        for model, drafter, stats in self._drafters():
            drafts.add_metric([model, drafter], stats.num_drafts)
            drafted.add_metric([model, drafter], stats.num_drafted_tokens)
            accepted.add_metric([model, drafter], stats.num_accepted_tokens)
        yield from (drafts, drafted, accepted)

    def _accepted_at(self) -> Metric:
        text = "Drafts whose token at this position stood; a draft's first token has position 0"
        family = _counter("accepted_draft_tokens_at_position", text, "position")
        for model, drafter, stats in self._drafters():
            for position, count in enumerate(stats.accepted_at):
                family.add_metric([model, drafter, str(position)], count)
        return family

    def _drafters(self) -> Iterator[tuple[str, str, DrafterStats]]:
        for model, stats in self._engines.items():
            for drafter, counts in sorted(stats.drafters.items()):
                yield model, drafter, counts


def _counter(name: str, text: str, *more_labels: str) -> CounterMetricFamily:
    """Prometheus adds `_total` to the name."""
    return CounterMetricFamily(_PREFIX + name, text, labels=["model", "drafter", *more_labels])
