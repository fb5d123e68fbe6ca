"""The question of a decision: longest match over all replicas, and the load of the candidates.

One MGET: blocks, predictions, popularity, and the records of the replicas that are known. Redis does nothing but look
keys up, 0.7 us for each that is not in the processor's cache, where the same in Lua took it twice as long, time in
which it serves no other gateway. Only in a fleet too large to be read as a whole, or when a holder is not known yet,
the holders' records take a second trip.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence

from engines.block_hash import BlockHash
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.depths import asked_depths, heat_depths
from gateway.state.fleet_view import FleetView, ReplicaState
from gateway.state.prefix_match import PrefixMatch, match_prefix
from gateway.state.record import read_state
from gateway.state.slot_names import Records, SlotNames
from gateway.state.wire import pack_hashes, pack_keys

# Known replicas are read along with those asked for while they are not more: parsing what is not needed costs little.
_READ_AHEAD = 128
_HEAT = struct.Struct("<dQ")  # requests, and when that was true, in ms


class FleetReader:
    """One model's fleet, as one gateway reads it. Remembers which replica is behind which slot, and checks it."""

    def __init__(self, client: StateClient, config: StateConfig) -> None:
        self._client = client
        self._report_ttl_ms = int(config.report_ttl_s * 1000)
        self._half_life_ms = int(config.recent_half_life_s * 1000)
        self._heat_ms = config.heat_s * 1000
        self._live = pack_keys(self._key(""), ["live"])
        self._names = SlotNames(self._key("r:"))
        self._turns = itertools.count()

    async def look(
        self, hashes: Sequence[BlockHash], replicas: Sequence[str], max_holders: int, session: BlockHash | None = None
    ) -> FleetView:
        """`replicas`, the `max_holders` others that hold most of `hashes`, and the one that `session` was sent to last.

        Raises StateUnavailableError.
        """
        ahead = self._names.all() if len(self._names) <= _READ_AHEAD else ()
        names = list(dict.fromkeys((*replicas, *ahead)))
        depths, counted = asked_depths(len(hashes)), heat_depths(len(hashes))
        asked = [hashes[depth - 1] for depth in depths]
        now, values = await self._client.values(
            self._live
            + self._names.pack_keys(names)
            + pack_hashes(self._key("b:"), asked)
            + pack_hashes(self._key("p:"), asked)
            + pack_hashes(self._key("h:"), [hashes[depth - 1] for depth in counted])
            + pack_hashes(self._key("s:"), [session] if session else []),
            1 + len(names) + 2 * len(asked) + len(counted) + (session is not None),
        )
        live, given = values[0] or b"", iter(values[1:])
        records: Records = dict(zip(names, given, strict=False))
        blocks, predictions, heat = (list(itertools.islice(given, n)) for n in (len(asked), len(asked), len(counted)))
        pin = next(given, None)
        pinned = pin.decode() if pin else None
        self._names.learn(records)
        match = match_prefix(live, depths, blocks, predictions, now)
        holders, num_trips = await self._holders(match.deepest(max_holders, next(self._turns)), pinned, records)
        shown = dict.fromkeys((*holders, *replicas, *([pinned] if pinned else [])))
        return FleetView(
            replicas={name: self._state(name, records[name], match, now) for name in shown},
            holders=match.holders(),
            heat=tuple((depth, self._uses(value, now)) for depth, value in zip(counted, heat, strict=True)),
            pinned=pinned,
            num_trips=num_trips,
        )

    async def _holders(self, slots: Sequence[int], pinned: str | None, records: Records) -> tuple[list[str], int]:
        """The replicas behind `slots`, and how many trips the look has taken.

        Their records and that of `pinned` are then among `records`.
        """
        missing = [slot for slot in slots if slot not in self._names]
        if missing:
            names = await self._client.command("HMGET", f"{self._client.prefix}:slots", *missing)
            self._names.learn_names(missing, names)
        wanted = [*self._names.of(slots), *([pinned] if pinned else [])]
        unread = [name for name in dict.fromkeys(wanted) if name not in records]
        if unread:
            _, values = await self._client.values(self._names.pack_keys(unread), len(unread))
            records.update(zip(unread, values, strict=True))
            self._names.learn({name: records[name] for name in unread})
        # Looks run beside each other: what another one learned meanwhile is not in this one's records.
        return [name for name in self._names.of(slots) if name in records], 2 if missing or unread else 1

    def _state(self, replica: str, record: bytes | None, match: PrefixMatch, now: int) -> ReplicaState:
        depths = match.confirmed, match.predicted
        return read_state(replica, record, depths, now, self._report_ttl_ms, self._half_life_ms)

    def _uses(self, heat: bytes | None, now: int) -> float:
        if heat is None:
            return 0.0
        count, since = _HEAT.unpack(heat)
        return float(count * math.exp((since - now) / self._heat_ms))

    def _key(self, kind: str) -> bytes:
        return f"{self._client.prefix}:{kind}".encode()
