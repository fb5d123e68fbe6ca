"""A client that leaves is noticed wherever the request is, and what it held is given back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI

from engines.types import Delta
from gateway.disconnect import cancelled_on_disconnect
from gateway.http import make_app
from tests.gateway.fakes import ScriptedEngine, chat, completion, config, echo_engine


class Caller:
    """Speaks ASGI to the application, and leaves when told."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, object]) -> None:
        self.writes: list[bytes] = []
        self.status: int | None = None
        self._left = asyncio.Event()
        self._body = [json.dumps(body).encode()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "state": {}}
        self.task = asyncio.create_task(app(scope | {"asgi": {"version": "3.0"}}, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, object]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            self.status = int(str(message["status"]))
        else:
            self.writes.append(bytes(message["body"]))


@asynccontextmanager
async def _running(engine: ScriptedEngine) -> AsyncIterator[FastAPI]:
    app = make_app(config(), {"echo": engine})
    async with app.router.lifespan_context(app):
        await app.state.fleet.started()
        yield app


async def _until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [(None,), ((Delta(index=0, text="a"),), None)], ids=["before", "after"])
async def test_leaving_closes_the_engines_stream(stream: bool, script: tuple[object, ...]) -> None:
    engine = ScriptedEngine(*script)
    async with _running(engine) as app:
        caller = Caller(app, "/v1/chat/completions", chat(stream=stream))
        await _until(lambda: engine.num_active and (caller.writes or not stream or script == (None,)))
        caller.leave()
        await asyncio.wait_for(caller.task, 5)
    assert (engine.num_active, engine.num_closed) == (0, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_frees_the_sequences_of_all_prompts(stream: bool) -> None:
    engine = echo_engine(token_delay_s=0.01)
    async with _running(engine) as app:
        body = completion(prompt=["ab", "c"], n=2, max_tokens=4000, stream=stream)
        caller = Caller(app, "/v1/completions", body)
        async with asyncio.timeout(5):
            while (await engine.stats()).num_running < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        caller.leave()
        await asyncio.wait_for(caller.task, 5)
        stats = await engine.stats()
    assert (stats.num_running, stats.num_aborted) == (0, 2)


async def test_a_cancelled_request_closes_the_engines_stream_too() -> None:
    engine = ScriptedEngine(None)
    async with _running(engine) as app:
        caller = Caller(app, "/v1/chat/completions", chat())
        await _until(lambda: engine.num_active)
        caller.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller.task
    assert engine.num_active == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cancel", "leave", "leave and cancel", "leave, then cancel"])
async def test_whenever_a_request_ends_its_trace_ends(how: str, stream: bool) -> None:
    """The caller leaves, or Serve cancels the task, after each number of the event loop's turns."""
    engine = ScriptedEngine((Delta(index=0, text="a"),), None)
    async with _running(engine) as app:
        for turns in range(24):
            caller = Caller(app, "/v1/chat/completions", chat(stream=stream))
            for _ in range(turns):
                await asyncio.sleep(0)
            if how.startswith("leave"):
                caller.leave()
            if how == "leave, then cancel":
                await asyncio.sleep(0)
            if "cancel" in how:
                caller.task.cancel()
            await asyncio.wait_for(asyncio.gather(caller.task, return_exceptions=True), 5)
            assert engine.num_active == 0, turns
            assert await _in_flight(app) in (None, 0.0), turns


async def _in_flight(app: FastAPI) -> float | None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        page = (await http.get("/metrics")).text
    found = [line for line in page.splitlines() if line.startswith("outrider_requests_in_flight{")]
    return float(found[0].split()[-1]) if found else None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_body_holds_no_slot_and_is_408(stream: bool) -> None:
    settings = config(http={"max_concurrent_requests": 1, "body_timeout_s": 0.2})
    app = make_app(settings, {"echo": echo_engine()})
    async with app.router.lifespan_context(app):
        await app.state.fleet.started()
        slow = Caller(app, "/v1/chat/completions", chat())
        slow._body.clear()
        await asyncio.sleep(0.02)
        quick = Caller(app, "/v1/chat/completions", chat(stream=stream))
        await asyncio.wait_for(quick.task, 0.15)
        await asyncio.wait_for(slow.task, 5)
    assert quick.status == 200
    assert slow.status == 408
    error = json.loads(slow.writes[0])["error"]
    assert (error["type"], error["message"]) == (
        "invalid_request_error",
        "The request body did not arrive within 0.2 seconds.",
    )


async def test_leaving_while_the_body_is_sent_is_no_error() -> None:
    async with _running(ScriptedEngine()) as app:
        caller = Caller(app, "/v1/chat/completions", chat())
        caller._body.clear()
        caller.leave()
        await asyncio.wait_for(caller.task, 5)
    assert caller.status == 499


async def test_one_engine_step_is_one_write() -> None:
    items = [(Delta(0, "a"), Delta(1, "b")), (Delta(0, "c"), Delta(1, "d"))]
    engine = ScriptedEngine(*items, (Delta(0, finish_reason="stop"), Delta(1, finish_reason="stop")))
    async with _running(engine) as app:
        caller = Caller(app, "/v1/completions", completion(n=2, stream=True))
        await caller.task
    assert [write.count(b"data: ") for write in caller.writes] == [2, 2, 2, 1, 0]


async def test_a_block_that_ends_first_is_undisturbed() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async with cancelled_on_disconnect(receive) as outcome:
        await asyncio.sleep(0)
    assert not outcome.happened
    assert asyncio.current_task().cancelling() == 0


async def test_a_disconnect_at_the_very_end_leaves_no_cancellation_behind() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async with cancelled_on_disconnect(receive) as outcome:
        pass
    await asyncio.sleep(0)
    assert asyncio.current_task().cancelling() == 0
    assert not outcome.happened  # never ran: the block had no await


async def test_the_blocks_own_error_passes() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(KeyError):
        async with cancelled_on_disconnect(receive):
            raise KeyError
