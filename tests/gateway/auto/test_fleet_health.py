"""Who is up and who is full, without any request waiting for the answer."""

import asyncio
from dataclasses import replace

import pytest

from engines.errors import EngineDeadError
from engines.types import EngineStats
from gateway.auto.fleet_health import FleetHealth
from gateway.errors import InternalError
from gateway.fleet import Fleet
from tests.gateway.auto_world import until
from tests.gateway.fakes import ScriptedEngine, config


class _Busy(ScriptedEngine):
    """Has this many requests waiting; answers after `delay_s`."""

    def __init__(self, num_waiting: int = 0, delay_s: float = 0.0) -> None:
        super().__init__()
        self.num_waiting = num_waiting
        self.delay_s = delay_s

    async def stats(self) -> EngineStats:
        await asyncio.sleep(self.delay_s)
        return replace(await super().stats(), num_waiting=self.num_waiting)


class _Broken(ScriptedEngine):
    """Its health check raises what no engine should."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error


async def _health(engine: ScriptedEngine, limit: int = 3) -> FleetHealth:
    fleet = Fleet(config("a"), {"a": engine})
    health = FleetHealth(fleet, {"a": limit}, period_s=0.01, timeout_s=0.05)
    assert health.trouble("a") == "not ready"
    await health.ask_once()
    fleet.start()
    await fleet.started()
    return health


async def test_a_model_is_up_from_its_start_until_it_says_otherwise() -> None:
    engine = _Busy()
    health = await _health(engine)
    assert health.trouble("a") is None
    engine.health = EngineDeadError("Its loop died.")
    await health.ask_once()
    assert health.trouble("a") == "Its loop died."
    engine.health = None
    await health.ask_once()
    assert health.trouble("a") is None


async def test_a_model_with_too_many_waiting_is_saturated() -> None:
    engine = _Busy(num_waiting=2)
    health = await _health(engine)
    await health.ask_once()
    assert not health.is_saturated("a")
    engine.num_waiting = 3
    await health.ask_once()
    assert health.is_saturated("a")


async def test_no_answer_is_trouble() -> None:
    health = await _health(_Busy(delay_s=10.0))
    await health.ask_once()
    assert health.trouble("a") == "no answer within 0.05 seconds"


@pytest.mark.parametrize("error", [InternalError(), RuntimeError("of another loop")])
async def test_a_bug_of_one_engine_is_its_trouble_and_does_not_end_the_watch(error: Exception) -> None:
    health = await _health(engine := _Broken(error))
    task = asyncio.create_task(health.run())
    await until(lambda: "could not be asked" in (health.trouble("a") or ""))
    engine.error = None
    await until(lambda: health.trouble("a") is None)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_it_keeps_asking() -> None:
    engine = _Busy()
    health = await _health(engine)
    task = asyncio.create_task(health.run())
    engine.health = EngineDeadError("Gone.")
    await until(lambda: health.trouble("a") is not None)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
