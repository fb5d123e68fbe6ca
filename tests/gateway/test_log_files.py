"""The log's files: whole lines, compressed, bounded, and taken over from processes that have ended."""

import errno
import gzip
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from gateway.log_files import LogFiles


class _Disk:
    """os.write until it is full, then ENOSPC after a part of the line."""

    def __init__(self) -> None:
        self.is_full = False

    def write(self, number: int, data: bytes) -> int:
        if not self.is_full:
            return os.write(number, data[:5])
        os.write(number, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _files(
    folder: Path, max_file: int = 100, max_total: int = 10_000, disk: _Disk | None = None
) -> tuple[LogFiles, list[float]]:
    now = [1_000_000.0]
    write = os.write if disk is None else disk.write
    return LogFiles(folder, max_file, 60.0, max_total, lambda: now[0], write), now


def _lines(folder: Path) -> list[bytes]:
    packed = [gzip.decompress(path.read_bytes()) for path in sorted(folder.glob("*.jsonl.gz"))]
    plain = [path.read_bytes() for path in sorted(folder.glob("*.jsonl"))]
    return b"".join(packed + plain).splitlines()


def test_lines_are_there_at_once_and_stay_when_files_are_compressed(tmp_path: Path) -> None:
    files, _ = _files(tmp_path / "made")
    files.append(b"a" * 60 + b"\n")
    files.tidy()
    assert len(list((tmp_path / "made").glob("*.open.jsonl"))) == 1
    files.append(b"b" * 60 + b"\n")
    files.tidy()
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".gz"]
    files.append(b"c\n")
    assert _lines(tmp_path / "made") == [b"a" * 60, b"b" * 60, b"c"]
    files.close()
    assert len(list((tmp_path / "made").glob("*.gz"))) == 2


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    files, _ = _files(tmp_path)
    files.append(b"a\n")
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]
    files.close()
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_a_file_is_its_owners_alone_while_it_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def copy(source: BinaryIO, target: BinaryIO) -> None:
        found.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
        target.write(source.read())

    monkeypatch.setattr("gateway.log_files.shutil.copyfileobj", copy)
    files, _ = _files(tmp_path)
    files.append(b"a\n")
    files.close()
    assert found == [0o600, 0o600]


def test_an_old_file_is_closed_even_if_it_is_small(tmp_path: Path) -> None:
    files, now = _files(tmp_path)
    files.append(b"a\n")
    now[0] += 59
    files.tidy()
    assert not list(tmp_path.glob("*.gz"))
    now[0] += 1
    files.tidy()
    assert len(list(tmp_path.glob("*.gz"))) == 1
    assert _lines(tmp_path) == [b"a"]


def test_the_oldest_files_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl.gz").write_bytes(b"x" * 5000)
    files, now = _files(tmp_path, max_file=1000, max_total=4000)
    for number in range(12):
        files.append(os.urandom(500).hex().encode() + f"{number}\n".encode())
        now[0] += 1
        files.tidy()
    total = sum(path.stat().st_size for path in tmp_path.glob("1970*"))
    assert 1000 < total <= 3000
    assert _lines_of_numbers(tmp_path)[-1] == b"1"
    assert (tmp_path / "mine.jsonl.gz").exists()


def _lines_of_numbers(folder: Path) -> list[bytes]:
    newest = sorted(folder.glob("1970*.jsonl.gz"))
    return [line[-1:] for path in newest for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_a_full_disk_leaves_whole_lines_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = _Disk()
    files, _ = _files(tmp_path, disk=disk)
    files.append(b"first line\n")
    disk.is_full = True
    with pytest.raises(OSError, match="No space left"):
        files.append(b"second line\n")
    assert _lines(tmp_path) == [b"first line"]
    disk.is_full = False
    files.append(b"third line\n")
    assert _lines(tmp_path) == [b"first line", b"third line"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files, _ = _files(tmp_path / "file" / "log")
    with pytest.raises(OSError, match="Not a directory"):
        files.append(b"a\n")


def test_files_of_a_process_that_has_ended_are_taken_over_without_their_last_part(tmp_path: Path) -> None:
    left = tmp_path / "20260101T000000-0123456789ab.open.jsonl"
    left.write_bytes(b"whole\npart of a li")
    files, _ = _files(tmp_path)
    files.tidy()
    assert _lines(tmp_path) == [b"whole"]
    assert not left.exists()


def test_files_of_a_living_process_are_not(tmp_path: Path) -> None:
    first, _ = _files(tmp_path)
    second, _ = _files(tmp_path)
    first.append(b"a\n")
    second.tidy()
    assert len(list(tmp_path.glob("*.open.jsonl"))) == 1
    first.append(b"b\n")
    first.close()
    assert _lines(tmp_path) == [b"a", b"b"]


def test_what_could_not_be_compressed_before_is_compressed_later(tmp_path: Path) -> None:
    (tmp_path / "20260101T000000-0123456789ab.jsonl").write_bytes(b"a\n")
    files, _ = _files(tmp_path)
    files.tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["20260101T000000-0123456789ab.jsonl.gz"]
    assert _lines(tmp_path) == [b"a"]


def test_a_process_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    files, _ = _files(tmp_path)
    files.close()
    assert list(tmp_path.iterdir()) == []
