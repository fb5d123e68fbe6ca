"""One replica's record: everything a decision wants to know of it in one string, a field of the hash of its fleet.

Sixteen doubles, then an entry for each gateway that has requests there. Zeros mean "never": an absent record reads as
one of zeros. Scripts change it, so that a change sees the one before it; readers take it apart in Python. A gateway's
entry is under a lease, and what has lapsed counts for nothing, whoever reads it and whenever.
"""

from __future__ import annotations

import struct

from gateway.state.fleet_view import ReplicaState
from gateway.state.prefix_match import PrefixMatch

_FIELDS = (
    "slot",  # plus one; zero: not registered
    "until",  # ms, end of its lease; past where it fell silent
    "draining",
    "kv_use",
    "reported",  # ms, when it said kv_use
    "prefill_tokens",  # observed, forgetting; so are the next five
    "prefill_ms",
    "decode_tokens",
    "decode_ms",
    "expected",  # warm tokens
    "found",
    "recent",  # uncached tokens sent
    "recent_at",
    "free_at",  # ms, when all that was sent will be prefilled
    "first_at",  # ms, of the last first token
    "sends",  # requests ever sent: tells whether somebody was quicker
)
_HEADER = struct.Struct(f"<{len(_FIELDS)}d")
_SLOT = struct.Struct("<d")  # a record begins with it
_ENTRY = struct.Struct("<8sIIIQ")  # gateway, version, queued tokens, requests in flight, end of the lease in ms
DAY_MS = 86_400_000  # a record is kept for so long after its last use
# Of what waits, at least this share: the request whose turn it is has not had its first token yet.
_LEAST_LEFT = 0.05
# Warm tokens promised and found before the first ones: a replica's word is good until it has proved otherwise.
_TRUSTED_TOKENS = 1000

# `r` is a table of the fields, `tail` the entries as they are.
RECORD_LUA = f"""
local {", ".join(name.upper() for name in _FIELDS)} = {", ".join(str(n + 1) for n in range(len(_FIELDS)))}
local function read_record(replica)
  local text = redis.call('HGET', ns .. ':r', replica) or string.rep('\\0', {_HEADER.size})
  return {{struct.unpack('<{"d" * len(_FIELDS)}', text)}}, text:sub({_HEADER.size + 1})
end
local function write_record(replica, r, tail)
  local text = struct.pack('<{"d" * len(_FIELDS)}', unpack(r, 1, {len(_FIELDS)})) .. tail
  if redis.call('HSET', ns .. ':r', replica, text) == 1 then  -- fields do not expire: sweeping looks after it
    redis.call('ZADD', ns .. ':replicas', 'NX', now + {DAY_MS}, replica)
  end
  redis.call('PEXPIRE', ns .. ':r', {DAY_MS})
end
local function account(tail, gateway, version, queued, in_flight, lease_ms)  -- tail with the gateway's newest word
  local kept = struct.pack('<c8I4I4I4I8', gateway, version, queued, in_flight, now + lease_ms)
  for at = 1, #tail, {_ENTRY.size} do
    local whose, known, _, _, ends = struct.unpack('<c8I4I4I4I8', tail, at)
    local entry = tail:sub(at, at + {_ENTRY.size - 1})
    if whose ~= gateway then
      if ends > now then kept = kept .. entry end
    elseif known > version then
      kept = entry .. kept:sub({_ENTRY.size + 1})
    end
  end
  return kept
end
local function load_of(tail)  -- tokens queued, requests in flight
  local queued, in_flight = 0, 0
  for at = 1, #tail, {_ENTRY.size} do
    local _, _, tokens, requests, ends = struct.unpack('<c8I4I4I4I8', tail, at)
    if ends > now then queued, in_flight = queued + tokens, in_flight + requests end
  end
  return queued, in_flight
end
"""


def read_slot(record: bytes) -> int | None:
    """The slot of the replica's present epoch; None if it is not registered."""
    (slot,) = _SLOT.unpack_from(record)
    return int(slot) - 1 if slot else None


def read_state(
    replica: str,
    record: bytes | None,
    match: PrefixMatch,
    now: int,
    report_ttl_ms: int,
    half_life_ms: int,
) -> ReplicaState:
    """The replica at `now` (ms); `match` tells what it holds."""
    if record is None:
        return ReplicaState(replica, leased=False)
    (
        slot,
        until,
        draining,
        kv_use,
        reported,
        prefill_tokens,
        prefill_ms,
        decode_tokens,
        decode_ms,
        expected,
        found,
        recent,
        recent_at,
        free_at,
        _,
        sends,
    ) = _HEADER.unpack_from(record)
    queued = in_flight = 0
    for _, _, tokens, requests, ends in _ENTRY.iter_unpack(record[_HEADER.size :]):
        if ends > now:
            queued, in_flight = queued + tokens, in_flight + requests
    prefill_rate = _rate(prefill_tokens, prefill_ms)
    leased = slot > 0 and until > now
    confirmed, predicted = match.depths(int(slot) - 1) if leased else (0, 0)
    return ReplicaState(  # in the order of its fields: by name, a decision's dozens of them take twice as long
        replica,
        leased,
        draining > 0,
        confirmed,
        predicted,
        (_left(queued, max(free_at - now, 0), prefill_rate) if queued else 0.0) if until else None,
        in_flight if until else None,
        recent * 2 ** ((recent_at - now) / half_life_ms) if recent else 0.0,
        prefill_rate,
        _rate(decode_tokens, decode_ms),
        kv_use if reported and now - reported <= report_ttl_ms else None,
        (found + _TRUSTED_TOKENS) / (expected + _TRUSTED_TOKENS),
        int(sends),
        0 < until <= now,
    )


def _rate(tokens: float, ms: float) -> float | None:
    """Tokens/s; None where nothing was observed."""
    return 1000 * tokens / ms if tokens > 0 and ms > 0 else None


def _left(queued: int, backlog_ms: float, rate: float | None) -> float:
    """Queued tokens less those that are believed to be prefilled already."""
    if rate is None:
        return float(queued)
    return min(queued, max(_LEAST_LEFT * queued, backlog_ms * rate / 1000))
