"""What lies between a Redis and those who use it: a network that can be slow or cut, and TLS."""

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class RedisProxy:
    """Forwards to the Redis at a unix socket, in a thread of its own. Use as a context manager."""

    def __init__(self, redis: str, listen: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        """`redis` is a unix:// address. Listens on the unix socket `listen`, or else on a port of localhost."""
        self._redis = redis.removeprefix("unix://")
        self._listen = listen
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.delay_s = 0.0  # of everything that Redis says
        self.cut_off: frozenset[int] = frozenset()  # processes; what is said meanwhile arrives late, if at all
        self._ends: set[asyncio.StreamWriter] = set()
        self._server = self._wait(self._start())

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"unix://{self._listen}"

    def stop(self) -> None:
        if self._thread.is_alive():
            self._wait(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> asyncio.Server:
        if self._listen is not None:
            return await asyncio.start_unix_server(self._handle, self._listen)
        return await asyncio.start_server(self._handle, "localhost", 0, ssl=self._tls)

    async def _end(self) -> None:
        self._server.close()
        self.delay_s, self.cut_off = 0.0, frozenset()
        for end in self._ends:
            end.transport.abort()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process = _process_of(writer) if self._listen is not None else None
        try:
            answers, questions = await asyncio.open_unix_connection(self._redis)
        except OSError:  # Redis is away
            writer.transport.abort()
            return
        ends = {questions, writer}
        self._ends |= ends
        pumps = self._pump(reader, questions, process, 0), self._pump(answers, writer, process, 1)
        _, rest = await asyncio.wait([asyncio.ensure_future(each) for each in pumps], return_when="FIRST_COMPLETED")
        self._ends -= ends
        for task in rest:
            task.cancel()
        for end in ends:
            end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: int | None, delays: int
    ) -> None:
        with contextlib.suppress(OSError):  # of which SSLError is one
            while data := await reader.read(65536):
                await asyncio.sleep(delays * self.delay_s)
                while process in self.cut_off:  # noqa: ASYNC110 - set by another thread
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()


def _process_of(writer: asyncio.StreamWriter) -> int:
    pid: int
    credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, _, _ = struct.unpack("3i", credentials)
    return pid
