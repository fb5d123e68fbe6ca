"""Decisions through a real Redis: they reserve, predict, explain without a trace, and go on without Redis."""

import asyncio
import random
from collections import Counter

import pytest

from gateway.routing.replica_choice import choose_replica
from gateway.routing.replica_router import ReplicaRouter, Routed
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.state.fleet import Clock, chain

REPLICAS = [f"r{number}" for number in range(4)]


@pytest.fixture
async def index(client: StateClient, config: StateConfig) -> PrefixIndex:
    index = PrefixIndex(client, config)
    for replica in REPLICAS:
        await index.register(replica, "1")
    return index


@pytest.fixture
def router(index: PrefixIndex, client: StateClient, config: StateConfig, clock: Clock) -> ReplicaRouter:
    return ReplicaRouter(FleetState(client, config, "g1", clock), block_size=16, rng=random.Random(0))


async def route(router: ReplicaRouter, name: str, blocks: int = 20) -> Routed:
    routed = await router.route(chain(name, blocks), blocks * 16 + 5, REPLICAS)
    assert routed is not None
    await router.state.settled()
    return routed


async def test_siblings_follow_a_prediction_and_strangers_spread(router: ReplicaRouter) -> None:
    first = await route(router, "a")
    second = await route(router, "a")
    assert (first.decision.reason, second.decision.reason) == ("cold", "warm")
    assert second.decision.replica == first.decision.replica
    assert second.reservation.new_tokens == 5
    assert second.reservation.expected_warm_tokens == 320
    strangers = {(await route(router, f"other {number}")).decision.replica for number in range(12)}
    assert strangers == set(REPLICAS)


async def test_two_gateways_that_do_not_know_of_each_other_send_a_new_prefix_to_one_place(
    index: PrefixIndex, client: StateClient, config: StateConfig, clock: Clock
) -> None:
    states = [FleetState(client, config, f"g{number}", clock) for number in range(4)]
    routers = [ReplicaRouter(state, 16, rng=random.Random(number)) for number, state in enumerate(states)]
    for name in ("a", "b", "c"):
        hashes = chain(name, 20)
        explained = [await each.explain(hashes, 320, REPLICAS, REPLICAS) for each in routers]
        assert len({each.decision.replica for each in explained}) == 1


async def test_requests_that_come_at_once_are_decided_one_after_the_other(
    index: PrefixIndex, client: StateClient, config: StateConfig, clock: Clock
) -> None:
    """By four gateways that saw the same idle fleet, with one new prompt each."""
    states = [FleetState(client, config, f"g{number}", clock) for number in range(4)]
    routers = [ReplicaRouter(state, 16, rng=random.Random(7)) for state in states]  # equal draws
    names = iter(range(1000))
    for _ in range(3):
        routed = await asyncio.gather(*(each.route(chain(f"new {next(names)}", 20), 320, REPLICAS) for each in routers))
        assert {each.decision.replica for each in routed if each is not None} == set(REPLICAS)
        for state in states:
            await state.settled()
    assert sum(state.counts.overtaken for state in states) > 0
    view = await states[0].look([], REPLICAS, 8)
    assert {each.in_flight for each in view.replicas.values()} == {3}


async def test_in_a_crowd_the_last_try_is_taken(router: ReplicaRouter) -> None:
    hashes = chain("crowd", 20)
    routed = await asyncio.gather(*(router.route(hashes, 325, REPLICAS) for _ in range(40)))
    await router.state.settled()
    assert all(each is not None for each in routed)
    view = await router.state.look(hashes, REPLICAS, 8)
    assert sum(each.in_flight or 0 for each in view.replicas.values()) == 40


async def test_confirmed_blocks_attract(router: ReplicaRouter, index: PrefixIndex) -> None:
    await index.apply("r2", "1", 1, chain("a", 15))
    routed = await route(router, "a")
    assert (routed.decision.replica, routed.decision.reason) == ("r2", "warm")
    assert routed.decision.expectation("r2").warm_tokens == 240


async def test_a_prefix_that_one_replica_cannot_serve_alone_finds_other_homes(
    router: ReplicaRouter, index: PrefixIndex
) -> None:
    hot = chain("hot", 50)
    await index.apply("r2", "1", 1, hot)
    chosen: Counter[str | None] = Counter()
    for number in range(40):
        routed = await router.route(hot + chain(f"tail {number}", 50), 1600, REPLICAS)
        assert routed is not None
        await router.state.settled()
        chosen[routed.decision.replica] += 1
    assert set(chosen) == set(REPLICAS)
    assert max(chosen.values()) <= 16


async def test_a_dry_run_changes_nothing(router: ReplicaRouter) -> None:
    hashes = chain("a", 20)
    for _ in range(3):
        explained = await router.explain(hashes, 320, REPLICAS, REPLICAS)
        assert explained.view.matched_blocks == 0
        assert {each.in_flight for each in explained.candidates} == {0}
        assert len(explained.decision.expectations) == len(REPLICAS)
    await router.state.settled()


async def test_a_decision_can_be_made_again_from_what_it_recorded(router: ReplicaRouter, index: PrefixIndex) -> None:
    await index.apply("r2", "1", 1, chain("a", 15))
    routed = await route(router, "a")
    assert choose_replica(routed.explained.request, routed.explained.candidates) == routed.decision


async def test_gone_replicas_are_not_chosen(router: ReplicaRouter, index: PrefixIndex) -> None:
    await index.apply("r2", "1", 1, chain("a", 20))
    routed = await router.route(chain("a", 20), 325, ["r0", "r1"])
    assert routed is not None
    assert {each.replica for each in routed.decision.expectations} == {"r0", "r1"}
    assert await router.route(chain("a", 20), 325, []) is None
    await router.state.settled()


async def test_a_large_fleet_is_sampled_and_the_holder_is_still_found(
    client: StateClient, config: StateConfig, clock: Clock
) -> None:
    index = PrefixIndex(client, config)
    names = [f"x{number}" for number in range(50)]
    for name in names:
        await index.register(name, "1")
    await index.apply("x37", "1", 1, chain("a", 20))
    router = ReplicaRouter(FleetState(client, config, "g1", clock), 16, rng=random.Random(3))
    routed = await router.route(chain("a", 20), 325, names)
    assert routed is not None
    assert routed.decision.replica == "x37"
    assert 8 <= len(routed.decision.expectations) <= 9
    await router.state.settled()


async def test_decisions_go_on_without_redis(clock: Clock) -> None:
    config = StateConfig(url="redis://127.0.0.1:1", timeout_s=0.5)
    client = StateClient(config, "redis://127.0.0.1:1", "m")
    state = FleetState(client, config, "g1", clock)
    router = ReplicaRouter(state, 16, rng=random.Random(0))
    first, second = await route(router, "a"), await route(router, "a")
    assert first.explained.view.source == "local"
    assert second.decision.replica == first.decision.replica  # it knows where it sent the prefix
    spread = {(await route(router, f"b{number}")).decision.replica for number in range(16)}
    assert spread == set(REPLICAS)
    assert state.counts.fallback_share == 1.0
    await client.close()


async def test_a_session_without_a_prefix_in_common_stays_on_its_replica(router: ReplicaRouter) -> None:
    """Prompts shorter than a block, or of an engine whose tokens nobody here can count."""
    first, other = chain("session", 2)

    async def go(session: bytes) -> str:
        routed = await router.route([], 5, REPLICAS, session=session)
        assert routed is not None
        router.state.first_token(routed.reservation, 0)
        router.state.finish(routed.reservation, 1)
        await router.state.settled()
        return routed.reservation.replica

    homes = {session: await go(session) for session in (first, other)}
    for _ in range(6):
        assert {session: await go(session) for session in homes} == homes


async def test_a_replica_whose_engine_fell_silent_gets_nothing_while_others_speak(
    router: ReplicaRouter, index: PrefixIndex, clock: Clock, config: StateConfig
) -> None:
    clock.now_s += config.replica_lease_s + 1
    for replica in REPLICAS[1:]:
        await index.apply(replica, "1", 1)
    chosen = {(await route(router, f"new {number}")).decision.replica for number in range(12)}
    assert chosen == set(REPLICAS[1:])
    clock.now_s += config.replica_lease_s + 1  # nobody speaks: the fleet may have no such engines
    assert (await route(router, "later")).decision.replica is not None


async def test_after_redis_came_back_empty_the_first_to_register_is_not_alone(
    client: StateClient, config: StateConfig, clock: Clock
) -> None:
    replicas = [f"r{number}" for number in range(8)]
    index, state = PrefixIndex(client, config), FleetState(client, config, "g1", clock)
    router = ReplicaRouter(state, 16, rng=random.Random(0))
    for replica in replicas:
        await index.register(replica, "1")
    await client.run(Script("return redis.call('DEL', unpack(redis.call('KEYS', ns .. ':*')))"))
    await index.register("r3", "2")
    held = [await router.route(chain(f"new {number}", 20), 320, replicas) for number in range(160)]
    chosen = Counter(routed.reservation.replica for routed in held if routed is not None)
    assert set(chosen) == set(replicas)
    assert max(chosen.values()) <= 2 * 160 / 8
    await state.settled()


async def test_a_silent_replica_stays_so_when_its_lease_is_swept(
    router: ReplicaRouter, index: PrefixIndex, clock: Clock, config: StateConfig
) -> None:
    for _ in range(4):
        clock.now_s += config.replica_lease_s - 1
        for replica in REPLICAS[1:]:
            await index.apply(replica, "1", 1)
        await index.sweep()
    explained = await router.explain(chain("a", 20), 320, REPLICAS, REPLICAS)
    found = {each.replica: each.set_aside for each in explained.decision.expectations}
    assert found == {"r0": "silent", "r1": None, "r2": None, "r3": None}
    assert {each.in_flight for each in explained.candidates} == {0}
