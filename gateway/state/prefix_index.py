"""Who holds which block, as engines say it: registration, events in sequence, leases, and the removal of what is gone.

    {ns}:slots     slot -> replica                          {ns}:live    bitmap of the slots in use
    {ns}:free      slots by the time they were cleared      {ns}:dirty   slots whose claims are still being removed
    {ns}:replicas  replicas by the end of their lease, then of their record
    {ns}:r         replica -> record: lease, load, rates    {ns}:e:ID    a replica's epoch: its name, slot, sequence
    {ns}:b:HASH    bitmap of the slots that hold the block  {ns}:held:S  hashes that slot S claims

A slot stands for one epoch of one replica: a restarted engine, or one whose events did not arrive in sequence, takes a
new one and publishes what it holds from the start. What the old slot claimed is at once no longer believed, and is
removed afterwards, a batch at a time. So a claim goes with its eviction event, its replica's lease, or its age.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engines.block_hash import BlockHash
from gateway.state.config import StateConfig
from gateway.state.connection import Script, StateClient
from gateway.state.record import DAY_MS, RECORD_LUA

# Blocks in one message: Redis is busy for about 1 us for each.
MAX_BATCH = 1024
_SWEEP_BATCH = 512
# A prediction names a slot: none may outlive the slot's meaning.
_SLOT_REST_MS = 120_000


class Applied(enum.Enum):
    """What became of a message of events."""

    OK = "ok"
    GAP = "gap"  # one before it is missing: register again and publish everything
    UNKNOWN = "unknown"  # the epoch is not the registered one, or Redis forgot it: the same


@dataclass(frozen=True, slots=True)
class EngineReport:
    """An engine's word on itself. Shares in [0, 1]."""

    kv_use: float


_RETIRE = (
    RECORD_LUA
    + """
local function clear(slot)
  redis.call('HDEL', ns .. ':slots', slot)
  redis.call('SETBIT', ns .. ':live', slot, 0)
  redis.call('SADD', ns .. ':dirty', slot)
end
local function retire(replica)
  local slot = redis.call('HGET', ns .. ':e:' .. replica, 'slot')
  if slot then
    local owner = redis.call('HGET', ns .. ':slots', slot)
    if not owner or owner == replica then clear(slot) end
  else  -- never registered, or its epoch ended by itself, which its slot does not
    local slots = redis.call('HGETALL', ns .. ':slots')
    for i = 1, #slots, 2 do
      if slots[i + 1] == replica then clear(slots[i]) end
    end
  end
  redis.call('DEL', ns .. ':e:' .. replica)
end
"""
)

_REGISTER = Script(
    _RETIRE
    + f"""
local function is_taken(slot)  -- by somebody, or by claims that are still being removed, or rests
  return redis.call('HEXISTS', ns .. ':slots', slot) == 1 or redis.call('GETBIT', ns .. ':live', slot) == 1
    or redis.call('SISMEMBER', ns .. ':dirty', slot) == 1 or redis.call('ZSCORE', ns .. ':free', slot)
end
-- ARGV: replica, epoch, lease_ms, slot_rest_ms
local replica, epoch, ends = ARGV[3], ARGV[4], now + tonumber(ARGV[5])
retire(replica)
local slot = redis.call('ZRANGEBYSCORE', ns .. ':free', '-inf', now - tonumber(ARGV[6]), 'LIMIT', 0, 1)[1]
if slot then
  redis.call('ZREM', ns .. ':free', slot)
else
  repeat slot = redis.call('INCR', ns .. ':num_slots') - 1 until not is_taken(slot)  -- the count may have been lost
end
redis.call('HSET', ns .. ':slots', slot, replica)
redis.call('SETBIT', ns .. ':live', slot, 1)
redis.call('HSET', ns .. ':e:' .. replica, 'slot', slot, 'epoch', epoch, 'seq', 0)
redis.call('PEXPIRE', ns .. ':e:' .. replica, {DAY_MS})
redis.call('ZADD', ns .. ':replicas', ends, replica)
local r, tail = read_record(replica)
r[SLOT], r[UNTIL], r[DRAINING], r[KV_USE], r[REPORTED] = slot + 1, ends, 0, 0, 0
r[EXPECTED], r[FOUND], r[FREE_AT], r[FIRST_AT] = 0, 0, 0, 0
write_record(replica, r, tail)
return slot
"""
)

_APPLY = Script(
    RECORD_LUA
    + f"""
-- ARGV: replica, epoch, seq, lease_ms, block_ttl_ms, kv_use, added, removed
local key, seq, ttl = ns .. ':e:' .. ARGV[3], tonumber(ARGV[5]), tonumber(ARGV[7])
local slot, epoch, last = unpack(redis.call('HMGET', key, 'slot', 'epoch', 'seq'))
if epoch ~= ARGV[4] or redis.call('HGET', ns .. ':slots', slot) ~= ARGV[3] then return 'unknown' end
local ends = now + tonumber(ARGV[6])
redis.call('PEXPIRE', key, {DAY_MS})
redis.call('SETBIT', ns .. ':live', slot, 1)  -- where it was lost
redis.call('ZADD', ns .. ':replicas', ends, ARGV[3])
local r, tail = read_record(ARGV[3])
r[SLOT], r[UNTIL] = slot + 1, ends
if ARGV[8] ~= '' then r[KV_USE], r[REPORTED] = tonumber(ARGV[8]), now end
write_record(ARGV[3], r, tail)
if seq <= tonumber(last) then return 'ok' end  -- said before, or a lease renewed
if seq ~= last + 1 then return 'gap' end
redis.call('HSET', key, 'seq', seq)
local held, added, removed = ns .. ':held:' .. slot, ARGV[9], ARGV[10]
for i = 1, #added / 16 do
  local block = key_of(':b:', added, i)
  redis.call('SETBIT', block, slot, 1)
  redis.call('PEXPIRE', block, ttl)
  redis.call('SADD', held, added:sub(16 * i - 15, 16 * i))
end
for i = 1, #removed / 16 do
  local block = key_of(':b:', removed, i)
  redis.call('SREM', held, removed:sub(16 * i - 15, 16 * i))
  if redis.call('EXISTS', block) == 1 then
    redis.call('SETBIT', block, slot, 0)
    if redis.call('BITCOUNT', block) == 0 then redis.call('DEL', block) end
  end
end
if #added > 0 then redis.call('PEXPIRE', held, 2 * ttl) end
return 'ok'
"""
)

_DRAIN = Script(
    RECORD_LUA
    + """
-- ARGV: replica, 1 or 0
local r, tail = read_record(ARGV[3])
if r[SLOT] > 0 and r[DRAINING] ~= tonumber(ARGV[4]) then
  r[DRAINING] = tonumber(ARGV[4])
  write_record(ARGV[3], r, tail)
end
return 1
"""
)

_FORGET = Script(
    _RETIRE
    + """
-- ARGV: replica
retire(ARGV[3])
redis.call('ZREM', ns .. ':replicas', ARGV[3])
redis.call('HDEL', ns .. ':r', ARGV[3])
return 1
"""
)

_SWEEP = Script(
    _RETIRE
    + f"""
-- ARGV: grace_ms, batch
local batch = tonumber(ARGV[4])
local lapsed = redis.call('ZRANGEBYSCORE', ns .. ':replicas', '-inf', now - tonumber(ARGV[3]), 'LIMIT', 0, 16)
for _, replica in ipairs(lapsed) do
  retire(replica)
  local r, tail = read_record(replica)  -- what it was sent is under leases of its own, and what was learned stays
  local _, in_flight = load_of(tail)
  local ends = (in_flight > 0 and now or math.max(r[RECENT_AT], r[UNTIL])) + {DAY_MS}
  if ends > now then
    r[SLOT] = 0
    write_record(replica, r, tail)
    redis.call('ZADD', ns .. ':replicas', ends, replica)
  else
    redis.call('HDEL', ns .. ':r', replica)
    redis.call('ZREM', ns .. ':replicas', replica)
  end
end
local slot = redis.call('SRANDMEMBER', ns .. ':dirty')
if not slot then return 0 end
local held = ns .. ':held:' .. slot
for _, hash in ipairs(redis.call('SPOP', held, batch)) do
  local block = ns .. ':b:' .. hash
  if redis.call('EXISTS', block) == 1 then
    redis.call('SETBIT', block, slot, 0)
    if redis.call('BITCOUNT', block) == 0 then redis.call('DEL', block) end
  end
end
if redis.call('EXISTS', held) == 0 then
  redis.call('SREM', ns .. ':dirty', slot)
  redis.call('ZADD', ns .. ':free', now, slot)
end
return redis.call('SCARD', ns .. ':dirty')
"""
)


class PrefixIndex:
    """The writing side of the index. Every method raises StateUnavailableError; none has then changed the caller."""

    def __init__(self, client: StateClient, config: StateConfig) -> None:
        self._client = client
        self._lease_ms = math.ceil(config.replica_lease_s * 1000)
        self._block_ttl_ms = math.ceil(config.block_ttl_s * 1000)

    async def register(self, replica: str, epoch: str) -> None:
        """Begin an epoch in which nothing is held yet; message 1 is next. Ends what the replica claimed before."""
        await self._client.run(_REGISTER, replica, epoch, self._lease_ms, _SLOT_REST_MS)

    async def apply(
        self,
        replica: str,
        epoch: str,
        seq: int,
        added: Sequence[BlockHash] = (),
        removed: Sequence[BlockHash] = (),
        report: EngineReport | None = None,
    ) -> Applied:
        """Message `seq` of an epoch: at most MAX_BATCH blocks, removals after additions. Renews the lease.

        An empty message with the last number again only renews. Blocks held for longer than block_ttl_s must be said
        again, or are forgotten.
        """
        if len(added) + len(removed) > MAX_BATCH:
            raise ValueError(f"{len(added) + len(removed)} blocks in one message; at most {MAX_BATCH}")
        kv_use = "" if report is None else report.kv_use
        answer = await self._client.run(
            _APPLY,
            replica,
            epoch,
            seq,
            self._lease_ms,
            self._block_ttl_ms,
            kv_use,
            b"".join(added),
            b"".join(removed),
        )
        return Applied(answer.decode())

    async def drain(self, replica: str, *, drains: bool = True) -> None:
        """It ends soon: no new prefixes. Or it does not, after all."""
        await self._client.run(_DRAIN, replica, int(drains))

    async def forget(self, replica: str) -> None:
        """It is gone: its claims and its load are no longer believed."""
        await self._client.run(_FORGET, replica)

    async def sweep(self) -> int:
        """Retire replicas whose lease ended and remove a batch of claims; dirty slots left. Any gateway, often."""
        return int(await self._client.run(_SWEEP, 2 * self._lease_ms, _SWEEP_BATCH))
