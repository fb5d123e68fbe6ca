"""The seam that everything else in the house is built against: one protocol, several engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from engines.types import Delta, EngineStats, GenerateRequest, ModelCard


class Engine(Protocol):
    """Turns requests into streams of deltas. All methods are called from one asyncio event loop."""

    async def start(self) -> ModelCard:
        """Load what is needed and return the model card; calling it again returns the same card.

        Raises ModelLoadError if the model cannot be served, EngineDeadError if a remote peer cannot be reached.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Stream the request's deltas, at most one per choice in each item; items not yet read are merged.

        Each choice ends with exactly one delta that has `finish_reason` and `usage`; the stream ends with the last
        choice. The concatenated texts of a choice are its whole completion, without the stop string.
        Closing the generator (or cancelling the task that reads it) aborts the request and frees what it holds
        within one step.

        Raises, at the first item: InvalidRequestError, EngineOverloadedError, UnsupportedParameterError. At any item:
        EngineDeadError, EngineTimeoutError, RemoteServerError.
        """
        ...

    async def stats(self) -> EngineStats:
        """A snapshot of load and counters; zeros where the engine does not know."""
        ...

    async def check_health(self) -> None:
        """Return if the engine can serve; raise EngineDeadError or EngineTimeoutError if not."""
        ...

    async def close(self) -> None:
        """Stop serving; running streams end with EngineDeadError. Idempotent."""
        ...
