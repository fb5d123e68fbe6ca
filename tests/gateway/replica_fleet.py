"""Two gateways, two replicas of a tiny model, a real Redis and the network before it, all as processes."""

import contextlib
import random
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from gateway.state.embedded import EmbeddedServer
from tests.gateway.fakes import events
from tests.gateway.redis_proxy import RedisProxy
from tests.gateway.serve_process import ServeProcess

LITTLE = {"num_cpus": 0.01}
ENGINE = "engine-tiny"
BLOCK = 16
COMPLETIONS = "/v1/completions"


class ReplicaFleet(ServeProcess):
    """The gateway under test, its Redis, and the questions that tests ask."""

    command = ("tests.gateway.scalable_serve",)

    def __init__(self, folder: Path, model: Path, redis_folder: Path) -> None:
        self._redis_folder = redis_folder
        self.redis = EmbeddedServer(64, redis_folder)
        self.network = RedisProxy(self.redis.url, redis_folder / "network.sock")
        engine = {"kind": "local", "model": str(model), "device": "cpu", "kv_cache_bytes": 2**24, "num_threads": 1}
        # Short steps, so that a long prompt is computed in many.
        engine |= {"max_num_seqs": 16, "max_num_batched_tokens": 16, "drafter": {"kind": "none"}, "costs_file": ""}
        tiny = {"name": "tiny", "engine": engine, "num_replicas": 2, "actor": LITTLE, "health_check_period_s": 1.0}
        # Patient with a busy machine; leases that end within a test.
        state = {"url": self.network.url, "timeout_s": 0.25, "retry_s": 0.05, "max_retry_s": 0.2, "load_lease_s": 3.0}
        state |= {"replica_lease_s": 3.0}
        ingress = {"num_replicas": 2, "actor": LITTLE}
        args = {"models": [tiny], "ingress": ingress, "state": state, "drain_timeout_s": 5.0}
        super().__init__(folder, args, wait_s=240.0)
        assert self.process.poll() is None, self.output
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.http.close()
        self.kill_all()
        self.network.stop()
        self.redis.stop()

    def start_redis(self) -> None:
        self.redis = EmbeddedServer(64, self._redis_folder)

    def complete(self, prompt: str, **fields: object) -> dict[str, Any]:
        answer = self.http.post(COMPLETIONS, json=body(prompt, **fields))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def decision(self, prompt: str) -> dict[str, Any]:
        answer = self.http.post("/v1/route", json={"model": "tiny", "prompt": prompt})
        assert answer.status_code == 200, answer.text
        entry: dict[str, Any] = answer.json()["replica"]["prompts"][0]
        return entry

    def is_ready(self) -> bool:
        """Whether both gateways, as far as a few questions meet them, know both replicas."""
        answers = [self.http.post("/v1/route", json={"model": "tiny", "prompt": "a"}) for _ in range(8)]
        if any(answer.status_code != 200 for answer in answers):
            return False
        entries = [answer.json()["replica"]["prompts"][0] for answer in answers]
        return all(len(entry["candidates"]) == 2 and entry["state"] == "shared" for entry in entries)

    def in_flight(self) -> list[int]:
        return [candidate["in_flight"] or 0 for candidate in self.decision(random_text(5))["candidates"]]

    def metric(self, name: str) -> float:
        """Summed over the gateways, as far as a few scrapes meet them."""
        return sum(self.series(name).values())

    def series(self, name: str) -> dict[str, float]:
        """The values of what begins so, by series."""
        found: dict[str, float] = {}
        for _ in range(12):
            for line in self.http.get("/metrics").text.splitlines():
                if line.startswith(name):
                    series, value = line.rsplit(" ", 1)
                    found[series] = float(value)
        return found

    def pid_of(self, replica: str, deployment: str = ENGINE) -> int:
        """The process that writes that replica's log."""
        for pid in self.replicas(deployment):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if link.is_symlink() and replica in str(link.readlink()):
                    return pid
        raise AssertionError(f"no process of replica {replica}")

    def scale(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{ENGINE} {count}\n")
        self.process.stdin.flush()


def random_text(length: int) -> str:
    return "".join(random.choices(string.ascii_lowercase, k=length))


def body(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True, "receipt": True} | fields


def entry_of(answer: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = answer["receipt"]["replica"]["prompts"][0]
    return entry


def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def _stream(fleet: ReplicaFleet, prompt: str, max_tokens: int, began: threading.Event) -> list[str]:
    """The events of one stream; `began` is set with the first bytes."""
    with httpx.stream(
        "POST", fleet.url + COMPLETIONS, json=body(prompt, max_tokens=max_tokens, stream=True), timeout=60
    ) as answer:
        said = ""
        for part in answer.iter_text():
            began.set()
            said += part
    return events(said)


def streams(fleet: ReplicaFleet, pool: ThreadPoolExecutor, count: int, max_tokens: int) -> list[Future[list[str]]]:
    """That many streams, all of which have begun."""
    began = [threading.Event() for _ in range(count)]
    futures = [pool.submit(_stream, fleet, random_text(40), max_tokens, event) for event in began]
    assert all(event.wait(30) for event in began)
    return futures


def confirmed(fleet: ReplicaFleet, prompt: str) -> int:
    """Tokens of the prompt that some engine says it holds."""
    return max(candidate["confirmed_tokens"] for candidate in fleet.decision(prompt)["candidates"])


@contextlib.contextmanager
def traffic(fleet: ReplicaFleet) -> Iterator[list[str]]:
    """Requests without a pause; where the knowledge of each decision came from, so far. Each must be answered."""
    states: list[str] = []
    failures: list[object] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():  # a connection each, so that both gateways are met
            try:
                answer = httpx.post(fleet.url + COMPLETIONS, json=body(random_text(40)), timeout=60)
            except httpx.HTTPError as error:
                failures.append(error)
                continue
            if answer.status_code == 200:
                states.append(entry_of(answer.json())["state"])
            else:
                failures.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield states
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def all_from(states: list[str], state: str, count: int = 12) -> bool:
    """Whether the last decisions were."""
    return len(states) >= count and set(states[-count:]) == {state}
