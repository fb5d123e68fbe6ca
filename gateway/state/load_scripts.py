"""What gateways tell each other: requests sent, first tokens seen, requests ended.

Every gateway writes its own totals per replica, absolute and with a version, under a lease: a lost or late message is
mended by the next, a gateway that dies takes its load with it, a Redis that comes back empty is soon full again.

`free_at` foretells when a replica will have prefilled all that it was sent: each request moves it on, each first token
sets it right. It says how much of a long prefill is already done, which totals alone do not.
"""

from __future__ import annotations

from gateway.state.connection import Script
from gateway.state.look_script import HEAT_DEPTHS_LUA

# Observed rates and hits are sums that forget one part in 200 with each request. Ratios of sums, since a mean of
# ratios would let short requests, which are mostly overhead, outvote long ones.
_KEEP = 0.995
_DAY_MS = 86_400_000

# ARGV: gateway, replica, version, queued_tokens, in_flight, lease_ms
_ACCOUNT = """
local function account(gateway, replica, version, queued, in_flight, lease_ms)
  local key = ns .. ':l:' .. replica
  local known = redis.call('HGET', key, gateway)
  if not known or struct.unpack('<I4', known) <= version then
    redis.call('HSET', key, gateway, struct.pack('<I4I4I4I8', version, queued, in_flight, now + lease_ms))
    redis.call('PEXPIRE', key, 2 * lease_ms)
  end
end
account(ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
local replica_key = ns .. ':r:' .. ARGV[4]
"""

RESERVE = Script(
    _ACCOUNT
    + HEAT_DEPTHS_LUA
    + f"""
-- further: new_tokens, prefill_rate, half_life_ms, predicted_ttl_ms, heat_ms, confirmed_blocks,
-- hashes
local new_tokens, rate, half_life = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local ttl, heat_ms, confirmed, hashes = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), ARGV[15]
local num_hashes = #hashes / 16
local slot, recent, since, free_at = unpack(redis.call('HMGET', replica_key, 'slot', 'recent', 'recent_at', 'free_at'))
recent = new_tokens + (recent and tonumber(recent) * 2 ^ ((tonumber(since) - now) / half_life) or 0)
redis.call('HSET', replica_key, 'recent', recent, 'recent_at', now,
  'free_at', math.max(tonumber(free_at or now), now) + 1000 * new_tokens / rate)
redis.call('PEXPIRE', replica_key, {_DAY_MS})

slot = tonumber(slot)
if slot then
  for from = confirmed + 1, num_hashes, 64 do
    local keys = {{}}
    for i = from, math.min(from + 63, num_hashes) do keys[#keys + 1] = key_of(':p:', hashes, i) end
    local mine = struct.pack('<I2I8', slot, now + ttl)
    for i, known in ipairs(redis.call('MGET', unpack(keys))) do
      local others = ''
      if known then
        for at = 1, #known, 10 do
          local other, ends = struct.unpack('<I2I8', known, at)
          if other ~= slot and ends > now then others = others .. known:sub(at, at + 9) end
        end
      end
      redis.call('SET', keys[i], mine .. others, 'PX', ttl)
    end
  end
end

for _, depth in ipairs(heat_depths) do
  if depth > num_hashes then break end
  local key, count = key_of(':h:', hashes, depth), 1
  local known = redis.call('GET', key)
  if known then
    local before, at = struct.unpack('<dI8', known)
    count = 1 + before * math.exp((at - now) / heat_ms)
  end
  redis.call('SET', key, struct.pack('<dI8', count, now), 'PX', 10 * heat_ms)
end
return 1
"""
)

FIRST_TOKEN = Script(
    _ACCOUNT
    + f"""
-- further: sent_ms_ago, uncached_tokens, prefill_rate, expected_tokens, found_tokens
local sent = now - tonumber(ARGV[9])
local queued = 0
for i, value in ipairs(redis.call('HVALS', ns .. ':l:' .. ARGV[4])) do
  local _, tokens, _, ends = struct.unpack('<I4I4I4I8', value)
  if ends > now then queued = queued + tokens end
end
local last, tokens, ms, expected, found = unpack(
  redis.call('HMGET', replica_key, 'first_at', 'prefill_tokens', 'prefill_ms', 'expected', 'found'))
-- Prompts are prefilled in turn: this one's turn began when it came, or when the one before it was done.
local took = now - math.max(sent, tonumber(last or 0))
redis.call('HSET', replica_key, 'first_at', now, 'free_at', now + 1000 * queued / tonumber(ARGV[11]),
  'prefill_tokens', {_KEEP} * tonumber(tokens or 0) + tonumber(ARGV[10]),
  'prefill_ms', {_KEEP} * tonumber(ms or 0) + math.max(took, 0),
  'expected', {_KEEP} * tonumber(expected or 0) + tonumber(ARGV[12]),
  'found', {_KEEP} * tonumber(found or 0) + math.min(tonumber(ARGV[12]), tonumber(ARGV[13])))
redis.call('PEXPIRE', replica_key, {_DAY_MS})
return 1
"""
)

FINISH = Script(
    _ACCOUNT
    + f"""
-- further: output_tokens, decode_ms
-- A sequence decodes beside others: the replica's rate is this one's times all that are in flight with it.
local together = 1
for i, value in ipairs(redis.call('HVALS', ns .. ':l:' .. ARGV[4])) do
  local _, _, requests, ends = struct.unpack('<I4I4I4I8', value)
  if ends > now then together = together + requests end
end
local output, took = tonumber(ARGV[9]), tonumber(ARGV[10])
if output > 1 and took > 0 then
  local tokens, ms = unpack(redis.call('HMGET', replica_key, 'decode_tokens', 'decode_ms'))
  redis.call('HSET', replica_key, 'decode_tokens', {_KEEP} * tonumber(tokens or 0) + output * together,
    'decode_ms', {_KEEP} * tonumber(ms or 0) + took)
end
return 1
"""
)

# ARGV: gateway, lease_ms, then replica, version, queued_tokens, in_flight in turn
HEARTBEAT = Script("""
local gateway, lease_ms = ARGV[3], tonumber(ARGV[4])
for i = 5, #ARGV, 4 do
  local key, version = ns .. ':l:' .. ARGV[i], tonumber(ARGV[i + 1])
  local known = redis.call('HGET', key, gateway)
  if not known or struct.unpack('<I4', known) <= version then
    redis.call('HSET', key, gateway,
      struct.pack('<I4I4I4I8', version, tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), now + lease_ms))
    redis.call('PEXPIRE', key, 2 * lease_ms)
  end
end
return 1
""")
