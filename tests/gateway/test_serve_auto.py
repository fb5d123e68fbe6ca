"""`auto` in real processes: the choice of a model and of a replica in one receipt, and a router swapped meanwhile."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.gateway.auto_world import EASY, HARD, STRONG, WEAK, auto_fields, damaged, question, version_of
from tests.gateway.serve_process import ROOT, ServeProcess

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]
LITTLE = {"num_cpus": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.fixture(scope="module")
def gateway(folder: Path, router: Path) -> Iterator[ServeProcess]:
    models = [
        {"name": name, "engine": {"kind": "echo", "max_model_len": 256}, "actor": LITTLE, "num_replicas": count}
        for name, count in ((WEAK, 1), (STRONG, 2))
    ]
    args = {
        "models": models,
        "ingress": {"actor": LITTLE},
        "auto": auto_fields(router, artifact_folder=str(folder / "artifacts"), watch_period_s=0.2),
        "request_log": {"folder": str(folder / "log"), "prompt": "full"},
        "routing": {"policy": "two_choices"},
    }
    process = ServeProcess(folder, args)
    yield process
    try:
        assert process.stop() == 0
    finally:
        process.kill_all()


def _outrider(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def _ask(gateway: ServeProcess, words: str, **fields: object) -> httpx.Response:
    body = {"model": "auto", "messages": [{"role": "user", "content": words}]} | fields
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_official_client_lists_and_asks_it(gateway: ServeProcess) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    assert "auto" in [model.id for model in client.models.list()]
    for quality, model in ((0.0, WEAK), (1.0, STRONG)):
        answer = client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "hello"}], extra_body={"quality": quality}
        )
        assert answer.model == model


def test_a_receipt_shows_both_choices(gateway: ServeProcess) -> None:
    body = _ask(gateway, question(HARD), quality=1.0, receipt=True).json()
    model = body["receipt"]["model"]
    assert (model["asked"], model["chosen"], body["model"]) == ("auto", STRONG, STRONG)
    assert [candidate["model"] for candidate in model["candidates"]] == [WEAK, STRONG]
    assert "replica" in body["receipt"]
    dry = httpx.post(
        f"{gateway.url}/v1/route",
        json={"model": "auto", "quality": 0.0, "messages": [{"role": "user", "content": question(EASY)}]},
    ).json()
    assert (dry["model"]["chosen"], "replica" in dry) == (WEAK, True)


def test_a_router_is_swapped_and_rolled_back_while_it_serves(
    gateway: ServeProcess, folder: Path, router: Path, other_router: Path
) -> None:
    where = ("--folder", folder / "artifacts", "--url", gateway.url, "--json")
    for expected, command in (
        (version_of(other_router), ("promote", other_router)),
        (version_of(router), ("promote", router)),
        (version_of(other_router), ("rollback",)),
    ):
        result = _outrider(*command, *where)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["version"] == expected
        receipt = _ask(gateway, question(HARD), receipt=True).json()["receipt"]
        assert receipt["model"]["artifact"] == expected
    bad = _outrider("promote", damaged(router, folder / "damaged"), *where)
    assert (bad.returncode, "checksum" in bad.stderr) == (1, True)
    status = httpx.get(f"{gateway.url}/v1/router").json()["auto"]
    assert (status["artifact"], status["error"]) == (version_of(other_router), None)


def test_feedback_can_be_trained_on_and_replayed(gateway: ServeProcess, folder: Path) -> None:
    for number in range(8):
        answer = _ask(gateway, question(HARD if number % 2 else EASY, number))
        told = {"request_id": answer.headers["x-request-id"], "score": 1.0}
        assert httpx.post(f"{gateway.url}/v1/feedback", json=told).status_code == 200
    (folder / "policy.yaml").write_text("goal: {kind: price, regret_usd: 1}\n")
    result = _outrider("replay", folder / "log", "--policy", folder / "policy.yaml", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["num_outcomes"] == 8
    assert document["logged_quality"]["value"] == 1.0
