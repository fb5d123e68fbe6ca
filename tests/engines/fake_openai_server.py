"""An OpenAI-compatible server on a free local port, over an EchoEngine: what RemoteEngine is tested against."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engines.byte_tokenizer import byte_tokenizer
from engines.config import EchoEngineConfig
from engines.echo import EchoEngine
from engines.errors import EngineError, InvalidRequestError
from engines.types import ChatMessage, Delta, GenerateRequest, SamplingParams, TokenLogprob, TokenPrompt

MODEL = "fake"
_SAMPLING = set(SamplingParams.model_fields) - {"logprobs"}
_OTHERS = {"model", "messages", "prompt", "n", "stream", "stream_options", "user", "logprobs", "top_logprobs"}


class FakeOpenAIServer:
    """`engine` tells what is under way; `bodies`, `headers` (of /models) and `client_ports` how it was asked."""

    def __init__(self, config: EchoEngineConfig) -> None:
        self.engine = EchoEngine(config)
        self.tokenizer = byte_tokenizer()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.client_ports: set[int] = set()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self._note_connection(request)
        entry = {"id": MODEL, "object": "model", "owned_by": "tests"}
        max_model_len = (await self.engine.start()).max_model_len
        return JSONResponse({"object": "list", "data": [entry | {"max_model_len": max_model_len}]})

    def _note_connection(self, request: Request) -> None:
        assert request.client is not None
        self.client_ports.add(request.client.port)

    async def _chat(self, request: Request) -> Response:
        self._note_connection(request)
        body = await request.json()
        messages = [ChatMessage(message["role"], message["content"]) for message in body["messages"]]
        return await self._stream(body, self.tokenizer.apply_chat_template(messages), is_chat=True)

    async def _complete(self, request: Request) -> Response:
        self._note_connection(request)
        body = await request.json()
        prompt = body["prompt"]
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        return await self._stream(body, token_ids, is_chat=False)

    async def _stream(self, body: dict[str, Any], token_ids: tuple[int, ...], is_chat: bool) -> Response:
        self.bodies.append(body)
        assert body["stream"] is True
        assert body["stream_options"] == {"include_usage": True}
        unknown = sorted(set(body) - _SAMPLING - _OTHERS)
        if unknown:
            return _error(InvalidRequestError(f"Unrecognized request argument: {unknown[0]}", unknown[0]))
        sampling = SamplingParams(
            **{name: value for name, value in body.items() if name in _SAMPLING},
            logprobs=(body["top_logprobs"] if is_chat else body["logprobs"]) if "logprobs" in body else None,
        )
        stream = self.engine.generate(GenerateRequest("r", TokenPrompt(token_ids), sampling, n=body.get("n", 1)))
        try:
            first = await anext(stream)
        except EngineError as error:
            return _error(error)
        return _EventStream(_events(first, stream, is_chat))


class _EventStream(Response):
    """Stops reading its events as soon as the client has left."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sender = asyncio.create_task(self._send(send))
        listener = asyncio.create_task(_until_disconnect(receive))
        await asyncio.wait([sender, listener], return_when=asyncio.FIRST_COMPLETED)
        for task in (sender, listener):
            task.cancel()
        await asyncio.wait([sender, listener])

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(
    first: tuple[Delta, ...], stream: AsyncGenerator[tuple[Delta, ...], None], is_chat: bool
) -> AsyncGenerator[str, None]:
    prompt_tokens = completion_tokens = 0
    async with aclosing(stream):
        try:
            item: tuple[Delta, ...] | None = first
            while item is not None:
                for delta in item:
                    yield _event({"choices": [_choice(delta, is_chat)]})
                    if delta.usage is not None:
                        prompt_tokens = delta.usage.prompt_tokens
                        completion_tokens += delta.usage.completion_tokens
                item = await anext(stream, None)
        except EngineError as error:
            yield _event({"error": {"message": error.message, "code": 503}})
            return
    yield ": a comment keeps the connection alive\n\n"
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    yield _event({"choices": [], "usage": usage}) + "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _choice(delta: Delta, is_chat: bool) -> dict[str, Any]:
    text = {"delta": {"content": delta.text}} if is_chat else {"text": delta.text}
    logprobs = None if delta.logprobs is None else (_chat_logprobs if is_chat else _logprobs)(delta.logprobs)
    end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
    return {"index": delta.index, "logprobs": logprobs} | text | end


def _chat_logprobs(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    def told(entry: Any) -> dict[str, Any]:
        return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.token_bytes or b"")}

    return {"content": [told(entry) | {"top_logprobs": [told(top) for top in entry.top]} for entry in entries]}


def _logprobs(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
    }


def _error(error: EngineError) -> Response:
    status = 400 if isinstance(error, InvalidRequestError) else 503
    param = getattr(error, "param", None)
    return JSONResponse({"error": {"message": error.message, "param": param, "code": status}}, status)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the test runner's signals are not the server's


@asynccontextmanager
async def serve(config: EchoEngineConfig | None = None) -> AsyncIterator[tuple[FakeOpenAIServer, str]]:
    """The server and its base URL, in this event loop."""
    fake = FakeOpenAIServer(config or EchoEngineConfig())
    await fake.engine.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(fake.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        server = _Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110 - uvicorn announces it to nobody
                await asyncio.sleep(0.01)
        try:
            yield fake, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            await fake.engine.close()
            server.should_exit = True
            await serving
