"""What an operator may write about how models are chosen: goals, floors, exploration."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PriceGoal(_Config):
    """A wrong answer that a better model would have got right costs as much as `regret_usd`."""

    kind: Literal["price"] = "price"
    regret_usd: float = Field(gt=0.0, description="worth of one such answer, USD")


class ShareGoal(_Config):
    """This share of requests goes to the strongest model, held online whatever the traffic is."""

    kind: Literal["share"] = "share"
    strong_share: Probability


class BoundGoal(_Config):
    """Quality stays within a bound of the strongest model's; `bound.threshold_for_loss` finds the threshold."""

    kind: Literal["bound"] = "bound"
    max_quality_loss: Probability = Field(description="mean, in results between 0 and 1")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)


Goal = Annotated[PriceGoal | ShareGoal | BoundGoal, Field(discriminator="kind")]


class PolicyConfig(_Config):
    """How models are chosen. The dial of a request moves the goal, never the floor."""

    name: str = Field(default="default", min_length=1, description="stamped on every decision, with a hash of the rest")
    goal: Goal = ShareGoal(strong_share=0.3)
    floor: str | None = Field(default=None, description="the least model that a tenant not among `floors` may be given")
    floors: dict[str, str] = Field(default_factory=dict, description="tenant: the least model it may be given")
    exploration: float = Field(default=0.01, ge=0.0, le=0.5, description="share of choices drawn at random")
    hold_gain: float = Field(default=0.05, ge=0.0, description="gain in P(right) below which a conversation stays")
    step_down_patience: int = Field(default=2, ge=1, description="turns in a row that must want a lesser model")
    warm_token_usd: float = Field(default=0.0, ge=0.0, description="price of computing one cached token again")
    step_down_tenants: tuple[str, ...] = Field(default=(), description="take a lesser model rather than a refusal")

    @property
    def version(self) -> str:
        """The name, and a hash of all that it stands for: what decisions are stamped with."""
        return f"{self.name}@{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]}"
