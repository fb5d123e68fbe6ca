"""Noticing that the client has left, while the server is busy with something else than writing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive


class ClientDisconnect:
    """Tells, after the block, whether the client left in it."""

    happened = False


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[ClientDisconnect]:
    """Cancel what the block awaits once the client has left, and end the block quietly.

    To be entered after the request's body was read: what `receive` then tells is the disconnect. A cancellation from
    elsewhere (Serve cancels the task itself) passes through.
    """
    task = asyncio.current_task()
    assert task is not None
    outcome = ClientDisconnect()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        outcome.happened = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        try:
            yield outcome
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})
    except asyncio.CancelledError:
        # Ours only if nobody else asked too (the same bookkeeping as asyncio.timeout).
        if not (outcome.happened and task.uncancel() == 0):
            raise
