"""The connection that a state client uses now, and the attempt to open the next one."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.state.channel import Channel


class Dialler:
    """Belongs to one event loop."""

    def __init__(self, url: str, password: str | None, patience_s: float) -> None:
        # Protocol 2: in 3 a server may say what nobody asked for, which a channel would take for an answer.
        self._redis = Redis.from_url(
            url, password=password, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None
        )
        self._patience_s = patience_s
        self._channel: Channel | None = None
        self._dialling: asyncio.Task[Channel] | None = None

    @property
    def channel(self) -> Channel | None:
        """The open one."""
        return self._channel if self._channel is not None and self._channel.is_open else None

    def dial(self) -> asyncio.Task[Channel]:
        """The attempt to connect that is under way; raises RedisError or OSError.

        It may take longer than a decision may wait, and cancelling it each time would never get a connection.
        """
        if self._dialling is None:
            self._dialling = asyncio.ensure_future(self._open())
            self._dialling.add_done_callback(self._dialled)
        return self._dialling

    async def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait({self._dialling})
        if self._channel is not None:
            await self._channel.close()
        await self._redis.aclose()

    def _dialled(self, task: asyncio.Task[Channel]) -> None:
        self._dialling = None
        if not task.cancelled() and task.exception() is None:
            self._channel = task.result()

    async def _open(self) -> Channel:
        if self._channel is not None:
            await self._channel.close()
        connection: AbstractConnection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(self._patience_s):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Channel(connection, self._patience_s)
