"""Server-sent events: one `data:` line per chunk, an error as a chunk of its own, and the end marker."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.disconnect import cancelled_on_disconnect
from gateway.errors import ErrorAnswer

DONE = b"data: [DONE]\n\n"


def event(payload: object) -> bytes:
    """One event. Escaped to ASCII, since some clients split lines at U+2028 and its like, which JSON may hold."""
    return b"data: " + json.dumps(payload, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"


def error_event(answer: ErrorAnswer) -> bytes:
    """An error after the first byte, as OpenAI's clients recognise it."""
    return event(answer.body())


class EventStream(Response):
    """A 200 whose body is `events`, written as they come. When they end or the client leaves, what it holds is closed.

    Starlette's own StreamingResponse notices a lost client only when it writes, and a prefill writes nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # Proxies must pass events on at once.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._resources = AsyncExitStack()

    def hold(self, resources: AsyncExitStack) -> None:
        """Take over `resources`, to be closed after the events."""
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The resources apart from the events: closing a generator that was never begun runs none of its code.
        async with self._resources, cancelled_on_disconnect(receive), aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
