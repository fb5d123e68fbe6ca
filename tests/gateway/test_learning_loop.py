"""The loop that the router is for: serve, log, hear how it was, train, promote, serve better."""

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from engines.protocol import Engine
from gateway.cli import app
from tests.gateway.auto_world import EASY, HARD, STRONG, WEAK, candidate, question, settings
from tests.gateway.fakes import chat, client, echo_engine


def _auto(artifacts: Path, **policy: object) -> dict[str, object]:
    """The candidates under their own names, which no shipped router knows."""
    return {
        "candidates": [candidate(WEAK, 1.0), candidate(STRONG, 10.0)],
        "policy": {"goal": {"kind": "share", "strong_share": 0.5}} | policy,
        "artifact_folder": str(artifacts),
        "watch_period_s": 0.01,
        "decision_timeout_s": 30.0,
    }


async def _ask(http: httpx.AsyncClient, words: list[str], number: int, num_hard_words: int) -> tuple[str, str]:
    """The model that answered, and the request's id."""
    asked = question(words, number, num_hard_words if words is HARD else 8)
    body = chat(model="auto", messages=[{"role": "user", "content": asked}], max_tokens=None)
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["model"], answer.headers["x-request-id"]


async def _strong_shares(http: httpx.AsyncClient, start: int, num_hard_words: int) -> tuple[float, float]:
    """Of hard and of easy questions that nobody has asked before, in turns."""
    found: dict[int, list[bool]] = {0: [], 1: []}
    for number in range(start, start + 40):
        model, _ = await _ask(http, (HARD, EASY)[number % 2], number, num_hard_words)
        found[number % 2].append(model == STRONG)
    return float(np.mean(found[0])), float(np.mean(found[1]))


def _engines() -> dict[str, Engine]:
    return {name: echo_engine(max_model_len=256) for name in (WEAK, STRONG)}


async def _status(http: httpx.AsyncClient) -> dict[str, object]:
    status: dict[str, object] = (await http.get("/v1/router")).json()["auto"]
    return status


# Without its text, a prompt is known by its length and the like.
@pytest.mark.parametrize(("prompt", "num_hard_words"), [("full", 8), ("off", 24), ("redacted", 8)])
async def test_a_gateway_learns_from_its_own_log(prompt: str, num_hard_words: int, tmp_path: Path) -> None:
    artifacts, log = tmp_path / "artifacts", tmp_path / "log"
    run = CliRunner().invoke
    own = settings(_auto(artifacts, exploration=0.5), request_log={"folder": str(log), "prompt": prompt})
    async with client(settings=own, more=_engines()) as http:
        assert (await _status(http))["abilities"] == []
        for number in range(120):
            words = (HARD, EASY)[number % 2]
            model, request_id = await _ask(http, words, number, num_hard_words)
            is_right = words is EASY or model == STRONG
            told = await http.post("/v1/feedback", json={"request_id": request_id, "correct": is_right})
            assert told.status_code == 200
        trained = await asyncio.to_thread(
            run, app, ["train", str(log), "--out", str(tmp_path / "new"), "--base", "none"]
        )
        assert trained.exit_code == 0, trained.output
        assert "nothing could be compared" in " ".join(trained.output.split())
        (tmp_path / "policy.yaml").write_text("goal: {kind: share, strong_share: 0.5}\nexploration: 0.0\n")
        replay = ["replay", str(log), "--policy", str(tmp_path / "policy.yaml"), "--router", str(tmp_path / "new")]
        replayed = await asyncio.to_thread(run, app, [*replay, "--json"])
        assert replayed.exit_code == 0, replayed.output
        found = json.loads(replayed.stdout)
        assert found["router"]["num_seen"] == found["num_rows"] == 120
        assert "120 of the requests taught this router" in replayed.stderr
        assert found["replayed"]["doubly_robust"]["value"] > found["logged_quality"]["value"] + 0.05
        promoted = await asyncio.to_thread(run, app, ["promote", str(tmp_path / "new"), "--folder", str(artifacts)])
        assert promoted.exit_code == 0, promoted.output
        status = await _status(http)
        for _ in range(1000):
            if status["abilities"]:
                break
            await asyncio.sleep(0.01)
            status = await _status(http)
        assert status["abilities"] == [STRONG, WEAK]
    async with client(settings=settings(_auto(artifacts, exploration=0.0)), more=_engines()) as http:
        assert (await _status(http))["artifact"] == status["artifact"]
        hard, easy = await _strong_shares(http, 1000, num_hard_words)
    assert hard > easy + 0.5
