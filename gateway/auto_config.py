"""What an operator may write about `model: "auto"`: the models it chooses among, and by which router and policy."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router_models.policy_config import BoundGoal, PolicyConfig

AUTO = "auto"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AutoCandidate(_Config):
    """One model that may be chosen, and what its tokens cost: a provider's prices, or what the machines cost."""

    model: str = Field(min_length=1, description="name of a served model")
    ability: str | None = Field(default=None, description="the artifact's name of it; its own name if not given")
    usd_per_million_input_tokens: float = Field(ge=0.0)
    usd_per_million_output_tokens: float = Field(ge=0.0)

    @property
    def ability_name(self) -> str:
        return self.ability or self.model

    def cost_usd(self, num_input_tokens: int, num_output_tokens: int) -> float:
        """What so many tokens cost, in USD."""
        input_usd = self.usd_per_million_input_tokens * num_input_tokens
        return (input_usd + self.usd_per_million_output_tokens * num_output_tokens) / 1e6


class AutoConfig(_Config):
    """The learned choice of a model."""

    candidates: tuple[AutoCandidate, ...] = Field(min_length=2, description="cheapest first; the last is the strongest")
    policy: PolicyConfig = PolicyConfig()
    artifact: str = Field(default="default", min_length=1, description="the router: a folder, or default")
    artifact_folder: str | None = Field(
        default=None, min_length=1, description="where `outrider promote` puts routers; one promoted there is served"
    )
    source: str = Field(
        default="log", min_length=1, description="the artifact's source to ask, where it has it; else all that can tell"
    )
    shadow: str | None = Field(default=None, min_length=1, description="a second router, which only writes to the log")
    calibration: str | None = Field(
        default=None, min_length=1, description="tables or request logs that a goal of kind bound is calibrated on"
    )
    expected_output_tokens: int = Field(default=256, ge=1, description="of a request that sets no limit, for its cost")
    decision_timeout_s: float = Field(default=0.25, gt=0.0, description="after that the strongest model answers")
    watch_period_s: float = Field(default=1.0, gt=0.0, description="how often artifact_folder is looked at")
    health_period_s: float = Field(default=1.0, gt=0.0, description="how often candidates are asked how they are")
    saturated_waiting: int = Field(default=8, ge=1, description="waiting requests per replica: the model is saturated")
    max_conversations: int = Field(default=10_000, ge=1, description="remembered per ingress process")
    conversation_ttl_s: float = Field(
        default=3600.0, gt=0.0, description="later a conversation's prefix counts as cold"
    )

    @property
    def strongest(self) -> AutoCandidate:
        return self.candidates[-1]

    def candidate(self, model: str) -> AutoCandidate | None:
        """The candidate of that served model, if it is one."""
        return next((candidate for candidate in self.candidates if candidate.model == model), None)

    @model_validator(mode="after")
    def _candidates_can_be_told_apart(self) -> Self:
        for field in ("model", "ability_name"):
            names = [getattr(candidate, field) for candidate in self.candidates]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{', '.join(twice)} is named by more than one of the candidates")
        return self

    @model_validator(mode="after")
    def _candidates_become_dearer(self) -> Self:
        for cheap, dear in zip(self.candidates, self.candidates[1:], strict=False):
            lower, higher = _prices(cheap), _prices(dear)
            if lower == higher or any(low > high for low, high in zip(lower, higher, strict=True)):
                raise ValueError(f"the cheapest comes first, but {dear.model} is not dearer than {cheap.model}")
        return self

    @model_validator(mode="after")
    def _floors_are_candidates(self) -> Self:
        floors = [*self.policy.floors.values(), *([self.policy.floor] if self.policy.floor else [])]
        for floor in floors:
            if self.candidate(floor) is None:
                raise ValueError(f"the floor {floor} is not one of the candidates")
        return self

    @model_validator(mode="after")
    def _a_bound_is_calibrated(self) -> Self:
        is_bound = isinstance(self.policy.goal, BoundGoal)
        if is_bound and self.calibration is None:
            raise ValueError(
                "a goal of kind bound needs calibration: prompts with results of the first and last candidate"
            )
        if self.calibration is not None and not is_bound:
            raise ValueError(f"calibration has no effect on a goal of kind {self.policy.goal.kind}")
        return self


def _prices(candidate: AutoCandidate) -> tuple[float, float]:
    return candidate.usd_per_million_input_tokens, candidate.usd_per_million_output_tokens
