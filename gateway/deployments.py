"""The two sides of the process border: EngineServer around an Engine, HandleEngine over Serve's handle to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.block_journal import BlockJournal, WatchesBlocks
from engines.config import EngineConfig, RemoteEngineConfig
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError, EngineTimeoutError
from engines.protocol import Engine
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard
from gateway.answers import JsonObject
from gateway.engine_factory import make_engine
from gateway.errors import InternalError
from gateway.replica_status import ReplicaStatus
from gateway.routing.placement_counts import PlacementCounts
from gateway.routing.placer import Placer, ServesChoice
from gateway.routing.retry_budget import RetryBudget

if TYPE_CHECKING:
    from gateway.routing.publishing import Publishing

# Serve learns of a dead replica within a few of these; three tries reach a living one if there is one.
_RETRY_DELAYS_S = (0.05, 0.5)
# After so long without a first item it is asked whether there is a replica at all; starting one takes longer.
_REPLICA_WAIT_S = 2.0
_RETRY_SHARE, _RETRY_BURST = 0.2, 256


class ReplicaLostError(EngineDeadError):
    """The request's replica died, or its engine was dead before the request came: another replica may serve it."""


class EngineServer:
    """One engine in one Serve replica.

    Loading is part of construction: a replica that runs can serve. A remote peer is another matter: it may be away
    when the replica starts, and come and go later, and no restart of this process would bring it back.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, publishing: Publishing | None = None
    ) -> None:
        """With `publishing`, gateways are told what the prefix cache holds; the engine must have one."""
        self._engine: Engine = make_engine(config)
        self._has_peer = isinstance(config, RemoteEngineConfig)
        if publishing is not None:
            assert isinstance(self._engine, WatchesBlocks)
            journal = BlockJournal()
            self._engine.watch_blocks(journal)
        try:
            await self._engine.start()
        except (EngineDeadError, EngineTimeoutError):
            if not self._has_peer:
                raise
        if publishing is not None:
            from gateway.routing.publishing import start_publishing  # and with it redis

            replica = serve.get_replica_context().replica_id.unique_id
            self._publishing = start_publishing(self._engine, journal, replica, publishing)

    async def card(self) -> ModelCard:
        """Raises EngineDeadError, EngineTimeoutError while the peer is away, ModelLoadError if it lacks the model."""
        return await self._engine.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """The engine's stream. Serve cancels it when the caller does, and the engine then frees the request."""
        await self._open()
        async with aclosing(self._engine.generate(request)) as items:
            async for item in items:
                yield item

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def ready(self) -> None:
        """Return if requests can be served now, by the peer too. Raises EngineDeadError, EngineTimeoutError."""
        await self._engine.start()
        await self._engine.check_health()

    async def check_health(self) -> None:
        """Serve's own health check: a replica that raises is replaced."""
        if not self._has_peer:
            await self._engine.check_health()

    async def _open(self) -> None:
        if self._has_peer:
            await self._engine.start()
            return
        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise ReplicaLostError(error.message) from error


class HandleEngine:
    """An Engine whose replicas live behind a Serve handle.

    Requests go to the replica that the placer wishes, or Serve chooses. A request that lost its replica before it was
    told anything goes to another, within the budget for retries. One whose engine stopped under it does not: it may be
    what stopped the engine, and would stop the next.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        retry_delays_s: tuple[float, ...] = _RETRY_DELAYS_S,
        replica_wait_s: float = _REPLICA_WAIT_S,
        has_replica: Callable[[str, str], bool] | None = None,
        placer: Placer | None = None,
        budget: RetryBudget | None = None,
    ) -> None:
        self._handle = handle
        self._retry_delays_s = retry_delays_s
        self._replica_wait_s = replica_wait_s
        self._replicas = ReplicaStatus(handle, has_replica)
        self._placer = placer or ServesChoice("single")
        self.budget = budget or RetryBudget(_RETRY_SHARE, _RETRY_BURST)
        self._is_closed = False

    def counted(self) -> PlacementCounts | None:
        """What the placer has done so far; None where Serve chooses."""
        return self._placer.counted()

    @property
    def policy(self) -> str:
        """How a replica is chosen."""
        return self._placer.policy

    async def start(self) -> ModelCard:
        """The card of any replica; waits until there is one."""
        card = await self._card()
        await self._placer.open(card)
        return card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Engine.generate."""
        async with aclosing(self.generate_noting(request, {})) as items:
            async for item in items:
                yield item

    async def generate_noting(
        self, request: GenerateRequest, entry: JsonObject
    ) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Explains.generate_noting."""
        self.budget.earn()
        lost: list[str] = []
        for delay_s in (*self._retry_delays_s, None):
            has_begun = False
            seat = await self._placer.place(request, frozenset(lost), entry)
            try:
                async with aclosing(self._call(request)) as items:
                    async for item in items:
                        has_begun = True
                        seat.note(item)
                        yield item
                return
            except ReplicaLostError:
                if has_begun or delay_s is None or self._is_closed or not self.budget.spend():
                    raise
                lost += [seat.replica] if seat.replica is not None else []
                entry["lost"] = list(lost)
            finally:
                seat.leave()
            if not self._placer.has_other(frozenset(lost)):
                await asyncio.sleep(delay_s)

    async def explain(self, request: GenerateRequest) -> JsonObject:
        """See Explains.explain."""
        return await self._placer.explain(request)

    async def stats(self) -> EngineStats:
        """The sum over all replicas."""
        with _translated():
            snapshots: list[EngineStats] = await self._handle.broadcast("stats").results_async()
        return sum(snapshots, EngineStats())

    async def check_health(self) -> None:
        """Whether some replica can serve; Serve replaces those that cannot."""
        if self._is_closed:
            raise EngineDeadError("The gateway is shutting down.")
        with _translated():
            await self._handle.ready.remote()

    async def close(self) -> None:
        """Nothing is sent any more. The replicas are Serve's to stop."""
        self._is_closed = True
        await self._placer.close()

    async def _card(self) -> ModelCard:
        for delay_s in (*self._retry_delays_s, None):
            try:
                with _translated():
                    card: ModelCard = await self._handle.card.remote()
                return card
            except ReplicaLostError:
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)
        raise AssertionError("the last try returns or raises")

    async def _call(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        if self._is_closed:
            raise EngineDeadError("The gateway is shutting down.")
        response = self._handle.options(stream=True).generate.remote(request)
        assert isinstance(response, DeploymentResponseGenerator)
        finished = False
        try:
            with _translated():
                first = await self._first(response)
                if first is not None:
                    yield first
                    async for item in response:
                        yield item
            finished = True
        finally:
            if not finished:
                # Reaches the replica's generator, whose `finally` aborts the request in the engine.
                response.cancel()  # type: ignore[no-untyped-call]

    async def _first(self, response: DeploymentResponseGenerator[Any]) -> tuple[Delta, ...] | None:
        """The first item, None if there is none. However long a living replica takes, it is waited for."""
        first = asyncio.ensure_future(anext(response, None))
        try:
            while not (await asyncio.wait({first}, timeout=self._replica_wait_s))[0]:
                if not await self._replicas.exist():
                    raise EngineDeadError("No replica of the model is running; one may be starting.")
            item: tuple[Delta, ...] | None = await first
            return item
        finally:
            first.cancel()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's and Serve's errors as the engines' own."""
    try:
        yield
    except RayTaskError as error:
        raise _cause(error) from error
    except RayActorError as error:
        raise ReplicaLostError("The engine's process died.") from error
    except BackPressureError as error:
        raise EngineOverloadedError("All of the model's replicas are busy and its queue is full.") from error
    except DeploymentUnavailableError as error:
        raise EngineDeadError("The model could not be deployed.") from error
    except (RayServeException, RayError) as error:
        raise ReplicaLostError(f"The engine cannot be reached: {type(error).__name__}.") from error


def _cause(error: RayTaskError) -> Exception:
    """The exception that the replica raised; RayTaskError wraps it and often is a subclass of it as well."""
    cause = error.cause
    if isinstance(cause, EngineError):
        return cause
    if isinstance(cause, RayActorError):
        return ReplicaLostError("The engine's process died.")
    return InternalError()
