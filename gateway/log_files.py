"""The files of the request log: one that this process writes, the rest compressed, all of them together bounded.

A file is `TIME-ID.open.jsonl` while it is written, then `TIME-ID.jsonl.gz`. Several processes may share a folder: each
holds a lock on its open file, so a file without a lock belongs to a process that has ended, and is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from router_models.logs import OPEN_SUFFIX

_CLOSED, _PACKED = ".jsonl", ".jsonl.gz"
# For what others left behind, and what could not be compressed on a full disk.
_SWEEP_PERIOD_S = 60.0
_OURS = re.compile(r"\d{8}T\d{6}-[0-9a-f]{12}(\.open)?\.jsonl(\.gz)?")


class LogFiles:
    """Appends lines in `folder`, which is made if it is not there. Used from one thread.

    `write` appends bytes to a file descriptor and says how many, as os.write does.
    """

    def __init__(
        self,
        folder: Path,
        max_file_bytes: int,
        max_file_age_s: float,
        max_total_bytes: int,
        clock: Callable[[], float] = time.time,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_file_age_s = max_file_age_s
        self._max_total_bytes = max_total_bytes
        self._clock = clock
        self._write = write
        self._file: int | None = None
        self._path = folder
        self._num_bytes = 0
        self._opened_s = 0.0
        self._swept_s = float("-inf")

    def append(self, lines: bytes) -> None:
        """Append whole lines. Raises OSError, and then none of them is there."""
        number = self._open_file() if self._file is None else self._file
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[self._write(number, bytes(rest)) :]
        except OSError:
            # Shortening needs no space. A reader must not meet half a line with a whole one behind it.
            os.ftruncate(number, self._num_bytes)
            raise
        self._num_bytes += len(lines)

    def tidy(self) -> None:
        """Close and compress what is large or old enough, and keep the folder within its bound. Raises OSError."""
        is_old = self._clock() - self._opened_s >= self._max_file_age_s
        if self._file is not None and (self._num_bytes >= self._max_file_bytes or (is_old and self._num_bytes)):
            self.close()
        elif self._clock() - self._swept_s >= _SWEEP_PERIOD_S:
            self._sweep()

    def close(self) -> None:
        """Close and compress the open file; the next line opens another. Raises OSError."""
        if self._file is None:
            return
        number, self._file = self._file, None
        closed = _renamed(self._path, _CLOSED)
        try:
            if self._num_bytes:
                self._path.rename(closed)
            else:
                self._path.unlink()
        finally:
            os.close(number)
        self._sweep()

    def _open_file(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._clock()))
        self._path = self._folder / f"{stamp}-{uuid.uuid4().hex[:12]}{OPEN_SUFFIX}"
        # Hidden until it is locked, or another process might take it over. Prompts are nobody else's to read.
        hidden = self._path.with_name(f".{self._path.name}")
        number = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(number, fcntl.LOCK_EX)
        hidden.rename(self._path)
        self._file, self._num_bytes, self._opened_s = number, 0, self._clock()
        return number

    def _sweep(self) -> None:
        """Take over what others left open, compress what is closed, and delete the oldest beyond the bound."""
        self._swept_s = self._clock()
        for path in self._files():
            if path.name.endswith(OPEN_SUFFIX):
                _adopt(path)
        for path in self._files():
            if path.suffix == _CLOSED and not path.name.endswith(OPEN_SUFFIX):
                _pack(path)
        # Room is left for the file that will be written next.
        sizes = {path: size for path in self._files() if (size := _size(path)) is not None}
        total = sum(sizes.values())
        for path in sizes:
            if total <= self._max_total_bytes - self._max_file_bytes:
                break
            if not path.name.endswith(OPEN_SUFFIX):
                path.unlink(missing_ok=True)
                total -= sizes[path]

    def _files(self) -> list[Path]:
        """Ours, oldest first; whatever else lies in the folder is left alone."""
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _OURS.fullmatch(path.name))


def _adopt(path: Path) -> None:
    """Close the open file of a process that has ended, without what it had not finished."""
    with _locked(path) as number:
        if number is None:
            return
        data = path.read_bytes()
        os.ftruncate(number, data.rfind(b"\n") + 1)
        path.rename(_renamed(path, _CLOSED))


def _pack(path: Path) -> None:
    """Replace a closed file by its compressed form, unless another process is at it."""
    with _locked(path) as number:
        if number is None:
            return
        packed = _renamed(path, _PACKED)
        part = packed.with_suffix(".part")
        try:
            part.touch(0o600)
            part.chmod(0o600)  # one that was left behind, too
            with path.open("rb") as source, gzip.open(part, "wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(packed)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        path.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """A descriptor of the file with its lock; None where another process has the lock or has renamed the file."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield number if path.exists() else None
    finally:
        os.close(number)


def _renamed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.split(".", 1)[0] + suffix)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
