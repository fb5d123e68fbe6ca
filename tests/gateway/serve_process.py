"""`outrider serve` as a real process, and the processes below it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent


class ServeProcess:
    """Starts the command with these GatewayConfig arguments and waits, if told, until it is ready or has ended."""

    command = ("gateway", "serve")  # a module, and what comes before the configuration's path

    def __init__(self, folder: Path, args: dict[str, object], wait_s: float = 120.0, until_ready: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = folder / "fleet.yaml"
        app = {"name": "outrider", "import_path": "gateway.app:build_app", "args": args}
        config.write_text(yaml.safe_dump({"applications": [app]}))
        self._log = (folder / "output.txt").open("w+")
        command = [sys.executable, "-m", *self.command, str(config), "--port", str(self.port)]
        # A session of its own, as a terminal would give it; nothing below it may outlive it.
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if until_ready:
            try:
                self._wait(wait_s)
            except BaseException:
                self.kill_all()
                raise

    @property
    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _wait(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while "Ready at" not in self.output and self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def descendants(self) -> dict[int, str]:
        """Process id -> command line of everything started below."""
        parents, names = {}, {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit():
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it ended meanwhile
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: names[pid] for pid in found - {self.process.pid}}

    def replicas(self, deployment: str) -> list[int]:
        return sorted(pid for pid, name in self.descendants().items() if f"ServeReplica:outrider:{deployment}" in name)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send the signal, wait for the end, return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill_all(self) -> None:
        """For a test that failed halfway: these processes and no others."""
        pids = [*self.descendants(), self.process.pid] if self.process.poll() is None else []
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._log.close()


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not yet collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
