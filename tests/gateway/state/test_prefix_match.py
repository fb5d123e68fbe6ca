"""A chain of ANDs against the definition: leading blocks that a replica holds, or was sent lately."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.state.prefix_match import PrefixMatch, match_prefix, recent_requests

NOW = 1000
WIDTH = 9  # bytes: slots up to 71


def bitmap(slots: set[int]) -> bytes | None:
    """As SETBIT leaves it; None where nobody ever held the block."""
    if not slots:
        return None
    bits = bytearray(max(slots) // 8 + 1)
    for slot in slots:
        bits[slot // 8] |= 0x80 >> slot % 8
    return bytes(bits)


def sent_to(slots: dict[int, int], count: float = 1.0, since: int = NOW) -> bytes | None:
    """As FORETELL leaves it; None where nobody was."""
    predictions = b"".join(struct.pack("<HQ", slot, ends) for slot, ends in slots.items())
    return struct.pack("<dQ", count, since) + predictions if slots else None


def found(match: PrefixMatch, live: set[int]) -> dict[int, tuple[int, int]]:
    return {slot: depths for slot in live if (depths := match.depths(slot)) != (0, 0)}


_slots = st.integers(0, 70)
_blocks = st.lists(st.sets(_slots), max_size=6)
# Few distinct blocks, many times each, as prompts have them.
_prompts = st.tuples(_blocks, st.lists(st.integers(0, 5), max_size=30))
_sent = st.lists(st.dictionaries(_slots, st.sampled_from([NOW - 1, NOW, NOW + 1]), max_size=3), max_size=30)


@given(st.sets(_slots), _prompts, _sent, st.integers(1, 4))
def test_every_match_is_the_run_from_the_start(
    live: set[int], prompt: tuple[list[set[int]], list[int]], sent: list[dict[int, int]], step: int
) -> None:
    """`step`: blocks that were sent are asked for at every so many depths, and stand for those before them."""
    kinds, order = prompt
    held = [kinds[number] for number in order if number < len(kinds)]
    sent_depths = range(step, len(held) + 1, step)
    sent = (sent + [{}] * len(sent_depths))[: len(sent_depths)]
    match = match_prefix(
        bitmap(live) or b"",
        range(1, len(held) + 1),
        [*map(bitmap, held)],
        sent_depths,
        [*map(sent_to, sent)],
        NOW,
    )

    def was_sent(slot: int, index: int) -> bool:
        return index // step < len(sent) and sent[index // step].get(slot, 0) > NOW

    def run(slot: int, *, with_sent: bool) -> int:
        steps = (slot in block or (with_sent and was_sent(slot, index)) for index, block in enumerate(held))
        return len(list(itertools.takewhile(bool, steps)))

    expected = {slot: (run(slot, with_sent=False), run(slot, with_sent=True)) for slot in live}
    assert found(match, live) == {slot: depths for slot, depths in expected.items() if depths != (0, 0)}
    depths = [depth for depth, count in match.holders() for _ in range(count)]
    assert depths == sorted(depth for _, depth in expected.values() if depth)


@given(st.dictionaries(_slots, st.integers(1, 5), max_size=12), st.integers(0, 12), st.integers(0, 30))
def test_the_deepest_are_those_with_the_longest_matches(depths: dict[int, int], limit: int, turn: int) -> None:
    deepest = matches(depths).deepest(limit, turn)
    assert len(deepest) == len(set(deepest)) == min(limit, len(depths))
    assert [depths[slot] for slot in deepest] == sorted(depths.values(), reverse=True)[:limit]


def test_of_the_last_depth_others_are_taken_in_each_turn() -> None:
    match = matches(dict.fromkeys(range(5), 3) | {9: 7})
    assert {frozenset(match.deepest(3, turn)) for turn in range(5)} == {
        frozenset({9, turn, (turn + 1) % 5}) for turn in range(5)
    }


def matches(depths: dict[int, int]) -> PrefixMatch:
    groups: dict[int, int] = {}
    for slot, depth in depths.items():
        groups[depth] = groups.get(depth, 0) | 1 << (8 * WIDTH - 1 - slot)
    return PrefixMatch(WIDTH, predicted=sorted(groups.items()))


@given(st.sets(_slots), _prompts, st.integers(1, 5))
def test_a_block_stands_for_those_between_it_and_the_one_before(
    live: set[int], prompt: tuple[list[set[int]], list[int]], step: int
) -> None:
    kinds, order = prompt
    held = [bitmap(kinds[number]) for number in order if number < len(kinds)]
    depths = range(1, len(held) + 1)
    by_one = match_prefix(bitmap(live) or b"", depths, held, [], [], NOW)
    match = match_prefix(bitmap(live) or b"", [step * depth for depth in depths], held, [], [], NOW)
    assert found(match, live) == {
        slot: (step * confirmed, step * predicted) for slot, (confirmed, predicted) in found(by_one, live).items()
    }


def test_requests_for_a_block_count_for_less_as_time_goes_by() -> None:
    known = sent_to({3: NOW + 5}, count=8.0)
    assert known is not None
    assert recent_requests(known, NOW, 100.0) == 8.0
    assert recent_requests(known, NOW + 100, 100.0) == pytest.approx(8 / 2.718281828)
