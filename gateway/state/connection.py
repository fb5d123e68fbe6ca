"""Asking Redis, for scripts or many values at once: within a time limit, and not at all for a while after a failure.

A decision must not wait for a state that is slow: an answer that takes longer than `timeout_s` is none. After an error,
or several slow answers in a row, callers are refused at once for a pause that doubles, so that an outage costs a
decision nothing; the first call after the pause is the probe, and its success ends the outage.

Connections are redis-py's, with its addresses, passwords and TLS, but commands are packed here and sent on them
directly: its general path costs more than Redis needs for the longest of our questions.

Scripts address keys that they compute, so that one call can look at as much as a decision needs: a single Redis (with
replicas for failover), not a Redis Cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gateway.state.config import StateConfig
from gateway.state.errors import StateUnavailableError
from gateway.state.wire import Argument, head, pack

Clock = Callable[[], int]

# After this long nothing is expected any more, of a connection either.
_PATIENCE_S = 2.0
# One slow answer says more about this process or the network than about Redis.
_SLOW_IN_A_ROW = 3

# Time is Redis's own, so that gateways need not agree on it, unless the caller brings one: a replay does.
# Hashes come joined, 16 bytes each: hundreds of arguments cost more to pack and to read than to look at.
PRELUDE = """
local ns = ARGV[1]
local now = tonumber(ARGV[2])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local function key_of(kind, hashes, i) return ns .. kind .. hashes:sub(16 * i - 15, 16 * i) end
"""


class Script:
    """Lua that sees `ns` (the prefix of keys) and `now` (ms); its own arguments begin at ARGV[3]."""

    def __init__(self, body: str) -> None:
        self.source = PRELUDE + body
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class StateClient:
    """Runs scripts for one model's fleet. Belongs to one event loop."""

    def __init__(
        self,
        config: StateConfig,
        url: str,
        fleet: str,
        clock: Clock | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """`url` is the server's (config's, or the embedded one's); `fleet` names whose state it is: the model.

        `timeout_s` stands in for config's where nobody waits for the answer, as in an engine that publishes.
        """
        password = os.environ.get(config.password_env) if config.password_env else None
        if config.password_env and password is None:
            raise StateUnavailableError(f"the environment variable {config.password_env} is not set")
        self._redis = Redis.from_url(url, password=password, retry=Retry(NoBackoff(), 0), socket_timeout=None)
        self._idle: list[AbstractConnection] = []
        self.prefix = f"{config.namespace}:{{{fleet}}}"
        self._clock = clock
        self._config = config
        self._timeout_s = timeout_s or config.timeout_s
        self._late: set[asyncio.Task[Any]] = set()
        self._patience_s = max(_PATIENCE_S, self._timeout_s)
        self._slow = 0
        self._pause_s = 0.0
        self._closed_until = 0.0
        self.failures = 0

    @property
    def available(self) -> bool:
        """Whether a call would be tried now."""
        return time.monotonic() >= self._closed_until

    async def connect(self) -> None:
        """Open a connection without the haste of a decision. Raises StateUnavailableError."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._exchange(pack("PING"))
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise self._failed(str(error) or f"no answer within {self._patience_s:g} s") from error
        self._pause_s = self._closed_until = 0.0

    async def run(self, script: Script, *arguments: Argument) -> Any:
        """The script's answer, strings as bytes. Raises StateUnavailableError."""
        now = "" if self._clock is None else self._clock()
        return await self._in_time(self._evaluate(script, (self.prefix, now, *arguments)))

    async def values(self, packed_keys: bytes, count: int) -> tuple[int, list[bytes | None]]:
        """The time (ms), and the strings at `count` keys at that time. Raises StateUnavailableError."""
        answer: tuple[int, list[bytes | None]] = await self._in_time(self._values(packed_keys, count))
        return answer

    async def command(self, *words: Argument) -> Any:
        """A plain command's answer. Raises StateUnavailableError."""
        return (await self._in_time(self._exchange(pack(*words))))[0]

    async def _in_time(self, question: Coroutine[Any, Any, Any]) -> Any:
        if not self.available:
            question.close()
            raise StateUnavailableError("the shared state failed a moment ago")
        task = asyncio.ensure_future(question)
        try:
            # Not asyncio.timeout: after a stall of the event loop that gives up on answers that have already come.
            await asyncio.wait({task}, timeout=self._timeout_s)
        except asyncio.CancelledError:
            self._leave(task)
            raise
        if not task.done():
            self._leave(task)
            raise self._too_slow()
        try:
            answer = task.result()
        except (RedisError, OSError) as error:
            raise self._failed(str(error)) from error
        self._slow, self._pause_s = 0, 0.0
        return answer

    async def close(self) -> None:
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self._hang_up()
        await self._redis.aclose()

    def _leave(self, task: asyncio.Task[Any]) -> None:
        """Let a late call end by itself, if it does: a new connection may take longer than a decision may wait, and
        cancelling it each time would never get one."""
        self._late.add(task)
        asyncio.get_running_loop().call_later(self._patience_s, task.cancel)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # was reported when the call was given up

    async def _evaluate(self, script: Script, arguments: tuple[Argument, ...]) -> Any:
        try:
            return (await self._exchange(pack("EVALSHA", script.sha, 0, *arguments)))[0]
        except NoScriptError:  # the first use, or Redis was restarted
            return (await self._exchange(pack("EVAL", script.source, 0, *arguments)))[0]

    async def _values(self, packed_keys: bytes, count: int) -> tuple[int, list[bytes | None]]:
        mget = head(b"MGET", count) + packed_keys
        if self._clock is not None:
            return self._clock(), (await self._exchange(mget))[0]
        (seconds, micros), values = await self._exchange(pack("TIME"), mget)
        return int(seconds) * 1000 + int(micros) // 1000, values

    async def _exchange(self, *commands: bytes) -> list[Any]:
        """The answers to packed commands that are sent together."""
        if self._idle:
            try:
                return await self._exchange_on(self._idle.pop(), commands)
            except RedisConnectionError:
                await self._hang_up()  # closed while nobody used it, and the other idle ones with it
        return await self._exchange_on(self._new_connection(), commands)

    async def _exchange_on(self, connection: AbstractConnection, commands: tuple[bytes, ...]) -> list[Any]:
        is_clean = False  # nothing on its way that somebody else would take for an answer to him
        try:
            await connection.send_packed_command(b"".join(commands))
            answers = [await connection.read_response() for _ in commands]
            is_clean = True
        except ResponseError:
            is_clean = len(commands) == 1
            raise
        finally:
            if is_clean:
                self._idle.append(connection)
            else:
                await connection.disconnect(nowait=True)
        return answers

    def _new_connection(self) -> AbstractConnection:
        connection: AbstractConnection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        return connection

    async def _hang_up(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    def _too_slow(self) -> StateUnavailableError:
        self._slow += 1
        reason = f"no answer within {self._timeout_s * 1000:g} ms"
        if self._slow >= _SLOW_IN_A_ROW or self._pause_s:
            return self._failed(reason)
        self.failures += 1
        return StateUnavailableError(f"the shared state is unavailable: {reason}")

    def _failed(self, reason: str) -> StateUnavailableError:
        self.failures += 1
        self._pause_s = min(max(self._config.retry_s, 2 * self._pause_s), self._config.max_retry_s)
        self._closed_until = time.monotonic() + self._pause_s
        return StateUnavailableError(f"the shared state is unavailable: {reason}")
