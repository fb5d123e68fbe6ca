"""Simulated replicas: a queue, a prefill speed that running decodes lower, and an LRU of so many blocks.

A replica prefills one prompt after another, in the order of arrival. What its cache holds of a prompt is seen when its
turn comes, and the prompt's blocks are in the cache from its first token on: the last used stay, of one prompt those of
its beginning. A prompt costs `overhead_s` and its uncached tokens; a decoded token costs as much as a prefilled one.
What real engines do besides is left out: blocks of outputs (traces do not say them), blocks that running sequences pin,
prompts that share a step.

Load is the share of the fleet's time that the trace would take with nothing cached; arrivals are moved together or
apart to meet it. The clock is simulated, and is the only one: policies that keep state in Redis hand it to the scripts.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.affinity_traces import BLOCK_SIZE, TraceRequest, span_s


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one replica; near those of an 8B model on one large GPU."""

    prefill_rate: float = 10_000.0  # tokens/s with nothing decoding
    overhead_s: float = 0.01  # of each prompt
    decode_step_s: float = 0.025  # with one sequence; doubles at `decode_batch`
    decode_batch: int = 128
    max_requests: int = 1024  # in one replica; more are rejected

    def work_s(self, request: TraceRequest) -> float:
        """Time of one replica that the request takes uncached."""
        return (request.prompt_tokens + request.output_tokens) / self.prefill_rate + self.overhead_s

    def step_s(self, decoding: int) -> float:
        return self.decode_step_s * (1 + decoding / self.decode_batch)

    def prefill_s(self, tokens: int, decoding: int) -> float:
        return self.overhead_s + tokens / (self.prefill_rate - decoding / self.step_s(decoding))


class LruCache:
    """The last `capacity` blocks used; within a prompt the first blocks count as used last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def match(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are held."""
        return next((depth for depth, block in enumerate(blocks) if block not in self._blocks), len(blocks))

    def insert(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Hold `blocks`; those that were added, and those that were evicted for them."""
        new = dict.fromkeys(block for block in blocks if block not in self._blocks)
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        excess = max(len(self._blocks) - self._capacity, 0)
        removed = [self._blocks.popitem(last=False)[0] for _ in range(excess)]
        gone = set(removed)
        return [block for block in new if block not in gone], [block for block in removed if block not in new]


@dataclass(slots=True, eq=False)
class Arrival:
    """A request on its way through the fleet."""

    number: int
    request: TraceRequest
    at_s: float
    replica: int = -1
    cached_tokens: int = 0


class Policy(Protocol):
    """Chooses replicas, and is told what a gateway and the engines would tell."""

    async def choose(self, arrivals: Sequence[Arrival]) -> Sequence[int | None]:
        """Replicas for requests that arrived at once; None rejects."""

    async def prefilled(self, arrival: Arrival, added: Sequence[int], removed: Sequence[int]) -> None:
        """The first token is out; the replica's cache changed by these blocks."""

    async def finished(self, arrival: Arrival) -> None:
        """The last token is out."""

    async def tick(self) -> None:
        """A second went by."""


@dataclass(slots=True)
class Clock:
    """Simulated seconds."""

    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a replay came to. TTFT of the requests that were served, in seconds."""

    block_hit_rate: float
    skew: float
    ttft_p50_s: float
    ttft_p99_s: float
    rejected: int


@dataclass(slots=True)
class _Replica:
    cache: LruCache
    queue: deque[Arrival] = field(default_factory=deque)
    requests: int = 0
    decoding: int = 0
    prefilled_tokens: int = 0


_ARRIVE, _PREFILLED, _FINISHED, _TICK = range(4)


class Simulation:
    """One replay of a trace at one load under one policy."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        num_replicas: int,
        num_blocks: int,
        load: float,
        *,
        speed: Speed = Speed(),
        clock: Clock | None = None,
        at_once: int = 1,
    ) -> None:
        """`at_once`: so many arrivals in a row may be decided without knowing of each other, as by several gateways."""
        self._speed = speed
        self._clock = clock or Clock()
        self._at_once = at_once
        self._replicas = [_Replica(LruCache(num_blocks)) for _ in range(num_replicas)]
        stretch = sum(map(speed.work_s, trace)) / (num_replicas * load) / span_s(trace)
        start = self._clock.now_s
        arrivals = [Arrival(number, each, start + each.at_s * stretch) for number, each in enumerate(trace)]
        self._events: list[tuple[float, int, int, Arrival | None]] = [
            (each.at_s, each.number, _ARRIVE, each) for each in arrivals
        ]
        self._end_s = arrivals[-1].at_s
        self._sequence = len(arrivals)
        self._ttft: list[float] = []
        self._hits = self._blocks = self._rejected = 0

    async def run(self, policy: Policy) -> Result:
        """Replay everything."""
        heapq.heapify(self._events)
        self._push(self._clock.now_s + 1, _TICK, None)
        while self._events:
            at, _, kind, arrival = heapq.heappop(self._events)
            self._clock.now_s = at
            if arrival is None:
                await policy.tick()
                if self._events:
                    self._push(at + 1, _TICK, None)
            elif kind == _ARRIVE:
                await self._arrive(policy, self._together(arrival))
            elif kind == _PREFILLED:
                await self._first_token(policy, arrival)
            else:
                await self._finish(policy, arrival)
        return self._result()

    def _together(self, first: Arrival) -> list[Arrival]:
        arrivals = [first]
        while self._events and self._events[0][2] == _ARRIVE and len(arrivals) < self._at_once:
            following = self._events[0][3]
            assert following is not None
            if following.at_s > first.at_s + 0.005:
                break
            heapq.heappop(self._events)
            arrivals.append(following)
        return arrivals

    async def _arrive(self, policy: Policy, arrivals: Sequence[Arrival]) -> None:
        for arrival, choice in zip(arrivals, await policy.choose(arrivals), strict=True):
            if choice is None:
                self._rejected += 1
                continue
            arrival.replica = choice
            replica = self._replicas[choice]
            if replica.requests >= self._speed.max_requests:
                self._rejected += 1
                await policy.finished(arrival)
                continue
            replica.requests += 1
            replica.queue.append(arrival)
            if len(replica.queue) == 1:
                self._begin(replica)

    def _begin(self, replica: _Replica) -> None:
        arrival = replica.queue[0]
        blocks = arrival.request.blocks
        depth = replica.cache.match(blocks)
        arrival.cached_tokens = min(depth * BLOCK_SIZE, arrival.request.prompt_tokens - 1)
        self._hits += depth
        self._blocks += len(blocks)
        tokens = arrival.request.prompt_tokens - arrival.cached_tokens
        replica.prefilled_tokens += tokens
        took = self._speed.prefill_s(tokens, replica.decoding)
        self._push(self._clock.now_s + took, _PREFILLED, arrival)

    async def _first_token(self, policy: Policy, arrival: Arrival) -> None:
        replica = self._replicas[arrival.replica]
        replica.queue.popleft()
        replica.decoding += 1
        self._ttft.append(self._clock.now_s - arrival.at_s)
        added, removed = replica.cache.insert(arrival.request.blocks)
        decode_s = arrival.request.output_tokens * self._speed.step_s(replica.decoding)
        self._push(self._clock.now_s + decode_s, _FINISHED, arrival)
        if replica.queue:
            self._begin(replica)
        await policy.prefilled(arrival, added, removed)

    async def _finish(self, policy: Policy, arrival: Arrival) -> None:
        replica = self._replicas[arrival.replica]
        replica.decoding -= 1
        replica.requests -= 1
        await policy.finished(arrival)

    def _push(self, at: float, kind: int, arrival: Arrival | None) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at, self._sequence, kind, arrival))

    def _result(self) -> Result:
        prefilled = [each.prefilled_tokens for each in self._replicas]
        mean = max(sum(prefilled) / len(prefilled), 1)
        ordered = sorted(self._ttft)
        return Result(
            block_hit_rate=self._hits / max(self._blocks, 1),
            skew=max(prefilled) / mean,
            ttft_p50_s=_percentile(ordered, 0.50),
            ttft_p99_s=_percentile(ordered, 0.99),
            rejected=self._rejected,
        )


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; zero of nothing."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else 0.0
