"""What one gateway knows by itself: where it sent which prefix, and its own load. It goes on when Redis does not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engines.block_hash import BlockHash
from gateway.state.fleet_view import FleetView, ReplicaState
from gateway.state.load import LoadLedger

# Without an engine's word a claim is a guess; routers that only guess let theirs live for about two minutes.
_BELIEF_S = 120.0
_MAX_BLOCKS = 100_000
_MAX_SESSIONS = 10_000


class LocalView:
    """Always kept, at some microseconds a decision, since nobody knows when it will be needed."""

    def __init__(self, ledger: LoadLedger, max_blocks: int = _MAX_BLOCKS) -> None:
        self._ledger = ledger
        self._max_blocks = max_blocks
        self._beliefs: OrderedDict[BlockHash, dict[str, float]] = OrderedDict()
        self._sessions: OrderedDict[BlockHash, tuple[str, float]] = OrderedDict()
        self._seen: dict[str, ReplicaState] = {}
        self._gone: dict[str, float] = {}  # replica -> a belief that ends by then is from before it left

    def sent(self, replica: str, hashes: Iterable[BlockHash], now: float, session: BlockHash | None = None) -> None:
        """`replica` will hold these blocks, and has the session."""
        if session is not None:
            self._sessions[session] = replica, now + _BELIEF_S
            self._sessions.move_to_end(session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        beliefs, until = self._beliefs, now + _BELIEF_S
        for block in hashes:
            known = beliefs.get(block)
            if known is None:
                beliefs[block] = {replica: until}
            else:
                known.pop(replica, None)
                known[replica] = until  # the last one: they end in their order
                while known[oldest := next(iter(known))] <= now:
                    del known[oldest]
                beliefs.move_to_end(block)
        while len(beliefs) > self._max_blocks:
            beliefs.popitem(last=False)

    def remember(self, view: FleetView, now: float) -> None:
        """Rates and roles stay useful for a while after the shared state is gone."""
        self._seen.update(view.replicas)
        for replica, until in self._gone.items():
            if until > now:  # Redis knows it for longer
                self._seen.pop(replica, None)

    def forget(self, replica: str, now: float) -> None:
        """It is gone."""
        self._seen.pop(replica, None)
        self._gone = {name: until for name, until in self._gone.items() if until > now} | {replica: now + _BELIEF_S}

    def look(
        self,
        hashes: Sequence[BlockHash],
        replicas: Iterable[str],
        max_holders: int,
        now: float,
        session: BlockHash | None = None,
    ) -> FleetView:
        """As FleetReader.look, as far as this gateway knows: its own load, and predictions only."""
        depths = self._depths(hashes, now)
        counts: dict[int, int] = {}
        for depth in depths.values():
            counts[depth] = counts.get(depth, 0) + 1
        deepest = sorted(depths, key=depths.__getitem__, reverse=True)[:max_holders]
        home, until = self._sessions.get(session, (None, now)) if session is not None else (None, now)
        pinned = home if until > now else None
        names = dict.fromkeys((*deepest, *replicas, *([pinned] if pinned else [])))
        states = {replica: self._state(replica, depths.get(replica, 0)) for replica in names}
        return FleetView(replicas=states, holders=tuple(sorted(counts.items())), pinned=pinned, source="local")

    def _depths(self, hashes: Sequence[BlockHash], now: float) -> dict[str, int]:
        depths: dict[str, int] = {}
        alive: set[str] | None = None
        for depth, block in enumerate(hashes, 1):
            beliefs = self._beliefs.get(block, {})
            holders = {replica for replica, until in beliefs.items() if until > max(now, self._gone.get(replica, now))}
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            depths.update(dict.fromkeys(alive, depth))
        return depths

    def _state(self, replica: str, depth: int) -> ReplicaState:
        totals = self._ledger.totals(replica)
        return self._seen.get(replica, ReplicaState(replica, leased=False))._replace(
            confirmed_blocks=0,
            predicted_blocks=depth,
            queued_tokens=float(totals.queued_tokens),
            in_flight=totals.in_flight,
            recent_tokens=0.0,
            kv_use=None,
        )
