"""Keeps the router that serves: loads it, and replaces it whole when another one is promoted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.auto.artifact_folder import ArtifactFolder, Stamp
from gateway.auto.live_router import LiveRouter, load_router
from gateway.auto.threshold import Threshold, threshold_of
from gateway.auto_config import AutoConfig
from gateway.receipts import JsonObject
from gateway.router_metrics import RouterMetrics
from router_models.drift import Drift
from router_models.errors import RouterError
from router_models.policy import USUAL_QUALITY, Decision, Situation
from router_models.scorer import Score

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# A shared disk may show `current` before what it names.
_RETRY_S = 10.0


@dataclass(frozen=True, eq=False, slots=True)
class Active:
    """A router, its threshold, the strongest model, and how unlike its training the traffic is by its measure.

    A request that holds one is decided by one router, whatever is promoted meanwhile.
    """

    router: LiveRouter
    threshold: Threshold
    strongest: str
    drift: Drift = field(default_factory=Drift)

    def observe(self, score: Score, situation: Situation, decision: Decision) -> None:
        """Count a decision made by this router."""
        self.drift.observe(score.novelty)
        if situation.quality == USUAL_QUALITY:
            # A caller with a dial of his own has asked for another share than the promised one.
            gap = score.need if decision.gap is None else decision.gap
            self.threshold.observe(gap, decision.model == self.strongest)


class RouterWatch:
    """The router now, and the shadow. A router that cannot be loaded leaves the one before it serving."""

    def __init__(self, config: AutoConfig, metrics: RouterMetrics, log: FilteringBoundLogger) -> None:
        self._config = config
        self._folder = ArtifactFolder(Path(config.artifact_folder)) if config.artifact_folder else None
        self._metrics = metrics
        self._log = log
        self._error: str | None = None
        self._stamp: Stamp | None = None
        self._retry_at_s = float("inf")
        self.active: Active | None = None
        self.shadow: Active | None = None

    async def start(self) -> None:
        """Load the promoted router, or the configured one where none is or it cannot be loaded; and the shadow."""
        await self.look()
        if self.active is None:
            self.active = await self._load(self._config.artifact)
        if self._config.shadow is not None:
            self.shadow = await self._load(self._config.shadow)

    async def run(self) -> None:
        """Look for another router again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._config.watch_period_s)
            await self.look()

    async def look(self) -> None:
        """Serve what is promoted now. Never raises: what is wrong is logged, counted and told by `status`."""
        folder = self._folder
        if folder is None:
            return
        stamp = await asyncio.to_thread(folder.stamp)
        now_s = asyncio.get_running_loop().time()
        if stamp is None or (stamp == self._stamp and now_s < self._retry_at_s):
            return
        self._stamp, self._retry_at_s = stamp, float("inf")
        try:
            pointer = await asyncio.to_thread(folder.pointer)
        except RouterError as error:
            self._failed("current", error.message)
            pointer = None
        if pointer is None:
            self._retry_at_s = now_s + _RETRY_S
            return
        if self.active is not None and self.active.router.version == pointer.version:
            self._error = None
            return
        found = await self._load(str(folder.place(pointer.version)))
        if found is None:
            self._retry_at_s = now_s + _RETRY_S
        else:
            self.active, self._error = found, None

    def status(self) -> JsonObject:
        """What serves, for an operator."""
        return {
            "artifact": self.active.router.version if self.active else None,
            "abilities": list(self.active.router.known) if self.active else [],
            "unknown_share": self.active.drift.share if self.active else None,
            "shadow": self.shadow.router.version if self.shadow else None,
            "error": self._error,
        }

    async def _load(self, name: str) -> Active | None:
        from router_models.artifact import resolve

        try:
            router = await asyncio.to_thread(lambda: load_router(resolve(name).expanduser(), self._config))
            threshold = threshold_of(self._config.policy.goal, router)
        except RouterError as error:
            self._failed(name, error.message)
            return None
        except Exception as error:  # noqa: BLE001  # its numbers are data, and no data may end the watch
            self._failed(name, f"{name} cannot be used: {error!r}")
            return None
        if router.is_stand_in:
            self._log.warning("typical models stand in", artifact=router.version, reason="the candidates are unknown")
        self._log.info("router loaded", artifact=router.version, abilities=router.known)
        return Active(router, threshold, self._config.strongest.model)

    def _failed(self, name: str, reason: str) -> None:
        self._error = reason
        self._metrics.load_failures_inc()
        self._log.error("router not loaded", name=name, error=reason)
