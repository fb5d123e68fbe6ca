"""Ours in the replay: the gateway's own code and a real Redis; only the replicas and the clock are simulated.

Time: every life in the state (replica and gateway leases, predictions, heat, recent work) is a time stored beside the
entry and compared by the scripts with the time they are given, which in the replay is the simulation's. Redis's own
expiry of keys bounds memory when nobody looks any more; it runs in real time, and since a replay takes minutes for an
hour, it always comes later than the stored one.

Several gateways are several routers with their own connections and accounts, that take requests in turn and decide
requests that came within 5 ms at once: all look before any of them has reserved.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

from benchmarks.affinity_fleet import Arrival, Clock
from benchmarks.affinity_traces import BLOCK_SIZE
from engines.block_hash import BlockHash
from gateway.routing.replica_choice import DEFAULT_WEIGHTS, ChoiceWeights
from gateway.routing.replica_router import ReplicaRouter, Routed
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import MAX_BATCH, Applied, PrefixIndex

_BEAT_S = 3
# The replay shares its machine: a slow answer is waited for, since a fallback would be an accident of the machine.
_TIMEOUT_S = 600.0


class Outrider:
    """The policy "outrider". Made and used within one event loop; `close` when done."""

    def __init__(
        self,
        url: str,
        fleet: str,
        num_replicas: int,
        clock: Clock,
        *,
        num_gateways: int = 1,
        weights: ChoiceWeights = DEFAULT_WEIGHTS,
        seed: int = 0,
    ) -> None:
        """`fleet` names the keys: one that was not used before."""
        config = StateConfig(timeout_s=_TIMEOUT_S)

        def milliseconds() -> int:
            return int(clock.now_s * 1000)

        self._clients = [StateClient(config, url, fleet, milliseconds) for _ in range(num_gateways + 1)]
        self._index = PrefixIndex(self._clients[-1], config)
        self._states = [
            FleetState(client, config, f"gateway-{number}", lambda: clock.now_s)
            for number, client in enumerate(self._clients[:-1])
        ]
        self._routers = [
            ReplicaRouter(state, BLOCK_SIZE, weights, rng=random.Random(seed + number))
            for number, state in enumerate(self._states)
        ]
        self._replicas = [f"replica-{number}" for number in range(num_replicas)]
        self._numbers = {name: number for number, name in enumerate(self._replicas)}
        self._sequences = [0] * num_replicas
        self._routed: dict[int, tuple[FleetState, Routed]] = {}
        self._seconds = 0

    async def start(self) -> None:
        """Register the replicas."""
        for replica in self._replicas:
            await self._index.register(replica, "1")

    async def choose(self, arrivals: Sequence[Arrival]) -> Sequence[int | None]:
        choices = await asyncio.gather(*map(self._route, arrivals))
        for state in self._states:
            await state.settled()
        return choices

    async def prefilled(self, arrival: Arrival, added: Sequence[int], removed: Sequence[int]) -> None:
        await self._publish(arrival.replica, list(map(_hash, added)), list(map(_hash, removed)))
        state, routed = self._routed[arrival.number]
        state.first_token(routed.reservation, arrival.cached_tokens)
        await state.settled()

    async def finished(self, arrival: Arrival) -> None:
        state, routed = self._routed.pop(arrival.number)
        state.finish(routed.reservation, arrival.request.output_tokens)
        await state.settled()

    async def tick(self) -> None:
        self._seconds += 1
        if self._seconds % _BEAT_S:
            return
        for state in self._states:
            await state.heartbeat()
        for number in range(len(self._replicas)):
            await self._publish(number, [], [])
        await self._index.sweep()

    @property
    def fallbacks(self) -> int:
        """Decisions that did not see the shared state."""
        return sum(state.counts.local_looks + state.counts.failed_reports for state in self._states)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def _route(self, arrival: Arrival) -> int | None:
        number = arrival.number % len(self._routers)
        hashes = [_hash(block) for block in arrival.request.blocks]
        routed = await self._routers[number].route(hashes, arrival.request.prompt_tokens, self._replicas)
        if routed is None or routed.decision.replica is None:
            return None
        self._routed[arrival.number] = self._states[number], routed
        return self._numbers[routed.decision.replica]

    async def _publish(self, replica: int, added: list[BlockHash], removed: list[BlockHash]) -> None:
        """Events in messages of their largest size; without any, the lease is renewed."""
        events = [(block, True) for block in added] + [(block, False) for block in removed]
        for start in range(0, len(events) or 1, MAX_BATCH):
            batch = events[start : start + MAX_BATCH]
            self._sequences[replica] += bool(batch)
            applied = await self._index.apply(
                self._replicas[replica],
                "1",
                self._sequences[replica],
                [block for block, is_new in batch if is_new],
                [block for block, is_new in batch if not is_new],
            )
            assert applied is Applied.OK, applied


@lru_cache(maxsize=1 << 18)
def _hash(block: int) -> BlockHash:
    """A trace's ids stand for chained hashes: equal ids, equal prefixes."""
    return hashlib.blake2b(block.to_bytes(8, "little"), digest_size=16).digest()
