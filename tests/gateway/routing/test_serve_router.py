"""Serve's router does as the gateway wishes, and something sensible where it cannot."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter

from engines.types import GenerateRequest, SamplingParams, TokenPrompt
from gateway.routing.placements import Placements, Wish, placements_of
from gateway.routing.serve_router import WishRouter

ID = DeploymentID(name="engine-m", app_name="routers")
REQUEST = GenerateRequest("r", TokenPrompt((1, 2)), SamplingParams(max_tokens=3))


def _replica(name: str) -> Any:
    return SimpleNamespace(replica_id=ReplicaID(name, deployment_id=ID), max_ongoing_requests=10)


def _pending(*args: object) -> PendingRequest:
    metadata: Any = SimpleNamespace(internal_request_id="i", multiplexed_model_id="")
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


def _names(ranks: list[list[Any]]) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


@pytest.fixture
def placements() -> Placements:
    found = placements_of(ID.app_name, ID.name)
    found.withdraw("r")
    return found


@pytest.fixture
def router() -> WishRouter:
    return WishRouter(deployment_id=ID, handle_source=DeploymentHandleSource.REPLICA)


REPLICAS = [_replica(name) for name in "abcd"]


async def test_the_wished_replica_comes_first_then_two_others(router: WishRouter, placements: Placements) -> None:
    placements.make_wish("r", Wish("c"))
    pending = _pending(REQUEST)
    first, others = _names(await router.choose_replicas(REPLICAS, pending))
    assert first == ["c"]
    assert len(set(others)) == 2
    assert pending.routing_context.should_backoff, "or Serve asks again without a pause while all queues are full"


async def test_a_wished_replica_that_is_gone_is_two_choices(router: WishRouter, placements: Placements) -> None:
    placements.make_wish("r", Wish("z"))
    first, others = _names(await router.choose_replicas(REPLICAS, _pending(REQUEST)))
    assert first == []
    assert len(others) == 2


async def test_those_to_avoid_are_taken_only_when_there_is_no_other(router: WishRouter, placements: Placements) -> None:
    placements.make_wish("r", Wish(None, frozenset("abc")))
    assert _names(await router.choose_replicas(REPLICAS, _pending(REQUEST)))[1] == ["d"]
    assert len(_names(await router.choose_replicas(REPLICAS[:3], _pending(REQUEST)))[1]) == 2


@pytest.mark.parametrize("arguments", [(), ("stats",)])
async def test_calls_that_are_no_requests_go_anywhere(router: WishRouter, arguments: tuple[object, ...]) -> None:
    assert [len(rank) for rank in await router.choose_replicas(REPLICAS, _pending(*arguments))] == [0, 2]
    assert [len(rank) for rank in await router.choose_replicas(REPLICAS[:1], None)] == [0, 1]


async def test_the_gateway_is_told_where_a_request_went(router: WishRouter, placements: Placements) -> None:
    told: list[str] = []
    placements.make_wish("r", Wish("c", on_placed=told.append))
    router.on_request_routed(_pending(REQUEST), ReplicaID("d", deployment_id=ID), object())
    assert told == ["d"]


async def test_the_gateway_is_told_of_replicas_that_come_and_go(
    router: WishRouter, placements: Placements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestRouter, "_probe_queue_lens", lambda *_: asyncio.sleep(0))
    router.update_replicas(REPLICAS[:2])
    assert placements.replicas == ("a", "b")
    router.on_replica_actor_died(REPLICAS[0].replica_id)
    assert (placements.replicas, placements.take_deaths()) == (("b",), ["a"])
    router.update_replicas(REPLICAS[1:])
    assert placements.replicas == ("b", "c", "d")
    await asyncio.sleep(0)
