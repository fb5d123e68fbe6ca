"""The connection that a state client uses now, and the attempt to open the next one."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.state.channel import Channel


class Dialler:
    """Belongs to one event loop."""

    def __init__(self, url: str, password: str | None, ca_file: Path | None, patience_s: float) -> None:
        """`ca_file` holds the authorities (PEM) that a `rediss://` server's certificate must come from; None: the
        system's. Raises OSError if it cannot be used."""
        # Protocol 2: all of 3 that a channel would notice are messages that nobody asked for.
        self._redis = Redis.from_url(
            url, password=password, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None
        )
        # redis-py would read the system's authorities for each connection: some 15 ms, on the event loop.
        self._tls = ssl.create_default_context(cafile=ca_file) if url.startswith("rediss://") else None
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
        if isinstance(connection, SSLConnection):
            connection.ssl_context.context = self._tls
        try:
            async with asyncio.timeout(self._patience_s):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return Channel(connection, self._patience_s)
