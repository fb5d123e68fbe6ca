"""The question of a decision: longest match over all replicas, and the load of the candidates.

One trip: the records of the fleet, which are one hash, and an MGET of the prompt's blocks. Redis does nothing but look
keys up, 0.7 us for each that is not in the processor's cache, where the same in Lua took it twice as long, time in
which it serves no other gateway. Only in a fleet too large to be read as a whole, or when a holder is not known yet,
the holders' records take a second trip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from engines.block_hash import BlockHash
from gateway.state.channel import Answers
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.depths import held_depths, sent_depths
from gateway.state.fleet_view import FleetView
from gateway.state.prefix_match import match_prefix, recent_requests
from gateway.state.record import read_state
from gateway.state.slot_names import Records, SlotNames
from gateway.state.wire import head, pack, pack_hashes, pack_word

# A fleet of no more is read as a whole: parsing what is not needed costs little.
_READ_WHOLE = 128


class FleetReader:
    """One model's fleet, as one gateway reads it. Remembers which replica is behind which slot, and checks it."""

    def __init__(self, client: StateClient, config: StateConfig) -> None:
        self._client = client
        self._report_ttl_ms = int(config.report_ttl_s * 1000)
        self._half_life_ms = int(config.recent_half_life_s * 1000)
        self._heat_ms = config.heat_s * 1000
        self._live = pack_word(self._key("live"))
        self._records = self._key("r")
        self._whole_fleet = pack("HGETALL", self._records)
        self._fleet_size = pack("HLEN", self._records)
        self._num_records = 0  # when last counted: the first look counts them by reading all
        self._names = SlotNames()
        self._turns = itertools.count()

    async def look(
        self, hashes: Sequence[BlockHash], replicas: Sequence[str], max_holders: int, session: BlockHash | None = None
    ) -> FleetView:
        """`replicas`, the `max_holders` others that hold most of `hashes`, and the one that `session` was sent to last.

        Raises StateUnavailableError.
        """
        held_at, sent_at = held_depths(len(hashes)), sent_depths(len(hashes))
        asked = [name.encode() for name in replicas]
        is_whole = self._num_records <= _READ_WHOLE or not asked
        now, (told, *size, values) = await self._client.read(
            (self._whole_fleet if is_whole else self._some(asked) + self._fleet_size)
            + head(b"MGET", 1 + len(held_at) + len(sent_at) + (session is not None))
            + self._live
            + pack_hashes(self._key("b:"), [hashes[depth - 1] for depth in held_at])
            + pack_hashes(self._key("p:"), [hashes[depth - 1] for depth in sent_at])
            + pack_hashes(self._key("s:"), [session] if session else []),
            2 if is_whole else 3,
        )
        records = _pairs(told) if is_whole else _present(asked, told)
        self._num_records = len(records) if is_whole else size[0]
        given = iter(values)
        live = next(given) or b""
        held, sent = list(itertools.islice(given, len(held_at))), list(itertools.islice(given, len(sent_at)))
        pinned = next(given, None)
        match = match_prefix(live, held_at, held, sent_at, sent, now)
        slots = match.deepest(max_holders, next(self._turns))
        holders, num_trips = await self._holders(slots, pinned, records)
        shown = dict.fromkeys((*holders, *asked, *([pinned] if pinned else [])))
        lives = self._report_ttl_ms, self._half_life_ms
        states = [read_state(name.decode(), records.get(name), match, now, *lives) for name in shown]
        return FleetView(
            replicas={state.replica: state for state in states},
            holders=match.holders(),
            heat=tuple(
                [
                    (depth, recent_requests(known, now, self._heat_ms))
                    for depth, known in zip(sent_at, sent, strict=True)
                    if known is not None
                ]
            ),
            pinned=pinned.decode() if pinned else None,
            num_trips=num_trips,
        )

    async def _holders(self, slots: Sequence[int], pinned: bytes | None, records: Records) -> tuple[list[bytes], int]:
        """The replicas behind `slots`, and how many trips the look has taken.

        Their records and that of `pinned` are then among `records`.
        """
        names = self._names
        holders = names.confirmed(slots, records)
        if len(holders) < len(slots):  # somebody is new, or not among the records
            names.learn(records)
            holders = names.confirmed(slots, records)
        if len(holders) == len(slots) and (pinned is None or pinned in records):
            return holders, 1
        missing = [slot for slot in slots if slot not in names]
        if missing:
            command = pack("HMGET", self._key("slots"), *missing)
            _, (found,) = await self._client.read(command, 1)
            names.learn_names(missing, found)
        wanted = dict.fromkeys((*names.known(slots), *([pinned] if pinned else [])))
        unread = [name for name in wanted if name not in records]
        if unread:
            _, (told,) = await self._client.read(self._some(unread), 1)
            read = _present(unread, told)
            names.learn(read)
            records.update(read)
        # Looks run beside each other: what another one learned meanwhile is not in this one's records.
        return names.confirmed(slots, records), 2

    def _some(self, names: Sequence[bytes]) -> bytes:
        return pack("HMGET", self._records, *names)

    def _key(self, kind: str) -> bytes:
        return f"{self._client.prefix}:{kind}".encode()


def _pairs(told: Answers) -> Records:
    """What HGETALL says."""
    each = iter(told)
    return dict(zip(each, each, strict=True))


def _present(names: Iterable[bytes], told: Answers) -> Records:
    """What HMGET says of those that are there."""
    return {name: record for name, record in zip(names, told, strict=True) if record is not None}
