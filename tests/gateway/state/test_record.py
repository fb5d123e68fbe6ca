"""A record read in Python is what scripts wrote, and what has lapsed counts for nothing."""

import struct

import pytest

from gateway.state.connection import Script, StateClient
from gateway.state.fleet_view import ReplicaState
from gateway.state.prefix_match import PrefixMatch
from gateway.state.record import RECORD_LUA, read_slot, read_state
from gateway.state.wire import pack

NOW = 1_000_000  # the tests' clock, in ms
ACCOUNT = Script(
    RECORD_LUA
    + """
local r, tail = read_record(ARGV[3])
r[SLOT], r[UNTIL], r[SENDS] = 4, now + 1000, r[SENDS] + 1
tail = account(tail, ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
write_record(ARGV[3], r, tail)
return {load_of(tail)}
"""
)


def read(record: bytes | None, now: int = NOW) -> ReplicaState:
    match = PrefixMatch(1, confirmed=[(2, 0b10000)], predicted=[(5, 0b10000)])  # slot 3
    return read_state("r", record, match, now, 10_000, 120_000)


async def stored(client: StateClient) -> bytes | None:
    _, (record,) = await client.read(pack("HGET", f"{client.prefix}:r", "r"), 1)
    return record  # type: ignore[no-any-return]


async def test_gateways_entries_are_kept_apart_replaced_and_dropped(client: StateClient) -> None:
    one, two = b"gateway1", b"\0\xff\r\n$1\r\n"  # any eight bytes
    assert await client.run(ACCOUNT, "r", one, 1, 100, 1, 500) == [100, 1]
    assert await client.run(ACCOUNT, "r", two, 1, 10, 2, 2000) == [110, 3]
    assert await client.run(ACCOUNT, "r", one, 3, 50, 1, 500) == [60, 3]
    assert await client.run(ACCOUNT, "r", one, 2, 999, 9, 500) == [60, 3]  # late
    record = await stored(client)
    assert record is not None
    assert (len(record), read_slot(record)) == (16 * 8 + 2 * 28, 3)
    state = read(record)
    assert (state.leased, state.queued_tokens, state.in_flight, state.sends) == (True, 60, 3, 4)
    assert (state.confirmed_blocks, state.predicted_blocks) == (2, 5)
    later = read(record, NOW + 600)
    assert (later.queued_tokens, later.in_flight) == (10, 2)
    lapsed = read(record, NOW + 1000)
    assert (lapsed.leased, lapsed.confirmed_blocks, lapsed.predicted_blocks) == (False, 0, 0)
    assert (later.lapsed, lapsed.lapsed) == (False, True)
    assert lapsed.in_flight == 2  # gateways say so, not its engine


def test_without_a_record_or_a_slot_nothing_is_known() -> None:
    assert read(None) == ReplicaState("r", leased=False)
    zeros = bytes(16 * 8)
    assert read(zeros) == ReplicaState("r", leased=False)
    assert read_slot(zeros) is None


def test_rates_reports_and_recent_work_as_fields_say() -> None:
    fields = [1.0, NOW + 1, 1, 0.5, NOW - 10_000, 2000, 1000, 300, 2000, 9000, 4000, 800, NOW - 120_000, 0, 0, 0]
    state = read(struct.pack("<16d", *fields))
    assert (state.prefill_rate, state.decode_rate, state.kv_use, state.draining) == (2000, 150, 0.5, True)
    assert state.trust == pytest.approx(0.5)
    assert state.recent_tokens == pytest.approx(400)
    assert read(struct.pack("<16d", *fields), NOW + 1).kv_use is None
