"""The two sides of the process border: EngineServer around an Engine, HandleEngine over Serve's handle to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engines.config import EngineConfig
from engines.errors import EngineDeadError, EngineError, EngineOverloadedError
from engines.protocol import Engine
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard
from gateway.engine_factory import make_engine
from gateway.errors import InternalError

# Serve learns of a dead replica within a few of these; three tries reach a living one if there is one.
_RETRY_DELAYS_S = (0.05, 0.5)


class EngineServer:
    """One engine in one Serve replica. Loading is part of construction: a replica that runs can serve."""

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine: Engine = make_engine(config)
        self._card = await self._engine.start()

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """The engine's stream. Serve cancels it when the caller does, and the engine then frees the request."""
        async with aclosing(self._engine.generate(request)) as items:
            async for item in items:
                yield item

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Serve's own health check: a replica that raises is replaced."""
        await self._engine.check_health()


class HandleEngine:
    """An Engine whose replicas live behind a Serve handle.

    Requests go to the replica that Serve chooses. A request whose replica died before it said anything goes to another.
    """

    def __init__(self, handle: DeploymentHandle[Any], retry_delays_s: tuple[float, ...] = _RETRY_DELAYS_S) -> None:
        self._handle = handle
        self._retry_delays_s = retry_delays_s
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
            except EngineDeadError:
                if has_begun or delay_s is None or self._is_closed:
                    raise
                await asyncio.sleep(delay_s)

    async def stats(self) -> EngineStats:
        """The sum over all replicas."""
        with _translated():
            snapshots: list[EngineStats] = await self._handle.broadcast("stats").results_async()
        totals = {field.name: sum(getattr(one, field.name) for one in snapshots) for field in fields(EngineStats)}
        return EngineStats(**totals)

    async def check_health(self) -> None:
        """Whether some replica can serve; Serve replaces those that cannot."""
        if self._is_closed:
            raise EngineDeadError("The gateway is shutting down.")
        with _translated():
            await self._handle.check_health.remote()

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
                async for item in response:
                    yield item
            finished = True
        finally:
            if not finished:
                # Reaches the replica's generator, whose `finally` aborts the request in the engine.
                response.cancel()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's and Serve's errors as the engines' own."""
    try:
        yield
    except RayTaskError as error:
        raise _cause(error) from error
    except RayActorError as error:
        raise EngineDeadError("The engine's process died.") from error
    except BackPressureError as error:
        raise EngineOverloadedError("All of the model's replicas are busy and its queue is full.") from error
    except DeploymentUnavailableError as error:
        raise EngineDeadError("The model could not be deployed.") from error
    except (RayServeException, RayError) as error:
        raise EngineDeadError(f"The engine cannot be reached: {type(error).__name__}.") from error


def _cause(error: RayTaskError) -> Exception:
    """The exception that the replica raised; RayTaskError wraps it and often is a subclass of it as well."""
    cause = error.cause
    if isinstance(cause, EngineError):
        return cause
    if isinstance(cause, RayActorError):
        return EngineDeadError("The engine's process died.")
    return InternalError()
