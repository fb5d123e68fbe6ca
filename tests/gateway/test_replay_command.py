"""`outrider replay`, on the log that a gateway has written."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.tenant_digest import KEY_FILE
from router_models import artifact
from router_models.logs import read_log
from router_models.rescore import Rescorer
from tests.gateway.auto_world import EASY, HARD, STRONG, WEAK, auto_fields, question, settings
from tests.gateway.fakes import chat, client, echo_engine

_POLICY = "goal: {kind: price, regret_usd: 10}\nexploration: 0.02\n"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def _policy(folder: Path, text: str = _POLICY) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


async def _logged(router: Path, folder: Path, prompt: str = "off") -> Path:
    """Some requests with feedback, a quarter of them a bank's."""
    auto, log = auto_fields(router, {"exploration": 0.3}), {"folder": str(folder), "prompt": prompt}
    more = {name: echo_engine(max_model_len=256) for name in (WEAK, STRONG)}
    async with client(settings=settings(auto, request_log=log), more=more) as http:
        for i in range(40):
            words = question(HARD if i % 2 else EASY, i)
            body = chat(model="auto", messages=[{"role": "user", "content": words}], max_tokens=None)
            tenant = {"cache_salt": "bank"} if i % 4 == 0 else {}
            answer = await http.post("/v1/chat/completions", json=body | tenant)
            told = {"request_id": answer.headers["x-request-id"], "correct": answer.json()["model"] == STRONG} | tenant
            assert (await http.post("/v1/feedback", json=told)).status_code == 200
    return folder


@pytest.fixture
async def logs(router: Path, tmp_path: Path) -> Path:
    return await _logged(router, tmp_path / "log")


async def test_one_document_with_decisions_cost_and_estimates(logs: Path, tmp_path: Path) -> None:
    result = _run(logs, "--policy", _policy(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["num_rows"], document["num_outcomes"]) == (40, 40)
    assert sum(change["rows"] for change in document["changes"]) == 40
    assert document["replayed"]["strong_share"] > document["logged"]["strong_share"]
    assert document["replayed"]["cost_usd"] > document["logged"]["cost_usd"]
    for name in ("ips", "doubly_robust"):
        assert document["replayed"][name]["value"] > document["logged_quality"]["value"]


async def test_a_table_for_people(logs: Path, tmp_path: Path) -> None:
    output = _run(logs, "--policy", _policy(tmp_path)).stdout
    assert "doubly robust" in output
    assert "weak -> strong:" in output


async def test_a_tenants_floor_is_found_in_the_log_by_its_digest(logs: Path, tmp_path: Path) -> None:
    text = "goal: {kind: price, regret_usd: 1e-9}\nexploration: 0.0\nfloors: {bank: strong}\n"
    document = json.loads(_run(logs, "--policy", _policy(tmp_path, text), "--json").stdout)
    assert document["replayed"]["strong_share"] >= 0.25
    (logs / KEY_FILE).unlink()
    result = _run(logs, "--policy", _policy(tmp_path, text))
    assert (result.exit_code, KEY_FILE in result.stderr) == (1, True)


_ABILITY = ("--ability", "strong=acme/Strong-1_5")


async def test_the_router_that_served_scores_as_it_did(router: Path, tmp_path: Path) -> None:
    log = read_log(await _logged(router, tmp_path / "log", "full"))
    rescorer = Rescorer(artifact.load(router), {STRONG: "acme/Strong-1_5"})
    for record in sorted(log.requests.values(), key=lambda record: record.time):
        logged, found = record.decision, rescorer.decision(record)
        assert logged is not None
        assert found is not None
        assert found.artifact == logged.artifact
        assert (found.choice, found.propensity, found.abstains) == (logged.choice, logged.propensity, logged.abstains)
        assert found.score == pytest.approx(logged.score, abs=1e-3)  # logged features are rounded
        assert found.novelty == pytest.approx(logged.novelty, abs=1e-3)
        for mine, other in zip(found.candidates, logged.candidates, strict=True):
            assert mine.prob_right == pytest.approx(other.prob_right, abs=1e-3)
    assert not rescorer.is_stand_in


async def test_another_router_decides_from_logged_features(logs: Path, router: Path, tmp_path: Path) -> None:
    """Where the log has no texts, as here."""
    policy = _policy(tmp_path)
    result = _run(logs, "--policy", policy, "--router", router, *_ABILITY, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(result.stdout)
    assert (found["num_rows"], found["num_left_out"]) == (40, 0)
    assert found["router"] == {"artifact": str(router), "num_seen": 0}
    assert found["logged"] == json.loads(_run(logs, "--policy", policy, "--json").stdout)["logged"]
    assert found["replayed"]["doubly_robust"] is not None


async def test_models_that_the_router_does_not_know_are_said(logs: Path, router: Path, tmp_path: Path) -> None:
    result = _run(logs, "--policy", _policy(tmp_path), "--router", router)
    assert result.exit_code == 0, result.output
    assert "typical ones stand in" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--router", "absent"), "absent"),
        (("--router", "default", "--ability", "strong"), "MODEL=NAME"),
        (("--ability", "strong=x"), "without --router"),
    ],
)
def test_a_router_that_cannot_score_is_one_line_and_status_1(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    result = _run(tmp_path, "--policy", _policy(tmp_path), *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert words in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("goal: {kind: share}", "goal.share.strong_share: Field required"),
        ("goals: 3", "goals: Extra inputs"),
        ("- [", "not YAML"),
    ],
)
def test_a_policy_with_mistakes_is_one_line_and_status_1(text: str, words: str, tmp_path: Path) -> None:
    result = _run(tmp_path, "--policy", _policy(tmp_path, text))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert words in result.stderr


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "No such file" in _run(tmp_path, "--policy", tmp_path / "absent.yaml").stderr
    assert "neither prompts.parquet" in _run(tmp_path, "--policy", _policy(tmp_path)).stderr
