"""A chain of ANDs against the definition: leading blocks that a replica holds, or was sent lately."""

import itertools
import struct

from hypothesis import given
from hypothesis import strategies as st

from gateway.state.prefix_match import PrefixMatch, match_prefix

NOW = 1000


def bitmap(slots: set[int]) -> bytes | None:
    """As SETBIT leaves it; None where nobody ever held the block."""
    if not slots:
        return None
    bits = bytearray(max(slots) // 8 + 1)
    for slot in slots:
        bits[slot // 8] |= 0x80 >> slot % 8
    return bytes(bits)


def predictions(slots: dict[int, int]) -> bytes | None:
    return b"".join(struct.pack("<HQ", slot, ends) for slot, ends in slots.items()) or None


_slots = st.integers(0, 70)
_blocks = st.lists(st.sets(_slots), max_size=6)
# Few distinct blocks, many times each, as prompts have them.
_prompts = st.tuples(_blocks, st.lists(st.integers(0, 5), max_size=30))
_sent = st.lists(st.dictionaries(_slots, st.sampled_from([NOW - 1, NOW, NOW + 1]), max_size=3), max_size=30)


@given(st.sets(_slots), _prompts, _sent)
def test_every_match_is_the_run_from_the_start(
    live: set[int], prompt: tuple[list[set[int]], list[int]], sent: list[dict[int, int]]
) -> None:
    kinds, order = prompt
    held = [kinds[number] for number in order if number < len(kinds)]
    sent = (sent + [{}] * len(held))[: len(held)]
    match = match_prefix(
        bitmap(live) or b"", range(1, len(held) + 1), [*map(bitmap, held)], [*map(predictions, sent)], NOW
    )

    def run(slot: int, with_sent: bool) -> int:
        steps = (
            slot in block or (with_sent and told.get(slot, 0) > NOW) for block, told in zip(held, sent, strict=True)
        )
        return len(list(itertools.takewhile(bool, steps)))

    assert match.confirmed == {slot: run(slot, False) for slot in live if run(slot, False)}
    assert match.predicted == {slot: run(slot, True) for slot in live if run(slot, True)}
    depths = [depth for depth, count in match.holders() for _ in range(count)]
    assert depths == sorted(match.predicted.values())


@given(st.dictionaries(_slots, st.integers(1, 5), max_size=12), st.integers(0, 12), st.integers(0, 30))
def test_the_deepest_are_those_with_the_longest_matches(depths: dict[int, int], limit: int, turn: int) -> None:
    match = PrefixMatch(predicted=dict(sorted(depths.items(), key=lambda item: item[1])))
    deepest = match.deepest(limit, turn)
    assert len(deepest) == len(set(deepest)) == min(limit, len(depths))
    assert [depths[slot] for slot in deepest] == sorted(depths.values(), reverse=True)[:limit]


def test_of_the_last_depth_others_are_taken_in_each_turn() -> None:
    match = PrefixMatch(predicted=dict.fromkeys(range(5), 3) | {9: 7})
    assert {frozenset(match.deepest(3, turn)) for turn in range(5)} == {
        frozenset({9, turn, (turn + 1) % 5}) for turn in range(5)
    }


@given(st.sets(_slots), _prompts, st.integers(1, 5))
def test_a_block_stands_for_those_between_it_and_the_one_before(
    live: set[int], prompt: tuple[list[set[int]], list[int]], step: int
) -> None:
    kinds, order = prompt
    held = [bitmap(kinds[number]) for number in order if number < len(kinds)]
    none, depths = [None] * len(held), range(1, len(held) + 1)
    by_one = match_prefix(bitmap(live) or b"", depths, held, none, NOW)
    match = match_prefix(bitmap(live) or b"", [step * depth for depth in depths], held, none, NOW)
    assert match.confirmed == {slot: step * depth for slot, depth in by_one.confirmed.items()}
    assert match.predicted == {slot: step * depth for slot, depth in by_one.predicted.items()}
