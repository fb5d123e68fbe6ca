"""The log line of a request: its draft tokens, and nothing of what was said."""

import json
from dataclasses import replace

import pytest

from engines.errors import EngineDeadError
from engines.types import Delta, DraftCounts, GenerateRequest, SamplingParams, TokenPrompt, Usage
from gateway.log import make_logger
from gateway.metrics import Metrics
from gateway.trace import CLIENT_LEFT, FinishedRequest, Trace
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


def _trace(finished: list[FinishedRequest]) -> Trace:
    trace = Trace(Metrics("ingress"), make_logger("error"), "id-1")
    trace.on_finish(finished.append)
    trace.serve("m", stream=False, user=None, metadata=None)
    trace.prompt_tokens(3)
    return trace


async def test_whoever_asked_is_told_once_what_became_of_a_request() -> None:
    finished: list[FinishedRequest] = []
    trace = _trace(finished)
    engine = ScriptedEngine(
        (Delta(0, "a", (1, 2)),), (replace(LAST, usage=Usage(3, 2, 1, 4, 5, {"model": DraftCounts(9, 4)})),)
    )
    request = GenerateRequest("r", TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=2))
    assert [item async for item in trace.observe(engine.generate(request))]
    trace.finish(200)
    trace.finish(CLIENT_LEFT)
    (told,) = finished
    assert (told.status, told.model, told.prompt_tokens, told.completion_tokens) == (200, "m", 3, 2)
    assert (told.cached_tokens, told.accepted_draft_tokens, told.rejected_draft_tokens) == (1, 4, 5)
    assert told.finish_reasons == ("stop",)
    assert told.ttft_s is not None
    assert told.ttft_s <= told.e2e_s
    body = trace.receipt.body()
    assert body["id"] == "id-1"
    drafters = {"model": {"drafted": 9, "accepted": 4}}
    assert body["speculation"] == {"accepted_draft_tokens": 4, "rejected_draft_tokens": 5, "drafters": drafters}


def test_a_request_that_got_no_answer_has_no_first_token() -> None:
    finished: list[FinishedRequest] = []
    _trace(finished).finish(CLIENT_LEFT, "gone")
    assert (finished[0].status, finished[0].error, finished[0].ttft_s) == (CLIENT_LEFT, "gone", None)
    assert finished[0].usages == ()
