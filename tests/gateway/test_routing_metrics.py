"""What Prometheus reads of placements; series end with their replica."""

from gateway.routing.placement_counts import PlacementCounts
from gateway.routing.retry_budget import RetryBudget
from gateway.routing_metrics import RoutingCollector
from tests.gateway.fakes import ScriptedEngine


class Counting(ScriptedEngine):
    def __init__(self, counts: PlacementCounts | None) -> None:
        super().__init__()
        self.budget = RetryBudget(0.2, 1)
        self._counts = counts

    def counted(self) -> PlacementCounts | None:
        return self._counts


def _samples(**engines: ScriptedEngine) -> dict[str, float]:
    return {
        sample.name
        + "".join(f",{sample.labels[key]}" for key in sorted(sample.labels) if key != "ingress"): sample.value
        for metric in RoutingCollector("i", engines).collect()
        for sample in metric.samples
    }


def test_counters_by_model_reason_and_replica() -> None:
    counts = PlacementCounts(by_reason={"warm": 2}, local=1, failed_reports=2, moved=3, silent={"r2": 7})
    counts.decided(0.0004, None)
    counts.decided(0.003, None)
    counts.found("r1", 64, 48)
    counts.found("r1", 0, 16)
    found = _samples(m=Counting(counts))
    assert found["outrider_replica_decisions_total,m,blind"] == 2
    assert found["outrider_replica_decision_seconds_bucket,0.0005,m"] == 1
    assert found["outrider_replica_decision_seconds_bucket,+Inf,m"] == 2
    assert found["outrider_replica_fallback_share,m"] == 0.25
    assert found["outrider_replica_state_failures_total,m"] == 2
    assert found["outrider_replica_moved_total,m"] == 3
    assert found["outrider_replica_silent_decisions_total,m,r2"] == 7
    assert found["outrider_replica_cached_tokens_expected_total,m,r1"] == 64
    assert found["outrider_replica_cached_tokens_found_total,m,r1"] == 64
    assert found["outrider_replica_cached_tokens_error_total,m,r1"] == 32


def test_a_replica_that_is_gone_has_no_series() -> None:
    counts = PlacementCounts(silent={"r1": 1})
    counts.found("r1", 1, 1)
    counts.found("r2", 1, 1)
    counts.keep_only(["r2"])
    assert {name for name in _samples(m=Counting(counts)) if ",r1" in name} == set()


def test_retries_are_told_of_every_model_and_placements_of_those_that_place() -> None:
    engine = Counting(None)
    assert engine.budget.spend()
    assert not engine.budget.spend()
    found = _samples(m=engine, plain=ScriptedEngine())
    assert found == {
        "outrider_replica_retries_total,m,retried": 1,
        "outrider_replica_retries_total,m,refused": 1,
    }
