"""What a reader remembers of slots is what records said last, and is believed while they say it."""

import struct

from gateway.state.slot_names import _MAX_NAMES, SlotNames


def record(slot: int | None) -> bytes:
    return struct.pack("<16d", 0.0 if slot is None else slot + 1, *[0.0] * 15)


def test_a_name_follows_its_record() -> None:
    names = SlotNames()
    names.learn({b"a": record(0), b"b": record(7), b"d": record(None)})
    assert names.known([0, 7, 3]) == [b"a", b"b"]
    names.learn({b"a": record(3), b"b": record(None)})
    assert names.known([0, 7, 3]) == [b"a"]
    assert (0 in names, 3 in names) == (False, True)


def test_a_slot_has_the_name_that_was_seen_with_it_last() -> None:
    names = SlotNames()
    names.learn({b"old": record(5)})
    names.learn({b"new": record(5)})
    names.learn({b"old": record(None)})
    assert names.known([5]) == [b"new"]
    names.learn_names([5, 6, 8], [b"new", b"other", None])
    assert names.known([5, 6, 8]) == [b"new", b"other"]


def test_only_a_record_that_says_the_same_confirms_a_name() -> None:
    names = SlotNames()
    names.learn({b"a": record(0), b"b": record(1), b"c": record(2)})
    assert names.confirmed([2, 0, 1, 9], {b"a": record(0), b"b": record(4)}) == [b"a"]


def test_names_are_remembered_in_bounded_number() -> None:
    names = SlotNames()
    for number in range(0, 2 * _MAX_NAMES, 100):
        names.learn({b"replica %d" % n: record(n) for n in range(number, number + 100)})
    assert len(names.known(range(2 * _MAX_NAMES))) <= _MAX_NAMES
