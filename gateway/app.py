"""The Serve application: `build_app` turns the arguments of a Serve config into bound deployments."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from gateway.config import GatewayConfig, ModelConfig
from gateway.deployments import EngineServer, HandleEngine
from gateway.http import make_app

# /health, /ready and /metrics must get through when every request slot is taken.
_SPARE_INGRESS_REQUESTS = 64
# The ingress writes one line per request itself.
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_SHUTDOWN_POLL_S = 0.2


class IngressServer:
    """The ingress in one Serve replica: the FastAPI application over one handle per model."""

    def __init__(self, config: GatewayConfig, handles: dict[str, DeploymentHandle[Any]]) -> None:
        self._config = config
        self._handles = handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Called by Serve in the replica: an application holds sockets and locks, which do not travel.
        engines = {name: HandleEngine(handle) for name, handle in self._handles.items()}
        name = serve.get_replica_context().replica_id.unique_id
        return make_app(self._config, engines, name, names_requests=False)


def build_app(args: dict[str, object]) -> Application:
    """The application for these arguments, a GatewayConfig as plain data. Raises pydantic.ValidationError."""
    # Serve converts arguments only where the annotation is a class at run time, so it is done here, visibly.
    config = GatewayConfig.model_validate(args)
    engines = {model.name: _engine_deployment(model, config) for model in config.models}
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        ray_actor_options=config.ingress.actor.model_dump(),
        max_ongoing_requests=config.http.max_concurrent_requests + _SPARE_INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
        logging_config=_LOGGING,
    )
    return ingress(serve.ingress()(IngressServer)).bind(config, engines)


def _engine_deployment(model: ModelConfig, config: GatewayConfig) -> Application:
    engine = serve.deployment(
        name=deployment_name(model.name),
        num_replicas=model.num_replicas,
        ray_actor_options=model.actor.model_dump(),
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        health_check_period_s=model.health_check_period_s,
        # A model that cannot be loaded will not load the second time.
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
        logging_config=_LOGGING,
    )
    return engine(EngineServer).bind(model.engine)


def deployment_name(model: str) -> str:
    """A name that Serve's URLs and file names can hold, no two models' the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    suffix = "" if plain == model else "-" + hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"engine-{plain}{suffix}"
