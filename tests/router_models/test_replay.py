"""Recorded choices made again: against the truth of a simulated world."""

from pathlib import Path

import numpy as np
import pytest

from router_models import artifact
from router_models.errors import DataError
from router_models.logs import Log, read_log
from router_models.policy import Candidate, Situation, decide
from router_models.policy_config import PolicyConfig
from router_models.records import (
    LoggedCandidate,
    LoggedDecision,
    LoggedPrompt,
    LoggedTurn,
    LoggedUse,
    OutcomeRecord,
    RequestRecord,
)
from router_models.replay import replay
from router_models.rescore import Rescorer

_COSTS = {"weak": 0.001, "strong": 0.01}


def _policy(regret_usd: float, exploration: float = 0.2, **fields: object) -> PolicyConfig:
    goal = {"kind": "price", "regret_usd": regret_usd}
    return PolicyConfig.model_validate({"goal": goal, "exploration": exploration} | fields)


def _log(policy: PolicyConfig, num_rows: int = 400, seed: int = 0, has_outcomes: bool = True) -> Log:
    """Requests whose need is known to the router; the strong model is right in 90 %, the weak one by the need less."""
    rng = np.random.default_rng(seed)
    requests, results = {}, {}
    for number in range(num_rows):
        need = float(rng.random() * 0.8)
        truth = {"weak": 0.9 - need, "strong": 0.9}
        candidates = [Candidate(model, _COSTS[model], truth[model]) for model in _COSTS]
        found = decide(policy, candidates, Situation(10, need=need), float(rng.random()))
        request_id = str(number)
        requests[request_id] = RequestRecord(
            request_id=request_id,
            time=number,
            decision=LoggedDecision(
                policy="logging",
                artifact="a",
                feature_version=1,
                candidates=tuple(LoggedCandidate(model=m, prob_right=truth[m], cost_usd=_COSTS[m]) for m in _COSTS),
                choice=found.model,
                propensity=found.propensity,
                mechanism=found.mechanism,
                preferred=found.preferred,
                score=need,
                novelty=0.2,
            ),
            use=LoggedUse(model=found.model, input_tokens=10, output_tokens=10),
        )
        if has_outcomes:
            results[request_id] = {found.model: float(rng.random() < truth[found.model])}
    return Log(requests, results)


def test_the_same_policy_changes_nothing() -> None:
    policy = _policy(0.02)
    found = replay(_log(policy), policy)
    assert (found.num_rows, found.num_outcomes, found.num_left_out) == (400, 400, 0)
    assert set(found.changes) == {("weak", "weak"), ("strong", "strong")}
    assert found.replayed.cost_usd == pytest.approx(found.logged.cost_usd, rel=0.1)
    assert found.logged_quality is not None
    assert found.replayed.ips is not None
    assert found.replayed.ips.value == pytest.approx(found.logged_quality.value, abs=0.1)


def test_another_policys_quality_and_cost_are_estimated() -> None:
    covered = {"ips": 0, "doubly_robust": 0}
    target = _policy(10.0, exploration=0.0)
    for seed in range(30):
        found = replay(_log(_policy(0.02), 300, seed), target)
        for name in covered:
            estimate = getattr(found.replayed, name)
            covered[name] += estimate.low <= 0.9 <= estimate.high
    assert found.replayed.strong_share == pytest.approx(1.0, abs=0.03)
    assert found.replayed.cost_usd > found.logged.cost_usd
    assert found.changes["weak", "strong"] > 50
    assert covered["ips"] >= 23
    assert covered["doubly_robust"] >= 23


def test_a_promised_share_is_held_on_the_recorded_traffic() -> None:
    policy = PolicyConfig.model_validate({"goal": {"kind": "share", "strong_share": 0.25}, "exploration": 0.0})
    assert replay(_log(_policy(0.02)), policy).replayed.strong_share == pytest.approx(0.25, abs=0.03)


def test_floors_hold_in_a_replay_too() -> None:
    policy = _policy(1e-9, exploration=0.0, floor="strong")
    assert replay(_log(_policy(0.02)), policy).replayed.strong_share == 1.0


def test_a_log_without_exploration_says_nothing_about_what_it_never_did() -> None:
    log = _log(_policy(1e9, exploration=0.0))
    found = replay(log, _policy(1e-9, exploration=0.0))
    assert (found.replayed.ips, found.replayed.doubly_robust) == (None, None)
    assert found.refusal is not None
    assert "never takes" in found.refusal
    assert found.replayed.strong_share == 0.0


def test_what_the_log_could_not_have_done_is_not_estimated() -> None:
    """Both models answered, but no request could have gone to the other one."""
    found = replay(_log(_policy(0.02, exploration=0.0)), _policy(10.0, exploration=0.0))
    assert (found.replayed.ips, found.replayed.doubly_robust) == (None, None)
    assert found.refusal is not None
    assert "had no chance to act otherwise" in found.refusal
    assert found.logged_quality is not None


def test_one_outcome_is_no_estimate() -> None:
    found = replay(_log(_policy(0.02), 1), _policy(0.02))
    assert (found.logged_quality, found.refusal) == (None, "one request of the log has an outcome")


def test_without_outcomes_decisions_and_costs_remain() -> None:
    found = replay(_log(_policy(0.02), has_outcomes=False), _policy(10.0))
    assert (found.num_outcomes, found.logged_quality) == (0, None)
    assert found.refusal == "no request of the log has an outcome"
    assert found.replayed.cost_usd > found.logged.cost_usd


def test_what_was_down_stays_down_and_is_left_out_where_nothing_else_is_allowed() -> None:
    log = _log(_policy(0.02), 20)
    record = log.requests["0"]
    assert record.decision is not None
    down = tuple(
        c.model_copy(update={"refused": "down"}) if c.model == "strong" else c for c in record.decision.candidates
    )
    decision = record.decision.model_copy(update={"candidates": down, "choice": "weak"})
    requests = log.requests | {"0": record.model_copy(update={"decision": decision})}
    found = replay(Log(requests, log.results), _policy(10.0, exploration=0.0, floor="strong"))
    assert (found.num_rows, found.num_left_out) == (19, 1)


def test_outcomes_of_tenants_who_chose_the_same_ids_count(tmp_path: Path) -> None:
    log = _log(_policy(0.02), 40)
    lines = []
    for number, (request_id, record) in enumerate(log.requests.items()):
        shared, tenant = str(number // 2), "ab"[number % 2]
        lines.append(record.model_copy(update={"request_id": shared, "tenant": tenant}).model_dump_json())
        (score,) = log.results[request_id].values()
        outcome = OutcomeRecord(request_id=shared, time=number, label="feedback", score=score, tenant=tenant)
        lines.append(outcome.model_dump_json())
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    found = replay(read_log(tmp_path), _policy(0.02))
    assert (found.num_rows, found.num_outcomes) == (40, 40)
    assert found.logged_quality == replay(log, _policy(0.02)).logged_quality


def test_what_cannot_be_replayed_is_an_error() -> None:
    with pytest.raises(DataError, match="no automatic choice"):
        replay(Log({"1": RequestRecord(request_id="1", time=0)}, {}), _policy(1.0))
    bound = PolicyConfig.model_validate({"goal": {"kind": "bound", "max_quality_loss": 0.1}})
    with pytest.raises(DataError, match="both models' results"):
        replay(_log(_policy(1.0), 5), bound)


def test_what_another_router_cannot_read_is_left_out() -> None:
    """The log has kept neither texts nor features."""
    log, rescorer = _log(_policy(0.02), 10), Rescorer(artifact.load(artifact.resolve("default")), {})
    with pytest.raises(DataError, match="no automatic choice"):
        replay(log, _policy(0.02), rescorer=rescorer)
    readable = log.requests["3"].model_copy(
        update={"prompt": LoggedPrompt(kind="full", turns=(LoggedTurn(role="user", text="Why?"),))}
    )
    found = replay(Log(log.requests | {"3": readable}, log.results), _policy(0.02), rescorer=rescorer)
    assert (found.num_rows, found.num_left_out) == (1, 9)


def test_the_document_is_plain_data() -> None:
    document = replay(_log(_policy(0.02), 50), _policy(10.0)).document()
    assert {"from", "to", "rows"} == set(document["changes"][0])  # type: ignore[index]
    assert document["replayed"]["ips"]["low"] <= document["replayed"]["ips"]["high"]  # type: ignore[index]
