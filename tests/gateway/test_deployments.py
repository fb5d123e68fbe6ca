"""HandleEngine over a handle that fails as Serve's do; EngineServer over an engine that fails as engines do."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentResponseGenerator

from engines.config import EchoEngineConfig
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError, InvalidRequestError
from engines.types import Delta, EngineStats, GenerateRequest, SamplingParams, TokenPrompt
from gateway.deployments import EngineServer, HandleEngine
from gateway.errors import InternalError
from tests.gateway.fakes import CARD

REQUEST = GenerateRequest("r", TokenPrompt((1, 2)), SamplingParams(max_tokens=3))
ITEM = (Delta(index=0, text="a"),)


class Response(DeploymentResponseGenerator):
    """One call's stream: items, then perhaps an error; None among them waits forever."""

    def __init__(self, script: list[object]) -> None:
        self.script = script
        self.was_cancelled = False

    async def __anext__(self) -> object:
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        if isinstance(item, Exception):
            raise item
        if item is None:
            await asyncio.Event().wait()
        return item

    def cancel(self) -> None:
        self.was_cancelled = True


class Method:
    def __init__(self, handle: "Handle") -> None:
        self._handle = handle

    def remote(self, *_: object) -> object:
        return self._handle.calls.pop(0)


class Handle:
    """Answers each call of `generate` with the next response."""

    def __init__(self, *responses: object, stats: list[EngineStats] | None = None) -> None:
        self.calls = list(responses)
        self._stats = stats or []

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def __getattr__(self, name: str) -> Method:
        assert name in ("generate", "card", "check_health")
        return Method(self)

    def broadcast(self, name: str) -> "Handle":
        assert name == "stats"
        return self

    async def results_async(self) -> list[EngineStats]:
        return self._stats


async def _value(value: object) -> object:
    if isinstance(value, Exception):
        raise value
    return value


def _task_error(cause: Exception) -> RayTaskError:
    # What a caller catches is both a RayTaskError and, where Ray can derive it, the cause's class.
    return RayTaskError("generate", "Traceback ...", cause).as_instanceof_cause()


def _died() -> Exception:
    return ActorDiedError()


async def _collect(engine: HandleEngine) -> list[object]:
    return [item async for item in engine.generate(REQUEST)]


async def test_items_pass_through() -> None:
    response = Response([ITEM, ITEM])
    assert await _collect(HandleEngine(Handle(response))) == [ITEM, ITEM]
    assert not response.was_cancelled


@pytest.mark.parametrize("error", [_died(), _task_error(EngineDeadError("gone")), RayServeException("no replica")])
async def test_death_before_the_first_item_is_retried_elsewhere(error: Exception) -> None:
    engine = HandleEngine(Handle(Response([error]), Response([ITEM])), retry_delays_s=(0.0,))
    assert await _collect(engine) == [ITEM]


async def test_retries_end() -> None:
    handle = Handle(*(Response([_died()]) for _ in range(5)))
    with pytest.raises(EngineDeadError, match="process died"):
        await _collect(HandleEngine(handle, retry_delays_s=(0.0, 0.0)))
    assert len(handle.calls) == 2


async def test_death_after_the_first_item_is_not_retried() -> None:
    handle = Handle(Response([ITEM, _died()]), Response([ITEM]))
    with pytest.raises(EngineDeadError):
        await _collect(HandleEngine(handle, retry_delays_s=(0.0,)))
    assert len(handle.calls) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_task_error(InvalidRequestError("No.", "seed")), InvalidRequestError("No.", "seed")),
        (_task_error(EngineOverloadedError("Full.", 3.0)), EngineOverloadedError("Full.", 3.0)),
        (_task_error(KeyError("the prompt")), InternalError()),
        (BackPressureError(5, 5), EngineOverloadedError("All of the model's replicas are busy and its queue is full.")),
    ],
    ids=["refused", "overloaded", "bug", "queue full"],
)
async def test_foreign_errors_become_our_own_with_their_fields(error: Exception, expected: EngineError) -> None:
    with pytest.raises(type(expected)) as caught:
        await _collect(HandleEngine(Handle(Response([error]))))
    assert type(caught.value) is type(expected)
    assert vars(caught.value) == vars(expected)


async def test_closing_the_stream_cancels_the_call() -> None:
    response = Response([ITEM, None])
    stream = HandleEngine(Handle(response)).generate(REQUEST)
    await anext(stream)
    await stream.aclose()
    assert response.was_cancelled


async def test_cancelling_the_reader_cancels_the_call() -> None:
    response = Response([None])
    reader = asyncio.create_task(_collect(HandleEngine(Handle(response))))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert response.was_cancelled


async def test_stats_are_summed_over_replicas() -> None:
    handle = Handle(stats=[EngineStats(num_running=2, step_time_s=0.5), EngineStats(num_running=3, step_time_s=0.25)])
    assert await HandleEngine(handle).stats() == EngineStats(num_running=5, step_time_s=0.75)


async def test_card_and_health_come_from_a_replica() -> None:
    handle = Handle(_value(CARD), _value(None), _value(_died()))
    engine = HandleEngine(handle)
    assert await engine.start() == CARD
    await engine.check_health()
    with pytest.raises(EngineDeadError):
        await engine.check_health()


async def test_a_closed_engine_sends_nothing() -> None:
    handle = Handle(Response([ITEM]))
    engine = HandleEngine(handle)
    await engine.close()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await _collect(engine)
    with pytest.raises(EngineDeadError, match="shutting down"):
        await engine.check_health()
    assert len(handle.calls) == 1


async def _server() -> EngineServer:
    server = EngineServer.__new__(EngineServer)
    await EngineServer.__init__(server, EchoEngineConfig(token_delay_s=0.001))  # as Serve constructs it
    return server


async def test_a_server_is_its_engine() -> None:
    server = await _server()
    items: AsyncIterator[tuple[Delta, ...]] = server.generate(REQUEST)
    assert sum([len(delta.token_ids) async for item in items for delta in item]) == 3
    assert (await server.card()).model == "echo"
    assert (await server.stats()).num_finished == 1
    await server.check_health()


async def test_closing_a_servers_stream_frees_the_engine() -> None:
    server = await _server()
    items = server.generate(REQUEST)
    await anext(items)
    await items.aclose()
    assert (await server.stats()).num_running == 0
    assert (await server.stats()).num_aborted == 1
