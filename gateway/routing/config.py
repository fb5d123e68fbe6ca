"""What an operator may write about the choice of a replica."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ReplicaPolicy = Literal["warm", "two_choices", "round_robin"]


class RoutingConfig(BaseModel):
    """How requests find a replica of a model that has several. Models with one replica need none of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: ReplicaPolicy = Field(
        default="warm",
        description="warm: least expected time to first token, by what each replica holds, for local engines (others "
        "get two_choices); two_choices: the shorter queue of two, Serve's own; round_robin: in turn, for comparison",
    )
    num_sampled: int = Field(default=8, ge=1, description="replicas considered, drawn at random, besides holders")
    max_holders: int = Field(default=8, ge=0, description="replicas considered because they hold most of the prompt")
    max_blocks: int = Field(default=2048, ge=1, description="blocks of a prompt that count; the rest is taken as new")
    receipt_age_s: float = Field(
        default=300, gt=0, description="how long a receipt can be asked for where several gateways share a state"
    )
    publish_period_s: float = Field(default=0.05, gt=0, description="pause between an engine's messages on its blocks")
    retry_share: float = Field(default=0.2, ge=0, le=1, description="retries allowed per request, in the long run")
    retry_burst: int = Field(
        default=256, ge=0, description="retries saved up: what a lost replica had not begun moves to others at once"
    )
