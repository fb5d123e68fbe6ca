"""What a decision costs: look, choose and claim, Redis included, at a steady rate from one gateway.

    python -m benchmarks.affinity_cost --json

The fleet is full: prompts share a first part, conversations are held to different depths by different replicas, and
everything that a served request tells the state (predictions, first token, end) goes on beside the decisions, as it
would. Two in three requests continue a conversation, the others are new after the common part. Each decision is timed
from the moment it was due, so that a slow one is counted for all that waited behind it; hashing a prompt's blocks is
timed apart. The event loop's timers are late by up to a millisecond, requests are not: the last two milliseconds before
a request is due pass in turns of the loop.

Several rounds, since the machine is never quite idle: figures of each, with the cores that other processes kept busy
meanwhile (a figure is worth something where they are few), and the median of the rounds.

`--company`: a second gateway sends a request now and then. The first one cannot know any more that it is alone, and
waits for Redis to confirm each claim.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.environment import describe
from engines.block_hash import BlockHash, extend_hashes, root_hash
from gateway.process import begin_to_serve
from gateway.routing.replica_router import ReplicaRouter, Routed
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.embedded import EmbeddedServer
from gateway.state.fleet_state import FleetState, StateCounts
from gateway.state.prefix_index import PrefixIndex

_BLOCK_SIZE = 64
_COMMON_BLOCKS = 4
_WARM_UP_S = 4.0  # until a gateway knows that it is alone, among others
_POOL_TOKENS = 1 << 20
_TIMER_S = 0.002


class Load:
    """Conversations, where they are held, and the next request."""

    def __init__(self, num_replicas: int, num_blocks: int, num_conversations: int, rng: random.Random) -> None:
        self.replicas = [f"replica-{number}" for number in range(num_replicas)]
        self._num_blocks = num_blocks
        self._rng = rng
        # Prompts are cut from it: drawing each token anew takes longer than deciding.
        self._pool = array("H", rng.randbytes(2 * _POOL_TOKENS)).tolist()
        self._common = self._fresh(_COMMON_BLOCKS)
        self._conversations = [self._prompt() for _ in range(num_conversations)]

    def held_by(self, replica: int) -> list[BlockHash]:
        """What a replica holds at the start: the common part, and beginnings of its share of the conversations."""
        held = dict.fromkeys(block_hashes(self._common))
        for number, token_ids in enumerate(self._conversations):
            if (number + replica) % 8 == 0:
                depth = self._rng.randint(_COMMON_BLOCKS, self._num_blocks)
                held.update(dict.fromkeys(block_hashes(token_ids[: depth * _BLOCK_SIZE])))
        return list(held)

    def next(self) -> list[int]:
        """Token ids of the next request's prompt."""
        if self._rng.random() < 1 / 3:
            return self._prompt()
        token_ids = self._rng.choice(self._conversations)
        kept = self._rng.randint(_COMMON_BLOCKS, self._num_blocks)
        return token_ids[: kept * _BLOCK_SIZE] + self._fresh(self._num_blocks - kept)

    def _prompt(self) -> list[int]:
        return self._common + self._fresh(self._num_blocks - _COMMON_BLOCKS)

    def _fresh(self, num_blocks: int) -> list[int]:
        start = self._rng.randrange(_POOL_TOKENS - num_blocks * _BLOCK_SIZE)
        return self._pool[start : start + num_blocks * _BLOCK_SIZE]


def block_hashes(token_ids: list[int]) -> list[BlockHash]:
    """As a gateway computes them."""
    hashes: list[BlockHash] = []
    extend_hashes(hashes, root_hash("model"), token_ids, _BLOCK_SIZE)
    return hashes


@dataclass(slots=True)
class Round:
    """Seconds, in the order of requests."""

    decisions: list[float] = field(default_factory=list)
    hashing: list[float] = field(default_factory=list)
    counts: StateCounts = field(default_factory=StateCounts)

    def document(self) -> dict[str, Any]:
        """Milliseconds at percentiles, and how often the shared state was not there."""
        decisions, hashing = sorted(self.decisions), sorted(self.hashing)
        return {
            **{f"p{share}_ms": _at(decisions, share) for share in (50, 90, 99)},
            "hashing_p50_ms": _at(hashing, 50),
            "local_looks": self.counts.local_looks,
            "failed_reports": self.counts.failed_reports,
            "overtaken": self.counts.overtaken,
        }


async def measure(
    url: str,
    num_replicas: int,
    num_blocks: int,
    rate: float,
    seconds: float,
    config: StateConfig | None = None,
    *,
    company: bool = False,
) -> Round:
    """One round, with a fleet of its own."""
    rng = random.Random(0)
    config = config or StateConfig()
    fleet = f"cost-{os.getpid()}-{time.time_ns()}"
    client, publisher = StateClient(config, url, fleet), StateClient(config, url, fleet, timeout_s=1.0)
    await client.connect()
    state, load = FleetState(client, config, "gateway"), Load(num_replicas, num_blocks, 200, rng)
    await _fill(PrefixIndex(publisher, config), load)
    router, measured = ReplicaRouter(state, _BLOCK_SIZE, rng=rng), Round(counts=state.counts)
    after: set[asyncio.Task[None]] = set()
    another = asyncio.create_task(_keep_company(FleetState(publisher, config, "another"), load)) if company else None
    begin_to_serve()
    start = time.perf_counter() + 0.1
    for number in range(int((seconds + _WARM_UP_S) * rate)):
        token_ids = load.next()
        began = time.perf_counter()
        hashes = block_hashes(token_ids)
        hashed_s = time.perf_counter() - began
        due = start + number / rate
        await _until(due)
        routed = await router.route(hashes, len(token_ids), load.replicas)
        if number >= _WARM_UP_S * rate:
            measured.decisions.append(time.perf_counter() - due)
            measured.hashing.append(hashed_s)
        assert routed is not None
        task = asyncio.create_task(_serve(state, routed))
        after.add(task)
        task.add_done_callback(after.discard)
    await asyncio.gather(*after)
    await state.settled()
    if another is not None:
        another.cancel()
        await asyncio.gather(another, return_exceptions=True)
    await client.close()
    await publisher.close()
    return measured


async def _fill(index: PrefixIndex, load: Load) -> None:
    for number, replica in enumerate(load.replicas):
        await index.register(replica, "1")
        held = load.held_by(number)
        for seq, first in enumerate(range(0, len(held), 256), 1):
            await index.apply(replica, "1", seq, held[first : first + 256])


async def _keep_company(state: FleetState, load: Load) -> None:
    """A request to everyone in turn, at a rate that decides nothing but is seen."""
    for replica in itertools.cycle(load.replicas):
        figures: dict[str, Any] = {"confirmed_blocks": 0, "new_tokens": 100, "prefill_rate": 1e4, "expected_s": 0.01}
        reservation = state.reserve(replica, [], 100, **figures)
        await asyncio.sleep(0.1)
        state.finish(reservation, 0)


async def _until(due: float) -> None:
    await asyncio.sleep(max(due - time.perf_counter() - _TIMER_S, 0))
    while time.perf_counter() < due:  # noqa: ASYNC110 - what is waited for is a time, finer than timers have it
        await asyncio.sleep(0)


def _at(ordered: Sequence[float], share: int) -> float:
    return round(1000 * ordered[int(len(ordered) * share / 100)], 3)


class OthersUse:
    """Processor time that neither this process nor the Redis with this pid used, since now."""

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid
        self._began = time.perf_counter(), self._used()

    def cores(self) -> float | None:
        """How many they kept busy; None where the system does not tell."""
        began, used = self._began
        now = self._used()
        return None if now is None or used is None else round((now - used) / (time.perf_counter() - began), 2)

    def _used(self) -> float | None:
        try:
            user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
            server = Path(f"/proc/{self._server_pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        except OSError:
            return None
        ticks = user + nice + system + irq + softirq - sum(map(int, server))
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure in milliseconds over the rounds; counts are summed."""
    times = {key: statistics.median(each[key] for each in rounds) for key in rounds[0] if key.endswith("_ms")}
    counts = {key: sum(each[key] for each in rounds) for key in ("local_looks", "failed_reports", "overtaken")}
    return {**times, **counts}


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
    seconds: Annotated[float, typer.Option(min=1, help="of a round")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    company: Annotated[bool, typer.Option("--company", help="a second gateway sends requests too")] = False,
    redis: Annotated[str | None, typer.Option(help="URL; default: an embedded server")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout: one JSON document")] = False,
) -> None:
    """Time decisions."""
    server = EmbeddedServer() if redis is None else None
    figures: list[dict[str, Any]] = []
    try:
        url = redis if server is None else server.url
        assert url is not None
        for _ in range(rounds):
            others = OthersUse(server.pid if server is not None else None)
            measured = asyncio.run(measure(url, replicas, blocks, rate, seconds, company=company))
            figures.append({**measured.document(), "others_cores": others.cores()})
    finally:
        if server is not None:
            server.stop()
    setting = {"replicas": replicas, "blocks": blocks, "rate": rate, "seconds": seconds, "company": company}
    document = {**setting, **medians(figures), "rounds": figures}
    print(json.dumps({**document, "environment": describe()}) if as_json else document)


if __name__ == "__main__":
    typer.run(main)
