"""Claims come with events in sequence, and go with evictions, leases, epochs and age."""

import itertools
import random
from collections.abc import Sequence

import pytest

from engines.block_hash import BlockHash
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.depths import held_depths
from gateway.state.fleet_state import FleetState
from gateway.state.fleet_view import FleetView
from gateway.state.load import Reservation
from gateway.state.look import FleetReader
from gateway.state.prefix_index import MAX_BATCH, Applied, EngineReport, PrefixIndex
from tests.gateway.state.fleet import Clock, chain

KEYS = Script("return redis.call('KEYS', ns .. ':' .. ARGV[3])")
DELETE = Script("return redis.call('DEL', ns .. ':' .. ARGV[3])")
SLOTS = Script("return {redis.call('HLEN', ns .. ':slots'), redis.call('BITCOUNT', ns .. ':live')}")


@pytest.fixture
def index(client: StateClient, config: StateConfig) -> PrefixIndex:
    return PrefixIndex(client, config)


async def look(
    client: StateClient, config: StateConfig, hashes: list[BlockHash], replicas: Sequence[str], max_holders: int
) -> FleetView:
    """As a gateway that has just come up sees it."""
    return await FleetReader(client, config).look(hashes, replicas, max_holders)


async def confirmed(client: StateClient, hashes: list[BlockHash], *replicas: str) -> dict[str, int]:
    view = await look(client, StateConfig(), hashes, replicas, 8)
    return {name: state.confirmed_blocks for name, state in view.replicas.items()}


async def test_the_match_is_the_run_of_held_blocks_from_the_start(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 6)
    await index.register("r1", "1")
    await index.register("r2", "1")
    await index.apply("r1", "1", 1, prompt[:4])
    await index.apply("r2", "1", 1, [prompt[0], *prompt[2:]])  # a hole after the first block
    assert await confirmed(client, prompt, "r1", "r2") == {"r1": 4, "r2": 1}
    assert await confirmed(client, chain("b", 3), "r1", "r2") == {"r1": 0, "r2": 0}


async def test_holders_are_candidates_without_being_asked_for(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 3)
    await index.register("r1", "1")
    await index.register("r2", "1")
    await index.apply("r1", "1", 1, prompt)
    assert await confirmed(client, prompt, "r2") == {"r1": 3, "r2": 0}


async def test_evicted_blocks_are_no_longer_held_and_leave_no_keys(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 4)
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, prompt)
    await index.apply("r1", "1", 2, removed=prompt[2:])
    assert await confirmed(client, prompt, "r1") == {"r1": 2}
    assert len(await client.run(KEYS, "b:*")) == 2


async def test_a_message_said_twice_changes_nothing(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 4)
    await index.register("r1", "1")
    assert await index.apply("r1", "1", 1, prompt) is Applied.OK
    assert await index.apply("r1", "1", 2, removed=prompt[1:]) is Applied.OK
    assert await index.apply("r1", "1", 1, prompt) is Applied.OK
    assert await confirmed(client, prompt, "r1") == {"r1": 1}


async def test_a_missing_message_is_a_gap_and_is_not_applied(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 2)
    await index.register("r1", "1")
    assert await index.apply("r1", "1", 2, prompt) is Applied.GAP
    assert await confirmed(client, prompt, "r1") == {"r1": 0}
    assert await index.apply("r1", "1", 1, prompt) is Applied.OK


async def test_a_new_epoch_ends_what_the_old_one_claimed(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 3)
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, prompt)
    await index.register("r1", "2")
    assert await confirmed(client, prompt, "r1") == {"r1": 0}
    assert await index.apply("r1", "1", 2, prompt) is Applied.UNKNOWN
    await index.apply("r1", "2", 1, prompt[:1])
    assert await confirmed(client, prompt, "r1") == {"r1": 1}


async def test_a_redis_that_forgot_the_replica_says_so(index: PrefixIndex) -> None:
    assert await index.apply("r1", "1", 1, chain("a", 1)) is Applied.UNKNOWN


async def test_claims_end_with_the_lease_and_return_with_it(
    index: PrefixIndex, client: StateClient, clock: Clock, config: StateConfig
) -> None:
    prompt = chain("a", 3)
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, prompt)
    clock.now_s += config.replica_lease_s + 0.1
    assert await confirmed(client, prompt, "r1") == {"r1": 0}
    await index.apply("r1", "1", 1)  # nothing new, but alive
    assert await confirmed(client, prompt, "r1") == {"r1": 3}


async def test_sweeping_removes_all_that_a_dead_replica_left(
    index: PrefixIndex, client: StateClient, clock: Clock, config: StateConfig
) -> None:
    prompt = chain("a", 700)
    await index.register("r1", "1")
    await index.register("r2", "1")
    await index.apply("r1", "1", 1, prompt)
    await index.apply("r2", "1", 1, prompt[:10])
    clock.now_s += 3 * config.replica_lease_s
    await index.apply("r2", "1", 1)
    assert await index.sweep() == 1  # a batch of 512
    assert await index.sweep() == 0
    assert len(await client.run(KEYS, "b:*")) == 10
    assert await client.run(KEYS, "held:*") == [f"{client.prefix}:held:1".encode()]
    assert await confirmed(client, prompt, "r2") == {"r2": 10}
    assert await index.apply("r1", "1", 2) is Applied.UNKNOWN


async def test_a_record_outlives_its_lease_by_a_day_after_its_last_use(
    index: PrefixIndex, client: StateClient, clock: Clock, config: StateConfig
) -> None:
    state = FleetState(client, config, "g", clock)
    clock.now_s = 1e9  # days after what "never" is stored as

    async def records() -> set[bytes]:
        await index.sweep()
        return set(await client.run(Script("return redis.call('HKEYS', ns .. ':r')")))

    def send(replica: str) -> Reservation:
        return state.reserve(replica, [], 10, confirmed_blocks=0, new_tokens=10, prefill_rate=1.0, expected_s=1.0)

    for name in ("idle", "used", "busy"):
        await index.register(name, "1")
    used, busy, _ = send("used"), send("busy"), send("never registered")
    state.finish(used, 0)
    await state.settled()
    clock.now_s += 3 * config.replica_lease_s
    assert await records() == {b"idle", b"used", b"busy", b"never registered"}
    clock.now_s += 86_400
    send("busy")
    await state.settled()
    for _ in range(2):
        assert await records() == {b"busy"}
    state.finish(busy, 0)
    await state.settled()


async def test_slots_are_used_again_after_a_rest(index: PrefixIndex, client: StateClient, clock: Clock) -> None:
    for epoch in range(5):
        await index.register("r1", str(epoch))
        while await index.sweep():
            pass
        clock.now_s += 200
    assert await client.run(Script("return redis.call('GET', ns .. ':num_slots')")) == b"2"


@pytest.mark.parametrize("lost", ["live", "num_slots", "slots", "e:r1", "r"])
async def test_what_redis_lost_is_said_again(index: PrefixIndex, client: StateClient, lost: str) -> None:
    """As an engine goes on that is told UNKNOWN, while another one comes up."""
    prompt = chain("a", 3)
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, prompt)
    assert await client.run(DELETE, lost) == 1
    await index.register("r2", "1")
    if await index.apply("r1", "1", 1) is Applied.UNKNOWN:
        await index.register("r1", "2")
        await index.apply("r1", "2", 1, prompt)
    assert await confirmed(client, prompt, "r1", "r2") == {"r1": 3, "r2": 0}
    assert await index.apply("r2", "1", 1) is Applied.OK
    assert await client.run(SLOTS) == [2, 2]


async def test_a_lost_count_hands_out_no_slot_that_rests(index: PrefixIndex, client: StateClient) -> None:
    for _ in range(3):  # one is cleared, one is being cleared, one is in use
        await index.register("r1", "1")
        await index.apply("r1", "1", 1, chain("a", 600))
        if not await client.run(KEYS, "free"):
            await index.sweep()
            await index.sweep()
    assert await client.run(DELETE, "num_slots") == 1
    await index.register("r2", "1")
    assert await client.run(Script("return redis.call('HGET', ns .. ':slots', 3)")) == b"r2"


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_slot_ends_though_the_engine_has_been_off_for_days(
    index: PrefixIndex, client: StateClient, clock: Clock, comes_back: bool
) -> None:
    """Its epoch and its record have ended by themselves."""
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, chain("a", 3))
    await client.run(DELETE, "e:r1")
    await client.run(DELETE, "r")
    clock.now_s += 2 * 86_400
    if comes_back:
        await index.register("r1", "2")
    await index.sweep()
    assert await client.run(SLOTS) == [int(comes_back)] * 2
    assert await client.run(KEYS, "b:*") == []
    assert await client.run(KEYS, "dirty") == []


async def test_drained_replicas_say_so_and_forgotten_ones_are_gone(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 2)
    await index.register("r1", "1")
    await index.apply("r1", "1", 1, prompt)
    await index.drain("r1")
    assert (await look(client, StateConfig(), prompt, (), 8)).replicas["r1"].draining
    await index.forget("r1")
    assert (await look(client, StateConfig(), prompt, (), 8)).replicas == {}


async def test_reports_are_unknown_once_they_are_old(index: PrefixIndex, client: StateClient, clock: Clock) -> None:
    await index.register("r1", "1")
    await index.apply("r1", "1", 0, report=EngineReport(kv_use=0.5))
    assert (await look(client, StateConfig(), [], ["r1"], 8)).replicas["r1"].kv_use == 0.5
    clock.now_s += StateConfig().report_ttl_s + 1
    assert (await look(client, StateConfig(), [], ["r1"], 8)).replicas["r1"].kv_use is None


async def test_a_message_has_a_largest_size(index: PrefixIndex) -> None:
    with pytest.raises(ValueError, match="at most"):
        await index.apply("r1", "1", 1, chain("a", MAX_BATCH + 1))


async def test_fleets_do_not_see_each_other(client: StateClient, server: object, config: StateConfig) -> None:
    prompt = chain("a", 2)
    await PrefixIndex(client, config).register("r1", "1")
    await PrefixIndex(client, config).apply("r1", "1", 1, prompt)
    other = StateClient(config, server.url, "another model")  # type: ignore[attr-defined]
    try:
        assert (await look(other, config, prompt, (), 8)).replicas == {}
    finally:
        await other.close()


async def test_random_events_agree_with_plain_sets(index: PrefixIndex, client: StateClient) -> None:
    """Seventy replicas, so that bitmaps have several words; every match against the definition."""
    rng = random.Random(7)
    chains = [chain(f"c{number}", 40) for number in range(4)]
    names = [f"r{number}" for number in range(70)]
    held: dict[str, set[BlockHash]] = {name: set() for name in names}
    for name in names:
        await index.register(name, "1")
        for seq in range(1, 4):
            added = {block for each in chains for block in each[: rng.randint(0, 40)]} - held[name]
            held[name] |= added
            removed = {block for block in held[name] if rng.random() < 0.03}
            held[name] -= removed
            assert await index.apply(name, "1", seq, list(added), list(removed)) is Applied.OK
    for prompt in (*chains, *(each[:32] for each in chains)):
        expected = {name: _depth(prompt, held[name]) for name in names}
        view = await look(client, StateConfig(), prompt, names, 8)
        assert {name: state.confirmed_blocks for name, state in view.replicas.items()} == expected
        assert _histogram(view) == sorted(depth for depth in expected.values() if depth)
        few = await look(client, StateConfig(), prompt, (), 5)
        depths = sorted((state.confirmed_blocks for state in few.replicas.values()), reverse=True)
        assert depths == sorted(expected.values(), reverse=True)[:5]


def _depth(prompt: Sequence[BlockHash], held: set[BlockHash]) -> int:
    """The last of the depths asked about before the first one that is not held."""
    run = itertools.takewhile(lambda depth: prompt[depth - 1] in held, held_depths(len(prompt)))
    return max(run, default=0)


def _histogram(view: FleetView) -> list[int]:
    return [depth for depth, count in view.holders for _ in range(count)]


async def test_equal_holders_take_turns(index: PrefixIndex, client: StateClient) -> None:
    prompt = chain("a", 2)
    for number in range(6):
        await index.register(f"r{number}", "1")
        await index.apply(f"r{number}", "1", 1, prompt)
    reader = FleetReader(client, StateConfig())
    seen = [frozenset((await reader.look(prompt, (), 2)).replicas) for _ in range(6)]
    assert all(len(each) == 2 for each in seen)
    assert frozenset().union(*seen) == {f"r{number}" for number in range(6)}
