"""The request log: records are made and written by a thread of its own, so that no request waits for a disk.

What waits is bounded, what does not fit is dropped and counted, and so is what the disk refuses: logging never fails a
request.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.errors import LogUnavailableError
from gateway.log_files import LogFiles
from gateway.request_log_config import RequestLogConfig
from gateway.router_metrics import RouterMetrics
from gateway.tenant_digest import tenant_key
from router_models.records import OutcomeRecord, RequestRecord

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LogRecord = RequestRecord | OutcomeRecord

_BATCH = 256
_IDLE_S = 0.5
_WRITE_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 10.0


class _Entry:
    """A record to be made and written; `done`, where somebody waits, is told when it is, or why it is not."""

    def __init__(self, make: Callable[[], LogRecord], done: Future[None] | None = None) -> None:
        self.make = make
        self.done = done

    def settle(self, error: Exception | None) -> None:
        if self.done is None or not self.done.set_running_or_notify_cancel():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class RequestLog:
    """One process's request log. `put` and `write` may be called from any thread, between `start` and `close`.

    `key` is that of the tenants' digests, known once it is started.
    """

    def __init__(
        self, config: RequestLogConfig, metrics: RouterMetrics, log: FilteringBoundLogger, files: LogFiles | None = None
    ) -> None:
        self.config = config
        self.key = b""
        self._folder = Path(config.folder).expanduser()
        self._files = files or LogFiles(
            self._folder, config.max_file_bytes, config.max_file_age_s, config.max_total_bytes
        )
        self._metrics = metrics
        self._log = log
        self._queue: queue.Queue[_Entry | None] = queue.Queue(config.max_queued)
        # A daemon: a process that is made to end does not wait for a disk.
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._failing: set[str] = set()

    def start(self) -> None:
        self.key = self._key_of(self._folder)
        self._thread.start()

    def close(self) -> None:
        """Write what waits, and end; a disk that hangs is not waited for."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_CLOSE_TIMEOUT_S)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def put(self, make: Callable[[], LogRecord]) -> None:
        """Have a record made and written some time. Never waits, never raises."""
        try:
            self._queue.put_nowait(_Entry(make))
        except queue.Full:
            self._metrics.dropped_inc("queue")

    async def write(self, record: LogRecord) -> None:
        """Write a record, and return when it is in the file. Raises LogUnavailableError."""
        done: Future[None] = Future()
        try:
            self._queue.put_nowait(_Entry(lambda: record, done))
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await asyncio.wrap_future(done)
        except queue.Full as error:
            self._metrics.dropped_inc("queue")
            raise LogUnavailableError("its queue is full") from error
        except OSError as error:  # TimeoutError is one
            raise LogUnavailableError(error.strerror or "its disk is too slow") from error

    def _run(self) -> None:
        is_open = True
        while is_open:
            entries, is_open = self._take()
            if entries:
                self._append(entries)
            self._tell("tidied", self._files.tidy if is_open else self._files.close)

    def _take(self) -> tuple[list[_Entry], bool]:
        """What waits, at most a batch; False once the log is being closed and nothing waits any more."""
        entries: list[_Entry] = []
        try:
            entry = self._queue.get(timeout=_IDLE_S)
            while entry is not None:
                entries.append(entry)
                if len(entries) == _BATCH:
                    return entries, True
                entry = self._queue.get_nowait()
        except queue.Empty:
            return entries, True
        return entries, False

    def _append(self, entries: list[_Entry]) -> None:
        lines, made = [], []
        for entry in entries:
            try:
                lines.append(entry.make().model_dump_json().encode() + b"\n")
                made.append(entry)
            except Exception as error:  # noqa: BLE001  # the thread's border: one bad record must not end the log
                self._log.error("record not made", exc_info=error)
                self._metrics.dropped_inc("record")
                entry.settle(OSError(0, "the record could not be made"))
        failure = self._tell("written", lambda: self._files.append(b"".join(lines))) if lines else None
        if failure is None:
            self._metrics.records_inc(len(made))
        else:
            self._metrics.dropped_inc("disk", len(made))
        for entry in made:
            entry.settle(failure)

    def _tell(self, done: str, work: Callable[[], None]) -> OSError | None:
        """The disk's error, if there is one; it is logged when it begins."""
        try:
            work()
        except OSError as error:
            if done not in self._failing:
                self._log.error(f"request log not {done}", folder=str(self._folder), error=str(error))
            self._failing.add(done)
            return error
        self._failing.discard(done)
        return None

    def _key_of(self, folder: Path) -> bytes:
        try:
            return tenant_key(folder)
        except OSError as error:
            self._log.error("tenants will have other digests after a restart", folder=str(folder), error=str(error))
            return secrets.token_bytes(32)
