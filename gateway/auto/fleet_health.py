"""Which candidates are up and which have more to do than they can, asked in the background: no request waits for it."""

from __future__ import annotations

import asyncio

from engines.errors import EngineError
from gateway.fleet import Fleet, ServedModel


class FleetHealth:
    """What was last heard of some models. A model that has not been asked yet counts as up once it has started."""

    def __init__(self, fleet: Fleet, limits: dict[str, int], period_s: float, timeout_s: float) -> None:
        """`limits`: by model, how many waiting requests are too many."""
        self._fleet = fleet
        self._limits = limits
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._troubles: dict[str, str] = {}
        self._waiting: dict[str, int] = {}

    def trouble(self, model: str) -> str | None:
        """Why the model cannot be asked now; None if it can."""
        return "not ready" if self._ready(model) is None else self._troubles.get(model)

    def is_saturated(self, model: str) -> bool:
        return self._waiting.get(model, 0) >= self._limits[model]

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            await self.ask_once()
            await asyncio.sleep(self._period_s)

    async def ask_once(self) -> None:
        """Ask every model that has started."""
        await asyncio.gather(*(self._ask(model) for model in self._limits))

    def _ready(self, name: str) -> ServedModel | None:
        return next((model for model in self._fleet.ready() if model.name == name), None)

    async def _ask(self, name: str) -> None:
        model = self._ready(name)
        if model is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await model.engine.check_health()
                self._waiting[name] = (await model.engine.stats()).num_waiting
        except (EngineError, TimeoutError) as error:
            self._troubles[name] = getattr(error, "message", "") or f"no answer within {self._timeout_s:g} seconds"
        except Exception as error:  # noqa: BLE001  # a bug of one engine must not end the watch over all of them
            self._troubles[name] = f"it could not be asked: {error!r}"
        else:
            self._troubles.pop(name, None)
