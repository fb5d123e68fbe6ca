"""HandleEngine over a handle that fails as Serve's do; EngineServer over an engine that fails as engines do."""

import asyncio
import json
import pickle
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentResponseGenerator

from engines.config import EchoEngineConfig, RemoteEngineConfig
from engines.echo import EchoEngine
from engines.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    InvalidRequestError,
    ModelLoadError,
)
from engines.remote import RemoteEngine
from engines.types import ChatMessage, ChatPrompt, Delta, EngineStats, GenerateRequest, SamplingParams, TokenPrompt
from gateway import deployments, replica_status
from gateway.deployments import EngineServer, HandleEngine, ReplicaLostError
from gateway.errors import InternalError
from gateway.routing.retry_budget import RetryBudget
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

    app_name = "outrider"
    deployment_name = "engine-fake"

    def __init__(self, *responses: object, stats: list[EngineStats] | None = None) -> None:
        self.calls = list(responses)
        self._stats = stats or []

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def __getattr__(self, name: str) -> Method:
        assert name in ("generate", "card", "ready")
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


@pytest.mark.parametrize("error", [_died(), _task_error(ReplicaLostError("gone")), RayServeException("no replica")])
async def test_death_before_the_first_item_is_retried_elsewhere(error: Exception) -> None:
    engine = HandleEngine(Handle(Response([error]), Response([ITEM])), retry_delays_s=(0.0,))
    assert await _collect(engine) == [ITEM]


class Placing:
    """Places each try at the next of its replicas, and remembers what became of it."""

    policy = "warm"

    def __init__(self, *replicas: str) -> None:
        self.left = list(replicas)
        self.avoided: list[frozenset[str]] = []
        self.seats: list[Seated] = []
        self.is_open = False

    async def open(self, card: object) -> None:
        self.is_open = True

    async def place(self, request: GenerateRequest, avoid: frozenset[str], entry: dict[str, object]) -> "Seated":
        self.avoided.append(avoid)
        self.seats.append(Seated(self.left.pop(0)))
        return self.seats[-1]

    async def explain(self, request: GenerateRequest) -> dict[str, object]:
        return {"chosen": self.left[0]}

    def has_other(self, avoid: frozenset[str]) -> bool:
        return bool(self.left)

    def counted(self) -> None:
        return None

    async def close(self) -> None:
        self.is_open = False


class Seated:
    def __init__(self, replica: str) -> None:
        self.replica = replica
        self.items: list[object] = []
        self.num_left = 0

    def note(self, item: object) -> None:
        self.items.append(item)

    def leave(self) -> None:
        self.num_left += 1


async def test_every_try_has_a_seat_and_the_next_avoids_what_was_lost() -> None:
    placer, entry = Placing("a", "b"), {}
    handle = Handle(Response([_died()]), Response([ITEM]))
    engine = HandleEngine(handle, retry_delays_s=(60.0,), placer=placer)  # not slept: there is another replica
    assert [item async for item in engine.generate_noting(REQUEST, entry)] == [ITEM]
    assert placer.avoided == [frozenset(), frozenset({"a"})]
    assert [seat.items for seat in placer.seats] == [[], [ITEM]]
    assert [seat.num_left for seat in placer.seats] == [1, 1]
    assert entry == {"lost": ["a"]}
    assert engine.budget.num_retries == 1


async def test_a_stream_that_is_left_leaves_its_seat() -> None:
    placer = Placing("a")
    stream = HandleEngine(Handle(Response([ITEM, None])), placer=placer).generate(REQUEST)
    await anext(stream)
    await stream.aclose()
    assert placer.seats[0].num_left == 1


async def test_beyond_the_budget_nothing_is_retried() -> None:
    engine = HandleEngine(Handle(Response([_died()]), Response([ITEM])), budget=RetryBudget(0.0, 0))
    with pytest.raises(ReplicaLostError):
        await _collect(engine)
    assert (engine.budget.num_retries, engine.budget.num_refused) == (0, 1)


async def test_the_placer_opens_and_closes_with_its_engine() -> None:
    placer = Placing("a")
    engine = HandleEngine(Handle(_value(CARD)), placer=placer)
    await engine.start()
    assert placer.is_open
    assert (engine.policy, await engine.explain(REQUEST), engine.counted()) == ("warm", {"chosen": "a"}, None)
    await engine.close()
    assert not placer.is_open


async def test_what_stopped_one_engine_is_not_given_to_another() -> None:
    crash = _task_error(EngineDeadError("The engine loop has crashed: IndexError"))
    handle = Handle(Response([crash]), Response([ITEM]))
    with pytest.raises(EngineDeadError, match="loop has crashed"):
        await _collect(HandleEngine(handle, retry_delays_s=(0.0,)))
    assert len(handle.calls) == 1


async def test_without_a_replica_a_request_fails_soon() -> None:
    response = Response([None])
    asked: list[tuple[str, str]] = []

    def has_replica(app: str, deployment: str) -> bool:
        asked.append((app, deployment))
        return False

    engine = HandleEngine(Handle(response), (0.0,), replica_wait_s=0.01, has_replica=has_replica)
    with pytest.raises(EngineDeadError, match="No replica"):
        await asyncio.wait_for(_collect(engine), 5)
    assert asked == [("outrider", "engine-fake")]
    assert response.was_cancelled


async def test_a_living_replica_is_waited_for_and_serve_asked_once_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Response):
        async def __anext__(self) -> object:
            await asyncio.sleep(0.1)
            return await super().__anext__()

    num_asked = 0

    def has_replica(*_: str) -> bool:
        nonlocal num_asked
        num_asked += 1
        return True

    monkeypatch.setattr(replica_status, "_STATUS_AGE_S", 60.0)
    handle = Handle(*(Slow([ITEM]) for _ in range(5)))
    engine = HandleEngine(handle, replica_wait_s=0.01, has_replica=has_replica)
    assert await asyncio.gather(*(_collect(engine) for _ in range(5))) == [[ITEM]] * 5
    assert num_asked == 1


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


async def test_the_card_is_asked_of_another_replica_when_one_has_died() -> None:
    engine = HandleEngine(Handle(_value(_died()), _value(CARD)), retry_delays_s=(0.0,))
    assert await engine.start() == CARD
    with pytest.raises(ReplicaLostError):
        await HandleEngine(Handle(_value(_died()), _value(_died())), retry_delays_s=(0.0,)).start()


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


class Crashing(EchoEngine):
    """Its first request stops it."""

    is_dead = False

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("It has crashed.")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        self.is_dead = True
        raise EngineDeadError("It has crashed.")
        yield ()


async def test_only_a_request_that_came_after_the_crash_may_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "make_engine", Crashing)
    server = await _server()
    with pytest.raises(EngineDeadError) as first:
        await anext(server.generate(REQUEST))
    with pytest.raises(EngineDeadError) as second:
        await anext(server.generate(REQUEST))
    assert not isinstance(first.value, ReplicaLostError)
    assert isinstance(second.value, ReplicaLostError)
    assert isinstance(pickle.loads(pickle.dumps(second.value)), ReplicaLostError)
    with pytest.raises(EngineDeadError):
        await server.check_health()


class Peer(httpx.AsyncBaseTransport):
    """A server that is away until it is there, and then has these models."""

    def __init__(self) -> None:
        self.models: list[str] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.models is None:
            raise httpx.ConnectError("refused", request=request)
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": model} for model in self.models]})
        choice = {"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}
        body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
        return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    transport = Peer()
    monkeypatch.setattr(deployments, "make_engine", lambda config: RemoteEngine(config, transport))
    return transport


async def _remote_server() -> EngineServer:
    server = EngineServer.__new__(EngineServer)
    await EngineServer.__init__(server, RemoteEngineConfig(base_url="http://peer/v1", model="m"))
    return server


async def test_a_replica_does_not_need_its_peer_and_finds_it_later(peer: Peer) -> None:
    server = await _remote_server()
    await server.check_health()
    chat = GenerateRequest("r", ChatPrompt((ChatMessage("user", "hi"),)), SamplingParams(max_tokens=3))
    for call in (server.card(), server.ready(), anext(server.generate(chat))):
        with pytest.raises(EngineDeadError, match="refused"):
            await call
    peer.models = ["m"]
    # Requests come to a replica whose card nobody asked for again.
    assert "".join([delta.text async for item in server.generate(chat) for delta in item]) == "yes"
    await server.ready()
    assert (await server.card()).model == "m"
    peer.models = None
    await server.check_health()
    with pytest.raises(EngineDeadError):
        await server.ready()


async def test_a_peer_without_the_model_ends_the_replica(peer: Peer) -> None:
    peer.models = ["another"]
    with pytest.raises(ModelLoadError, match="another"):
        await _remote_server()
