"""Starting engines: each by itself, again where that can help, and named by a hash that follows."""

import asyncio

import pytest

from engines.errors import EngineDeadError, ModelLoadError
from engines.types import ModelCard
from gateway import fleet as fleet_module
from gateway.errors import ModelNotReadyError, UnknownModelError
from gateway.fleet import Fleet
from tests.gateway.fakes import ScriptedEngine, config


async def test_a_peer_that_comes_up_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_RETRY_DELAYS_S", (0.0,))
    engine = ScriptedEngine()
    engine.start_errors = [EngineDeadError("Away."), EngineDeadError("Still away.")]
    fleet = Fleet(config("a"), {"a": engine})
    fleet.start()
    await asyncio.wait_for(fleet.started(), 5)
    assert fleet.get("a").card == engine.card


async def test_a_model_that_cannot_load_is_not_tried_again() -> None:
    broken, sound = ScriptedEngine(), ScriptedEngine()
    broken.start_errors = [ModelLoadError("No such folder.")]
    fleet = Fleet(config("broken", "sound"), {"broken": broken, "sound": sound})
    before = fleet.config_hash
    fleet.start()
    await asyncio.wait_for(fleet.started(), 5)
    assert [model.name for model in fleet.ready()] == ["sound"]
    assert fleet.config_hash != before
    with pytest.raises(ModelNotReadyError, match=r"No such folder\."):
        fleet.get("broken")
    with pytest.raises(UnknownModelError):
        fleet.get("absent")


async def test_closing_while_starting_stops_the_start() -> None:
    engine = ScriptedEngine()
    engine.start_errors = [EngineDeadError("Away.")] * 100
    fleet = Fleet(config("a"), {"a": engine})
    fleet.start()
    await asyncio.sleep(0)
    await asyncio.wait_for(fleet.close(), 5)
    assert len(engine.start_errors) >= 99


async def test_waiting_ends_with_the_models_or_with_its_limit() -> None:
    class Never(ScriptedEngine):
        async def start(self) -> ModelCard:
            await asyncio.Event().wait()
            raise AssertionError

    fleet = Fleet(config("a", "b"), {"a": ScriptedEngine(), "b": Never()})
    fleet.start()
    await fleet.wait(0.01)
    while not fleet.ready():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert [model.name for model in fleet.ready()] == ["a"]
    await fleet.close()


async def test_an_engine_that_is_away_is_not_waited_for_twice() -> None:
    engine = ScriptedEngine()
    engine.start_errors = [EngineDeadError("Away.")] * 100
    fleet = Fleet(config("a"), {"a": engine})
    fleet.start()
    async with asyncio.timeout(5):
        await fleet.wait(60)
    await fleet.close()
