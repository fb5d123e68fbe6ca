"""Which model answers: the cheapest one that is good enough, within what operator, tenant and request allow.

P(good enough) of a model is 1 - (P(dearest right) - P(it right)), the dearest being that of the allowed candidates:
what is lost is only what the better model would have got, so it is above 1 for a model that is expected to be better.
Everything here is arithmetic on a prediction; nothing that a prompt says can lift a floor or a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from router_models.errors import PolicyError

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

    name: str = Field(default="default", min_length=1, description="stamped on every decision")
    goal: Goal = ShareGoal(strong_share=0.3)
    floors: dict[str, str] = Field(default_factory=dict, description="tenant: the least model it may be given")
    exploration: float = Field(default=0.01, ge=0.0, le=0.5, description="share of choices drawn at random")
    hold_gain: float = Field(default=0.05, ge=0.0, description="gain in P(right) below which a conversation stays")
    step_down_patience: int = Field(default=2, ge=1, description="turns in a row that must want a lesser model")
    warm_token_usd: float = Field(default=0.0, ge=0.0, description="price of computing one cached token again")
    step_down_tenants: tuple[str, ...] = Field(default=(), description="take a lesser model rather than a refusal")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as the gateway knows it now. `prob_right` None where the router has no ability for it."""

    model: str
    cost_usd: float
    prob_right: float | None
    max_context: int | None = None
    is_up: bool = True
    is_saturated: bool = False
    warm_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Situation:
    """What is decided about. `quality` is the request's dial: 0 cheapest, 1 best, 0.5 as the operator set it.

    `need` is the router's, of the dearest over the cheapest model, where it is not just the difference of their
    probabilities. `threshold` is the gap at or above which the dearest model is taken, from an online quantile or a
    bound; goals with a price do not need it. `current` is the model that this conversation has, `turns_below` how many
    turns in a row have wanted a lesser one.
    """

    num_tokens: int
    tenant: str = ""
    quality: float = 0.5
    need: float | None = None
    threshold: float | None = None
    abstains: bool = False
    current: str | None = None
    turns_below: int = 0


Mechanism = Literal["only", "model", "abstained", "floor", "held", "stepped_down", "explored"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice and why. `good_enough` of every candidate; `refused` gives the reason for those that are not allowed.

    `probabilities` of choosing each allowed model, exploration included: what a later replay needs.
    """

    model: str
    mechanism: Mechanism
    propensity: float
    probabilities: Mapping[str, float]
    good_enough: Mapping[str, float]
    bars: Mapping[str, float]
    refused: Mapping[str, str]
    turns_below: int = 0


def decide(policy: PolicyConfig, candidates: Sequence[Candidate], situation: Situation, draw: float) -> Decision:
    """Choose a model; `draw` in [0, 1) is the only chance in it. Raises PolicyError where no candidate is allowed."""
    allowed, refused = _allowed(policy, candidates, situation)
    if not allowed:
        raise PolicyError("; ".join(f"{model}: {reason}" for model, reason in refused.items()) or "no candidates")
    good, bars = _good_enough(allowed, situation.need), _bars(policy.goal, allowed, situation)
    chosen, mechanism = _choose(allowed, good, bars, situation)
    chosen, mechanism, turns_below = _hold(policy, allowed, good, situation, chosen, mechanism)
    if any(reason == "saturated" for reason in refused.values()) and mechanism != "only":
        mechanism = "stepped_down"
    probabilities = _explored(policy.exploration, allowed, chosen)
    drawn = _draw(probabilities, chosen.model, draw)
    if drawn != chosen.model:
        mechanism = "explored"
    return Decision(drawn, mechanism, probabilities[drawn], probabilities, good, bars, refused, turns_below)


def threshold_at(prior_threshold: float, quality: float) -> float:
    """The gap's threshold under a request's dial: unchanged at 0.5, never strong at 0, always strong at 1.

    Monotone in `quality` for every score, so turning the dial up never gives a lesser model.
    """
    if quality <= 0.0:
        return float("inf")
    if quality >= 1.0:
        return float("-inf")
    return float(prior_threshold - _DIAL_SPREAD * np.log(quality / (1 - quality)))


# Gaps of usual prompts lie within about two tenths of each other.
_DIAL_SPREAD = 0.08


def _allowed(
    policy: PolicyConfig, candidates: Sequence[Candidate], situation: Situation
) -> tuple[list[Candidate], dict[str, str]]:
    refused = {}
    floor = _floor_cost(policy, candidates, situation.tenant)
    may_step_down = situation.tenant in policy.step_down_tenants
    for candidate in candidates:
        if not candidate.is_up:
            refused[candidate.model] = "down"
        elif candidate.max_context is not None and situation.num_tokens > candidate.max_context:
            refused[candidate.model] = "context window"
        elif candidate.cost_usd < floor:
            refused[candidate.model] = "below the tenant's floor"
        elif candidate.is_saturated and may_step_down:
            refused[candidate.model] = "saturated"
    allowed = [candidate for candidate in candidates if candidate.model not in refused]
    return sorted(allowed, key=lambda candidate: (candidate.cost_usd, candidate.model)), refused


def _floor_cost(policy: PolicyConfig, candidates: Sequence[Candidate], tenant: str) -> float:
    floor = policy.floors.get(tenant)
    if floor is None:
        return 0.0
    costs = {candidate.model: candidate.cost_usd for candidate in candidates}
    if floor not in costs:
        raise PolicyError(f"the floor of this tenant, {floor}, is not a candidate")
    return costs[floor]


def _good_enough(allowed: Sequence[Candidate], need: float | None) -> dict[str, float]:
    """1 - gap of each candidate to the dearest, all moved as `need` moves that of the cheapest; 0 where unknown."""
    dearest, cheapest = allowed[-1].prob_right, allowed[0].prob_right
    found = {allowed[-1].model: 1.0}
    for candidate in allowed[:-1]:
        if dearest is None or candidate.prob_right is None:
            found[candidate.model] = 0.0
            continue
        move = 0.0 if need is None or cheapest is None else need - (dearest - cheapest)
        found[candidate.model] = 1 - (dearest - candidate.prob_right) - move
    return found


def _bars(goal: Goal, allowed: Sequence[Candidate], situation: Situation) -> dict[str, float]:
    """The least P(good enough) of each model. The dearest one needs none."""
    dearest = allowed[-1]
    found = {}
    for candidate in allowed:
        if isinstance(goal, PriceGoal):
            gap = (dearest.cost_usd - candidate.cost_usd) / goal.regret_usd
        elif situation.threshold is None:
            raise PolicyError(f"a goal of kind {goal.kind} needs a threshold")
        else:
            gap = situation.threshold
        found[candidate.model] = 0.0 if candidate is dearest else 1 - threshold_at(gap, situation.quality)
    return found


def _choose(
    allowed: Sequence[Candidate], good: Mapping[str, float], bars: Mapping[str, float], situation: Situation
) -> tuple[Candidate, Mechanism]:
    if len(allowed) == 1:
        return allowed[0], "only"
    if situation.abstains and situation.quality > 0.0:
        return allowed[-1], "abstained"
    return next(c for c in allowed if c is allowed[-1] or good[c.model] > bars[c.model]), "model"


def _hold(
    policy: PolicyConfig,
    allowed: Sequence[Candidate],
    good: Mapping[str, float],
    situation: Situation,
    chosen: Candidate,
    mechanism: Mechanism,
) -> tuple[Candidate, Mechanism, int]:
    """Stay with the conversation's model unless changing pays: up at once for a gain, down only after some turns."""
    current = next((c for c in allowed if c.model == situation.current), None)
    if current is None or current is chosen:
        return chosen, mechanism, 0
    if chosen.cost_usd > current.cost_usd:
        is_worth_it = good[chosen.model] - good[current.model] >= policy.hold_gain or mechanism == "abstained"
        return (chosen, mechanism, 0) if is_worth_it else (current, "held", 0)
    turns = situation.turns_below + 1
    saved = current.cost_usd - chosen.cost_usd - policy.warm_token_usd * current.warm_tokens
    if turns < policy.step_down_patience or saved <= 0:
        return current, "held", turns
    return chosen, mechanism, 0


def _explored(share: float, allowed: Sequence[Candidate], chosen: Candidate) -> dict[str, float]:
    each = share / len(allowed)
    return {c.model: each + (1 - share if c is chosen else 0.0) for c in allowed}


def _draw(probabilities: Mapping[str, float], chosen: str, draw: float) -> str:
    """The chosen model first, so that small draws follow the policy; the rest in order of the candidates."""
    edge = probabilities[chosen]
    for model, probability in probabilities.items():
        if draw < edge:
            return chosen
        if model != chosen:
            edge += probability
            if draw < edge:
                return model
    return chosen
