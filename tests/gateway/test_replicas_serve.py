"""Two real replicas, two gateways, a real Redis, and what happens to requests when one of them is killed."""

import json
import os
import random
import signal
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.state.embedded import EmbeddedServer
from tests.engines.tiny_models import SUPPORTED, save
from tests.engines.tokenizers import character_tokenizer
from tests.gateway.fakes import events
from tests.gateway.serve_process import ServeProcess, alive

pytestmark = [pytest.mark.serve, pytest.mark.timeout(420)]
LITTLE = {"num_cpus": 0.01}
ENGINE = "engine-tiny"
BLOCK = 16
COMPLETIONS = "/v1/completions"


class Fleet(ServeProcess):
    """The gateway under test, its Redis, and the questions that tests ask."""

    command = ("tests.gateway.scalable_serve",)

    def __init__(self, folder: Path, model: Path, redis_folder: Path) -> None:
        self._redis_folder = redis_folder
        self.redis = EmbeddedServer(64, redis_folder)
        engine = {"kind": "local", "model": str(model), "device": "cpu", "kv_cache_bytes": 2**24, "num_threads": 1}
        # Short steps, so that a long prompt is computed in many.
        engine |= {"max_num_seqs": 16, "max_num_batched_tokens": 16, "drafter": {"kind": "none"}, "costs_file": ""}
        tiny = {"name": "tiny", "engine": engine, "num_replicas": 2, "actor": LITTLE, "health_check_period_s": 1.0}
        # Patient with a busy machine; leases that end within a test.
        state = {"url": self.redis.url, "timeout_s": 0.25, "retry_s": 0.05, "max_retry_s": 0.2, "load_lease_s": 3.0}
        state |= {"replica_lease_s": 3.0}
        ingress = {"num_replicas": 2, "actor": LITTLE}
        args = {"models": [tiny], "ingress": ingress, "state": state, "drain_timeout_s": 5.0}
        super().__init__(folder, args, wait_s=240.0)
        assert self.process.poll() is None, self.output
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def start_redis(self) -> None:
        self.redis = EmbeddedServer(64, self._redis_folder)

    def complete(self, prompt: str, **fields: object) -> dict[str, Any]:
        answer = self.http.post(COMPLETIONS, json=_body(prompt, **fields))
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
        return [candidate["in_flight"] or 0 for candidate in self.decision(_text(5))["candidates"]]

    def metric(self, name: str) -> float:
        """Summed over the gateways, as far as a few scrapes meet them."""
        found: dict[str, float] = {}
        for _ in range(12):
            for line in self.http.get("/metrics").text.splitlines():
                if line.startswith(name):
                    series, value = line.rsplit(" ", 1)
                    found[series] = float(value)
        return sum(found.values())

    def pid_of(self, replica: str) -> int:
        """The process that writes that replica's log."""
        for pid in self.replicas(ENGINE):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if link.is_symlink() and replica in str(link.readlink()):
                    return pid
        raise AssertionError(f"no process of replica {replica}")

    def scale(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{ENGINE} {count}\n")
        self.process.stdin.flush()


def _text(length: int) -> str:
    return "".join(random.choices(string.ascii_lowercase, k=length))


def _body(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 2, "ignore_eos": True, "receipt": True} | fields


def _entry(answer: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = answer["receipt"]["replica"]["prompts"][0]
    return entry


def _until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def _stream(fleet: Fleet, prompt: str, max_tokens: int, began: threading.Event) -> list[str]:
    """The events of one stream; `began` is set with the first bytes."""
    with httpx.stream(
        "POST", fleet.url + COMPLETIONS, json=_body(prompt, max_tokens=max_tokens, stream=True), timeout=60
    ) as answer:
        body = ""
        for part in answer.iter_text():
            began.set()
            body += part
    return events(body)


def _streams(fleet: Fleet, pool: ThreadPoolExecutor, count: int, max_tokens: int) -> list[Future[list[str]]]:
    """That many streams, all of which have begun."""
    began = [threading.Event() for _ in range(count)]
    futures = [pool.submit(_stream, fleet, _text(40), max_tokens, event) for event in began]
    assert all(event.wait(30) for event in began)
    return futures


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    config = SUPPORTED["llama"]()
    config.max_position_embeddings = 4096
    model = save(config, tmp_path_factory.mktemp("tiny"))
    character_tokenizer().save_pretrained(model)
    running = Fleet(tmp_path_factory.mktemp("serve"), model, tmp_path_factory.mktemp("r"))
    try:
        _until(running.is_ready, 120)
        yield running
    finally:
        running.http.close()
        running.kill_all()
        running.redis.stop()


def test_a_prefix_is_served_where_it_is_warm(fleet: Fleet) -> None:
    prefixes = [_text(20 * BLOCK) for _ in range(4)]
    homes = [_entry(fleet.complete(prefix + _text(8)))["chosen"] for prefix in prefixes]
    assert len(set(homes)) == 2, "new prefixes spread"
    _until(lambda: all(_confirmed(fleet, prefix) for prefix in prefixes), 5)
    for prefix, home in zip(prefixes, homes, strict=True):
        answer = fleet.complete(prefix + _text(8))
        entry = _entry(answer)
        assert (entry["state"], entry["chosen"], entry["reason"]) == ("shared", home, "warm")
        assert entry["cached_tokens_expected"] == entry["cached_tokens_found"] == 20 * BLOCK
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 * BLOCK
    assert fleet.metric("outrider_replica_cached_tokens_found_total") >= 4 * 20 * BLOCK
    assert fleet.metric("outrider_replica_cached_tokens_error_total") == 0


def _confirmed(fleet: Fleet, prompt: str) -> int:
    """Tokens of the prompt that some engine says it holds."""
    return max(candidate["confirmed_tokens"] for candidate in fleet.decision(prompt)["candidates"])


def test_another_tenants_prefix_is_cold(fleet: Fleet) -> None:
    prefix = _text(10 * BLOCK)
    fleet.complete(prefix, cache_salt="one")
    _until(lambda: _entry(fleet.complete(prefix + "a", cache_salt="one"))["cached_tokens_expected"] > 0, 5)
    stranger = _entry(fleet.complete(prefix + "b", cache_salt="two"))
    assert (stranger["cached_tokens_expected"], stranger["cached_tokens_found"]) == (0, 0)


def test_a_receipt_is_found_by_its_tenant_at_every_gateway(fleet: Fleet) -> None:
    answer = fleet.http.post(COMPLETIONS, json=_body("hello", cache_salt="Tenänt"))
    name = answer.headers["x-request-id"]
    mine = {"x-outrider-cache-salt": "Ten%C3%A4nt"}
    _until(lambda: fleet.http.get(f"/v1/receipts/{name}", headers=mine).status_code == 200, 5)
    for _ in range(8):
        found = httpx.get(f"{fleet.url}/v1/receipts/{name}", headers=mine)  # a connection of its own
        assert found.json()["replica"] == answer.json()["receipt"]["replica"]
        assert httpx.get(f"{fleet.url}/v1/receipts/{name}").status_code == 404


def test_a_dry_run_from_the_command_line_computes_nothing(fleet: Fleet) -> None:
    before = fleet.metric("outrider_engine_num_prompt_tokens")
    result = CliRunner().invoke(app, ["route", "hello there", "--text", "--url", fleet.url, "--json"])
    assert result.exit_code == 0, result.output
    candidates = json.loads(result.stdout)["replica"]["prompts"][0]["candidates"]
    assert len(candidates) == 2
    assert sum(candidate["chosen"] for candidate in candidates) == 1
    assert fleet.metric("outrider_engine_num_prompt_tokens") == before


def test_redis_killed_and_restarted_empty(fleet: Fleet) -> None:
    prefix = _text(20 * BLOCK)
    home = _entry(fleet.complete(prefix))["chosen"]
    os.kill(fleet.redis.pid, signal.SIGKILL)
    fleet.redis.stop()
    began_s = time.monotonic()
    entries = [_entry(fleet.complete(prefix + _text(4))) for _ in range(6)]
    assert time.monotonic() - began_s < 20
    assert {entry["state"] for entry in entries} == {"local"}
    assert fleet.metric("outrider_replica_fallback_share") > 0
    fleet.start_redis()
    _until(lambda: fleet.decision(prefix)["state"] == "shared", 10)
    # Nobody told the engines: they notice, and say again what they hold.
    _until(lambda: _confirmed(fleet, prefix) >= 20 * BLOCK, 15)
    _until(lambda: len(fleet.decision(prefix)["candidates"]) == 2, 10)
    again = _entry(fleet.complete(prefix + _text(4)))
    assert again["reason"] == "warm"
    assert again["cached_tokens_found"] == 20 * BLOCK
    assert home in {candidate["replica"] for candidate in again["candidates"]}
    _until(lambda: fleet.in_flight() == [0, 0], 10)


def test_a_gateway_killed_with_requests_in_flight(fleet: Fleet) -> None:
    gateways = fleet.replicas("ingress")
    assert len(gateways) == 2
    with ThreadPoolExecutor(8) as pool:
        futures = _streams(fleet, pool, 8, 1200)
        _until(lambda: sum(fleet.in_flight()) == 8, 10)
        os.kill(gateways[0], signal.SIGKILL)
        for future in futures:  # of the dead gateway they break off, as connections do
            error = future.exception(60)
            assert error is None or isinstance(error, httpx.HTTPError)
    # Its leases end by themselves, and so do its requests in the engines.
    _until(lambda: fleet.in_flight() == [0, 0], 15)
    _until(lambda: fleet.metric("outrider_engine_num_running") == 0, 15)
    _until(lambda: len(fleet.replicas("ingress")) == 2, 60)
    _until(fleet.is_ready, 120)


def test_a_replica_killed_in_mid_stream_and_in_mid_prefill(fleet: Fleet) -> None:
    _until(fleet.is_ready, 120)
    with ThreadPoolExecutor(16) as pool:
        streams = _streams(fleet, pool, 6, 1500)
        prefills = [pool.submit(fleet.complete, _text(2000)) for _ in range(6)]
        _until(lambda: sum(fleet.in_flight()) >= 10, 20)
        victim = max(fleet.decision("a")["candidates"], key=lambda candidate: candidate["in_flight"])
        os.kill(fleet.pid_of(victim["replica"]), signal.SIGKILL)
        # Not begun, so nothing is lost: the other replica computes them.
        answers = [_entry(future.result(90)) for future in prefills]
        bodies = [future.result(90) for future in streams]
    assert any(victim["replica"] in entry.get("lost", ()) for entry in answers)
    assert all(entry["chosen"] != victim["replica"] for entry in answers)
    broken = [body for body in bodies if "error" in json.loads(body[-2])]
    assert all(body[-1] == "[DONE]" for body in bodies)
    assert broken
    assert {json.loads(body[-2])["error"]["code"] for body in broken} == {"engine_unavailable"}
    assert fleet.metric("outrider_replica_retries_total{") > 0
    _until(lambda: fleet.in_flight() == [0, 0], 60)


def test_scaling_under_load_loses_no_request(fleet: Fleet) -> None:
    _until(fleet.is_ready, 120)
    stop, statuses, served = threading.Event(), [], set()

    def ask() -> None:
        with httpx.Client(base_url=fleet.url, timeout=60) as http:
            while not stop.is_set():
                answer = http.post(COMPLETIONS, json=_body(_text(60), max_tokens=20))
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    served.add(_entry(answer.json())["chosen"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        fleet.scale(4)
        _until(lambda: len(fleet.decision("a")["candidates"]) == 4, 120)
        _until(lambda: len(served) >= 4, 60)
        fleet.scale(1)
        _until(lambda: len(fleet.decision("a")["candidates"]) == 1, 60)
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert set(statuses) == {200}
    _until(lambda: fleet.in_flight() == [0], 10)


def test_it_stops_whole(fleet: Fleet) -> None:
    below = fleet.descendants()
    assert fleet.process.stdin is not None
    fleet.process.stdin.close()
    fleet.process.wait(60)
    _until(lambda: not [pid for pid in below if alive(pid)], 20)
    assert alive(fleet.redis.pid), "the operator's own Redis is not ours to stop"
