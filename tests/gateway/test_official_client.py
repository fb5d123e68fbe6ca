"""The official `openai` client, sync and async, against a real server on a real socket."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import openai
import pytest
import uvicorn

from engines.echo import EchoEngine
from engines.errors import EngineDeadError, EngineOverloadedError
from engines.types import Delta, Piece, Usage
from gateway.http import make_app
from tests.gateway.fakes import ScriptedEngine, config, echo_engine

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
PIECES = (Piece("a", "prediction"), Piece("", "target"), Piece("é", "target"))
DRAFTED = [
    (Delta(0, "aé", (1, 2, 3), provenance=PIECES),),
    (Delta(0, "", provenance=(), finish_reason="stop", usage=Usage(3, 3, 0, 1, 2)),),
]


@dataclass
class Server:
    url: str
    slow: EchoEngine


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serves `echo`; `slow`, which takes 20 ms a token; `drafting`, which tells of drafts; `full`, `dead` and `dying`,
    which fail in their ways."""
    slow = echo_engine(token_delay_s=0.02)
    engines = {
        "echo": echo_engine(max_model_len=256),
        "slow": slow,
        "drafting": ScriptedEngine(*DRAFTED),
        "full": ScriptedEngine(EngineOverloadedError("The queue is full.")),
        "dead": ScriptedEngine(EngineDeadError("The engine died.")),
        "dying": ScriptedEngine((Delta(index=0, text="a"),), EngineDeadError("The engine died.")),
    }
    app = make_app(config(*engines), engines)
    # h11 and asyncio: what every platform has. websockets would warn of its own deprecations.
    uv = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", loop="asyncio", http="h11"))
    thread = threading.Thread(target=uv.run)
    thread.start()
    while not uv.started:
        time.sleep(0.01)
    port = uv.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    while len(client.models.list().data) < len(engines):
        time.sleep(0.01)
    client.close()
    yield Server(f"http://127.0.0.1:{port}/v1", slow)
    uv.should_exit = True
    thread.join()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=8, stop=["hi"], seed=1)
    assert answer.choices[0].message.content == "user: "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 28


def test_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "user: hi"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=MESSAGES, stop=["hi"]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "user: "


def test_two_choices_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=2, n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in answer.choices] == ["us", "us"]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(entry.token, entry.bytes) for entry in logprobs.content] == [("u", [117]), ("s", [115])]
    assert logprobs.content[0].top_logprobs[0].token == "u"


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["ab", "c"], max_tokens=3, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["aba", "ccc"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "a"]
    with client.completions.create(model="echo", prompt="ab", max_tokens=3, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "aba"


def test_extensions_travel_in_extra_body(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="abc", max_tokens=9, extra_body={"stop_token_ids": [99]})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")


def test_a_prediction_is_the_clients_own_field_and_its_tokens_are_in_the_usage(client: openai.OpenAI) -> None:
    parts: list[openai.types.chat.ChatCompletionContentPartTextParam] = [{"type": "text", "text": "aé"}]
    answer = client.chat.completions.create(
        model="drafting",
        messages=MESSAGES,
        prediction={"type": "content", "content": parts},
        extra_body={"speculation": {"provenance": True}},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 1
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 2
    assert answer.choices[0].model_extra == {
        "provenance": [{"text": piece.text, "source": piece.source} for piece in PIECES]
    }


def test_provenance_comes_with_each_chunk(client: openai.OpenAI) -> None:
    asked = {"speculation": {"provenance": True}}
    with client.chat.completions.create(
        model="drafting", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body=asked
    ) as stream:
        chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    told = [(choice.delta.content or "", choice.model_extra["provenance"]) for choice in choices]
    assert [text for text, _ in told] == ["", "aé", ""]
    assert all("".join(piece["text"] for piece in pieces) == text for text, pieces in told)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens_details is not None
    assert chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens == 1
    with client.chat.completions.stream(model="drafting", messages=MESSAGES, extra_body=asked) as helper:
        assert helper.get_final_completion().choices[0].message.content == "aé"
    with client.completions.create(model="drafting", prompt="x", stream=True, extra_body=asked) as stream:
        pieces = [piece for chunk in stream for choice in chunk.choices for piece in choice.model_extra["provenance"]]
    assert [piece["source"] for piece in pieces] == [piece.source for piece in PIECES]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "slow", "drafting", "full", "dead", "dying"]
    assert client.models.retrieve("echo").owned_by == "outrider"


@pytest.mark.parametrize(
    ("model", "fields", "error"),
    [
        ("echo", {"n": 99}, openai.BadRequestError),
        ("echo", {"max_tokens": 9999}, openai.BadRequestError),
        ("echo", {"prediction": {"type": "content", "content": "x"}}, openai.BadRequestError),
        ("echo", {"extra_body": {"speculation": {"drafter": "model"}}}, openai.BadRequestError),
        ("echo", {"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ("absent", {}, openai.NotFoundError),
        ("full", {}, openai.RateLimitError),
        ("dead", {}, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_error_classes(client: openai.OpenAI, model: str, fields: dict[str, object], error: type, stream: bool) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, stream=stream, **fields)
    assert caught.value.body["message"]


def test_an_error_inside_a_stream_is_raised(client: openai.OpenAI) -> None:
    received = []
    with client.chat.completions.create(model="dying", messages=MESSAGES, stream=True) as stream:  # noqa: SIM117
        with pytest.raises(openai.APIError, match=r"The engine died\."):
            received.extend(chunk.choices[0].delta.content for chunk in stream)
    assert received == ["", "a"]


async def test_the_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        whole, stream = await asyncio.gather(
            client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=8),
            client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=8, stream=True),
        )
        async with stream:
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="absent", messages=MESSAGES)
    assert whole.choices[0].message.content == "".join(pieces) == "user: hi"


async def _num_running(server: Server, wanted: int) -> None:
    """Waits until the engine runs so many. Stats are plain counters, safe to read from this thread."""
    async with asyncio.timeout(5):
        while (await server.slow.stats()).num_running != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_leaving_a_stream_frees_the_sequence(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="slow", messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await _num_running(server, 1)
        await stream.close()
        await _num_running(server, 0)


async def test_leaving_a_unary_call_frees_the_sequence(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        call = asyncio.create_task(client.chat.completions.create(model="slow", messages=MESSAGES))
        await _num_running(server, 1)
        call.cancel()
        await _num_running(server, 0)
        with pytest.raises(asyncio.CancelledError):
            await call
