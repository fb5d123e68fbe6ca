"""What a decision costs: look, choose and reserve, Redis included, at a steady rate from one gateway.

    python -m benchmarks.affinity_cost --json

The fleet is full: prompts share a first part, conversations are held to different depths by different replicas, and
everything that a served request tells the state (first token, end, blocks added and evicted) goes on beside the
decisions, as it would. Two in three requests continue a conversation, the others are new from their second block on.
Each is timed from the moment it was due, so that one slow decision is counted for all that waited behind it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Annotated, Any

import typer

from benchmarks.environment import describe
from engines.block_hash import BlockHash
from gateway.routing.replica_router import ReplicaRouter, Routed
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import PrefixIndex

_BLOCK_SIZE = 64
_COMMON_BLOCKS = 4
_WARM_UP_S = 1.0


class Load:
    """Conversations, where they are held, and the next request."""

    def __init__(self, num_replicas: int, num_blocks: int, num_conversations: int, rng: random.Random) -> None:
        self.replicas = [f"replica-{number}" for number in range(num_replicas)]
        self._num_blocks = num_blocks
        self._rng = rng
        self._common = self._fresh(_COMMON_BLOCKS)
        self._conversations = [self._prompt() for _ in range(num_conversations)]

    def held_by(self, replica: int) -> list[BlockHash]:
        """What a replica holds at the start: the common part, and beginnings of its share of the conversations."""
        held = dict.fromkeys(self._common)
        for number, hashes in enumerate(self._conversations):
            if (number + replica) % 8 == 0:
                held.update(dict.fromkeys(hashes[: self._rng.randint(_COMMON_BLOCKS, len(hashes))]))
        return list(held)

    def next(self) -> list[BlockHash]:
        """Hashes of the next request's blocks."""
        if self._rng.random() < 1 / 3:
            return self._prompt()
        hashes = self._rng.choice(self._conversations)
        kept = self._rng.randint(_COMMON_BLOCKS, len(hashes))
        return hashes[:kept] + self._fresh(self._num_blocks - kept)

    def _prompt(self) -> list[BlockHash]:
        return self._common + self._fresh(self._num_blocks - _COMMON_BLOCKS)

    def _fresh(self, count: int) -> list[BlockHash]:
        return [self._rng.randbytes(16) for _ in range(count)]


async def measure(url: str, num_replicas: int, num_blocks: int, rate: float, seconds: float) -> dict[str, Any]:
    """Milliseconds of each decision, sorted, and how many went without the shared state."""
    rng = random.Random(0)
    config = StateConfig()
    fleet = f"cost-{os.getpid()}-{time.time_ns()}"
    client, publisher = StateClient(config, url, fleet), StateClient(config, url, fleet, timeout_s=1.0)
    await client.connect()
    state = FleetState(client, config, "gateway")
    index = PrefixIndex(publisher, config)
    load = Load(num_replicas, num_blocks, 200, rng)
    for number, replica in enumerate(load.replicas):
        await index.register(replica, "1")
        held = load.held_by(number)
        for seq, first in enumerate(range(0, len(held), 256), 1):
            await index.apply(replica, "1", seq, held[first : first + 256])
    router = ReplicaRouter(state, _BLOCK_SIZE, rng=rng)
    times: list[float] = []
    after: set[asyncio.Task[None]] = set()
    start = time.perf_counter() + 0.1
    for number in range(int((seconds + _WARM_UP_S) * rate)):
        due = start + number / rate
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        hashes = load.next()
        began = max(due, time.perf_counter()) if number == 0 else due
        routed = await router.route(hashes, num_blocks * _BLOCK_SIZE, load.replicas)
        if number >= _WARM_UP_S * rate:
            times.append((time.perf_counter() - began) * 1000)
        assert routed is not None
        task = asyncio.create_task(_serve(state, routed))
        after.add(task)
        task.add_done_callback(after.discard)
    await asyncio.gather(*after)
    await state.settled()
    await client.close()
    await publisher.close()
    times.sort()
    return {"times_ms": times, "local_looks": state.counts.local_looks, "failed_reports": state.counts.failed_reports}


async def _serve(state: FleetState, routed: Routed) -> None:
    """What a request tells the state after its decision."""
    await asyncio.sleep(0.2)
    state.first_token(routed.reservation, routed.reservation.expected_warm_tokens)
    await asyncio.sleep(0.3)
    state.finish(routed.reservation, 20)


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 64,
    blocks: Annotated[int, typer.Option(min=8, help="in a prompt, of 64 tokens each")] = 128,
    rate: Annotated[float, typer.Option(min=1, help="decisions a second")] = 200.0,
    seconds: Annotated[float, typer.Option(min=1)] = 20.0,
    redis: Annotated[str | None, typer.Option(help="URL; default: an embedded server")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout: one JSON document")] = False,
) -> None:
    """Time decisions."""
    server = EmbeddedServer() if redis is None else None
    try:
        url = redis if server is None else server.url
        assert url is not None
        measured = asyncio.run(measure(url, replicas, blocks, rate, seconds))
    finally:
        if server is not None:
            server.stop()
    times = measured.pop("times_ms")
    figures = {f"p{share:g}_ms": round(times[int(len(times) * share / 100)], 3) for share in (50, 90, 99)}
    document = {"replicas": replicas, "blocks": blocks, "rate": rate, "decisions": len(times), **figures, **measured}
    print(json.dumps({**document, "environment": describe()}) if as_json else document)


if __name__ == "__main__":
    typer.run(main)
