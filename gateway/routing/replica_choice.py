"""Which replica a request goes to: a pure function, so that it serves, explains and replays alike.

What counts is time to the first token, but not this request's alone. A replica's score is, in seconds,

    expected + wait_weight * expected^2 / typical + copy_weight * copied + balance_weight * ahead

`expected`  until the first token here: (queued + uncached tokens) / prefill rate + the decode step under way + a
            barrier that rises with KV use.
`expected^2 / typical`  what makes a long wait worse than several short ones: without it a warm prefix is worth waiting
            for whatever queues there, and the slowest hundredth pays. `typical` is the fleet's usual expectation.
`copied`    prefill time of the blocks that another replica holds and this one would compute again. Beyond the time it
            takes now, a copy pushes others' blocks out of the cache. It counts once divided by (holders + recent
            requests) of each block: a prefix that everyone holds does not attract, and one that everyone asks for is
            copied readily, since the copy will be used.
`ahead`     prefill time of the work this replica was given lately beyond what the least busy one was: caches that
            fill at the same speed live equally long, and a hot prefix finds a second home before its first one drowns.

Two bounds set candidates aside while others are left: requests in flight, and recent work, both against the mean of the
candidates. A replica whose engine fell silent is set aside while another one is within these bounds against the silent
one's own load: what cannot reach Redis may still serve, and is not idle while the others drown. A session stays where
its last request went while that costs little more. Ties are broken by a hash of the caller's salt and the replica's
name (rendezvous): the hash of the first block that nobody holds sends the same new prefix to the same place from every
gateway, a random salt is a draw.

Close relatives: Preble (arXiv 2407.00023) adds load, eviction and recomputation too; NVIDIA Dynamo and llm-d weigh
overlap against load. `benchmarks/affinity.py` has the ablations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Reason = Literal["warm", "cold", "load", "fallback", "none"]


# Named tuples: a decision makes dozens of them, and frozen dataclasses take twelve times as long to make.
class Candidate(NamedTuple):
    """One replica as the decision sees it. Tokens are of this prompt where they are warm; None is unknown."""

    replica: str
    confirmed_tokens: int = 0  # held, says the engine
    predicted_tokens: int = 0  # the same with what was sent there lately; at least confirmed_tokens
    queued_tokens: float | None = None  # uncached prompt tokens before this request
    in_flight: int | None = None
    recent_tokens: float = 0.0
    prefill_rate: float | None = None  # tokens/s
    decode_rate: float | None = None  # tokens/s of all its sequences together
    kv_use: float | None = None  # in [0, 1]
    trust: float = 1.0  # warm tokens found over warm tokens promised
    draining: bool = False
    silent: bool = False  # its engine has not spoken for a while, where others have


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """What is to be placed. Depths are in blocks, ascending."""

    prompt_tokens: int
    block_size: int
    typical_s: float  # usual expectation in this fleet
    tie_salt: bytes
    holders: tuple[tuple[int, int], ...] = ()  # (depth, replicas of the fleet whose match ends there)
    heat: tuple[tuple[int, float], ...] = ()  # (depth, recent requests for the block that ends there)
    pinned: str | None = None  # where the session's last request went


@dataclass(frozen=True, slots=True)
class ChoiceWeights:
    """How the parts of a score compare. The defaults were found by ablation, see benchmarks/README.md."""

    copy_weight: float = 64.0
    wait_weight: float = 0.5
    balance_weight: float = 0.2
    max_in_flight_ratio: float = 2.0  # of the candidates' mean
    spare_in_flight: int = 16  # beyond the ratio, so that few requests do not bound each other
    max_recent_ratio: float = 1.5
    spare_recent_s: float = 20.0
    max_kv_use: float = 0.95
    kv_barrier_s: float = 0.15  # times k / (1 - k)
    full_trust: float = 0.9  # claims of a replica that keeps this share of its promises are taken whole
    tie_band: float = 0.01  # scores as close as this are equal
    pin_slack_s: float = 0.1  # a session stays where it was while that costs at most so much more
    rate_band: float = 0.2  # learned rates as close to the mean are the mean: a mix of short prompts looks slow
    default_prefill_rate: float = 4000.0  # tokens/s, where no replica has shown one


DEFAULT_WEIGHTS = ChoiceWeights()


class Expectation(NamedTuple):
    """What a candidate would mean for the request. `score` is what is compared; the parts are seconds."""

    replica: str
    expected_s: float
    score: float
    warm_tokens: int
    new_tokens: int
    wait_s: float
    prefill_s: float
    decode_s: float
    pressure_s: float
    copied_s: float
    ahead_s: float
    set_aside: str | None  # why it is no choice while others are
    load_known: bool
    rate_known: bool


@dataclass(frozen=True, slots=True)
class ReplicaDecision:
    """The choice and everything it was made from. `replica` is None only without candidates."""

    replica: str | None
    reason: Reason
    expectations: tuple[Expectation, ...]

    def expectation(self, replica: str) -> Expectation:
        """Of one candidate."""
        return next(each for each in self.expectations if each.replica == replica)


def choose_replica(
    request: ReplicaRequest, candidates: Sequence[Candidate], weights: ChoiceWeights = DEFAULT_WEIGHTS
) -> ReplicaDecision:
    """The candidate with the lowest score, and every candidate's expectation in the order given."""
    fleet = _Fleet(request, candidates, weights)
    expectations = fleet.expectations()
    best = _best(request, expectations, weights)
    if best is None:
        return ReplicaDecision(None, "none", expectations)
    return ReplicaDecision(best.replica, _reason(best, expectations), expectations)


def _best(request: ReplicaRequest, expectations: Sequence[Expectation], weights: ChoiceWeights) -> Expectation | None:
    pool = [each for each in expectations if each.set_aside is None] or _least_bad(expectations)
    if not pool:
        return None
    lowest = min(each.score for each in pool)
    pinned = next((each for each in pool if each.replica == request.pinned), None)
    if pinned is not None and pinned.score <= lowest + weights.pin_slack_s:
        return pinned
    ties = [each for each in pool if each.score <= lowest * (1 + weights.tie_band)]
    return ties[0] if len(ties) == 1 else max(ties, key=lambda each: _draw(request.tie_salt, each.replica))


def _draw(salt: bytes, replica: str) -> bytes:
    """The replica's weight in rendezvous hashing."""
    return hashlib.blake2b(replica.encode(), key=salt[:64], digest_size=8).digest()


def _least_bad(expectations: Sequence[Expectation]) -> Sequence[Expectation]:
    """Bounds hold while they leave a choice; a draining replica is taken when there is no other."""
    return [each for each in expectations if each.set_aside != "draining"] or expectations


def _reason(best: Expectation, expectations: Sequence[Expectation]) -> Reason:
    warmest = max(each.warm_tokens for each in expectations)
    if best.set_aside is not None:
        return "fallback"
    if not warmest:
        return "cold"
    return "warm" if best.warm_tokens == warmest else "load"


def _mean(known: Sequence[float | None], default: float) -> float:
    """Of those that are known."""
    values = [each for each in known if each is not None]
    return sum(values) / len(values) if values else default


class _Fleet:
    """What is common to all candidates of a decision."""

    def __init__(self, request: ReplicaRequest, candidates: Sequence[Candidate], weights: ChoiceWeights) -> None:
        self._request = request
        self._candidates = candidates
        self._weights = weights
        self._rate = _mean([each.prefill_rate for each in candidates], weights.default_prefill_rate)
        self._rates = [self._rate_of(each) for each in candidates]
        # A replica of unknown load is taken for a usual one: neither idle, which would draw everyone, nor lost.
        self._queue = _mean([each.queued_tokens for each in candidates], 0.0)
        self._in_flight = _mean([each.in_flight for each in candidates], 0.0)
        self._kv_use = _mean([each.kv_use for each in candidates], 0.0)
        self._recent = [each.recent_tokens / rate for each, rate in zip(candidates, self._rates, strict=True)] or [0.0]
        self._least_recent_s = min(self._recent)
        self._mean_recent_s = sum(self._recent) / len(self._recent)
        self._warm = [self._warm_tokens(each) for each in candidates]
        self._worth = _Worth(request, [tokens // request.block_size for tokens in self._warm])

    def expectations(self) -> tuple[Expectation, ...]:
        """Of all candidates, in their order."""
        return tuple(map(self._expect, self._candidates, self._rates, self._warm, self._recent))

    def _expect(self, candidate: Candidate, rate: float, warm: int, recent_s: float) -> Expectation:
        request, weights = self._request, self._weights
        new = max(request.prompt_tokens - warm, 1)
        wait_s = (self._queue if candidate.queued_tokens is None else candidate.queued_tokens) / rate
        in_flight = self._in_flight if candidate.in_flight is None else candidate.in_flight
        decode_s = in_flight / candidate.decode_rate if candidate.decode_rate else 0.0
        kv_use = min(self._kv_use if candidate.kv_use is None else candidate.kv_use, 0.99)
        pressure_s = weights.kv_barrier_s * kv_use / (1 - kv_use)
        expected_s = wait_s + new / rate + decode_s + pressure_s
        copied_s = self._worth.lost(warm // request.block_size) / rate
        ahead_s = recent_s - self._least_recent_s
        score = (
            expected_s
            + weights.wait_weight * expected_s * expected_s / max(request.typical_s, 1e-3)
            + weights.copy_weight * copied_s
            + weights.balance_weight * ahead_s
        )
        return Expectation(
            candidate.replica,
            expected_s,
            score,
            warm,
            new,
            wait_s,
            new / rate,
            decode_s,
            pressure_s,
            copied_s,
            ahead_s,
            self._set_aside(candidate, recent_s),
            candidate.queued_tokens is not None,
            candidate.prefill_rate is not None,
        )

    def _rate_of(self, candidate: Candidate) -> float:
        rate = candidate.prefill_rate
        return self._rate if rate is None or abs(rate / self._rate - 1) <= self._weights.rate_band else rate

    def _warm_tokens(self, candidate: Candidate) -> int:
        """Whole blocks; the last prompt token is always computed."""
        size = self._request.block_size
        promised = min(max(candidate.confirmed_tokens, candidate.predicted_tokens), self._request.prompt_tokens - 1)
        trust = 1.0 if candidate.trust >= self._weights.full_trust else candidate.trust
        return math.floor(promised * trust) // size * size

    def _set_aside(self, candidate: Candidate, recent_s: float) -> str | None:
        if candidate.draining:
            return "draining"
        if candidate.kv_use is not None and candidate.kv_use > self._weights.max_kv_use:
            return "kv full"
        if beyond := self._beyond(candidate, recent_s, self._in_flight, self._mean_recent_s):
            return beyond
        return "silent" if candidate.silent and self._is_spared(candidate, recent_s) else None

    def _beyond(
        self, candidate: Candidate, recent_s: float, usual_in_flight: float, usual_recent_s: float
    ) -> str | None:
        """The bound against a usual load that the candidate is beyond."""
        weights = self._weights
        max_in_flight = weights.max_in_flight_ratio * usual_in_flight + weights.spare_in_flight
        if candidate.in_flight is not None and candidate.in_flight > max_in_flight:
            return "in flight"
        return "recent work" if recent_s > weights.max_recent_ratio * usual_recent_s + weights.spare_recent_s else None

    def _is_spared(self, silent: Candidate, recent_s: float) -> bool:
        """Whether one that speaks can take the request without having much more to do than the silent one."""
        in_flight = self._in_flight if silent.in_flight is None else silent.in_flight
        return any(
            self._set_aside(other, other_s) is None and self._beyond(other, other_s, in_flight, recent_s) is None
            for other, other_s in zip(self._candidates, self._recent, strict=True)
            if not other.silent
        )


class _Worth:
    """Tokens of the warmest candidate's match, each divided by how many hold it and lately asked for it."""

    def __init__(self, request: ReplicaRequest, depths: Sequence[int]) -> None:
        deepest = max(depths, default=0)
        holders = dict(request.holders)
        left = max(sum(holders.values()), 1)
        self._lost: dict[int, float] = {0: 0.0}
        heat = iter(request.heat)
        total, before, counted_at, uses = 0.0, 0, 0.0, 0.0
        for depth in sorted({*holders, *depths, *(at for at, _ in request.heat)}):
            if not 0 < depth <= deepest:
                continue
            while counted_at < depth:
                counted_at, uses = next(heat, (math.inf, 0.0))
            total += (depth - before) * request.block_size / (left + uses)
            self._lost[depth] = total
            left = max(left - holders.get(depth, 0), 1)
            before = depth
        self._total = total

    def lost(self, depth: int) -> float:
        """Of it, what a candidate with that match would compute again."""
        return self._total - self._lost[depth]
