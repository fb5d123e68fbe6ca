"""What gateways tell each other: requests sent, first tokens seen, requests ended.

Every gateway writes its own totals per replica, absolute and with a version, under a lease: a lost or late message is
mended by the next, a gateway that dies takes its load with it, a Redis that comes back empty is soon full again.

`free_at` foretells when a replica will have prefilled all that it was sent: each request moves it on, each first token
sets it right. It says how much of a long prefill is already done, which totals alone do not.

A decision is made from what was seen some hundred microseconds before it is told. `sends`, which counts the requests
sent to a replica, says whether another gateway was quicker: CLAIM then changes nothing, and the gateway decides anew.
"""

from __future__ import annotations

from gateway.state.connection import Script
from gateway.state.record import RECORD_LUA

# Observed rates and hits are sums that forget one part in 200 with each request. Ratios of sums, since a mean of
# ratios would let short requests, which are mostly overhead, outvote long ones.
_KEEP = 0.995
# ARGV: gateway, replica, version, queued_tokens, in_flight, lease_ms
_ACCOUNT = (
    RECORD_LUA
    + """
local replica = ARGV[4]
local r, tail = read_record(replica)
tail = account(tail, ARGV[3], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
"""
)

CLAIM = Script(
    RECORD_LUA
    + """
-- ARGV: gateway, replica, version, queued_tokens, in_flight, lease_ms, sends or -1, new_tokens, prefill_rate,
-- half_life_ms
local replica, sends, new_tokens = ARGV[4], tonumber(ARGV[9]), tonumber(ARGV[10])
local r, tail = read_record(replica)
if sends >= 0 and r[SENDS] ~= sends then return 0 end
tail = account(tail, ARGV[3], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
r[SENDS] = r[SENDS] + 1
r[RECENT] = new_tokens + r[RECENT] * 2 ^ ((r[RECENT_AT] - now) / tonumber(ARGV[12]))
r[RECENT_AT] = now
r[FREE_AT] = math.max(r[FREE_AT], now) + 1000 * new_tokens / tonumber(ARGV[11])
write_record(replica, r, tail)
return 1
""",
    counts=True,
)

FORETELL = Script(
    RECORD_LUA
    + """
-- ARGV: replica, predicted_ttl_ms, heat_ms, hashes that it was sent, how many of them its engine confirmed,
-- session or '', session_ttl_ms
local ttl, heat_ms, sent, num_confirmed = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local r = read_record(ARGV[3])
local slot = r[SLOT] - 1
for i = 1, #sent / 16 do
  local key, count, life, predictions, mine = key_of(':p:', sent, i), 1, 0, '', -1
  if slot >= 0 and i > num_confirmed then
    mine, life, predictions = slot, ttl, struct.pack('<I2I8', slot, now + ttl)
  end
  local known = redis.call('GET', key)
  if known then
    local before, since = struct.unpack('<dI8', known)
    count = 1 + before * math.exp((since - now) / heat_ms)
    for at = 17, #known, 10 do
      local other, ends = struct.unpack('<I2I8', known, at)
      if other ~= mine and ends > now then
        life, predictions = math.max(life, ends - now), predictions .. known:sub(at, at + 9)
      end
    end
  end
  -- Until a twentieth of one request is left of the count.
  life = math.ceil(math.max(life, heat_ms * (3 + math.log(count))))
  redis.call('SET', key, struct.pack('<dI8', count, now) .. predictions, 'PX', life)
end

if ARGV[8] ~= '' then redis.call('SET', ns .. ':s:' .. ARGV[8], ARGV[3], 'PX', ARGV[9]) end
return 1
""",
    counts=True,
)

FIRST_TOKEN = Script(
    _ACCOUNT
    + f"""
-- further: sent_ms_ago, uncached_tokens, prefill_rate, promised_tokens, found_tokens
local queued = load_of(tail)
-- Prompts are prefilled in turn: this one's turn began when it came, or when the one before it was done.
local took = now - math.max(now - tonumber(ARGV[9]), r[FIRST_AT])
local promised, found = tonumber(ARGV[12]), tonumber(ARGV[13])
r[FIRST_AT], r[FREE_AT] = now, now + 1000 * queued / tonumber(ARGV[11])
r[PREFILL_TOKENS] = {_KEEP} * r[PREFILL_TOKENS] + tonumber(ARGV[10])
r[PREFILL_MS] = {_KEEP} * r[PREFILL_MS] + math.max(took, 0)
r[EXPECTED] = {_KEEP} * r[EXPECTED] + promised
r[FOUND] = {_KEEP} * r[FOUND] + math.min(promised, found)
write_record(replica, r, tail)
return 1
""",
    counts=True,
)

FINISH = Script(
    _ACCOUNT
    + f"""
-- further: output_tokens, decode_ms
local output, took = tonumber(ARGV[9]), tonumber(ARGV[10])
if output > 1 and took > 0 then
  -- A sequence decodes beside others: the replica's rate is this one's times all that are in flight with it.
  local _, others = load_of(tail)
  r[DECODE_TOKENS] = {_KEEP} * r[DECODE_TOKENS] + output * (others + 1)
  r[DECODE_MS] = {_KEEP} * r[DECODE_MS] + took
end
write_record(replica, r, tail)
return 1
""",
    counts=True,
)

HEARTBEAT = Script(
    RECORD_LUA
    + """
-- ARGV: gateway, lease_ms, then replica, version, queued_tokens, in_flight in turn
for i = 5, #ARGV, 4 do
  local r, tail = read_record(ARGV[i])
  tail = account(tail, ARGV[3], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[4]))
  write_record(ARGV[i], r, tail)
end
return 1
"""
)
