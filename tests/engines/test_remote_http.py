"""RemoteEngine against scripted answers: framing, failures, secrets, start and health."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from engines.config import RemoteEngineConfig
from engines.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    ModelLoadError,
    RemoteServerError,
)
from engines.remote import RemoteEngine
from engines.types import Delta, GenerateRequest, SamplingParams, TextPrompt, Usage
from tests.engines.engine_contract import collect

Answer = Callable[[httpx.Request], httpx.Response]
MODELS = httpx.Response(200, json={"data": [{"id": "m", "owned_by": "us"}, {"id": "other"}]})
KEY = "sk-very-secret"
REQUEST = GenerateRequest("r", TextPrompt("hi"), SamplingParams(max_tokens=5))
A = 'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
END = 'data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n'
DONE = "data: [DONE]\n\n"


def engine(answer: Answer | httpx.Response, models: httpx.Response = MODELS, **config: Any) -> RemoteEngine:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(models.status_code, content=models.content)
        return answer(request) if callable(answer) else answer

    settings = RemoteEngineConfig(**{"base_url": "http://peer/v1", "model": "m"} | config)
    return RemoteEngine(settings, httpx.MockTransport(handle))


def events(*parts: str, error: Exception | None = None) -> httpx.Response:
    """A stream in these pieces; then `error`."""

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part.encode()
        if error is not None:
            raise error

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())


async def complete(answer: Answer | httpx.Response, **config: Any) -> list[Delta]:
    """The deltas of the one choice."""
    remote = engine(answer, **config)
    await remote.start()
    try:
        return (await collect(remote, REQUEST)).choices[0].deltas
    finally:
        assert (await remote.stats()).num_running == 0
        await remote.close()


async def failure(answer: Answer | httpx.Response, **config: Any) -> EngineError:
    with pytest.raises(EngineError) as failed:
        await complete(answer, **config)
    return failed.value


def text_and_usage(deltas: list[Delta]) -> tuple[str, Usage | None]:
    return "".join(delta.text for delta in deltas), deltas[-1].usage


@pytest.mark.parametrize(
    "parts",
    [
        (A, A, END, USAGE, DONE),
        (A + A + END + USAGE + DONE,),
        tuple(A + A + END + USAGE + DONE),
        (": ping\n\n", A, "\n", "event: ping\ndata:\n\n", A, END, ": ping\n\n", USAGE, DONE),
        ((A + A + END + USAGE + DONE).replace("\n", "\r\n"),),
        (A.replace('"choices":', '"choices":\ndata: '), A, END, USAGE, DONE),
        (A, A, END, USAGE),
        (A, A, END.replace("}]}", '}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}'), DONE),
        (A, A, END, USAGE, DONE, "data: what comes after the end is nobody's\n\n"),
    ],
)
async def test_however_it_is_framed_the_stream_reads_the_same(parts: tuple[str, ...]) -> None:
    assert text_and_usage(await complete(events(*parts))) == ("aa", Usage(1, 2))


async def test_a_multibyte_character_may_be_cut_between_packets() -> None:
    async def body() -> AsyncIterator[bytes]:
        for byte in (A.replace('"a"', '"🙂"') + END + USAGE + DONE).encode():
            yield bytes((byte,))

    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())
    assert text_and_usage(await complete(response))[0] == "🙂"


@pytest.mark.parametrize("parts", [(A,), (A, DONE), (A, END[:20]), (), (A, USAGE, DONE)])
async def test_a_stream_that_ends_too_early_is_an_error(parts: tuple[str, ...]) -> None:
    assert type(await failure(events(*parts))) is EngineDeadError


async def test_text_before_a_failure_is_delivered() -> None:
    remote = engine(events(A, error=httpx.ReadError("reset")))
    await remote.start()
    stream = remote.generate(REQUEST)
    assert await anext(stream) == (Delta(0, "a"),)
    with pytest.raises(EngineDeadError, match="reset") as failed:
        await anext(stream)
    assert isinstance(failed.value.__cause__, EngineDeadError)
    assert isinstance(failed.value.__cause__.__cause__, httpx.ReadError)
    assert (await remote.stats()).num_aborted == 1


async def test_silence_inside_a_stream_is_a_timeout() -> None:
    assert type(await failure(events(A, error=httpx.ReadTimeout("silent")))) is EngineTimeoutError


async def test_an_error_event_ends_the_stream() -> None:
    event = 'data: {"error": {"message": "out of memory", "type": "server_error"}}\n\n'
    error = await failure(events(A, event))
    assert isinstance(error, RemoteServerError)
    assert (error.message, error.status) == ("out of memory", 500)


async def test_a_bug_of_ours_does_not_leave_the_reader_waiting(caplog: pytest.LogCaptureFixture) -> None:
    assert type(await failure(events(A, error=ZeroDivisionError("bug")))) is EngineDeadError
    assert "ZeroDivisionError" in caplog.text


async def test_a_server_that_does_not_stream_is_an_error() -> None:
    error = await failure(httpx.Response(200, json={"choices": []}))
    assert isinstance(error, RemoteServerError)
    assert "does not stream" in error.message


async def test_a_parameter_that_the_server_does_not_know_is_named() -> None:
    body = {"error": {"message": "Unrecognized request argument supplied: top_k", "param": "top_k"}}
    error = await failure(httpx.Response(400, json=body))
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.param) == ("Unrecognized request argument supplied: top_k", "top_k")


async def test_a_full_server_tells_when_to_come_back() -> None:
    error = await failure(httpx.Response(429, headers={"retry-after": "9"}, json={"error": {"message": "full"}}))
    assert isinstance(error, EngineOverloadedError)
    assert error.retry_after_s == 9.0


async def test_an_endless_error_page_is_not_read_to_its_end() -> None:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 10_000

    error = await failure(httpx.Response(500, content=body()))
    assert isinstance(error, RemoteServerError)
    assert len(error.message) == 1000


async def test_missing_usage_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    remote = engine(lambda _: events(A, END, DONE))
    await remote.start()
    for _ in range(2):
        assert (await collect(remote, REQUEST)).choices[0].last.usage == Usage(0, 0)
    assert caplog.text.count("does not tell usage") == 1


async def test_more_streams_than_connections_are_refused() -> None:
    gate = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield A.encode()
        await gate.wait()

    answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())
    remote = engine(answer, max_connections=1)
    await remote.start()
    running = remote.generate(REQUEST)
    await anext(running)
    with pytest.raises(EngineOverloadedError):
        await anext(remote.generate(REQUEST))
    await remote.check_health()
    await running.aclose()
    assert (await remote.stats()).num_running == 0


async def test_the_key_is_sent_and_nowhere_to_be_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PEER_KEY", KEY)
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["authorization"])
        return httpx.Response(401, json={"error": {"message": f"Incorrect API key provided: {KEY}"}})

    remote = engine(answer, api_key_env="PEER_KEY")
    card = await remote.start()
    with pytest.raises(RemoteServerError, match="Incorrect") as failed:
        await collect(remote, REQUEST)
    assert sent == [f"Bearer {KEY}"]
    seen = [repr(remote), repr(card), repr(failed.value), str(failed.value.__cause__), caplog.text]
    assert all(KEY not in text for text in seen)
    assert KEY.encode() not in pickle.dumps(failed.value)


async def test_the_key_is_read_at_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEER_KEY", raising=False)
    remote = engine(events(A, END, DONE), api_key_env="PEER_KEY")
    with pytest.raises(ModelLoadError, match="PEER_KEY"):
        await remote.start()
    monkeypatch.setenv("PEER_KEY", KEY)
    await remote.start()
    monkeypatch.delenv("PEER_KEY")
    assert (await collect(remote, REQUEST)).choices[0].text == "a"


async def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_KEY", "ключ\nx")
    with pytest.raises(ModelLoadError) as failed:
        await engine(MODELS, api_key_env="PEER_KEY").start()
    assert "ключ" not in failed.value.message


@pytest.mark.parametrize("base_url", ["http://us:er@peer/v1", "http://peer/v1/"])
async def test_errors_tell_where_without_passwords(base_url: str) -> None:
    remote = engine(MODELS, httpx.Response(503), base_url=base_url)
    with pytest.raises(EngineDeadError, match="http://peer/v1") as failed:
        await remote.start()
    assert "er@" not in failed.value.message


@pytest.mark.parametrize(
    ("models", "error", "told"),
    [
        (httpx.Response(200, json={"data": [{"id": "x"}, {"id": "y"}]}), ModelLoadError, "it has x, y"),
        (httpx.Response(200, json={"data": []}), ModelLoadError, "it has none"),
        (httpx.Response(200, text="<html>"), ModelLoadError, "no OpenAI-compatible server"),
        (httpx.Response(401, text="who?"), ModelLoadError, "who?"),
        (httpx.Response(500, text="oops"), EngineDeadError, "oops"),
        (httpx.Response(429, text="full"), EngineDeadError, "full"),
    ],
)
async def test_start_tells_what_is_wrong(models: httpx.Response, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told.replace("?", "\\?")):
        await engine(MODELS, models).start()


@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_without_a_list_of_models_is_fine(status: int) -> None:
    remote = engine(events(A, END, DONE), httpx.Response(status))
    card = await remote.start()
    await remote.check_health()
    assert card.max_model_len is None
    assert card.prompt_kinds == frozenset({"chat", "text"})


@pytest.mark.parametrize(
    ("configured", "told", "expected"), [(None, None, None), (9, None, 9), (None, 8, 8), (9, 8, 8), (7, 8, 7)]
)
async def test_the_shorter_context_window_counts(
    configured: int | None, told: int | None, expected: int | None
) -> None:
    models = httpx.Response(200, json={"data": [{"id": "m", "max_model_len": told}]})
    assert (await engine(MODELS, models, max_model_len=configured).start()).max_model_len == expected


async def test_another_server_has_another_fingerprint() -> None:
    first, second = [await engine(MODELS, base_url=f"http://{host}/v1").start() for host in ("a", "b")]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(httpx.ConnectError("refused"), EngineDeadError), (httpx.ReadTimeout("slow"), EngineTimeoutError)],
)
async def test_health_is_what_the_server_answers(raised: Exception, expected: type[Exception]) -> None:
    trouble: list[Exception | int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if trouble and isinstance(trouble[0], Exception):
            raise trouble[0]
        return httpx.Response(trouble[0] if trouble else 200, content=MODELS.content)  # type: ignore[arg-type]

    config = RemoteEngineConfig(base_url="http://peer/v1", model="m")
    remote = RemoteEngine(config, httpx.MockTransport(handle))
    await remote.start()
    await remote.check_health()
    trouble[:] = [raised]
    with pytest.raises(expected):
        await remote.check_health()
    trouble[:] = [503]
    with pytest.raises(EngineDeadError):
        await remote.check_health()
    trouble[:] = [429]
    await remote.check_health()


async def test_nobody_listening_is_a_dead_engine() -> None:
    remote = RemoteEngine(RemoteEngineConfig(base_url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(EngineDeadError, match=r"127\.0\.0\.1"):
        await remote.start()


def test_a_base_url_that_is_none_is_a_readable_error() -> None:
    with pytest.raises(ModelLoadError, match="base_url"):
        RemoteEngine(RemoteEngineConfig(base_url="http://peer:port/v1", model="m"))


def test_the_request_is_sent_as_json() -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://peer/v1/completions"
        sent.append(json.loads(request.content))
        return events(A, END, DONE)

    asyncio.run(complete(answer))
    assert sent[0]["prompt"] == "hi"
