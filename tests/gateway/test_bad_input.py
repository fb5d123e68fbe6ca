"""Every wrong request gets the status and body that OpenAI's clients expect, naming what is wrong."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from engines.errors import (
    EngineDeadError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    RemoteServerError,
    UnsupportedParameterError,
)
from engines.types import Delta
from gateway.http import make_app
from tests.gateway.fakes import ScriptedEngine, chat, client, completion, config, events, text

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def _refusal(http: httpx.AsyncClient, body: object, path: str = CHAT) -> tuple[int, dict[str, str | None]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error


def _predicted(content: object) -> dict[str, object]:
    return {"type": "content", "content": content}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "echo",}', b'{"model": "\xff\xfe"}', b'{"a": "\\ud800"}', b"[]", b"null", b"[" * 100_000],
    ids=["empty", "cut", "comma", "invalid UTF-8", "half a surrogate pair", "list", "null", "deep"],
)
async def test_what_is_not_a_json_object(body: bytes) -> None:
    async with client() as http:
        status, error = await _refusal(http, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 7}, "model"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 9}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "stream_options.x"),
        ({"user": "a", "safety_identifier": "b"}, "safety_identifier"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"priority": 1001}, "priority"),
        ({"priority": -1001}, "priority"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"min_tokens": 2**31}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"speculation": True}, "speculation"),
        ({"speculation": {"drafter": "magic"}}, "speculation.drafter"),
        ({"speculation": {"drafter": ["ngram"]}}, "speculation.drafter"),
        ({"speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens"),
        ({"speculation": {"max_draft_tokens": 2**31}}, "speculation.max_draft_tokens"),
        ({"speculation": {"max_draft_tokens": "4"}}, "speculation.max_draft_tokens"),
        ({"speculation": {"max_draft_tokens": True}}, "speculation.max_draft_tokens"),
        ({"speculation": {"provenance": 1}}, "speculation.provenance"),
        ({"speculation": {"draft": "ngram"}}, "speculation.draft"),
        ({"speculation": {"drafter": "prediction"}}, "speculation.drafter"),
        ({"speculation": {"drafter": "prediction"}, "prediction": _predicted("")}, "speculation.drafter"),
        ({"speculation": {"drafter": "prediction"}, "prediction": _predicted([])}, "speculation.drafter"),
        ({"prediction": "x"}, "prediction"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
        ({"prediction": {"content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "text", "content": "x"}}, "prediction.type"),
        ({"prediction": _predicted("x") | {"weight": 1}}, "prediction.weight"),
        ({"prediction": _predicted(None)}, "prediction.content"),
        ({"prediction": _predicted({"text": "x"})}, "prediction.content"),
        ({"prediction": _predicted(["x"])}, "prediction.content[0]"),
        ({"prediction": _predicted([{"type": "text"}])}, "prediction.content[0].text"),
        ({"prediction": _predicted([{"type": "text", "text": 5}])}, "prediction.content[0].text"),
        ({"prediction": _predicted([{"type": "image_url", "image_url": {}}])}, "prediction.content[0].type"),
    ],
    ids=str,
)
async def test_a_wrong_field_is_named(fields: dict[str, object], param: str) -> None:
    async with client() as http:
        status, error = await _refusal(http, chat(**fields))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"speculation": {"drafter": "magic"}}, "speculation.drafter"),
        ({"speculation": {"drafter": "prediction"}}, "speculation.drafter"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content"),
    ],
    ids=str,
)
async def test_a_wrong_field_of_a_completion_is_named(fields: dict[str, object], param: str) -> None:
    async with client() as http:
        status, error = await _refusal(http, completion(**fields), TEXT)
    assert (status, error["param"]) == (400, param)


async def test_images_are_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    async with client() as http:
        status, error = await _refusal(http, chat(messages=[{"role": "user", "content": [part]}]))
    assert (status, error["param"]) == (400, "messages[0].content[0].type")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_unknown_model_is_404(path: str) -> None:
    body = chat(model="gpt-9") if path == CHAT else completion(model="gpt-9")
    async with client() as http:
        status, error = await _refusal(http, body, path)
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "gpt-9" in str(error["message"])


@pytest.mark.parametrize(
    ("path", "body", "param", "numbers"),
    [
        (CHAT, chat(max_tokens=250), "messages", ("256", "270", "20", "250")),
        (CHAT, chat(max_tokens=10**9), "messages", ("256", str(10**9))),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}], max_tokens=None), "messages", ("256", "318")),
        (TEXT, completion(prompt="x" * 256), "prompt", ("256", "260")),
    ],
    ids=["room", "huge", "prompt alone", "completions"],
)
async def test_a_context_too_long_says_both_numbers(
    path: str, body: dict[str, object], param: str, numbers: tuple[str, ...]
) -> None:
    async with client() as http:
        status, error = await _refusal(http, body, path)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert all(number in str(error["message"]) for number in numbers)


async def test_a_template_that_rejects_the_roles_is_400() -> None:
    async with client() as http:
        fleet = http._transport.app.state.fleet
        fleet.get("echo").prompts._tokenizer._hf.chat_template = "{{ raise_exception('Roles must alternate.') }}"
        status, error = await _refusal(http, chat())
    assert (status, error["param"]) == (400, "messages")
    assert "Roles must alternate." in str(error["message"])


async def test_a_body_over_the_limit_is_413_announced_or_not() -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 100

    async with client(settings=config(http={"max_body_bytes": 1000})) as http:
        announced = await http.post(CHAT, content=b"x" * 1001)
        chunked = await http.post(CHAT, content=parts())
    assert (announced.status_code, chunked.status_code) == (413, 413)
    assert "1000 bytes" in announced.json()["error"]["message"]
    assert sent == 11


async def test_a_strange_content_length_is_400() -> None:
    async with client() as http:
        answer = await http.post(CHAT, content=b"{}", headers={"content-length": "-5"})
    assert answer.status_code == 400


@pytest.mark.parametrize(("method", "path", "status"), [("GET", CHAT, 405), ("POST", "/v1/nothing", 404)])
async def test_unknown_routes_answer_in_the_same_form(method: str, path: str, status: int) -> None:
    async with client() as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (InvalidRequestError("No.", "seed"), 400, "invalid_request_error", None),
        (UnsupportedParameterError("No drafter.", "speculation"), 400, "invalid_request_error", None),
        (EngineOverloadedError("Full.", retry_after_s=2.5), 429, "rate_limit_error", "3"),
        (EngineDeadError("Dead."), 503, "service_unavailable_error", "1"),
        (EngineTimeoutError("Slow."), 504, "timeout_error", None),
        (RemoteServerError("Broken.", 500), 502, "bad_gateway_error", None),
        (RemoteServerError("Wrong key.", 401), 502, "bad_gateway_error", None),
        (RemoteServerError("Slow down.", 429), 429, "rate_limit_error", "1"),
        (RemoteServerError("Bad.", 400), 400, "invalid_request_error", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_error_before_the_first_byte_has_its_status(
    error: Exception, status: int, kind: str, retry_after: str | None, stream: bool
) -> None:
    async with client(ScriptedEngine(error)) as http:
        answer = await http.post(CHAT, json=chat(stream=stream))
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["error"]["message"] == str(error)
    assert answer.json()["error"]["param"] == getattr(error, "param", None)
    assert answer.headers.get("retry-after") == retry_after


async def test_an_engine_error_after_the_first_byte_is_an_event_and_an_end() -> None:
    engine = ScriptedEngine((Delta(index=0, text="a"),), EngineDeadError("Dead."))
    async with client(engine) as http:
        answer = await http.post(CHAT, json=chat(stream=True))
    payloads = events(answer.text)
    assert answer.status_code == 200
    assert json.loads(payloads[1])["choices"][0]["delta"] == {"content": "a"}
    assert json.loads(payloads[-2])["error"]["code"] == "engine_unavailable"
    assert payloads[-1] == "[DONE]"
    assert engine.num_closed == 1


async def test_an_aborted_choice_is_an_error_not_an_answer() -> None:
    async with client(ScriptedEngine((Delta(index=0, text="a", finish_reason="abort"),))) as http:
        whole = await http.post(CHAT, json=chat())
        streamed = await http.post(CHAT, json=chat(stream=True))
    assert whole.status_code == 503
    assert "error" in json.loads(events(streamed.text)[-2])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_500_without_its_text(stream: bool, capsys: pytest.CaptureFixture[str]) -> None:
    async with client(ScriptedEngine(KeyError("the prompt"))) as http:
        answer = await http.post(CHAT, json=chat(stream=stream))
    assert answer.status_code == 500
    assert "the prompt" not in answer.text
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_beyond_its_time_is_stopped(stream: bool) -> None:
    engine = ScriptedEngine((Delta(index=0, text="a"),), None)
    async with client(engine, config(http={"request_timeout_s": 0.05})) as http:
        answer = await http.post(CHAT, json=chat(stream=stream))
    assert "0.05 seconds" in answer.text
    assert answer.status_code == (200 if stream else 504)
    assert engine.num_active == 0


async def test_requests_beyond_the_limit_are_429_and_slots_come_back() -> None:
    engine = ScriptedEngine(None)
    async with client(engine, config(http={"max_concurrent_requests": 1})) as http:
        first = asyncio.create_task(http.post(CHAT, json=chat(stream=True)))
        while not engine.num_active:  # noqa: ASYNC110
            await asyncio.sleep(0)
        refused = await http.post(CHAT, json=chat())
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        engine.script = tuple(text("a"))
        served = await http.post(CHAT, json=chat())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert served.status_code == 200


async def test_a_model_that_is_not_up_yet_is_503() -> None:
    late = ScriptedEngine()
    late.start_errors = [EngineDeadError("The peer is away.")] * 3
    app = make_app(config("echo", "late"), {"echo": ScriptedEngine(), "late": late})
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
            answer = await http.post(CHAT, json=chat(model="late"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "The peer is away." in answer.json()["error"]["message"]


@pytest.mark.parametrize("messages", [[], "hi", None, 5])
async def test_messages_of_refusals_speak_of_json_not_of_python(messages: object) -> None:
    async with client() as http:
        _, error = await _refusal(http, chat() | {"messages": messages})
    assert "tuple" not in (error["message"] or "").lower()


_LONG = 10**400


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, chat(model="m" * 3000), 404),
        (TEXT, completion(model="m" * 3000), 404),
        (CHAT, chat(**{"u" * 3000: 1}), 400),
        (CHAT, chat(metadata={"u" * 3000: 1}), 400),
        (CHAT, chat(logit_bias={"u" * 3000: 1}), 400),
        (CHAT, chat(logit_bias={"9" * 400: 1}), 400),
        (CHAT, chat(stop_token_ids=[_LONG]), 400),
        (CHAT, chat(max_tokens=_LONG), 400),
        (CHAT, chat(speculation={"max_draft_tokens": _LONG}), 400),
        (CHAT, chat(speculation={"u" * 3000: 1}), 400),
        (CHAT, chat(speculation={"drafter": "u" * 3000}), 400),
        (CHAT, chat(prediction="u" * 3000), 400),
        (CHAT, chat(min_tokens=_LONG), 400),
        (CHAT, chat(max_tokens=None, max_completion_tokens=_LONG), 400),
        (TEXT, completion(prompt=[_LONG]), 400),
        (TEXT, completion(prompt=[[_LONG]]), 400),
    ],
    ids=str,
)
async def test_long_values_are_not_repeated_in_full(path: str, body: dict[str, object], status: int) -> None:
    async with client() as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == status
    assert len(answer.text) < 450


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(messages=[1] * 100_000)),
        (CHAT, chat(messages=[{"role": "user", "content": [1] * 100_000}])),
        (CHAT, chat(prediction=_predicted([1] * 100_000))),
        (CHAT, chat(stop=[1] * 100_000)),
        (CHAT, chat(stop_token_ids=["1"] * 100_000)),
        (TEXT, completion(prompt=[None] * 100_000)),
        (TEXT, completion(prompt=[-1] * 100_000)),
    ],
    ids=["messages", "parts", "prediction", "stop", "stop ids", "prompts", "ids"],
)
async def test_a_hundred_thousand_mistakes_are_refused_as_fast_as_one(path: str, body: dict[str, object]) -> None:
    async with client() as http:
        began_s = time.perf_counter()
        answer = await http.post(path, json=body)
    # Explaining all of them took a minute and more, in which nobody else was served.
    assert time.perf_counter() - began_s < 2
    assert answer.status_code == 400
    assert "[0]" in answer.json()["error"]["param"]


async def test_a_token_id_out_of_range_is_not_taken_for_text() -> None:
    async with client() as http:
        _, error = await _refusal(http, completion(prompt=[1, 2**31]), TEXT)
    assert error["param"] == "prompt[1]"
    assert "less than" in (error["message"] or "")


async def test_refused_prompts_are_not_counted() -> None:
    async with client() as http:
        await http.post(CHAT, json=chat(max_tokens=250))
        refused = (await http.get("/metrics")).text
        served = (await http.post(CHAT, json=chat())).json()["usage"]["prompt_tokens"]
        after = (await http.get("/metrics")).text
    assert _prompt_tokens(refused) == 0
    assert _prompt_tokens(after) == served > 0


def _prompt_tokens(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("outrider_prompt_tokens_total{")]
    return sum(float(line.split()[-1]) for line in lines)
