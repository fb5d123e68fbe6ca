"""The log line of a request: its draft tokens, and nothing of what was said."""

import json
from dataclasses import replace

import pytest

from engines.errors import EngineDeadError
from engines.types import Delta, Usage
from tests.gateway.fakes import LAST, ScriptedEngine, chat, client, config

PREDICTION = {"type": "content", "content": "a secret guess"}


async def _line(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], **fields: object) -> dict[str, object]:
    async with client(engine, config(log_level="info")) as http:
        await http.post("/v1/chat/completions", json=chat(prediction=PREDICTION, **fields))
    (line,) = capsys.readouterr().err.splitlines()
    assert "secret" not in line
    told: dict[str, object] = json.loads(line)
    return told


@pytest.mark.parametrize("stream", [False, True])
async def test_draft_tokens_are_logged_over_all_choices(stream: bool, capsys: pytest.CaptureFixture[str]) -> None:
    last = [replace(LAST, index=index, usage=Usage(3, 9, 0, 6 - index, index)) for index in (0, 1)]
    line = await _line(ScriptedEngine(tuple(last)), capsys, stream=stream, n=2)
    assert line["event"] == "request"
    assert (line["accepted_draft_tokens"], line["rejected_draft_tokens"]) == (11, 1)
    assert line["finish_reasons"] == ["stop", "stop"]


async def test_an_answer_cut_short_logs_the_draft_tokens_that_were_told(capsys: pytest.CaptureFixture[str]) -> None:
    whole = replace(LAST, usage=Usage(3, 9, 0, 6, 2))
    engine = ScriptedEngine((whole, Delta(1, "a", (1,))), EngineDeadError("Dead."))
    line = await _line(engine, capsys, n=2)
    assert (line["status"], line["error"]) == (503, "Dead.")
    assert (line["accepted_draft_tokens"], line["rejected_draft_tokens"]) == (6, 2)


async def test_a_request_that_was_refused_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    line = await _line(ScriptedEngine(), capsys, n=99)
    assert (line["status"], line["accepted_draft_tokens"], line["rejected_draft_tokens"]) == (400, 0, 0)
