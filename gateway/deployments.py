"""The two sides of the process border: EngineServer around an Engine, HandleEngine over Serve's handle to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.config import EngineConfig, RemoteEngineConfig
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError, EngineTimeoutError
from engines.protocol import Engine
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard
from gateway.engine_factory import make_engine
from gateway.errors import InternalError

# Serve learns of a dead replica within a few of these; three tries reach a living one if there is one.
_RETRY_DELAYS_S = (0.05, 0.5)
# After so long without a first item it is asked whether there is a replica at all; starting one takes longer.
_REPLICA_WAIT_S = 2.0
_STATUS_AGE_S = 1.0


class ReplicaLostError(EngineDeadError):
    """The request's replica died, or its engine was dead before the request came: another replica may serve it."""


class EngineServer:
    """One engine in one Serve replica.

    Loading is part of construction: a replica that runs can serve. A remote peer is another matter: it may be away
    when the replica starts, and come and go later, and no restart of this process would bring it back.
    """

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine: Engine = make_engine(config)
        self._has_peer = isinstance(config, RemoteEngineConfig)
        try:
            await self._engine.start()
        except (EngineDeadError, EngineTimeoutError):
            if not self._has_peer:
                raise

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

    Requests go to the replica that Serve chooses. A request that lost its replica before it was told anything goes to
    another. One whose engine stopped under it does not: it may be what stopped the engine, and would stop the next.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        retry_delays_s: tuple[float, ...] = _RETRY_DELAYS_S,
        replica_wait_s: float = _REPLICA_WAIT_S,
        has_replica: Callable[[str, str], bool] | None = None,
    ) -> None:
        self._handle = handle
        self._retry_delays_s = retry_delays_s
        self._replica_wait_s = replica_wait_s
        self._replicas = _Replicas(handle, has_replica or _has_replica)
        self._is_closed = False

    async def start(self) -> ModelCard:
        """The card of any replica; waits until there is one."""
        with _translated():
            card: ModelCard = await self._handle.card.remote()
        return card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Engine.generate."""
        for delay_s in (*self._retry_delays_s, None):
            has_begun = False
            try:
                async with aclosing(self._call(request)) as items:
                    async for item in items:
                        has_begun = True
                        yield item
                return
            except ReplicaLostError:
                if has_begun or delay_s is None or self._is_closed:
                    raise
                await asyncio.sleep(delay_s)

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


class _Replicas:
    """Whether a deployment has replicas. Many requests may wait, and Serve's one controller is asked once for all."""

    def __init__(self, handle: DeploymentHandle[Any], ask: Callable[[str, str], bool]) -> None:
        self._handle = handle
        self._ask = ask
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._exist = True

    async def exist(self) -> bool:
        async with self._asking:
            if time.monotonic() - self._asked_s > _STATUS_AGE_S:
                self._exist = await asyncio.to_thread(self._ask, self._handle.app_name, self._handle.deployment_name)
                self._asked_s = time.monotonic()
            return self._exist


def _has_replica(app: str, deployment: str) -> bool:
    """Whether Serve knows of a replica that may hold a request: a stopping one may, a starting one cannot."""
    try:
        application = serve.status().applications.get(app)
    except RayError:
        return True  # the controller is being restarted; the replicas go on without it
    found = application.deployments.get(deployment) if application is not None else None
    return found is not None and any(n for state, n in found.replica_states.items() if state != "STARTING")


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
