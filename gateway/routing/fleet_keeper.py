"""What a gateway does for a fleet's shared state beside its requests: renew, announce who left, sweep."""

from __future__ import annotations

import asyncio
import logging

from gateway.routing.placements import Placements
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.errors import StateUnavailableError
from gateway.state.fleet_state import FleetState
from gateway.state.prefix_index import PrefixIndex

_log = logging.getLogger(__name__)

_MAX_PERIOD_S = 1.0
# Batches of claims removed in one period; Redis is busy for under a millisecond with each.
_MAX_SWEEPS = 8


class FleetKeeper:
    """One model's, in one gateway. Every gateway does the same: nothing here is done twice with another effect."""

    def __init__(self, client: StateClient, config: StateConfig, state: FleetState, placements: Placements) -> None:
        self._client = client
        self._index = PrefixIndex(client, config)
        self._state = state
        self._placements = placements
        self._period_s = min(config.load_lease_s / 3, _MAX_PERIOD_S)
        self._known: frozenset[str] = frozenset()
        self._dead: set[str] = set()
        self._leaving: set[str] = set()
        self._coming: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._client.close()

    async def keep(self) -> None:
        """One round. What fails is tried again in the next."""
        self._compare()
        await self._state.heartbeat()
        try:
            await self._announce()
            for _ in range(_MAX_SWEEPS):
                if not await self._index.sweep():
                    break
        except StateUnavailableError:
            return  # the next round

    async def _run(self) -> None:
        while True:
            try:
                await self.keep()
            except Exception:  # noqa: BLE001 - the task's border: without its rounds leases would end
                _log.exception("a round of the fleet's upkeep has failed")
            await asyncio.sleep(self._period_s)

    def _compare(self) -> None:
        """Whoever is no longer among those that run has died, or drains: Serve takes it off its list first.

        It may come back, the same process: Serve reconfigures replicas in place, and lists them again afterwards.
        """
        running = frozenset(self._placements.replicas)
        self._dead.update(self._placements.take_deaths())
        gone = (self._known | self._dead) - running
        for replica in gone:
            self._state.forget(replica)
        self._leaving = (self._leaving - running) | (self._known - running - self._dead)
        self._coming = (self._coming & running) | (running - self._known)
        self._known = running

    async def _announce(self) -> None:
        for replica in list(self._dead):
            await self._index.forget(replica)
            self._dead.discard(replica)
        for group, drains in ((self._leaving, True), (self._coming, False)):
            for replica in list(group):
                await self._index.drain(replica, drains=drains)
                group.discard(replica)
