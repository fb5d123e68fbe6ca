"""The placers that look at nothing: Serve's choice, and replicas in turn."""

from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from gateway.routing.placements import Placements, Wish, placements_of
from gateway.routing.placer import RoundRobin, ServesChoice
from tests.gateway.fakes import CARD

NOBODY: frozenset[str] = frozenset()


def _request(name: str = "r") -> GenerateRequest:
    return GenerateRequest(name, TokenPrompt((1, 2)), SamplingParams(max_tokens=3))


async def test_serves_choice_wishes_nothing_and_writes_nothing() -> None:
    placer, entry = ServesChoice("two_choices"), {}
    await placer.open(CARD)
    seat = await placer.place(_request(), NOBODY, entry)
    seat.leave()
    assert (seat.replica, entry, await placer.explain(_request())) == (None, {}, {})
    assert not placer.has_other(NOBODY)
    assert placer.counted() is None


async def test_round_robin_takes_turns_and_passes_over_those_to_avoid() -> None:
    placements = Placements()
    placements.replicas = ("a", "b", "c")
    placer = RoundRobin(placements)
    entries: list[dict[str, object]] = [{} for _ in range(4)]
    for i, entry in enumerate(entries):
        await placer.place(_request(str(i)), NOBODY, entry)
    assert [entry["chosen"] for entry in entries] == ["a", "b", "c", "a"]
    seat = await placer.place(_request("x"), frozenset({"a", "b"}), {})
    assert seat.replica == "c"
    assert placements.wish_of("x") == Wish("c", frozenset({"a", "b"}))
    assert placer.has_other(frozenset({"a", "b"}))
    assert not placer.has_other(frozenset({"a", "b", "c"}))


async def test_a_wish_goes_with_its_seat() -> None:
    placements = Placements()
    seat = await RoundRobin(placements).place(_request(), NOBODY, {})
    assert placements.num_wishes == 1
    seat.leave()
    seat.leave()
    assert placements.num_wishes == 0


def test_deaths_are_told_once_and_the_dead_do_not_run() -> None:
    placements = Placements()
    placements.replicas = ("a", "b")
    placements.died("a")
    assert placements.replicas == ("b",)
    assert (placements.take_deaths(), placements.take_deaths()) == (["a"], [])


def test_everyone_in_a_process_meets_at_the_same_place() -> None:
    assert placements_of("app", "one") is placements_of("app", "one")
    assert placements_of("app", "one") is not placements_of("app", "two")
