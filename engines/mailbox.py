"""Where one request's deltas wait for their reader. Lives on the asyncio side only."""

from __future__ import annotations

import asyncio
import copy

from engines.errors import EngineError
from engines.types import Delta, joined


class Mailbox:
    """Merges what the reader has not fetched yet: a slow reader gets fewer, larger items."""

    def __init__(self, num_choices: int) -> None:
        self._num_open = num_choices
        self._pending: list[Delta] = []
        self._error: EngineError | None = None
        self._news = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Every choice's last delta has been fetched."""
        return self._num_open == 0

    def put(self, deltas: tuple[Delta, ...]) -> None:
        self._pending.extend(deltas)
        self._news.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with `error`, after what has been put before."""
        self._error = error
        self._news.set()

    async def get(self) -> tuple[Delta, ...]:
        """At most one delta per choice. Raises the error the mailbox was failed with."""
        while not self._pending:
            if self._error is not None:
                # A copy: one error may end many streams, each with its own traceback.
                raise copy.copy(self._error) from self._error
            await self._news.wait()
            self._news.clear()
        items = joined(self._pending)
        self._pending.clear()
        self._num_open -= sum(delta.finish_reason is not None for delta in items)
        return items
