"""One connection to Redis for everybody at once: commands leave in the order they were given, answers come back in it.

redis-py opens it, with its addresses, passwords and TLS, and then its transport is ours: asked in its own way, every
question costs three wake-ups of the event loop and a connection to itself, more than Redis needs for the longest of
them. Each write to a socket costs more than the commands in it: those that nobody waits for leave with the next one
that somebody does, or after a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

# So long may a command wait for company.
_LINGER_S = 0.001
# So long may the other side take to say goodbye, as TLS wants it to.
_FAREWELL_S = 1.0

_NOT_YET = object()
Answers = list[Any]


@dataclass(slots=True)
class _Asked:
    """Commands that were sent together, and their answers so far."""

    future: asyncio.Future[Answers]
    num_answers: int
    since: float
    answers: Answers = field(default_factory=list)

    def settle(self) -> None:
        if self.future.done():
            return  # nobody waits any more
        error = next((one for one in self.answers if isinstance(one, ResponseError)), None)
        if error is None:
            self.future.set_result(self.answers)
        else:
            self.future.set_exception(error)


class Channel(asyncio.Protocol):
    """Belongs to one event loop. It is lost, with all that waits, once an answer has taken `patience_s`."""

    def __init__(self, connection: AbstractConnection, patience_s: float) -> None:
        """`connection` is open, and nobody else uses it."""
        self._connection = connection
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=ResponseError, notEnoughData=_NOT_YET)
        self._asked: deque[_Asked] = deque()
        self._unsent: list[bytes] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None
        self.is_open = True
        self._is_gone = asyncio.Event()
        writer = connection._writer  # there is no public way to it
        assert writer is not None
        self._transport: asyncio.WriteTransport = writer.transport
        self._transport.set_protocol(self)

    def send(self, commands: bytes, num_answers: int = 1, *, at_once: bool = True) -> asyncio.Future[Answers]:
        """The answers to packed commands, in order; `at_once`: somebody waits for them.

        The future raises ResponseError where Redis refuses one, RedisConnectionError where the connection is lost.
        """
        future: asyncio.Future[Answers] = self._loop.create_future()
        if not self.is_open:
            future.set_exception(RedisConnectionError("the connection is closed"))
            return future
        self._asked.append(_Asked(future, num_answers, time.monotonic()))
        self._unsent.append(commands)
        if at_once:
            self._flush()
        elif self._flushing is None:
            self._flushing = self._loop.call_later(_LINGER_S, self._flush)
        if self._watching is None:
            self._watching = self._loop.call_later(self._patience_s, self._watch)
        return future

    def abort(self, reason: str = "the connection was given up") -> None:
        """Lose the connection now."""
        self._transport.abort()
        self._lose(RedisConnectionError(reason))

    async def close(self) -> None:
        """Its socket is closed afterwards. Harmless when repeated, and due after a loss too."""
        self._lose(RedisConnectionError("the connection was closed"))
        # redis-py's own waiting would be for the protocol that this one stands in for.
        await self._connection.disconnect(nowait=True)
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._is_gone.wait()
        except TimeoutError:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self.is_open:
            return
        self._reader.feed(data)
        try:
            while self.is_open and (answer := self._reader.gets()) is not _NOT_YET:
                self._take(answer)
        except hiredis.ProtocolError as error:
            self.abort(f"not Redis's protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone.set()
        self._lose(RedisConnectionError(str(exc) if exc else "Redis closed the connection"))

    def _take(self, answer: Any) -> None:
        if isinstance(answer, hiredis.PushNotification):
            return  # of its own accord, between answers, as protocol 3 lets a server
        if not self._asked:
            self.abort(f"Redis said what nobody asked: {answer}")
            return
        asked = self._asked[0]
        asked.answers.append(answer)
        if len(asked.answers) == asked.num_answers:
            self._asked.popleft()
            asked.settle()

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def _watch(self) -> None:
        self._watching = None
        if not self._asked:
            return
        left_s = self._asked[0].since + self._patience_s - time.monotonic()
        if left_s > 0:
            self._watching = self._loop.call_later(left_s, self._watch)
        else:
            self.abort(f"no answer within {self._patience_s:g} s")

    def _lose(self, error: RedisConnectionError) -> None:
        self.is_open = False
        for timer in (self._flushing, self._watching):
            if timer is not None:
                timer.cancel()
        self._flushing = self._watching = None
        self._unsent.clear()
        while self._asked:
            asked = self._asked.popleft()
            if not asked.future.done():
                asked.future.set_exception(error)
