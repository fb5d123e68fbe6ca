"""What a reader remembers of slots is what records said last."""

import struct

from gateway.state.slot_names import _MAX_NAMES, SlotNames
from gateway.state.wire import pack_keys


def record(slot: int | None) -> bytes:
    return struct.pack("<16d", 0.0 if slot is None else slot + 1, *[0.0] * 15)


def test_a_name_follows_its_record() -> None:
    names = SlotNames(b"r:")
    names.learn({"a": record(0), "b": record(7), "c": None, "d": record(None)})
    assert names.of([0, 7, 3]) == ["a", "b"]
    names.learn({"a": record(3), "b": None})
    assert names.of([0, 7, 3]) == ["a"]
    assert (0 in names, 3 in names, len(names)) == (False, True, 1)


def test_a_slot_has_the_name_that_was_seen_with_it_last() -> None:
    names = SlotNames(b"r:")
    names.learn({"old": record(5)})
    names.learn({"new": record(5)})
    names.learn({"old": None})
    assert list(names.all()) == ["new"]
    names.learn_names([5, 6, 8], [b"new", b"other", None])
    assert names.of([5, 6, 8]) == ["new", "other"]


def test_keys_are_remembered_in_bounded_number() -> None:
    names = SlotNames(b"r:")
    many = [f"replica {number}" for number in range(_MAX_NAMES + 5)]
    assert names.pack_keys(many) == names.pack_keys(many) == pack_keys(b"r:", many)
    names.learn({"a": record(1)})
    names.pack_keys(many)
    assert len(names._packed) <= _MAX_NAMES
