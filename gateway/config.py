"""GatewayConfig: everything an operator may write, composed of the parts' own classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.config import EngineConfig
from gateway.auto_config import AUTO, AutoConfig
from gateway.request_log_config import RequestLogConfig
from gateway.routing.config import ReplicaPolicy, RoutingConfig
from gateway.state.config import StateConfig

# Serve puts the name into actor names and URLs of its own; a slash allows "organisation/model".
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)]
LogLevel = Literal["debug", "info", "warning", "error"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ActorOptions(_Config):
    """What Ray reserves for one process."""

    num_cpus: float = Field(default=1.0, ge=0.0, description="CPUs Ray reserves; a bookkeeping number, not a limit")
    num_gpus: float = Field(default=0.0, ge=0.0, description="GPUs Ray reserves and makes visible")


class ModelConfig(_Config):
    """One served model: an engine and how many copies of it run."""

    name: ModelName = Field(description="what clients write into `model`")
    engine: EngineConfig
    num_replicas: int = Field(default=1, ge=1, description="engine processes")
    actor: ActorOptions = ActorOptions()
    max_ongoing_requests: int = Field(default=1024, ge=1, description="requests in one replica, waiting ones included")
    max_queued_requests: int = Field(default=1024, ge=0, description="requests waiting for any replica, per ingress")
    health_check_period_s: float = Field(default=5.0, gt=0.0)


class HttpConfig(_Config):
    """Limits at the door."""

    max_body_bytes: int = Field(default=8 * 2**20, ge=1, description="larger bodies get 413")
    body_timeout_s: float = Field(default=30.0, gt=0.0, description="time for a body to arrive; then 408")
    max_n: int = Field(default=16, ge=1, description="choices per prompt")
    max_prompts: int = Field(default=64, ge=1, description="prompts in one /v1/completions request")
    max_concurrent_requests: int = Field(default=1024, ge=1, description="per ingress replica; more get 429")
    request_timeout_s: float = Field(default=600.0, gt=0.0, description="from parsed request to last token; then 504")
    health_timeout_s: float = Field(default=5.0, gt=0.0, description="longest wait of /ready and /metrics for engines")


class IngressConfig(_Config):
    """The processes that speak HTTP."""

    num_replicas: int = Field(default=1, ge=1)
    actor: ActorOptions = ActorOptions()


class GatewayConfig(_Config):
    """The whole application. `args` of a Serve config file."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    http: HttpConfig = HttpConfig()
    ingress: IngressConfig = IngressConfig()
    auto: AutoConfig | None = Field(default=None, description='the models behind `model: "auto"`')
    request_log: RequestLogConfig | None = None
    routing: RoutingConfig = RoutingConfig()
    state: StateConfig = StateConfig()
    drain_timeout_s: float = Field(default=20.0, gt=0.0, description="time for running requests when a replica stops")
    log_level: LogLevel = "info"

    @property
    def needs_state(self) -> bool:
        """Whether gateways and engines are to share what they know."""
        return any(self.replica_policy(model) == "warm" for model in self.models)

    def replica_policy(self, model: ModelConfig) -> ReplicaPolicy | Literal["single"]:
        """How this model's requests find a replica. What a remote engine or an echo holds, nobody knows."""
        if model.num_replicas == 1:
            return "single"
        if self.routing.policy == "warm" and model.engine.kind != "local":
            return "two_choices"
        return self.routing.policy

    @model_validator(mode="after")
    def _names_are_distinct(self) -> GatewayConfig:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"model names must be distinct, but {', '.join(twice)} appears more than once")
        return self

    @model_validator(mode="after")
    def _leases_are_renewed_in_time(self) -> GatewayConfig:
        longest_s = self.state.replica_lease_s / 3
        if self.routing.publish_period_s > longest_s:
            raise ValueError(
                f"routing.publish_period_s is {self.routing.publish_period_s:g} and may be at most a third of "
                f"state.replica_lease_s, {longest_s:g}: replicas would lose their lease between two messages"
            )
        return self

    @model_validator(mode="after")
    def _auto_chooses_among_models(self) -> GatewayConfig:
        if self.auto is None:
            return self
        names = [model.name for model in self.models]
        if AUTO in names:
            raise ValueError(f"no model may be named {AUTO} beside an automatic choice")
        unknown = [candidate.model for candidate in self.auto.candidates if candidate.model not in names]
        if unknown:
            raise ValueError(f"auto.candidates has {', '.join(unknown)}, but the models are {', '.join(names)}")
        if self.auto.shadow is not None and self.request_log is None:
            raise ValueError("auto.shadow only writes to the request log, and there is no request_log")
        return self
