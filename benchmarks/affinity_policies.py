"""What others do, re-implemented from their descriptions. All know what they sent; none knows an engine's cache.

Loads are what is in flight: requests where the original counts requests, else prompt tokens that wait for their first
token, which is the stronger signal and therefore the fairer comparison for the classical rules.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence

from benchmarks.affinity_fleet import Arrival

_KEY_BLOCKS = 2  # 1,024 tokens: one block would send all of a trace whose requests share it to one replica


class Baseline(ABC):
    """A policy that keeps its state in the process: queued tokens and requests in flight of each replica."""

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        self.num_replicas = num_replicas
        self.rng = rng
        self.queued = [0] * num_replicas
        self.requests = [0] * num_replicas
        self._waiting: set[int] = set()

    @abstractmethod
    def pick(self, blocks: Sequence[int]) -> int:
        """The replica for a prompt."""

    async def choose(self, arrivals: Sequence[Arrival]) -> Sequence[int | None]:
        return [self._send(each) for each in arrivals]

    async def prefilled(self, arrival: Arrival, added: Sequence[int], removed: Sequence[int]) -> None:
        self._release(arrival)

    async def finished(self, arrival: Arrival) -> None:
        self._release(arrival)
        self.requests[arrival.replica] -= 1

    async def tick(self) -> None:
        """Nothing of theirs goes by time."""
        return

    def least(self, load: Sequence[float], among: Sequence[int] | None = None) -> int:
        """The replica with the least load, ties at random."""
        replicas = range(self.num_replicas) if among is None else among
        lowest = min(load[each] for each in replicas)
        return self.rng.choice([each for each in replicas if load[each] == lowest])

    def two_choices(self, load: Sequence[float]) -> int:
        """The less loaded of two at random."""
        count = min(2, self.num_replicas)
        return self.least(load, self.rng.sample(range(self.num_replicas), count))

    def _send(self, arrival: Arrival) -> int:
        replica = self.pick(arrival.request.blocks)
        self.queued[replica] += arrival.request.prompt_tokens
        self.requests[replica] += 1
        self._waiting.add(arrival.number)
        return replica

    def _release(self, arrival: Arrival) -> None:
        if arrival.number in self._waiting:
            self._waiting.remove(arrival.number)
            self.queued[arrival.replica] -= arrival.request.prompt_tokens


class RoundRobin(Baseline):
    """In turn."""

    _next = -1

    def pick(self, blocks: Sequence[int]) -> int:
        self._next = (self._next + 1) % self.num_replicas
        return self._next


class Random(Baseline):
    """By lot."""

    def pick(self, blocks: Sequence[int]) -> int:
        return self.rng.randrange(self.num_replicas)


class LeastLoaded(Baseline):
    """Fewest prompt tokens waiting for their first token."""

    def pick(self, blocks: Sequence[int]) -> int:
        return self.least(self.queued)


class TwoChoices(Baseline):
    """The less loaded of two at random."""

    def pick(self, blocks: Sequence[int]) -> int:
        return self.two_choices(self.queued)


class RoutedPrefixes:
    """Which replica was sent which prefix: per replica the last `capacity` blocks, for ever if None."""

    def __init__(self, num_replicas: int, capacity: int | None = None) -> None:
        self._capacity = capacity
        self.sent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_replicas)]

    def longest(self, blocks: Sequence[int]) -> tuple[int, list[int]]:
        """Blocks of the longest match, and the replicas that have it."""
        alive, depth = list(range(len(self.sent))), 0
        for block in blocks:
            following = [each for each in alive if block in self.sent[each]]
            if not following:
                break
            alive, depth = following, depth + 1
        return depth, alive

    def insert(self, replica: int, blocks: Sequence[int]) -> None:
        sent = self.sent[replica]
        for block in reversed(blocks):
            sent[block] = None
            sent.move_to_end(block)
        while self._capacity is not None and len(sent) > self._capacity:
            sent.popitem(last=False)


class LongestPrefix(Baseline):
    """The longest match, whatever the load; where nothing matches, the least loaded."""

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        super().__init__(num_replicas, rng)
        self._routed = RoutedPrefixes(num_replicas)

    def pick(self, blocks: Sequence[int]) -> int:
        depth, holders = self._routed.longest(blocks)
        replica = self.rng.choice(holders) if depth else self.least(self.queued)
        self._routed.insert(replica, blocks)
        return replica


def _preference(blocks: Sequence[int], num_replicas: int) -> list[int]:
    """Replicas by rendezvous weight for the prompt's first blocks."""
    key = repr(tuple(blocks[:_KEY_BLOCKS])).encode()
    weights = [
        hashlib.blake2b(key + bytes([0, each % 256, each // 256]), digest_size=8).digest()
        for each in range(num_replicas)
    ]
    return sorted(range(num_replicas), key=weights.__getitem__, reverse=True)


class PrefixHash(Baseline):
    """A hash of the first blocks, whatever the load."""

    def pick(self, blocks: Sequence[int]) -> int:
        return _preference(blocks, self.num_replicas)[0]


class BoundedHash(Baseline):
    """Consistent hashing with bounded loads (arXiv 1608.01350): the next replica when one has 1.25 x the mean."""

    bound = 1.25

    def pick(self, blocks: Sequence[int]) -> int:
        limit = self.bound * (sum(self.requests) + 1) / self.num_replicas
        order = _preference(blocks, self.num_replicas)
        return next((each for each in order if self.requests[each] + 1 <= limit), self.least(self.requests))


class Sglang(Baseline):
    """SGLang's cache-aware rule: the shortest queue while the pool is out of balance (spread above 64 requests and a
    factor of 1.5), else the best match if it covers more than 30 % of the prompt, else the least loaded."""

    spread, ratio, threshold = 64, 1.5, 0.3
    tree_blocks = 32_768  # 2**26 characters at four to a token

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        super().__init__(num_replicas, rng)
        self._routed = RoutedPrefixes(num_replicas, self.tree_blocks)

    def pick(self, blocks: Sequence[int]) -> int:
        replica = self._pick(blocks)
        self._routed.insert(replica, blocks)
        return replica

    def _pick(self, blocks: Sequence[int]) -> int:
        least, most = min(self.requests), max(self.requests)
        if most - least > self.spread and most > self.ratio * least:
            return self.least(self.requests)
        depth, holders = self._routed.longest(blocks)
        return self.rng.choice(holders) if depth > self.threshold * len(blocks) else self.least(self.requests)


class RayPrefix(Baseline):
    """Ray Serve's prefix-aware rule: two choices while queues differ by more than 10, else a replica of the best match
    if it covers 10 % of the prompt, else the one with the smallest tree."""

    imbalance, threshold = 10, 0.1

    def __init__(self, num_replicas: int, rng: random.Random) -> None:
        super().__init__(num_replicas, rng)
        self._routed = RoutedPrefixes(num_replicas)

    def pick(self, blocks: Sequence[int]) -> int:
        replica = self._pick(blocks)
        self._routed.insert(replica, blocks)
        return replica

    def _pick(self, blocks: Sequence[int]) -> int:
        if max(self.requests) - min(self.requests) > self.imbalance:
            return self.two_choices(self.requests)
        depth, holders = self._routed.longest(blocks)
        if depth >= self.threshold * len(blocks):
            return self.rng.choice(holders)
        return self.least([len(sent) for sent in self._routed.sent])


BASELINES: dict[str, Callable[[int, random.Random], Baseline]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "least_loaded": LeastLoaded,
    "two_choices": TwoChoices,
    "longest_prefix": LongestPrefix,
    "prefix_hash": PrefixHash,
    "bounded_hash": BoundedHash,
    "sglang": Sglang,
    "ray": RayPrefix,
}
