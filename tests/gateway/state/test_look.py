"""Which replicas a look finds: those asked for, and holders nobody named, whatever became of their slots since."""

import asyncio

import pytest

from gateway.state.channel import Answers
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.fleet_state import FleetState
from gateway.state.look import _READ_WHOLE, FleetReader
from gateway.state.prefix_index import PrefixIndex
from tests.gateway.state.fleet import Clock, chain

PROMPT = chain("p", 5)


async def test_a_holder_is_named_and_read_even_in_a_fleet_too_large_to_read_ahead(
    client: StateClient, config: StateConfig
) -> None:
    index, reader = PrefixIndex(client, config), FleetReader(client, config)
    names = [f"r{number}" for number in range(_READ_WHOLE + 10)]
    for name in names:
        await index.register(name, "1")
    await index.apply(names[-1], "1", 1, PROMPT)
    for asked in ([], names, names[:3], names[:3]):  # unknown, all known, too many to read them all: twice the same
        view = await reader.look(PROMPT, asked, 4)
        assert view.replicas[names[-1]].confirmed_blocks == 5
        assert view.replicas.keys() == {names[-1], *asked}
        assert view.holders == ((5, 1),)


async def test_a_slot_that_went_to_another_replica_is_not_taken_for_the_old_one(
    client: StateClient, config: StateConfig
) -> None:
    index, reader = PrefixIndex(client, config), FleetReader(client, config)
    await index.register("old", "1")
    await index.apply("old", "1", 1, PROMPT[:2])
    assert (await reader.look(PROMPT, [], 4)).replicas["old"].confirmed_blocks == 2
    await index.register("old", "2")  # a new slot, and nothing in it
    await index.register("new", "1")
    await index.apply("new", "1", 1, PROMPT)
    view = await reader.look(PROMPT, ["old"], 4)
    assert {name: state.confirmed_blocks for name, state in view.replicas.items()} == {"new": 5, "old": 0}
    await index.forget("new")
    assert (await reader.look(PROMPT, ["old", "new"], 4)).replicas["new"].queued_tokens is None
    assert (await reader.look(PROMPT, ["old"], 4)).replicas.keys() == {"old"}


async def test_looks_beside_each_other_learn_together(client: StateClient, config: StateConfig) -> None:
    index, reader = PrefixIndex(client, config), FleetReader(client, config)
    names = [f"r{number}" for number in range(6)]
    for depth, name in enumerate(names):
        await index.register(name, "1")
        await index.apply(name, "1", 1, PROMPT[:depth])
    views = await asyncio.gather(*(reader.look(PROMPT[: depth + 1], [], 4) for depth in range(5)))
    for depth, view in enumerate(views, 1):
        assert {min(number, depth) for number in range(1, 6)} == {found for found, _ in view.holders}
        assert len(view.replicas) == 4


async def test_a_long_prompt_costs_no_more_keys_and_matches_but_for_the_last_stretch(
    client: StateClient, config: StateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, reader = PrefixIndex(client, config), FleetReader(client, config)
    prompt, held = chain("long", 1000), {"all": 1000, "most": 777, "few": 17, "one": 1}
    for name, depth in held.items():
        await index.register(name, "1")
        await index.apply(name, "1", 1, prompt[:depth])
    read, counts = client.read, list[int]()

    async def counted(commands: bytes, num_answers: int) -> tuple[int, Answers]:
        now, answers = await read(commands, num_answers)
        counts.append(len(answers[-1]))
        return now, answers

    monkeypatch.setattr(client, "read", counted)
    view = await reader.look(prompt, list(held), 4)
    found = {name: state.confirmed_blocks for name, state in view.replicas.items()}
    assert found == {"all": 992, "most": 768, "few": 17, "one": 1}
    assert counts == [1 + 111 + 35]


async def test_a_prompt_without_blocks_still_sees_loads(client: StateClient, config: StateConfig) -> None:
    await PrefixIndex(client, config).register("r1", "1")
    view = await FleetReader(client, config).look([], ["r1", "r2"], 4)
    assert (view.replicas["r1"].queued_tokens, view.replicas["r2"].queued_tokens) == (0, None)
    assert (view.holders, view.heat) == ((), ())


async def test_the_replica_of_a_session_is_shown_even_if_nobody_else_would_name_it(
    client: StateClient, config: StateConfig, clock: Clock
) -> None:
    index, state = PrefixIndex(client, config), FleetState(client, config, "g", clock)
    names = [f"r{number}" for number in range(_READ_WHOLE + 10)]
    for name in names:
        await index.register(name, "1")
    session, other = chain("session", 2)
    figures = {"confirmed_blocks": 0, "new_tokens": 5, "prefill_rate": 1.0, "expected_s": 5.0}
    state.reserve("r7", [], 5, session=session, **figures)  # type: ignore[arg-type]
    await state.settled()
    for asked in (["r1"], names):  # before all are known, and in a fleet too large to read
        view = await state.look(PROMPT, asked, 4, session)
        assert view.pinned == "r7"
        assert view.replicas["r7"].in_flight == 1
    assert (await state.look(PROMPT, ["r1"], 4, other)).pinned is None
    assert "r7" not in (await state.look(PROMPT, ["r1"], 4)).replicas
