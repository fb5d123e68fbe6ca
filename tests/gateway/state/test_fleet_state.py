"""Load, rates and predictions as gateways share them; and what one of them still knows when Redis is gone."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.fleet_state import FleetState
from gateway.state.fleet_view import ReplicaState
from gateway.state.load import Reservation
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.state.fleet import Clock, chain

PROMPT = chain("p", 4)


@pytest.fixture
async def index(client: StateClient, config: StateConfig) -> PrefixIndex:
    index = PrefixIndex(client, config)
    await index.register("r1", "1")
    await index.register("r2", "1")
    return index


@pytest.fixture
async def gateways(
    index: PrefixIndex, client: StateClient, config: StateConfig, clock: Clock
) -> AsyncIterator[tuple[FleetState, FleetState]]:
    states = FleetState(client, config, "g1", clock), FleetState(client, config, "g2", clock)
    yield states
    for state in states:
        await state.settled()


def send(state: FleetState, replica: str = "r1", tokens: int = 1000, rate: float = 1000.0) -> Reservation:
    return state.reserve(
        replica,
        PROMPT,
        tokens,
        confirmed_blocks=0,
        new_tokens=tokens,
        prefill_rate=rate,
        expected_s=tokens / rate,
    )


async def claim(state: FleetState, sends: int | None, tokens: int = 1000) -> Reservation | None:
    return await state.claim(
        "r1",
        PROMPT,
        tokens,
        sends=sends,
        confirmed_blocks=0,
        new_tokens=tokens,
        prefill_rate=1000.0,
        expected_s=tokens / 1000,
    )


async def seen(state: FleetState, replica: str = "r1") -> ReplicaState:
    await state.settled()
    return (await state.look(PROMPT, ["r1", "r2"], 8)).replicas[replica]


async def test_a_gateway_sees_what_another_sent(gateways: tuple[FleetState, FleetState]) -> None:
    first, second = gateways
    one = send(first, tokens=1000)
    send(second, tokens=500)
    await first.settled()
    state = await seen(second)
    assert (state.queued_tokens, state.in_flight) == (1500, 2)
    first.first_token(one, cached_tokens=0)
    await first.settled()
    state = await seen(second)
    assert (state.queued_tokens, state.in_flight) == (500, 2)
    first.finish(one, output_tokens=5)
    await first.settled()
    assert (await seen(second)).in_flight == 1


async def test_of_two_claims_by_one_look_the_later_is_refused(gateways: tuple[FleetState, FleetState]) -> None:
    first, second = gateways
    sends = (await seen(first)).sends
    assert await claim(first, sends) is not None
    assert await claim(second, sends) is None
    state = await seen(second)
    assert (state.queued_tokens, state.in_flight, state.recent_tokens) == (1000, 1, 1000)
    assert state.predicted_blocks == 4
    assert second.counts.overtaken == 1
    assert second.in_flight("r1") == 0
    assert await claim(second, state.sends) is not None
    assert (await seen(first)).in_flight == 2


async def test_requests_of_one_gateway_overtake_each_other_too(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    sends = (await seen(state)).sends
    claims = await asyncio.gather(*(claim(state, sends) for _ in range(5)))
    assert sum(each is not None for each in claims) == 1
    after = await seen(state)
    assert (after.queued_tokens, after.in_flight) == (1000, 1)


async def test_alone_it_claims_without_waiting_and_is_overtaken_by_itself_only(
    index: PrefixIndex, client: StateClient, config: StateConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = FleetState(client, config, "alone", clock)
    send(state)  # Redis knows the scripts from now on
    await seen(state)
    clock.now_s += 5
    sends = (await seen(state)).sends

    async def never(*_: object) -> None:
        raise AssertionError("nobody else could be quicker")

    with monkeypatch.context() as patch:
        patch.setattr(client, "run", never)
        assert await claim(state, sends) is not None
        assert await claim(state, sends) is None
    assert state.counts.overtaken == 1
    after = await seen(state)
    assert (after.in_flight, after.sends) == (2, sends + 1)
    assert await claim(state, after.sends) is not None
    await state.settled()


async def test_company_is_noticed_and_waited_for(gateways: tuple[FleetState, FleetState], clock: Clock) -> None:
    first, second = gateways
    await seen(first)
    clock.now_s += 5
    send(second)
    await second.settled()
    sends = (await seen(first)).sends
    send(second)
    await second.settled()
    assert await claim(first, sends) is None, "Redis was asked, and knows of the other one's request"


async def test_a_claim_that_must_not_be_refused_is_not(gateways: tuple[FleetState, FleetState]) -> None:
    first, second = gateways
    sends = (await seen(first)).sends
    send(first)
    await first.settled()
    assert await claim(second, None) is not None
    await second.settled()
    after = await seen(second)
    assert (after.in_flight, after.sends - sends) == (2, 2)


async def test_a_cancelled_claim_leaves_no_load(gateways: tuple[FleetState, FleetState]) -> None:
    state, other = gateways
    sends = (await seen(state)).sends
    task = asyncio.create_task(claim(state, sends))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await state.settled()
    await asyncio.sleep(0.05)  # what was on its way when it was cancelled
    after = await seen(other)
    assert (after.queued_tokens, after.in_flight) == (0, 0)
    assert state.in_flight("r1") == 0


async def test_an_end_without_a_first_token_releases_everything(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    one = send(state)
    state.finish(one, output_tokens=0)
    state.finish(one, output_tokens=0)
    state.first_token(one, cached_tokens=0)
    after = await seen(state)
    assert (after.queued_tokens, after.in_flight) == (0, 0)
    assert state.in_flight("r1") == 0


async def test_the_load_of_a_dead_gateway_ends_with_its_lease(
    gateways: tuple[FleetState, FleetState], index: PrefixIndex, clock: Clock, config: StateConfig
) -> None:
    dead, alive = gateways
    send(dead)
    mine = send(alive, tokens=100)
    await dead.settled()
    assert (await seen(alive)).in_flight == 2
    for _ in range(2):
        clock.now_s += config.load_lease_s * 0.7
        await alive.heartbeat()
        await index.apply("r1", "1", 0)
    assert (await seen(alive)).in_flight == 1
    alive.finish(mine, output_tokens=0)
    assert (await seen(alive)).in_flight == 0


async def test_late_reports_do_not_undo_newer_ones(
    gateways: tuple[FleetState, FleetState], client: StateClient
) -> None:
    state, other = gateways
    reservations = [send(state, tokens=10) for _ in range(20)]
    for each in reservations:  # all in flight at once, over several connections
        state.first_token(each, cached_tokens=0)
        state.finish(each, output_tokens=0)
    await state.settled()
    after = await seen(other)
    assert (after.queued_tokens, after.in_flight) == (0, 0)


async def test_predictions_hold_siblings_together_and_end(
    gateways: tuple[FleetState, FleetState], index: PrefixIndex, clock: Clock, config: StateConfig
) -> None:
    first, second = gateways
    send(first, tokens=1000, rate=1000.0)
    await first.settled()
    state = await seen(second)
    assert (state.confirmed_blocks, state.predicted_blocks) == (0, 4)
    clock.now_s += config.predicted_ttl_s + 0.5  # a second more, since that is when the first token was expected
    await index.apply("r1", "1", 0)
    assert (await seen(second)).predicted_blocks == 4
    clock.now_s += 1
    assert (await seen(second)).predicted_blocks == 0


async def test_a_prediction_continues_what_is_confirmed(
    gateways: tuple[FleetState, FleetState], index: PrefixIndex
) -> None:
    state, _ = gateways
    await index.apply("r1", "1", 1, PROMPT[:2])
    await index.apply("r2", "1", 1, PROMPT[:3])
    state.reserve("r1", PROMPT, 40, confirmed_blocks=2, new_tokens=20, prefill_rate=100.0, expected_s=0.2)
    await state.settled()
    view = await state.look(PROMPT, [], 8)
    depths = {name: (each.confirmed_blocks, each.predicted_blocks) for name, each in view.replicas.items()}
    assert depths == {"r1": (2, 4), "r2": (3, 3)}
    assert view.holders == ((3, 1), (4, 1))
    assert view.matched_blocks == 4


async def test_both_predictions_of_a_block_count(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    send(state, "r1")
    send(state, "r2")
    send(state, "r1")
    await state.settled()
    view = await state.look(PROMPT, [], 8)
    assert {name: each.predicted_blocks for name, each in view.replicas.items()} == {"r1": 4, "r2": 4}


async def test_popularity_is_counted_and_fades(
    gateways: tuple[FleetState, FleetState], clock: Clock, config: StateConfig
) -> None:
    state, other = gateways
    for _ in range(3):
        send(state)
        await state.settled()
    view = await other.look(PROMPT, [], 8)
    assert dict(view.heat) == pytest.approx({1: 3, 2: 3, 3: 3, 4: 3})
    clock.now_s += config.heat_s
    view = await other.look([PROMPT[0], *chain("q", 3)], [], 8)
    assert dict(view.heat) == pytest.approx({1: 3 / 2.718281828})


async def test_queued_tokens_shrink_while_the_first_in_line_is_prefilled(
    gateways: tuple[FleetState, FleetState], clock: Clock
) -> None:
    state, _ = gateways
    clock.now_s += 1
    one = send(state, tokens=1000, rate=1000.0)
    await state.settled()
    clock.now_s += 1.0
    state.first_token(one, cached_tokens=0)  # teaches a rate of 1,000 tokens/s
    two = send(state, tokens=1000, rate=1000.0)
    await state.settled()
    clock.now_s += 0.6
    assert (await seen(state)).queued_tokens == pytest.approx(400, abs=5)
    clock.now_s += 5
    assert (await seen(state)).queued_tokens == pytest.approx(50)  # late, but not done
    state.first_token(two, cached_tokens=0)
    assert (await seen(state)).queued_tokens == 0


async def test_rates_are_learned_from_first_tokens_and_ends(
    gateways: tuple[FleetState, FleetState], clock: Clock
) -> None:
    state, other = gateways
    assert (await seen(other)).prefill_rate is None
    clock.now_s += 1
    one, two = send(state, tokens=1000), send(state, tokens=3000)
    clock.now_s += 0.5
    state.first_token(one, cached_tokens=0)
    await state.settled()
    assert (await seen(other)).prefill_rate == pytest.approx(2000)
    clock.now_s += 1.5  # its turn began with the other's first token
    state.first_token(two, cached_tokens=0)
    await state.settled()
    assert (await seen(other)).prefill_rate == pytest.approx(2000, rel=0.02)
    clock.now_s += 1
    state.finish(one, output_tokens=150)
    await state.settled()
    assert (await seen(other)).decode_rate == pytest.approx(2 * 150 / 2.5, rel=0.01)


def serve(state: FleetState, replica: str, *, promised: int, expected: int, found: int) -> None:
    """A prompt of 2,000 tokens, from decision to end."""
    one = state.reserve(
        replica,
        PROMPT,
        2000,
        confirmed_blocks=4 if promised else 0,
        new_tokens=2000 - expected,
        prefill_rate=1e4,
        expected_s=0.1,
        promised_tokens=promised,
    )
    state.first_token(one, cached_tokens=found)
    state.finish(one, output_tokens=1)


async def test_promises_that_are_not_kept_lower_the_trust(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    for _ in range(20):
        serve(state, "r1", promised=1000, expected=1000, found=0)
        # More than was promised does not make up for anything.
        serve(state, "r2", promised=1000, expected=1000, found=1200)
        await state.settled()
    assert (await seen(state, "r1")).trust < 0.1
    assert (await seen(state, "r2")).trust == pytest.approx(1.0)


async def test_what_only_gateways_expected_costs_no_trust(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    for _ in range(20):
        serve(state, "r1", promised=0, expected=1000, found=0)
        await state.settled()
    assert (await seen(state)).trust == 1.0


async def test_trust_settles_at_the_share_of_promises_that_is_kept(gateways: tuple[FleetState, FleetState]) -> None:
    state, _ = gateways
    for _ in range(200):  # what is expected falls with the trust; what is promised does not
        serve(state, "r1", promised=1000, expected=int(1000 * (await seen(state)).trust), found=500)
    assert (await seen(state)).trust == pytest.approx(0.5, abs=0.02)


async def test_an_unregistered_replica_is_unknown_not_idle(client: StateClient, config: StateConfig) -> None:
    state = FleetState(client, config, "g1")
    replica = (await state.look(PROMPT, ["r9"], 8)).replicas["r9"]
    assert (replica.leased, replica.queued_tokens, replica.in_flight) == (False, None, None)


async def test_without_redis_a_gateway_goes_on_by_itself_and_comes_back() -> None:
    server = EmbeddedServer(max_memory_mb=32)
    config = StateConfig(timeout_s=1.0, retry_s=0.01, max_retry_s=0.02)
    client = StateClient(config, server.url, "m")
    try:
        await PrefixIndex(client, config).register("r1", "1")
        state = FleetState(client, config, "g1")
        one = send(state, "r1")
        assert (await state.look(PROMPT, ["r1", "r2"], 8)).source == "shared"
        server.stop()
        two = send(state, "r2")
        await state.settled()
        view = await state.look(PROMPT, ["r1", "r2"], 8)
        assert view.source == "local"
        assert view.holders == ((4, 2),)
        assert {name: each.in_flight for name, each in view.replicas.items()} == {"r1": 1, "r2": 1}
        three = await claim(state, sends=0)  # nobody can say that it came too late
        assert three is not None
        assert state.in_flight("r1") == 2
        state.finish(three, output_tokens=1)
        state.finish(one, output_tokens=1)
        state.finish(two, output_tokens=1)
        await state.settled()
        assert state.counts.local_looks == 1
        assert state.counts.fallback_share == 0.5
        assert state.counts.failed_reports > 0
    finally:
        await client.close()
        server.stop()


async def test_a_redis_restarted_empty_is_filled_by_heartbeats(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("r")
    config = StateConfig(timeout_s=1.0, retry_s=0.01, max_retry_s=0.02)
    server = EmbeddedServer(max_memory_mb=32, directory=directory)
    client = StateClient(config, server.url, "m")
    try:
        index = PrefixIndex(client, config)
        await index.register("r1", "1")
        state = FleetState(client, config, "g1")
        send(state, "r1", tokens=700)
        await state.settled()
        server.stop()
        server = EmbeddedServer(max_memory_mb=32, directory=directory)
        await asyncio.sleep(0.05)
        await state.look(PROMPT, ["r1"], 8)  # may still meet the connection that broke
        await asyncio.sleep(0.05)
        await state.heartbeat()
        await index.register("r1", "2")
        after = await state.look(PROMPT, ["r1"], 8)
        assert after.source == "shared"
        assert after.replicas["r1"].in_flight == 1
    finally:
        await client.close()
        server.stop()


async def test_an_end_that_could_not_be_told_is_told_later(
    gateways: tuple[FleetState, FleetState], client: StateClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = gateways
    one = send(first)
    await first.settled()
    with monkeypatch.context() as patch:
        patch.setattr(client._breaker, "_closed_until", float("inf"))
        first.first_token(one, 0)
        first.finish(one, 3)
        await first.settled()
    assert (await seen(second)).in_flight == 1
    await first.heartbeat()
    after = await seen(second)
    assert (after.in_flight, after.queued_tokens) == (0, 0)
    assert not list(first._ledger.busy())
