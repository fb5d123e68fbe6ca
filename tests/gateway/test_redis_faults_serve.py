"""Redis slow, full, and out of one process's reach while requests flow: all are served, it is seen, and it heals."""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from tests.gateway.replica_fleet import (
    BLOCK,
    ReplicaFleet,
    all_from,
    confirmed,
    random_text,
    streams,
    traffic,
    until,
)

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]
SHARE = "outrider_replica_fallback_share{"
LOCAL = "outrider_replica_local_decisions_total{"
SILENT = "outrider_replica_silent_decisions_total{"


def _is_idle(fleet: ReplicaFleet) -> bool:
    """Nothing in flight, as several questions and with them both gateways see it."""
    return all(fleet.in_flight() == [0, 0] for _ in range(6))


def _sees_it_and_heals(fleet: ReplicaFleet, states: list[str], fault: contextlib.AbstractContextManager[None]) -> None:
    until(lambda: all_from(states, "shared"), 60)
    before = fleet.metric(SHARE)
    with fault:
        until(lambda: all_from(states, "local"))
        until(lambda: fleet.metric(SHARE) > before)
        worst = fleet.metric(SHARE)
    until(lambda: all_from(states, "shared"))
    until(lambda: fleet.metric(SHARE) < worst)


@contextlib.contextmanager
def _slow(fleet: ReplicaFleet) -> Iterator[None]:
    fleet.network.delay_s = 0.5  # twice what a decision of this fleet waits
    try:
        yield
    finally:
        fleet.network.delay_s = 0.0


@contextlib.contextmanager
def _full(fleet: ReplicaFleet) -> Iterator[None]:
    with Redis.from_url(fleet.redis.url) as owner:
        usual = {name: owner.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy")}
        owner.config_set("maxmemory-policy", "noeviction")
        owner.config_set("maxmemory", 1)
        try:
            yield
        finally:
            for name, value in usual.items():  # room first: the usual policy would make some
                owner.config_set(name, value)


def test_redis_becomes_too_slow(fleet: ReplicaFleet) -> None:
    with traffic(fleet) as states:
        _sees_it_and_heals(fleet, states, _slow(fleet))
    until(lambda: _is_idle(fleet))


def test_redis_is_full(fleet: ReplicaFleet) -> None:
    prefix = random_text(20 * BLOCK)
    fleet.complete(prefix)
    until(lambda: confirmed(fleet, prefix) >= 20 * BLOCK)
    with traffic(fleet) as states:
        _sees_it_and_heals(fleet, states, _full(fleet))
    until(lambda: _is_idle(fleet))
    # What engines could not say meanwhile they have said by now.
    until(lambda: confirmed(fleet, prefix) >= 20 * BLOCK)
    until(fleet.is_ready)


def test_one_gateway_of_two_does_not_reach_redis(fleet: ReplicaFleet) -> None:
    until(fleet.is_ready, 60)
    before = fleet.series(LOCAL)
    assert len(before) == 2
    now = dict(before)  # as last seen: scrapes may miss the one that waits for Redis at each decision
    lonely, other = before
    (name,) = re.findall(r'ingress="([^"]+)"', lonely)
    with traffic(fleet) as states, ThreadPoolExecutor(4) as pool:
        until(lambda: all_from(states, "shared"))
        begun = streams(fleet, pool, 4, 200)
        fleet.network.cut_off = frozenset({fleet.pid_of(name, "ingress")})
        try:
            for future in begun:  # counted in Redis, which the lonely one cannot tell of their end
                assert future.result(60)[-1] == "[DONE]"
            until(lambda: {"local", "shared"} == set(states[-12:]))
            until(lambda: now.update(fleet.series(LOCAL)) or now[lonely] >= before[lonely] + 10)
        finally:
            fleet.network.cut_off = frozenset()
        assert now[lonely] - before[lonely] > now[other] - before[other]
        until(lambda: all_from(states, "shared"))
    until(lambda: _is_idle(fleet))


def test_an_engine_does_not_reach_redis(fleet: ReplicaFleet) -> None:
    until(fleet.is_ready, 60)
    name: str = fleet.decision("a")["candidates"][0]["replica"]

    def set_aside() -> str | None:
        found: dict[str, str | None] = {
            each["replica"]: each["set_aside"] for each in fleet.decision("a")["candidates"]
        }
        return found[name]

    with traffic(fleet):
        fleet.network.cut_off = frozenset({fleet.pid_of(name)})
        try:
            until(lambda: set_aside() == "silent")
            until(lambda: any(name in series for series in fleet.series(SILENT)))
        finally:
            fleet.network.cut_off = frozenset()
        until(lambda: set_aside() != "silent")
    until(lambda: _is_idle(fleet))
