"""Asking Redis, for scripts or many values at once: within a time limit, and not at all for a while after a failure.

A decision must not wait for a state that is slow: an answer that takes longer than `timeout_s` is none. After an error,
or several slow answers in a row, callers are refused at once for a pause that doubles, so that an outage costs a
decision nothing; the first call after the pause is the probe, and its success ends the outage.

Scripts address keys that they compute, so that one call can look at as much as a decision needs: a single Redis (with
replicas for failover), not a Redis Cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Callable
from typing import Any

from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.state.breaker import Breaker
from gateway.state.channel import Answers
from gateway.state.config import StateConfig
from gateway.state.dialler import Dialler
from gateway.state.errors import StateAccessError, StateUnavailableError
from gateway.state.wire import Argument, pack

Clock = Callable[[], int]
# Hears what became of a script: True, it ran; False, it did not; None, nobody knows.
Told = Callable[[bool | None], None]
# Raised with every change of what keys hold: gateways and engines of two versions share nothing, and nobody misreads.
_LAYOUT = 3
_TIME = pack("TIME")

# After this long nothing is expected any more, of a connection either.
_PATIENCE_S = 2.0
# How a Redis begins that wants to know who we are, or lets us do less than we must.
_NO_ACCESS = ("NOAUTH", "NOPERM")

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

    def __init__(self, body: str, *, counts: bool = False) -> None:
        """`counts`: what it does once it must not do twice."""
        self.counts = counts
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

        `timeout_s` stands in for config's where nobody waits for the answer, as in an engine that publishes. Raises
        StateAccessError for a password that is not set and for a `ca_file` that cannot be used.
        """
        password = os.environ.get(config.password_env) if config.password_env else None
        if config.password_env and password is None:
            raise StateAccessError(f"the environment variable {config.password_env} is not set")
        self.prefix = f"{config.namespace}:{_LAYOUT}:{{{fleet}}}"
        self._clock = clock
        self._timeout_s = timeout_s or config.timeout_s
        self._known: set[str] = set()  # scripts that Redis had when it was last asked
        self._aside: set[asyncio.Task[Any]] = set()
        self._patience_s = max(_PATIENCE_S, self._timeout_s)
        try:
            self._dialler = Dialler(url, password, config.ca_file, self._patience_s)
        except OSError as error:
            raise StateAccessError(f"{config.ca_file}: {error}") from error
        self._breaker = Breaker(self.prefix, config.retry_s, config.max_retry_s)
        self._refuses_writes = False
        self._is_closed = False

    @property
    def available(self) -> bool:
        """Whether a call would be tried now."""
        return self._breaker.available

    @property
    def failures(self) -> int:
        """Calls that got no answer, or a refusal."""
        return self._breaker.failures

    async def connect(self) -> None:
        """Open a connection without the haste of a decision. Raises StateUnavailableError."""
        try:
            async with asyncio.timeout(self._patience_s):
                channel = self._dialler.channel
                if channel is None:
                    channel = await asyncio.shield(self._dialler.dial())
                await channel.send(pack("PING"))
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise self._failed(error, str(error) or f"no answer within {self._patience_s:g} s") from error
        self._breaker.answered()

    async def run(self, script: Script, *arguments: Argument) -> Any:
        """The script's answer, strings as bytes. Raises StateUnavailableError."""
        full = self._full(arguments)
        try:
            answer = (await self._ask(pack("EVALSHA", script.sha, 0, *full), once=script.counts))[0]
        except _UnknownScriptError:  # the first use, or Redis was restarted
            answer = (await self._ask(pack("EVAL", script.source, 0, *full), once=script.counts))[0]
        self._known.add(script.sha)
        self._refuses_writes = False
        return answer

    def tell(self, script: Script, *arguments: Argument, done: Told) -> None:
        """Run a script whose answer nobody waits for. Never raises."""
        if self._is_closed or not self.available:
            done(False)
            return
        channel = self._dialler.channel
        if channel is None or script.sha not in self._known:
            self._run_aside(script, arguments, done)
            return

        def answered(future: asyncio.Future[Answers]) -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, ResponseError) and _is_unknown_script(error):
                self._known.discard(script.sha)
                self._run_aside(script, arguments, done)
                return
            if isinstance(error, ResponseError):
                self._refused(error)
                done(False)
                return
            is_told = error is None and not future.cancelled()
            self._refuses_writes = self._refuses_writes and not is_told
            done(True if is_told else None)

        packed = pack("EVALSHA", script.sha, 0, *self._full(arguments))
        channel.send(packed, at_once=False).add_done_callback(answered)

    async def read(self, commands: bytes, num_answers: int) -> tuple[int, Answers]:
        """The time (ms), and the answers to packed commands that change nothing. Raises StateUnavailableError.

        Also where Redis has refused a write since it last took one: what it holds is then no longer what is.
        """
        if self._refuses_writes:
            raise StateUnavailableError("the shared state takes no writes")
        if self._clock is not None:
            return self._clock(), await self._ask(commands, num_answers)
        (seconds, micros), *answers = await self._ask(_TIME + commands, 1 + num_answers)
        return int(seconds) * 1000 + int(micros) // 1000, answers

    async def close(self) -> None:
        self._is_closed = True
        for task in self._aside:
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
        await self._dialler.close()

    def _full(self, arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
        return (self.prefix, "" if self._clock is None else self._clock(), *arguments)

    def _run_aside(self, script: Script, arguments: tuple[Argument, ...], done: Told) -> None:
        def over(task: asyncio.Task[Any]) -> None:
            self._aside.discard(task)
            done(None if task.cancelled() or task.exception() else True)

        task = asyncio.ensure_future(self.run(script, *arguments))
        self._aside.add(task)
        task.add_done_callback(over)

    async def _ask(self, commands: bytes, num_answers: int = 1, *, once: bool = False) -> Answers:
        """The answers to packed commands that are sent together, if they come in time; `once`: never sent again."""
        if self._is_closed or not self.available:
            raise StateUnavailableError("the shared state failed a moment ago")
        try:
            answers = await self._ask_channel(commands, num_answers, once)
        except TimeoutError as error:
            raise self._too_slow() from error
        except ResponseError as error:
            if _is_unknown_script(error):
                raise _UnknownScriptError from error
            raise self._refused(error) from error
        except (RedisError, OSError) as error:
            raise self._failed(error, str(error)) from error
        self._breaker.answered()
        return answers

    async def _ask_channel(self, commands: bytes, num_answers: int, once: bool) -> Answers:
        if (channel := self._dialler.channel) is not None:
            try:
                return await self._answer(channel.send(commands, num_answers))
            except RedisConnectionError as error:
                if once:
                    raise RedisConnectionError(f"{error}; whether the script ran before that is unknown") from error
                # Closed while nobody used it, as far as can be known.
        dialling = self._dialler.dial()
        await asyncio.wait({dialling}, timeout=self._timeout_s)
        if not dialling.done():
            raise TimeoutError
        return await self._answer(dialling.result().send(commands, num_answers))

    async def _answer(self, future: asyncio.Future[Answers]) -> Answers:
        """What it brings within `timeout_s`: raises TimeoutError."""
        # Not asyncio.timeout: after a stall of the event loop that gives up on answers that have already come.
        timer = asyncio.get_running_loop().call_later(self._timeout_s, _give_up, future)
        try:
            return await future
        finally:
            timer.cancel()

    def _refused(self, error: ResponseError) -> StateUnavailableError:
        """Full, or read-only: a Redis that can be read and not be told anything."""
        self._refuses_writes = True
        channel = self._dialler.channel
        if str(error).startswith("READONLY") and channel is not None:
            channel.abort()  # a failover: the address leads elsewhere by now
        return self._failed(error, str(error))

    def _too_slow(self) -> StateUnavailableError:
        reason = f"no answer within {self._timeout_s * 1000:g} ms"
        self._breaker.too_slow(reason)
        return StateUnavailableError(f"the shared state is unavailable: {reason}")

    def _failed(self, error: Exception, reason: str) -> StateUnavailableError:
        self._breaker.failed(reason)
        kind = StateAccessError if _is_access(error) else StateUnavailableError
        return kind(f"the shared state is unavailable: {reason}")


class _UnknownScriptError(Exception):
    """Redis has never seen the script, or forgot it."""


def _is_unknown_script(error: ResponseError) -> bool:
    return str(error).startswith("NOSCRIPT")


def _is_access(error: Exception) -> bool:
    """Whether one of us does not accept the other."""
    first = error.__context__  # redis-py makes ConnectionErrors of what went wrong
    # Of its own answers, to whom it logs in or which database it selects, redis-py cuts such words off.
    is_refused = any(isinstance(each, (AuthenticationError, NoPermissionError)) for each in (error, first))
    return is_refused or isinstance(first, ssl.SSLCertVerificationError) or str(error).startswith(_NO_ACCESS)


def _give_up(future: asyncio.Future[Answers]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
