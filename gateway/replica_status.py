"""Whether a deployment has replicas, as Serve's controller knows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

_STATUS_AGE_S = 1.0


class ReplicaStatus:
    """Many requests may wait for one answer, and Serve's one controller is asked once for all."""

    def __init__(self, handle: DeploymentHandle[Any], ask: Callable[[str, str], bool] | None = None) -> None:
        self._handle = handle
        self._ask = ask or _has_replica
        self._asking = asyncio.Lock()
        self._asked_s = float("-inf")
        self._exist = True

    async def exist(self) -> bool:
        """The answer may be a second old."""
        async with self._asking:
            if time.monotonic() - self._asked_s > _STATUS_AGE_S:
                self._exist = await asyncio.to_thread(self._ask, self._handle.app_name, self._handle.deployment_name)
                self._asked_s = time.monotonic()
            return self._exist


def _has_replica(app: str, deployment: str) -> bool:
    """Whether Serve knows of a replica that may hold a request: a stopping one may, a starting one cannot."""
    try:
        application = serve.status().applications.get(app)
    except RayError:
        return True  # the controller is being restarted; the replicas go on without it
    found = application.deployments.get(deployment) if application is not None else None
    return found is not None and any(n for state, n in found.replica_states.items() if state != "STARTING")
