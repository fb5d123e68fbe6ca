"""A gateway's rounds: leases renewed, the dead forgotten, leavers announced, claims swept."""

import asyncio

import pytest

from gateway.routing.fleet_keeper import FleetKeeper
from gateway.routing.placements import Placements
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.state.fleet import Clock, chain


@pytest.fixture
def placements() -> Placements:
    placements = Placements()
    placements.replicas = ("r1", "r2")
    return placements


@pytest.fixture
def state(client: StateClient, config: StateConfig, clock: Clock) -> FleetState:
    return FleetState(client, config, "gateway", clock)


@pytest.fixture
async def keeper(client: StateClient, config: StateConfig, state: FleetState, placements: Placements) -> FleetKeeper:
    index = PrefixIndex(client, config)
    for replica in ("r1", "r2"):
        await index.register(replica, "epoch")
        await index.apply(replica, "epoch", 1, chain("x", 5))
    keeper = FleetKeeper(client, config, state, placements)
    await keeper.keep()
    return keeper


def _reserve(state: FleetState, replica: str) -> None:
    state.reserve(replica, [], 10, confirmed_blocks=0, new_tokens=10, prefill_rate=1000.0, expected_s=0.1)


async def test_load_outlives_its_lease_as_long_as_the_gateway_keeps_it(
    keeper: FleetKeeper, state: FleetState, clock: Clock, config: StateConfig
) -> None:
    _reserve(state, "r1")
    await state.settled()
    for _ in range(4):
        clock.now_s += config.load_lease_s / 2
        await keeper.keep()
    assert (await state.look([], ["r1"], 0)).replicas["r1"].in_flight == 1
    clock.now_s += config.load_lease_s * 1.1
    assert not (await state.look([], ["r1"], 0)).replicas["r1"].in_flight


async def test_who_leaves_drains_and_who_dies_is_forgotten(
    keeper: FleetKeeper, state: FleetState, placements: Placements
) -> None:
    placements.replicas = ("r2",)
    await keeper.keep()
    view = await state.look(chain("x", 5), ["r1", "r2"], 2)
    assert (view.replicas["r1"].draining, view.replicas["r2"].draining) == (True, False)
    placements.died("r2")
    await keeper.keep()
    view = await state.look(chain("x", 5), ["r1", "r2"], 2)
    assert view.replicas["r2"].confirmed_blocks == 0
    assert view.replicas["r1"].confirmed_blocks == 5


async def test_who_comes_back_is_used_again(keeper: FleetKeeper, state: FleetState, placements: Placements) -> None:
    """The same process under the same epoch, as after a reconfiguration in place."""
    placements.replicas = ("r2",)
    await keeper.keep()
    placements.replicas = ("r1", "r2")
    await keeper.keep()
    assert not (await state.look([], ["r1"], 0)).replicas["r1"].draining


async def test_announcements_wait_for_a_state_that_is_away(
    config: StateConfig, state: FleetState, placements: Placements, client: StateClient
) -> None:
    away = StateClient(config, "unix:///nowhere/redis.sock", "m", timeout_s=1.0)
    keeper = FleetKeeper(away, config, state, placements)
    await keeper.keep()
    placements.replicas = ("r2",)
    await keeper.keep()
    assert keeper._leaving == {"r1"}
    placements.replicas = ("r1", "r2")
    await keeper.keep()
    assert not keeper._leaving
    await away.close()


async def test_it_runs_until_it_is_closed(
    config: StateConfig, state: FleetState, placements: Placements, client: StateClient
) -> None:
    quick = config.model_copy(update={"load_lease_s": 0.03})
    keeper = FleetKeeper(client, quick, state, placements)
    keeper.start()
    while keeper._known != {"r1", "r2"}:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await keeper.close()
