"""Two real replicas, two gateways, a real Redis, and what happens to requests when one of them is killed."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from tests.gateway.replica_fleet import (
    BLOCK,
    COMPLETIONS,
    ReplicaFleet,
    all_from,
    body,
    confirmed,
    entry_of,
    random_text,
    streams,
    traffic,
    until,
)
from tests.gateway.serve_process import alive

pytestmark = [pytest.mark.serve, pytest.mark.timeout(420)]


def test_a_prefix_is_served_where_it_is_warm(fleet: ReplicaFleet) -> None:
    prefixes = [random_text(20 * BLOCK) for _ in range(4)]
    homes = [entry_of(fleet.complete(prefix + random_text(8)))["chosen"] for prefix in prefixes]
    assert len(set(homes)) == 2, "new prefixes spread"
    until(lambda: all(confirmed(fleet, prefix) for prefix in prefixes), 5)
    for prefix, home in zip(prefixes, homes, strict=True):
        answer = fleet.complete(prefix + random_text(8))
        entry = entry_of(answer)
        assert (entry["state"], entry["chosen"], entry["reason"]) == ("shared", home, "warm")
        assert entry["cached_tokens_expected"] == entry["cached_tokens_found"] == 20 * BLOCK
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20 * BLOCK
    assert fleet.metric("outrider_replica_cached_tokens_found_total") >= 4 * 20 * BLOCK
    assert fleet.metric("outrider_replica_cached_tokens_error_total") == 0


def test_another_tenants_prefix_is_cold(fleet: ReplicaFleet) -> None:
    prefix = random_text(10 * BLOCK)
    fleet.complete(prefix, cache_salt="one")
    until(lambda: entry_of(fleet.complete(prefix + "a", cache_salt="one"))["cached_tokens_expected"] > 0, 5)
    stranger = entry_of(fleet.complete(prefix + "b", cache_salt="two"))
    assert (stranger["cached_tokens_expected"], stranger["cached_tokens_found"]) == (0, 0)


def test_a_receipt_is_found_by_its_tenant_at_every_gateway(fleet: ReplicaFleet) -> None:
    answer = fleet.http.post(COMPLETIONS, json=body("hello", cache_salt="Tenänt"))
    name = answer.headers["x-request-id"]
    mine = {"x-outrider-cache-salt": "Ten%C3%A4nt"}
    until(lambda: fleet.http.get(f"/v1/receipts/{name}", headers=mine).status_code == 200, 5)
    for _ in range(8):
        found = httpx.get(f"{fleet.url}/v1/receipts/{name}", headers=mine)  # a connection of its own
        assert found.json()["replica"] == answer.json()["receipt"]["replica"]
        assert httpx.get(f"{fleet.url}/v1/receipts/{name}").status_code == 404


def test_a_dry_run_from_the_command_line_computes_nothing(fleet: ReplicaFleet) -> None:
    before = fleet.metric("outrider_engine_num_prompt_tokens")
    result = CliRunner().invoke(app, ["route", "hello there", "--text", "--url", fleet.url, "--json"])
    assert result.exit_code == 0, result.output
    candidates = json.loads(result.stdout)["replica"]["prompts"][0]["candidates"]
    assert len(candidates) == 2
    assert sum(candidate["chosen"] for candidate in candidates) == 1
    assert fleet.metric("outrider_engine_num_prompt_tokens") == before


def test_redis_killed_and_restarted_empty(fleet: ReplicaFleet) -> None:
    prefix = random_text(20 * BLOCK)
    home = entry_of(fleet.complete(prefix))["chosen"]
    with traffic(fleet) as states:
        until(lambda: all_from(states, "shared"))
        os.kill(fleet.redis.pid, signal.SIGKILL)
        fleet.redis.stop()
        began_s = time.monotonic()
        entries = [entry_of(fleet.complete(prefix + random_text(4))) for _ in range(6)]
        assert time.monotonic() - began_s < 20
        assert {entry["state"] for entry in entries} == {"local"}
        assert fleet.metric("outrider_replica_fallback_share") > 0
        fleet.start_redis()
        until(lambda: all_from(states, "shared"), 10)
        # Nobody told the engines: they notice, and say again what they hold.
        until(lambda: confirmed(fleet, prefix) >= 20 * BLOCK, 15)
    until(lambda: len(fleet.decision(prefix)["candidates"]) == 2, 10)
    again = entry_of(fleet.complete(prefix + random_text(4)))
    assert again["reason"] == "warm"
    assert again["cached_tokens_found"] == 20 * BLOCK
    assert home in {candidate["replica"] for candidate in again["candidates"]}
    until(lambda: fleet.in_flight() == [0, 0], 10)


def test_a_gateway_killed_with_requests_in_flight(fleet: ReplicaFleet) -> None:
    gateways = fleet.replicas("ingress")
    assert len(gateways) == 2
    with ThreadPoolExecutor(8) as pool:
        futures = streams(fleet, pool, 8, 1200)
        until(lambda: sum(fleet.in_flight()) == 8, 10)
        os.kill(gateways[0], signal.SIGKILL)
        for future in futures:  # of the dead gateway they break off, as connections do
            error = future.exception(60)
            assert error is None or isinstance(error, httpx.HTTPError)
    # Its leases end by themselves, and so do its requests in the engines.
    until(lambda: fleet.in_flight() == [0, 0], 15)
    until(lambda: fleet.metric("outrider_engine_num_running") == 0, 15)
    until(lambda: len(fleet.replicas("ingress")) == 2, 60)
    until(fleet.is_ready, 120)


def test_a_replica_killed_in_mid_stream_and_in_mid_prefill(fleet: ReplicaFleet) -> None:
    until(fleet.is_ready, 120)
    with ThreadPoolExecutor(16) as pool:
        running = streams(fleet, pool, 6, 1500)
        prefills = [pool.submit(fleet.complete, random_text(2000)) for _ in range(6)]
        until(lambda: sum(fleet.in_flight()) >= 10, 20)
        victim = max(fleet.decision("a")["candidates"], key=lambda candidate: candidate["in_flight"])
        os.kill(fleet.pid_of(victim["replica"]), signal.SIGKILL)
        # Not begun, so nothing is lost: the other replica computes them.
        answers = [entry_of(future.result(90)) for future in prefills]
        bodies = [future.result(90) for future in running]
    assert any(victim["replica"] in entry.get("lost", ()) for entry in answers)
    assert all(entry["chosen"] != victim["replica"] for entry in answers)
    broken = [body for body in bodies if "error" in json.loads(body[-2])]
    assert all(body[-1] == "[DONE]" for body in bodies)
    assert broken
    assert {json.loads(body[-2])["error"]["code"] for body in broken} == {"engine_unavailable"}
    assert fleet.metric("outrider_replica_retries_total{") > 0
    until(lambda: fleet.in_flight() == [0, 0], 60)


def test_scaling_under_load_loses_no_request(fleet: ReplicaFleet) -> None:
    until(fleet.is_ready, 120)
    stop, statuses, served = threading.Event(), [], set()

    def ask() -> None:
        with httpx.Client(base_url=fleet.url, timeout=60) as http:
            while not stop.is_set():
                answer = http.post(COMPLETIONS, json=body(random_text(60), max_tokens=20))
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    served.add(entry_of(answer.json())["chosen"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        fleet.scale(4)
        until(lambda: len(fleet.decision("a")["candidates"]) == 4, 120)
        until(lambda: len(served) >= 4, 60)
        fleet.scale(1)
        until(lambda: len(fleet.decision("a")["candidates"]) == 1, 60)
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert set(statuses) == {200}
    until(lambda: fleet.in_flight() == [0], 10)


def test_it_stops_whole(fleet: ReplicaFleet) -> None:
    below = fleet.descendants()
    assert fleet.process.stdin is not None
    fleet.process.stdin.close()
    fleet.process.wait(60)
    until(lambda: not [pid for pid in below if alive(pid)], 20)
    assert alive(fleet.redis.pid), "the operator's own Redis is not ours to stop"
