"""The server that the wheel ships starts, keeps to its socket, and ends with its owner."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.state.embedded import EmbeddedServer
from gateway.state.errors import StateStartError

OWNER = """
import time
from gateway.state.embedded import EmbeddedServer
server = EmbeddedServer(16)
print(server.pid, flush=True)
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_answers_on_its_socket_and_leaves_nothing_behind() -> None:
    with EmbeddedServer(max_memory_mb=16) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert path.parent.stat().st_mode & 0o077 == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"CONFIG GET maxmemory\r\nCONFIG GET save\r\nCONFIG GET hz\r\n")
            time.sleep(0.2)
            answer = client.recv(4096)
    assert b"16777216" in answer
    assert not path.parent.exists()
    assert not _alive(server.pid)
    server.stop()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_it_ends_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner, owner.stdout:
        pid = int(owner.stdout.readline())
        assert _alive(pid)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateStartError, match="too long"):
        EmbeddedServer(directory=tmp_path / ("x" * 120))


def test_a_server_that_cannot_start_says_why(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(StateStartError):
        EmbeddedServer(directory=tmp_path_factory.mktemp("e") / "missing")
