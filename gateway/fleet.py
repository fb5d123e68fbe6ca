"""The models behind this gateway: their engines, cards, prompt builders, and the hash that names the whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engines.errors import EngineDeadError, EngineError, EngineTimeoutError
from engines.protocol import Engine
from engines.types import ModelCard
from gateway.config import GatewayConfig, ModelConfig
from gateway.errors import ModelNotReadyError, UnknownModelError
from gateway.prompt import PromptBuilder, make_prompt_builder

_RETRY_DELAYS_S = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be asked. `created` is when it became ready, in seconds since 1970."""

    name: str
    engine: Engine
    card: ModelCard
    prompts: PromptBuilder
    created: int


class Fleet:
    """Engines by model name. One model's failure to start leaves the others serving."""

    def __init__(self, config: GatewayConfig, engines: Mapping[str, Engine]) -> None:
        self._config = config
        self._engines = engines
        self._ready: dict[str, ServedModel] = {}
        self._waiting: dict[str, str] = {model.name: "it is still loading." for model in config.models}
        self._tried = {model.name: asyncio.Event() for model in config.models}
        self._starting: list[asyncio.Task[None]] = []
        self.config_hash = config_hash(config, ())

    def start(self) -> None:
        """Begin to start all engines; returns at once. Must run in the event loop that will serve."""
        self._starting = [asyncio.create_task(self._start(model)) for model in self._config.models]

    async def started(self) -> None:
        """Wait until every engine has started or failed for good."""
        await asyncio.gather(*self._starting)

    async def wait(self, limit_s: float) -> None:
        """Wait until every engine has started, or said that it cannot now; no longer than so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for tried in self._tried.values():
                    await tried.wait()

    async def close(self) -> None:
        """Stop starting, and close every engine."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for engine in self._engines.values():
            await engine.close()

    def ready(self) -> list[ServedModel]:
        """The models that can be asked, in the order of the configuration."""
        return [self._ready[model.name] for model in self._config.models if model.name in self._ready]

    def get(self, name: str) -> ServedModel:
        """The model of that name. Raises UnknownModelError, ModelNotReadyError."""
        if name in self._ready:
            return self._ready[name]
        if name in self._waiting:
            raise ModelNotReadyError(name, self._waiting[name])
        raise UnknownModelError(name)

    async def troubles(self, timeout_s: float) -> dict[str, str]:
        """Why which models cannot serve now; empty if all can."""
        found = await asyncio.gather(*(self._trouble(model, timeout_s) for model in self.ready()))
        return self._waiting | {name: reason for name, reason in found if reason is not None}

    async def _trouble(self, model: ServedModel, timeout_s: float) -> tuple[str, str | None]:
        try:
            async with asyncio.timeout(timeout_s):
                await model.engine.check_health()
        except EngineError as error:
            return model.name, error.message
        except TimeoutError:
            return model.name, f"its engine did not answer within {timeout_s:g} seconds."
        return model.name, None

    async def _start(self, model: ModelConfig) -> None:
        for attempt in itertools.count():
            try:
                await self._start_once(model)
                self._tried[model.name].set()
                return
            except (EngineDeadError, EngineTimeoutError) as error:
                # A peer may come up later; a model that cannot be loaded will not.
                self._waiting[model.name] = error.message
                self._tried[model.name].set()
                await asyncio.sleep(_RETRY_DELAYS_S[min(attempt, len(_RETRY_DELAYS_S) - 1)])
            except EngineError as error:
                self._waiting[model.name] = error.message
                self._tried[model.name].set()
                return

    async def _start_once(self, model: ModelConfig) -> None:
        engine = self._engines[model.name]
        card = await engine.start()
        # Tokenizers are read from disk.
        prompts = await asyncio.to_thread(make_prompt_builder, model.engine, card)
        self._ready[model.name] = ServedModel(model.name, engine, card, prompts, created=int(time.time()))
        self._waiting.pop(model.name)
        self.config_hash = config_hash(self._config, [served.card for served in self._ready.values()])


def config_hash(config: GatewayConfig, cards: Iterable[ModelCard]) -> str:
    """16 hex digits over the whole configuration and the fingerprints of the engines that have started.

    A card's fingerprint covers weights, resolved settings and library versions; its model name tells them apart.
    """
    fingerprints = sorted((card.model, card.fingerprint) for card in cards)
    document = json.dumps([config.model_dump(mode="json"), fingerprints], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]
