"""Small engines that do exactly what a test needs, and the application in memory over any engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

import httpx

from engines.config import EchoEngineConfig
from engines.echo import EchoEngine
from engines.errors import EngineError
from engines.protocol import Engine
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard, Usage
from gateway.config import GatewayConfig
from gateway.http import make_app

CARD = ModelCard(model="fake", prompt_kinds=frozenset({"tokens"}), fingerprint="f" * 64, max_model_len=64)
LAST = Delta(index=0, text="", finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2))


class ScriptedEngine:
    """Yields the given items; an exception among them is raised, `None` waits forever. Remembers what it was asked."""

    def __init__(self, *script: tuple[Delta, ...] | Exception | None, card: ModelCard = CARD) -> None:
        self.script = script
        self.card = card
        self.requests: list[GenerateRequest] = []
        self.num_closed = 0
        self.num_active = 0
        self.health: EngineError | None = None
        self.start_errors: list[EngineError] = []

    async def start(self) -> ModelCard:
        if self.start_errors:
            raise self.start_errors.pop(0)
        return self.card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        self.requests.append(request)
        self.num_active += 1
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    await asyncio.Event().wait()
                else:
                    yield item
        finally:
            self.num_active -= 1
            self.num_closed += 1

    async def stats(self) -> EngineStats:
        return EngineStats(num_running=self.num_active)

    async def check_health(self) -> None:
        if self.health is not None:
            raise self.health

    async def close(self) -> None:
        pass


def text(*pieces: str, index: int = 0) -> list[tuple[Delta, ...]]:
    """One item per piece, one token each, and the last delta of a choice."""
    deltas = [Delta(index=index, text=piece, token_ids=(i,)) for i, piece in enumerate(pieces)]
    return [*((delta,) for delta in deltas), (replace(LAST, index=index),)]


def config(*names: str, **fields: object) -> GatewayConfig:
    models = [{"name": name, "engine": {"kind": "echo"}} for name in names or ("echo",)]
    return GatewayConfig.model_validate({"models": models, "log_level": "error"} | fields)


def echo_engine(**fields: object) -> EchoEngine:
    return EchoEngine(EchoEngineConfig.model_validate(fields))


@contextlib.asynccontextmanager
async def client(
    engine: Engine | None = None, settings: GatewayConfig | None = None, more: dict[str, Engine] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """The application in memory, its models started; the first is `echo`."""
    settings = settings or config("echo", *(more or ()))
    app = make_app(settings, {"echo": engine or echo_engine(max_model_len=256)} | (more or {}))
    async with app.router.lifespan_context(app):
        await app.state.fleet.started()
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            yield http


def chat(**fields: object) -> dict[str, object]:
    """The body of a small chat request."""
    return {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8} | fields


def completion(**fields: object) -> dict[str, object]:
    return {"model": "echo", "prompt": "abc", "max_tokens": 4} | fields


def events(body: str) -> list[str]:
    """The payloads of an event stream, which must be nothing but `data:` events."""
    parts: Sequence[str] = body.split("\n\n")
    assert parts[-1] == ""
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ") for part in parts[:-1]]
