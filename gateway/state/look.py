"""Asking the shared state for a FleetView, and reading the answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from engines.block_hash import BlockHash
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.fleet_view import FleetView, ReplicaState
from gateway.state.look_script import HEAT_DEPTHS, LOOK, RECORD

# Of what waits, at least this share: the request whose turn it is has not had its first token yet.
_LEAST_LEFT = 0.05
_turns = itertools.count()


async def look(
    client: StateClient, config: StateConfig, hashes: Sequence[BlockHash], replicas: Sequence[str], max_holders: int
) -> FleetView:
    """`replicas`, and the `max_holders` others that hold most of `hashes`. Raises StateUnavailableError."""
    ids, records, holders, heat = await client.run(
        LOOK,
        max_holders,
        next(_turns),
        int(config.report_ttl_s * 1000),
        int(config.recent_half_life_s * 1000),
        int(config.heat_s * 1000),
        b"".join(hashes),
        *replicas,
    )
    states = {
        name: _state(name, record)
        for name, record in zip(map(bytes.decode, ids), RECORD.iter_unpack(records), strict=True)
    }
    return FleetView(
        replicas=states,
        holders=tuple(zip(holders[::2], holders[1::2], strict=True)),
        heat=tuple((depth, float(uses)) for depth, uses in zip(HEAT_DEPTHS, heat, strict=False)),
    )


def _state(replica: str, record: tuple[float, ...]) -> ReplicaState:
    leased, draining, confirmed, predicted, queued, in_flight, recent, *learned, kv_use, trust, backlog_ms = record
    prefill_rate, decode_rate = _rate(*learned[:2]), _rate(*learned[2:])
    return ReplicaState(
        replica,
        leased=bool(leased),
        draining=bool(draining),
        confirmed_blocks=int(confirmed),
        predicted_blocks=int(predicted),
        queued_tokens=None if math.isnan(queued) else _left(queued, backlog_ms, prefill_rate),
        in_flight=None if math.isnan(in_flight) else int(in_flight),
        recent_tokens=recent,
        prefill_rate=prefill_rate,
        decode_rate=decode_rate,
        kv_use=None if math.isnan(kv_use) else kv_use,
        trust=trust,
    )


def _rate(tokens: float, ms: float) -> float | None:
    """Tokens/s; None where nothing was observed."""
    return 1000 * tokens / ms if tokens > 0 and ms > 0 else None


def _left(queued: float, backlog_ms: float, rate: float | None) -> float:
    """Queued tokens less those that are believed to be prefilled already."""
    if rate is None:
        return queued
    return min(queued, max(_LEAST_LEFT * queued, backlog_ms * rate / 1000))
