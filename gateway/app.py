"""The Serve application: `build_app` turns the arguments of a Serve config into bound deployments."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from gateway.config import GatewayConfig, ModelConfig
from gateway.deployments import EngineServer, HandleEngine
from gateway.errors import ConfigError
from gateway.http import make_app
from gateway.process import begin_to_serve
from gateway.receipt_shelf import Shared
from gateway.routing.placements import placements_of
from gateway.routing.placer import Placer, RoundRobin, ServesChoice
from gateway.routing.retry_budget import RetryBudget

if TYPE_CHECKING:
    from gateway.routing.publishing import Publishing

# /health, /ready and /metrics must get through when every request slot is taken.
_SPARE_INGRESS_REQUESTS = 64
# The ingress writes one line per request itself.
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_SHUTDOWN_POLL_S = 0.2
_RECEIPT_TIMEOUT_S = 1.0
# A gateway that joins running engines learns of them within this time, before it is sent requests.
_STARTUP_WAIT_S = 30.0


class IngressServer:
    """The ingress in one Serve replica: the FastAPI application over one handle per model."""

    def __init__(self, config: GatewayConfig, handles: dict[str, DeploymentHandle[Any]], state_url: str | None) -> None:
        self._config = config
        self._handles = handles
        self._state_url = state_url

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Called by Serve in the replica: an application holds sockets and locks, which do not travel.
        name = serve.get_replica_context().replica_id.unique_id
        engines = {model.name: self._engine(model, name) for model in self._config.models}
        return make_app(
            self._config,
            engines,
            name,
            names_requests=False,
            shared_receipts=self._shared_receipts(),
            startup_wait_s=_STARTUP_WAIT_S,
            on_started=begin_to_serve,
        )

    def _engine(self, model: ModelConfig, name: str) -> HandleEngine:
        handle, routing = self._handles[model.name], self._config.routing
        budget = RetryBudget(routing.retry_share, routing.retry_burst)
        return HandleEngine(handle, placer=self._placer(model, handle, name), budget=budget)

    def _placer(self, model: ModelConfig, handle: DeploymentHandle[Any], name: str) -> Placer:
        placements = placements_of(handle.app_name, handle.deployment_name)
        match policy := self._config.replica_policy(model):
            case "warm":
                from gateway.routing.warm_placer import WarmPlacer  # and with it redis

                assert self._state_url is not None
                config = self._config
                return WarmPlacer(model.name, config.routing, config.state, self._state_url, name, placements)
            case "round_robin":
                return RoundRobin(placements)
            case _:
                return ServesChoice(policy)

    def _shared_receipts(self) -> Shared | None:
        """Where there are several gateways, and a state that they share."""
        config = self._config
        if self._state_url is None or config.ingress.num_replicas == 1:
            return None
        from gateway.shared_receipts import SharedReceipts
        from gateway.state.connection import StateClient

        client = StateClient(config.state, self._state_url, "receipts", timeout_s=_RECEIPT_TIMEOUT_S)
        return SharedReceipts(client, config.routing.receipt_age_s)


def build_app(args: dict[str, object]) -> Application:
    """The application for these arguments, a GatewayConfig as plain data.

    Raises pydantic.ValidationError, and ConfigError without a Redis where one is needed: nothing here lives long enough
    to start one.
    """
    # Serve converts arguments only where the annotation is a class at run time, so it is done here, visibly.
    config = GatewayConfig.model_validate(args)
    return bind_app(config, config.state.url)


def bind_app(config: GatewayConfig, state_url: str | None) -> Application:
    """The application, its shared state at this address. Raises ConfigError if it needs one and there is none."""
    if config.needs_state and state_url is None:
        raise ConfigError(
            "A model with several replicas and routing.policy warm needs a Redis: set state.url, or routing.policy to "
            "two_choices. Only `outrider serve`, on one machine, starts one by itself."
        )
    engines = {model.name: _engine_deployment(model, config, state_url) for model in config.models}
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        ray_actor_options=config.ingress.actor.model_dump(),
        max_ongoing_requests=config.http.max_concurrent_requests + _SPARE_INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
        logging_config=_LOGGING,
    )
    return ingress(serve.ingress()(IngressServer)).bind(config, engines, state_url)


def _engine_deployment(model: ModelConfig, config: GatewayConfig, state_url: str | None) -> Application:
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
        request_router_config=_request_router(config.replica_policy(model)),
    )
    return engine(EngineServer).bind(model.engine, _publishing(model, config, state_url))


def _request_router(policy: str) -> RequestRouterConfig:
    """Serve's own choice of a replica, or ours carried out by it."""
    if policy in ("single", "two_choices"):
        return RequestRouterConfig()
    return RequestRouterConfig(
        request_router_class="gateway.routing.serve_router.WishRouter"  # type: ignore[arg-type]
    )


def _publishing(model: ModelConfig, config: GatewayConfig, state_url: str | None) -> Publishing | None:
    if state_url is None or config.replica_policy(model) != "warm":
        return None
    from gateway.routing.publishing import Publishing

    return Publishing(model.name, config.state, state_url, config.routing.publish_period_s)


def deployment_name(model: str) -> str:
    """A name that Serve's URLs and file names can hold, no two models' the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", model)
    suffix = "" if plain == model else "-" + hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"engine-{plain}{suffix}"
