"""A request's place from decision to end: what Serve is wished, what the fleet is told, what the receipt says."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from engines.block_hash import extend_hashes, root_hash
from engines.types import Delta, GenerateRequest, PrefixBlocks, SamplingParams, TextPrompt, TokenPrompt, Usage
from gateway.routing.config import RoutingConfig
from gateway.routing.placements import Placements
from gateway.routing.warm_placer import WarmPlacer
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.fakes import CARD

NOBODY: frozenset[str] = frozenset()
WARM_CARD = replace(CARD, prefix_blocks=PrefixBlocks("weights", 4))
PROMPT = tuple(range(42))
SAME_MODEL = iter(range(10_000))


def _request(name: str = "r", salt: str = "", prompt: TextPrompt | None = None) -> GenerateRequest:
    return GenerateRequest(name, prompt or TokenPrompt(PROMPT), SamplingParams(max_tokens=3), cache_salt=salt)


@pytest.fixture
def placements() -> Placements:
    placements = Placements()
    placements.replicas = ("r1", "r2")
    return placements


@pytest.fixture
async def placer(server: EmbeddedServer, config: StateConfig, placements: Placements) -> AsyncIterator[WarmPlacer]:
    placer = WarmPlacer(f"placed-{next(SAME_MODEL)}", RoutingConfig(), config, server.url, "gateway", placements)
    await placer.open(WARM_CARD)
    for replica in placements.replicas:
        await _publish(placer, config, server, replica, salt="nobody's")
    yield placer
    await placer.close()


async def _publish(
    placer: WarmPlacer, config: StateConfig, server: EmbeddedServer, replica: str, salt: str = ""
) -> None:
    """`replica` says that it holds all of PROMPT's full blocks."""
    hashes: list[bytes] = []
    extend_hashes(hashes, root_hash("weights", salt=salt), PROMPT, 4)
    client = StateClient(config, server.url, placer.model, timeout_s=5.0)
    index = PrefixIndex(client, config)
    await index.register(replica, "epoch")
    await index.apply(replica, "epoch", 1, hashes)
    await client.close()


def _first(cached_tokens: int | None) -> tuple[Delta, ...]:
    return (Delta(0, "a", (1,), cached_tokens=cached_tokens),)


LAST = (Delta(0, "", (2, 3), finish_reason="stop", usage=Usage(42, 3, 40)),)


async def _load(placer: WarmPlacer) -> dict[str, tuple[int, float]]:
    await placer.state.settled()
    view = await placer.state.look([], placer.placements.replicas, 0)
    return {name: (state.in_flight or 0, state.queued_tokens or 0.0) for name, state in view.replicas.items()}


async def test_a_prefix_goes_where_it_is_held(
    placer: WarmPlacer, config: StateConfig, server: EmbeddedServer, placements: Placements
) -> None:
    await _publish(placer, config, server, "r2", salt="tenant")
    entry: dict[str, Any] = {}
    seat = await placer.place(_request(salt="tenant"), NOBODY, entry)
    assert (seat.replica, entry["chosen"], entry["reason"], entry["state"]) == ("r2", "r2", "warm", "shared")
    assert entry["cached_tokens_expected"] == 40, "whole blocks, and one token is always computed"
    wish = placements.wish_of("r")
    assert wish is not None
    assert wish.replica == "r2"
    assert (await placer.explain(_request()))["cached_tokens_expected"] == 0, "of another tenant nothing is known"
    seat.leave()


async def test_a_dry_run_shows_every_replica(placer: WarmPlacer, placements: Placements) -> None:
    placements.replicas = tuple(f"r{i}" for i in range(12))
    entry = await placer.explain(_request())
    assert {each["replica"] for each in entry["candidates"]} == set(placements.replicas)


async def test_load_is_counted_from_place_to_leave(placer: WarmPlacer, placements: Placements) -> None:
    entry: dict[str, Any] = {}
    seat = await placer.place(_request(), NOBODY, entry)
    home = str(seat.replica)
    assert (await _load(placer))[home][0] == 1
    seat.note(_first(0))
    assert (await _load(placer))[home] == (1, 0.0), "computed, and no longer queued"
    seat.note(LAST)
    seat.leave()
    seat.leave()
    assert set((await _load(placer)).values()) == {(0, 0.0)}
    assert placements.num_wishes == 0
    assert entry["cached_tokens_found"] == 0


async def test_a_try_that_never_began_leaves_no_load(placer: WarmPlacer) -> None:
    seat = await placer.place(_request(), NOBODY, {})
    seat.leave()
    assert set((await _load(placer)).values()) == {(0, 0.0)}


async def test_expected_and_found_are_compared_per_replica(
    placer: WarmPlacer, config: StateConfig, server: EmbeddedServer
) -> None:
    await _publish(placer, config, server, "r1")
    seat = await placer.place(_request(), NOBODY, {})
    seat.note(_first(16))
    seat.note(LAST)
    seat.leave()
    warmth = placer.counted().warmth["r1"]
    assert (warmth.requests, warmth.expected, warmth.found, warmth.error) == (1, 40, 16, 24)


async def test_a_replica_that_keeps_no_promise_loses_trust(
    placer: WarmPlacer, config: StateConfig, server: EmbeddedServer
) -> None:
    await _publish(placer, config, server, "r1")
    for i in range(300):
        seat = await placer.place(_request(str(i)), frozenset({"r2"}), {})
        seat.note(_first(0))
        seat.leave()
        await placer.state.settled()
    entry = await placer.explain(_request())
    broken = next(each for each in entry["candidates"] if each["replica"] == "r1")
    assert broken["trust"] < 0.5
    assert broken["warm_tokens"] < broken["confirmed_tokens"]


async def _trust(placer: WarmPlacer, replica: str) -> float:
    await placer.state.settled()
    return (await placer.state.look([], [replica], 0)).replicas[replica].trust


async def test_siblings_that_are_found_cold_cost_no_trust(placer: WarmPlacer) -> None:
    """An engine begins those that come together in one step, and none finds what another one will leave."""
    for i in range(30):
        seats = []
        for name in ("a", "b", "c"):
            entry: dict[str, Any] = {}
            seats.append(await placer.place(_request(f"{name}{i}", salt=f"burst {i}"), frozenset({"r2"}), entry))
            await placer.state.settled()
        assert entry["cached_tokens_expected"] == 40
        for seat in seats:
            seat.note(_first(0))
            seat.leave()
    assert await _trust(placer, "r1") == 1.0
    assert placer.counted().warmth["r1"].error == 60 * 40, "the metric tells it all the same"


async def test_a_prompt_of_whole_blocks_is_not_promised_its_last(
    placer: WarmPlacer, config: StateConfig, server: EmbeddedServer
) -> None:
    await _publish(placer, config, server, "r1")
    for i in range(30):
        request = replace(_request(str(i)), prompt=TokenPrompt(PROMPT[:40]))
        seat = await placer.place(request, frozenset({"r2"}), {})
        seat.note(_first(36))
        seat.leave()
    assert await _trust(placer, "r1") == 1.0


async def test_local_decisions_judge_nobody(placer: WarmPlacer, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        entry: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            patch.setattr(placer._client._breaker, "_closed_until", float("inf"))
            seat = await placer.place(_request(str(i)), frozenset({"r2"}), entry)
        seat.note(_first(0))
        seat.leave()
        await placer.state.settled()
    assert (entry["state"], entry["cached_tokens_expected"]) == ("local", 40)
    assert await _trust(placer, "r1") == 1.0


async def test_the_load_moves_with_a_request_that_serve_put_elsewhere(placer: WarmPlacer) -> None:
    entry: dict[str, Any] = {}
    seat = await placer.place(_request(), NOBODY, entry)
    wished = str(seat.replica)
    other = "r2" if wished == "r1" else "r1"
    wish = placer.placements.wish_of("r")
    assert wish is not None
    assert wish.on_placed is not None
    await asyncio.to_thread(wish.on_placed, other)  # as Serve's thread does
    await asyncio.sleep(0)
    assert (seat.replica, entry["placed_by_serve"]) == (other, other)
    load = await _load(placer)
    assert (load[wished], load[other][0]) == ((0, 0.0), 1)
    seat.leave()
    assert set((await _load(placer)).values()) == {(0, 0.0)}
    assert placer.counted().moved == 1


async def test_news_after_the_end_moves_nothing(placer: WarmPlacer) -> None:
    seat = await placer.place(_request(), NOBODY, {})
    wish = placer.placements.wish_of("r")
    assert wish is not None
    assert wish.on_placed is not None
    seat.leave()
    wish.on_placed("r9")
    await asyncio.sleep(0)
    assert set((await _load(placer)).values()) == {(0, 0.0)}


async def test_without_a_known_replica_serve_chooses_and_the_load_follows(
    placer: WarmPlacer, placements: Placements
) -> None:
    placements.replicas = ()
    entry: dict[str, Any] = {}
    seat = await placer.place(_request(), NOBODY, entry)
    assert (seat.replica, entry["state"]) == (None, "blind")
    assert not placer.has_other(NOBODY)
    wish = placements.wish_of("r")
    assert wish is not None
    assert wish.on_placed is not None
    wish.on_placed("r7")
    await asyncio.sleep(0)
    assert seat.replica == "r7"
    seat.note(_first(None))
    seat.leave()
    assert placer.counted().by_reason == {"blind": 1}


async def test_those_to_avoid_are_avoided(placer: WarmPlacer) -> None:
    seats = [await placer.place(_request(str(i)), frozenset({"r1"}), {}) for i in range(8)]
    assert {seat.replica for seat in seats} == {"r2"}
    assert placer.has_other(frozenset({"r1"}))
    assert not placer.has_other(frozenset({"r1", "r2"}))


async def test_a_session_stays_and_is_its_tenants_own(placer: WarmPlacer) -> None:
    """Text, of which no gateway knows what is warm; the same name from two tenants."""

    async def go(salt: str) -> tuple[str | None, object]:
        request = replace(_request(f"{salt}{next(SAME_MODEL)}", salt, TextPrompt("hi")), session="talk")
        entry: dict[str, Any] = {}
        seat = await placer.place(request, frozenset(), entry)
        seat.leave()
        await placer.state.settled()
        return seat.replica, entry["session_was_at"]

    home, known = await go("a")
    assert known is None
    assert await go("b") != (home, home), "what another tenant has said is not known"
    for _ in range(5):
        assert await go("a") == (home, home)


async def test_text_is_placed_by_load_alone(placer: WarmPlacer) -> None:
    entry: dict[str, Any] = {}
    seat = await placer.place(_request(prompt=TextPrompt("hi")), NOBODY, entry)
    assert entry["reason"] == "cold"
    seat.leave()


async def test_a_state_that_is_away_is_local_and_counted(config: StateConfig, placements: Placements) -> None:
    placer = WarmPlacer("m", RoutingConfig(), config, "unix:///nowhere/redis.sock", "gateway", placements)
    await placer.open(WARM_CARD)
    entries: list[dict[str, Any]] = [{}, {}]
    for i, entry in enumerate(entries):
        seat = await placer.place(_request(str(i)), NOBODY, entry)
        seat.note(_first(0))
        seat.note(LAST)
        seat.leave()
    assert [entry["state"] for entry in entries] == ["local", "local"]
    assert entries[1]["chosen"] == entries[0]["chosen"], "what was sent there is remembered"
    counts = placer.counted()
    assert (counts.decisions, counts.local) == (2, 2)
    await placer.close()


async def test_dry_runs_and_refused_claims_are_no_decisions(
    placer: WarmPlacer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*(placer.place(_request(str(i)), NOBODY, {}) for i in range(4)))
    assert placer.state.counts.overtaken > 0
    monkeypatch.setattr(placer._client._breaker, "_closed_until", float("inf"))
    await placer.explain(_request())
    assert (placer.counted().decisions, placer.counted().local) == (4, 0)


async def test_a_replica_whose_engine_is_not_heard_is_counted(placer: WarmPlacer) -> None:
    (await placer.place(_request("a"), NOBODY, {})).leave()
    assert placer.counted().silent == {}
    await PrefixIndex(placer._client, StateConfig()).forget("r2")
    (await placer.place(_request("b"), NOBODY, {})).leave()
    (await placer.place(_request("c"), frozenset({"r2"}), {})).leave()
    assert placer.counted().silent == {"r2": 1}
    placer.placements.replicas = ("r1",)
    assert placer.counted().silent == {}
