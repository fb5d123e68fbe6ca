"""One decision, carried out: look, choose, claim; then tell the state what became of the request.

Between look and claim another gateway, or another request of this one, may have been sent to the same replica. Then the
claim is refused, and the request is decided again with that in sight: requests that come at once are decided one after
the other, whoever decides them, and only they pay for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from engines.block_hash import BlockHash
from gateway.routing.replica_choice import (
    DEFAULT_WEIGHTS,
    Candidate,
    ChoiceWeights,
    ReplicaDecision,
    ReplicaRequest,
    choose_replica,
)
from gateway.state.fleet_state import FleetState
from gateway.state.fleet_view import FleetView, ReplicaState
from gateway.state.load import Reservation

_FIRST_TYPICAL_S = 1.0
_TYPICAL_SHARE = 0.01  # weight of the newest decision in the usual expectation
_MAX_TRIES = 4  # the last one is not refused: in a crowd, a decision by a slightly old view is better than none


@dataclass(frozen=True, slots=True)
class Explained:
    """A decision and all it was made from: `choose_replica(request, candidates, weights)` makes it again."""

    decision: ReplicaDecision
    request: ReplicaRequest
    candidates: tuple[Candidate, ...]
    view: FleetView


@dataclass(frozen=True, slots=True)
class Routed:
    """A decision that holds a place: `reservation` goes to the state's `first_token` and `finish`."""

    explained: Explained
    reservation: Reservation

    @property
    def decision(self) -> ReplicaDecision:
        return self.explained.decision


class ReplicaRouter:
    """Places requests of one model. Belongs to one event loop."""

    def __init__(
        self,
        state: FleetState,
        block_size: int,
        weights: ChoiceWeights = DEFAULT_WEIGHTS,
        *,
        num_sampled: int = 8,
        max_holders: int = 8,
        rng: random.Random | None = None,
    ) -> None:
        """Besides `max_holders` that hold most of a prompt, `num_sampled` others are considered, drawn at random: a
        decision costs the same in a large fleet, and rarely misses an idle replica by much (power of d choices)."""
        self.state = state
        self._block_size = block_size
        self._weights = weights
        self._num_sampled = num_sampled
        self._max_holders = max_holders
        self._rng = rng or random.Random()
        self._typical_s = _FIRST_TYPICAL_S

    async def route(
        self,
        hashes: Sequence[BlockHash],
        prompt_tokens: int,
        replicas: Sequence[str],
        session: BlockHash | None = None,
    ) -> Routed | None:
        """Place a request on one of `replicas`, and count it there; None if there are none.

        `session` stands for what the request belongs to, if the client has said so.
        """
        considered = self._sample(replicas)
        for tries_left in reversed(range(_MAX_TRIES)):
            explained = await self.explain(hashes, prompt_tokens, considered, replicas, session)
            if explained.decision.replica is None:
                return None
            reservation = await self._hold(explained, hashes, session, may_refuse=tries_left > 0)
            if reservation is not None:
                expected_s = explained.decision.expectation(reservation.replica).expected_s
                self._typical_s += _TYPICAL_SHARE * (expected_s - self._typical_s)
                return Routed(explained, reservation)
        raise AssertionError("the last try is not refused")

    async def explain(
        self,
        hashes: Sequence[BlockHash],
        prompt_tokens: int,
        considered: Sequence[str],
        replicas: Sequence[str],
        session: BlockHash | None = None,
    ) -> Explained:
        """The decision among `considered` and those of `replicas` that hold most of the prompt. Changes nothing."""
        view = await self.state.look(hashes, considered, self._max_holders, session)
        request = ReplicaRequest(
            prompt_tokens,
            self._block_size,
            self._typical_s,
            self._tie_salt(hashes, view),
            holders=view.holders,
            heat=view.heat,
            pinned=view.pinned,
        )
        known = set(replicas)  # Redis may still know replicas that are gone
        others_speak = view.source == "shared" and any(state.leased for state in view.replicas.values())
        candidates = tuple(
            _candidate(state, self._block_size, others_speak)
            for state in view.replicas.values()
            if state.replica in known
        )
        return Explained(choose_replica(request, candidates, self._weights), request, candidates, view)

    async def _hold(
        self, explained: Explained, hashes: Sequence[BlockHash], session: BlockHash | None, may_refuse: bool
    ) -> Reservation | None:
        """A place on the chosen replica; None if somebody was quicker."""
        replica = explained.decision.replica
        assert replica is not None
        chosen, seen = explained.decision.expectation(replica), explained.view.replicas[replica]
        return await self.state.claim(
            replica,
            hashes,
            explained.request.prompt_tokens,
            sends=seen.sends if may_refuse and explained.view.source == "shared" else None,
            confirmed_blocks=seen.confirmed_blocks,
            new_tokens=chosen.new_tokens,
            prefill_rate=chosen.new_tokens / chosen.prefill_s,
            expected_s=chosen.expected_s,
            promised_tokens=min(seen.confirmed_blocks, (explained.request.prompt_tokens - 1) // self._block_size)
            * self._block_size,
            session=session,
        )

    def _sample(self, replicas: Sequence[str]) -> Sequence[str]:
        if len(replicas) <= self._num_sampled:
            return replicas
        return self._rng.sample(replicas, self._num_sampled)

    def _tie_salt(self, hashes: Sequence[BlockHash], view: FleetView) -> bytes:
        """Rendezvous by the first block that nobody holds; a draw where all are held."""
        return hashes[view.matched_blocks] if view.matched_blocks < len(hashes) else self._rng.randbytes(8)


def _candidate(state: ReplicaState, block_size: int, others_speak: bool) -> Candidate:
    return Candidate(
        state.replica,
        state.confirmed_blocks * block_size,
        state.predicted_blocks * block_size,
        state.queued_tokens,
        state.in_flight,
        state.recent_tokens,
        state.prefill_rate,
        state.decode_rate,
        state.kv_use,
        state.trust,
        state.draining,
        others_speak and state.lapsed,
    )
