"""The request log's thread: nothing waits for it, nothing fails with it."""

import asyncio
import errno
import os
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.errors import LogUnavailableError
from gateway.log import make_logger
from gateway.log_files import LogFiles
from gateway.request_log import RequestLog
from gateway.request_log_config import RequestLogConfig
from gateway.router_metrics import RouterMetrics
from router_models.logs import read_log
from router_models.records import OutcomeRecord, RequestRecord


class _FullDisk(LogFiles):
    """Refuses every line while `is_full`."""

    is_full = True

    def append(self, lines: bytes) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().append(lines)


class _HangingDisk(LogFiles):
    """Lets nothing through before `go` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 1000, 60.0, 10_000)
        self.go = threading.Event()
        self.began = threading.Event()

    def append(self, lines: bytes) -> None:
        self.began.set()
        assert self.go.wait(20)
        super().append(lines)


class _Counted:
    def __init__(self, folder: Path, files: LogFiles | None = None, **fields: object) -> None:
        self.registry = CollectorRegistry()
        config = RequestLogConfig.model_validate({"folder": str(folder)} | fields)
        self.log = RequestLog(config, RouterMetrics("test", self.registry), make_logger("error"), files)
        self.log.start()

    def count(self, name: str, reason: str | None = None) -> int:
        labels = 'ingress="test"' + ("" if reason is None else f',reason="{reason}"')
        line = f"outrider_request_log_{name}_total{{{labels}}} "
        rows = generate_latest(self.registry).decode().splitlines()
        return next((int(float(row.removeprefix(line))) for row in rows if row.startswith(line)), 0)


def _record(number: int) -> RequestRecord:
    return RequestRecord(request_id=str(number), time=float(number))


def _outcome(number: int) -> OutcomeRecord:
    return OutcomeRecord(request_id=str(number), time=1.0, label="feedback", score=1.0)


def test_records_are_written_by_another_thread_and_readable_afterwards(tmp_path: Path) -> None:
    found = _Counted(tmp_path, max_file_bytes=400)
    makers = set()

    def make(number: int) -> RequestRecord:
        makers.add(threading.current_thread().name)
        return _record(number)

    for number in range(100):
        found.log.put(lambda number=number: make(number))  # type: ignore[misc]
    found.log.close()
    assert makers == {"request-log"}
    assert list(read_log(tmp_path).requests) == [str(number) for number in range(100)]
    assert (found.count("records"), found.count("dropped", "queue")) == (100, 0)


def test_what_is_being_written_can_be_read(tmp_path: Path) -> None:
    found = _Counted(tmp_path)
    found.log.put(lambda: _record(1))
    deadline = time.monotonic() + 10
    while found.count("records") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "1" in read_log(tmp_path).requests
    found.log.close()


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path: Path) -> None:
    disk = _HangingDisk(tmp_path)
    found = _Counted(tmp_path, disk, max_queued=3)
    found.log.put(lambda: _record(0))
    assert disk.began.wait(10)
    began = time.perf_counter()
    for number in range(1, 9):
        found.log.put(lambda number=number: _record(number))  # type: ignore[misc]
    assert time.perf_counter() - began < 1.0
    assert found.count("dropped", "queue") == 5
    disk.go.set()
    found.log.close()
    assert list(read_log(tmp_path).requests) == ["0", "1", "2", "3"]


def test_a_full_disk_drops_and_counts_until_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = _FullDisk(tmp_path, 1000, 60.0, 10_000)
    found = _Counted(tmp_path, disk)
    for number in range(3):
        found.log.put(lambda number=number: _record(number))  # type: ignore[misc]
        deadline = time.monotonic() + 10
        while found.count("dropped", "disk") <= number:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    disk.is_full = False
    found.log.put(lambda: _record(9))
    found.log.close()
    assert list(read_log(tmp_path).requests) == ["9"]
    errors = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert len(errors) == 1
    assert "No space left" in errors[0]


def test_a_record_that_cannot_be_made_does_not_end_the_log(tmp_path: Path) -> None:
    found = _Counted(tmp_path)
    found.log.put(lambda: _record(1 // 0))
    found.log.put(lambda: _record(2))
    found.log.close()
    assert list(read_log(tmp_path).requests) == ["2"]
    assert found.count("dropped", "record") == 1


async def test_an_outcome_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    found = _Counted(tmp_path)
    found.log.put(lambda: _record(1))
    await found.log.write(_outcome(1))
    found_log = await asyncio.to_thread(read_log, tmp_path)
    assert (list(found_log.requests), found_log.summary.orphans) == (["1"], 0)
    await asyncio.to_thread(found.log.close)


async def test_whoever_waits_is_told_what_went_wrong(tmp_path: Path) -> None:
    full = _Counted(tmp_path, _FullDisk(tmp_path, 1000, 60.0, 10_000))
    with pytest.raises(LogUnavailableError, match="No space left"):
        await full.log.write(_outcome(1))
    full.log.close()
    disk = _HangingDisk(tmp_path)
    busy = _Counted(tmp_path, disk, max_queued=1)
    busy.log.put(lambda: _record(1))
    assert disk.began.wait(10)
    busy.log.put(lambda: _record(2))
    with pytest.raises(LogUnavailableError, match="queue is full"):
        await busy.log.write(_outcome(1))
    disk.go.set()
    busy.log.close()


def test_a_folder_that_cannot_be_made_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = _Counted(tmp_path / "file" / "log")
    assert len(found.log.key) == 32
    found.log.put(lambda: _record(1))
    found.log.close()
    assert found.count("dropped", "disk") == 1
