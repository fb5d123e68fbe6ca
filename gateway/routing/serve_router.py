"""Serve's side of a decision: a request goes where the gateway wished, or by two choices where that cannot be.

Serve names this class in a deployment's configuration and pickles it by value, so what it shares with the gateway is
imported from another module.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from engines.types import GenerateRequest
from gateway.routing.placements import Wish, placements_of


class WishRouter(RequestRouter):
    """Never waits for anything but Serve's own question whether a replica's queue has room."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._placements = placements_of(self._deployment_id.app_name, self._deployment_id.name)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The wished replica first, then two others to choose from by their queues."""
        if pending_request is not None:
            # When all queues are full, ask again after a pause and not at once.
            pending_request.routing_context.should_backoff = True
        wish = self._wish_of(pending_request) or Wish()
        wished = [each for each in candidate_replicas if each.replica_id.unique_id == wish.replica]
        others = [each for each in candidate_replicas if each.replica_id.unique_id not in wish.avoid]
        others = others or candidate_replicas
        return [wished, random.sample(others, min(2, len(others)))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        wish = self._wish_of(pending_request)
        if wish is not None and wish.on_placed is not None:
            wish.on_placed(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._placements.replicas = tuple(each.replica_id.unique_id for each in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._placements.died(replica_id.unique_id)

    def _wish_of(self, pending_request: PendingRequest | None) -> Wish | None:
        arguments = () if pending_request is None else pending_request.args
        if not arguments or not isinstance(arguments[0], GenerateRequest):
            return None
        return self._placements.wish_of(arguments[0].request_id)
