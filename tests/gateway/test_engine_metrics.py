"""Engine snapshots as Prometheus reads them, parsed back by its own client."""

from dataclasses import fields

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engines.types import DrafterStats, EngineStats
from gateway.engine_metrics import EngineCollector
from gateway.metrics import Metrics
from tests.gateway.fakes import ScriptedEngine, client

DRAFTERS = {"ngram": DrafterStats(4, 12, 7, (4, 2, 1)), "model": DrafterStats(1, 2, 0, (0, 0))}
STATS = EngineStats(num_running=2, speculation_time_s=2.0, speculation_plain_time_s=3.0, drafters=DRAFTERS)


def _samples(**engines: EngineStats) -> dict[tuple[str, ...], float]:
    """Value by name, model, drafter, position; a name twice on the page would be an error to Prometheus."""
    families = list(text_string_to_metric_families(generate_latest(EngineCollector(engines)).decode()))
    assert len({family.name for family in families}) == len(families)
    order = ("model", "drafter", "position")
    return {
        (sample.name, *(sample.labels[label] for label in order if label in sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_plain_field_is_a_gauge() -> None:
    samples = _samples(m=STATS)
    for field in fields(EngineStats):
        if field.name != "drafters":
            assert samples[f"outrider_engine_{field.name}", "m"] == getattr(STATS, field.name)


def test_drafters_are_counters_by_model_drafter_and_position() -> None:
    samples = _samples(m=STATS, other=EngineStats(drafters={"ngram": DrafterStats(1, 1, 1, (1,))}))
    name = "outrider_engine_accepted_draft_tokens_at_position_total"
    assert samples["outrider_engine_drafts_total", "m", "ngram"] == 4
    assert samples["outrider_engine_drafted_tokens_total", "m", "ngram"] == 12
    assert samples["outrider_engine_accepted_draft_tokens_total", "m", "ngram"] == 7
    assert samples["outrider_engine_accepted_draft_tokens_total", "m", "model"] == 0
    assert samples["outrider_engine_accepted_draft_tokens_total", "other", "ngram"] == 1
    assert [samples[name, "m", "ngram", str(position)] for position in range(3)] == [4, 2, 1]
    assert (name, "m", "ngram", "3") not in samples


def test_counters_are_declared_as_such_and_say_where_they_count_from() -> None:
    page = generate_latest(EngineCollector({"m": STATS})).decode()
    for name in ("drafts", "drafted_tokens", "accepted_draft_tokens", "accepted_draft_tokens_at_position"):
        assert f"# TYPE outrider_engine_{name}_total counter" in page
    assert "first token has position 0" in page
    assert "# TYPE outrider_engine_num_running gauge" in page


def test_the_gain_is_plain_time_over_time_and_absent_before_there_is_any() -> None:
    samples = _samples(m=STATS, idle=EngineStats())
    assert samples["outrider_engine_speculation_gain", "m"] == 1.5
    assert ("outrider_engine_speculation_gain", "idle") not in samples


def test_engines_without_drafters_have_no_series_of_them() -> None:
    assert not [key for key in _samples(m=EngineStats()) if "draft" in key[0] and key[0].endswith("_total")]


def test_no_engine_is_a_valid_page() -> None:
    assert _samples() == {}


async def test_the_page_has_the_engines_numbers_beside_our_own() -> None:
    class Drafting(ScriptedEngine):
        async def stats(self) -> EngineStats:
            return STATS

    async with client(Drafting()) as http:
        page = (await http.get("/metrics")).text
    families = [family.name for family in text_string_to_metric_families(page)]
    assert len(set(families)) == len(families)
    assert 'outrider_engine_drafts_total{drafter="ngram",model="echo"} 4.0' in page
    assert "outrider_requests_in_flight" in page


def test_a_process_without_requests_has_a_page() -> None:
    assert b"outrider_requests" in Metrics("one").exposition({})
