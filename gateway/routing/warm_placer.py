"""Places requests where their first token comes soonest: decides, has Serve do it, and tells the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from engines.block_hash import BlockHash, extend_hashes, root_hash
from engines.types import Delta, GenerateRequest, ModelCard, PrefixBlocks, TokenPrompt
from gateway.answers import JsonObject
from gateway.routing.config import RoutingConfig
from gateway.routing.explanation import explanation
from gateway.routing.fleet_keeper import FleetKeeper
from gateway.routing.placement_counts import PlacementCounts
from gateway.routing.placements import Placements, Wish
from gateway.routing.placer import Seat
from gateway.routing.replica_choice import DEFAULT_WEIGHTS
from gateway.routing.replica_router import ReplicaRouter, Routed
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.errors import StateUnavailableError
from gateway.state.fleet_state import FleetState
from gateway.state.load import Reservation


class WarmPlacer:
    """One model's placer in one gateway process. Belongs to the event loop in which it is opened."""

    policy = "warm"

    def __init__(
        self, model: str, routing: RoutingConfig, state: StateConfig, url: str, gateway: str, placements: Placements
    ) -> None:
        """`gateway` must be unique among gateways and their restarts. Raises StateUnavailableError for a password that
        is not set."""
        self.model = model
        self._routing = routing
        self.placements = placements
        self._client = StateClient(state, url, model)
        self.state = FleetState(self._client, state, gateway)
        self._keeper = FleetKeeper(StateClient(state, url, model, timeout_s=1.0), state, self.state, placements)
        self._blocks: PrefixBlocks | None = None
        self._router: ReplicaRouter | None = None
        self.counts = PlacementCounts()

    def counted(self) -> PlacementCounts:
        """See Placer.counted."""
        self.counts.failed_reports = self.state.counts.failed_reports
        self.counts.keep_only(self.placements.replicas)
        return self.counts

    async def open(self, card: ModelCard) -> None:
        """See Placer.open. Redis may be away: it is found when it comes."""
        if self._router is not None:
            return
        # Without a prefix cache there is load to balance still; any size of block serves.
        self._blocks = card.prefix_blocks
        self._router = ReplicaRouter(
            self.state,
            card.prefix_blocks.block_size if card.prefix_blocks else 64,
            num_sampled=self._routing.num_sampled,
            max_holders=self._routing.max_holders,
        )
        with contextlib.suppress(StateUnavailableError):  # then the first decisions are local
            await self._client.connect()
        self._keeper.start()

    async def place(self, request: GenerateRequest, avoid: frozenset[str], entry: JsonObject) -> Seat:
        """See Placer.place."""
        assert self._router is not None, "placing before open"
        began = time.perf_counter()
        hashes, prompt_tokens, session = self._hashes(request), _prompt_tokens(request), _session(request)
        replicas = [name for name in self.placements.replicas if name not in avoid]
        routed = await self._router.route(hashes, prompt_tokens, replicas, session=session) if replicas else None
        entry.pop("placed_by_serve", None)
        entry |= explanation(None if routed is None else routed.explained, prompt_tokens)
        self.counts.decided(time.perf_counter() - began, routed)
        return WarmSeat(self, request.request_id, session, hashes, prompt_tokens, routed, avoid, entry)

    async def explain(self, request: GenerateRequest) -> JsonObject:
        """See Placer.explain."""
        assert self._router is not None, "explaining before open"
        hashes, prompt_tokens, replicas = self._hashes(request), _prompt_tokens(request), self.placements.replicas
        if not replicas:
            return explanation(None, prompt_tokens)
        explained = await self._router.explain(hashes, prompt_tokens, replicas, replicas, session=_session(request))
        return explanation(explained, prompt_tokens)

    def has_other(self, avoid: frozenset[str]) -> bool:
        """See Placer.has_other."""
        return any(replica not in avoid for replica in self.placements.replicas)

    async def close(self) -> None:
        """Stop telling. What is in flight under this gateway's lease goes with the lease."""
        await self._keeper.close()
        await self.state.settled()
        await self._client.close()

    def _hashes(self, request: GenerateRequest) -> list[BlockHash]:
        hashes: list[BlockHash] = []
        if self._blocks is not None and isinstance(request.prompt, TokenPrompt):
            size = self._blocks.block_size
            token_ids = request.prompt.token_ids[: self._routing.max_blocks * size]
            extend_hashes(hashes, root_hash(self._blocks.model, salt=request.cache_salt), token_ids, size)
        return hashes


class WarmSeat:
    """One try of one request: its reservation, its wish to Serve, and what comes of both."""

    def __init__(
        self,
        placer: WarmPlacer,
        request_id: str,
        session: BlockHash | None,
        hashes: Sequence[BlockHash],
        prompt_tokens: int,
        routed: Routed | None,
        avoid: frozenset[str],
        entry: JsonObject,
    ) -> None:
        self._placer = placer
        self._request_id = request_id
        self._session = session
        self._hashes = hashes
        self._prompt_tokens = prompt_tokens
        self._routed = routed
        self._entry = entry
        self._reservation: Reservation | None = None if routed is None else routed.reservation
        self._num_output_tokens = 0
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        placer.placements.make_wish(request_id, Wish(self.replica, avoid, self._on_placed))

    @property
    def replica(self) -> str | None:
        return None if self._reservation is None else self._reservation.replica

    def note(self, item: tuple[Delta, ...]) -> None:
        """See Seat.note."""
        reservation = self._reservation
        found = next((delta.cached_tokens for delta in item if delta.cached_tokens is not None), None)
        if reservation is not None and reservation.first_token_at is None:
            # An engine that does not tell is taken at its word.
            cached_tokens = reservation.expected_warm_tokens if found is None else found
            self._placer.state.first_token(reservation, cached_tokens)
        if found is not None and "cached_tokens_found" not in self._entry:
            self._entry["cached_tokens_found"] = found
            if reservation is not None:
                self._placer.counts.found(reservation.replica, reservation.expected_warm_tokens, found)
        self._num_output_tokens += sum(len(delta.token_ids) for delta in item)

    def leave(self) -> None:
        """See Seat.leave."""
        self._is_over = True
        self._placer.placements.withdraw(self._request_id)
        if self._reservation is not None:
            self._placer.state.finish(self._reservation, self._num_output_tokens)

    def _on_placed(self, replica: str) -> None:
        """On Serve's thread: tell the event loop where the request went, if not where it was meant to go."""
        if replica != self.replica:
            self._loop.call_soon_threadsafe(self._move, replica)

    def _move(self, replica: str) -> None:
        """Serve could not do as wished, or had to choose: the load is there and not here."""
        if self._is_over or replica == self.replica:
            return
        if self._reservation is not None:
            self._placer.state.finish(self._reservation, 0)
        self._placer.counts.moved += 1
        self._entry["placed_by_serve"] = replica
        warm_tokens, rate = self._expected_at(replica)
        new_tokens = max(self._prompt_tokens - warm_tokens, 1)
        self._reservation = self._placer.state.reserve(
            replica,
            self._hashes,
            self._prompt_tokens,
            confirmed_blocks=0,
            new_tokens=new_tokens,
            prefill_rate=rate,
            expected_s=new_tokens / rate,
            session=self._session,
        )

    def _expected_at(self, replica: str) -> tuple[int, float]:
        """Warm tokens and prefill rate (tokens/s) there, if it was considered."""
        if self._routed is not None:
            for each in self._routed.decision.expectations:
                if each.replica == replica:
                    return each.warm_tokens, each.new_tokens / each.prefill_s
        return 0, DEFAULT_WEIGHTS.default_prefill_rate


def _prompt_tokens(request: GenerateRequest) -> int:
    """One where the engine alone can count them: then load is counted in requests."""
    return len(request.prompt.token_ids) if isinstance(request.prompt, TokenPrompt) else 1


def _session(request: GenerateRequest) -> BlockHash | None:
    """What stands for the request's session in the state: each tenant's are its own."""
    return None if request.session is None else root_hash("session", request.session, salt=request.cache_salt)
