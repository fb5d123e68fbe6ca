"""Which model answers: the cheapest one that is good enough, within what operator, tenant and request allow.

P(good enough) of a model is 1 - (P(dearest right) - P(it right)), the dearest being that of the allowed candidates:
what is lost is only what the better model would have got, so it is above 1 for a model that is expected to be better.
Everything here is arithmetic on a prediction; nothing that a prompt says can lift a floor or a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from router_models.errors import PolicyError
from router_models.policy_config import Goal, PolicyConfig, PriceGoal, ShareGoal


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as the gateway knows it now. `prob_right` None where the router has no ability for it.

    `num_tokens` of the request where this model's tokenizer counts others than the situation says.
    """

    model: str
    cost_usd: float
    prob_right: float | None
    max_context: int | None = None
    is_up: bool = True
    is_saturated: bool = False
    warm_tokens: int = 0
    num_tokens: int | None = None


USUAL_QUALITY = 0.5  # the dial of a request that leaves the choice to the operator


@dataclass(frozen=True, slots=True)
class Situation:
    """What is decided about. `quality` is the request's dial: 0 cheapest, 1 best, 0.5 as the operator set it.

    At its ends the caller has decided: no conversation is held there and nothing is explored. `need` is the router's,
    of the dearest over the cheapest of all candidates, where it is not just the difference of their probabilities.
    `threshold` is the gap at or above which the dearest model is taken, from an online quantile or a bound; a goal with
    a price does not need it. `current` is the model that this conversation has, `turns_below` how many turns in a row
    have wanted a lesser one.
    """

    num_tokens: int
    tenant: str = ""
    quality: float = USUAL_QUALITY
    need: float | None = None
    threshold: float | None = None
    abstains: bool = False
    current: str | None = None
    turns_below: int = 0


Mechanism = Literal["only", "model", "abstained", "floor", "held", "stepped_down", "explored"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice and why. `good_enough` of every candidate; `refused` gives the reason for those that are not allowed.

    `preferred` is what the policy takes where nothing is explored. `probabilities` of choosing each allowed model,
    exploration included: what a later replay needs. `gap` is what was compared with the threshold: the least that one
    of the lesser models leaves to the dearest; None where there is only one.
    """

    model: str
    preferred: str
    mechanism: Mechanism
    propensity: float
    probabilities: Mapping[str, float]
    good_enough: Mapping[str, float]
    bars: Mapping[str, float]
    refused: Mapping[str, str]
    gap: float | None = None
    turns_below: int = 0


def decide(policy: PolicyConfig, candidates: Sequence[Candidate], situation: Situation, draw: float) -> Decision:
    """Choose a model; `draw` in [0, 1) is the only chance in it. Raises PolicyError where no candidate is allowed."""
    allowed, refused = _allowed(policy, candidates, situation)
    if not allowed:
        raise PolicyError("; ".join(f"{model}: {reason}" for model, reason in refused.items()) or "no candidates")
    good, bars = _good_enough(allowed, candidates, situation.need), _bars(policy.goal, allowed, situation)
    if situation.abstains and isinstance(policy.goal, ShareGoal):
        good = {model: value if model == allowed[-1].model else value - _FIRST_IN_LINE for model, value in good.items()}
    gap = min((1 - good[candidate.model] for candidate in allowed[:-1]), default=None)
    chosen, mechanism = _choose(policy.goal, allowed, good, bars, situation)
    chosen, mechanism, turns_below = _hold(policy, allowed, good, situation, chosen, mechanism)
    if chosen.is_saturated and situation.tenant in policy.step_down_tenants:
        lesser = [candidate for candidate in allowed[: allowed.index(chosen)] if not candidate.is_saturated]
        if lesser:
            refused[chosen.model] = "saturated"
            allowed, chosen, mechanism = lesser, lesser[-1], "stepped_down"
    share = policy.exploration if 0.0 < situation.quality < 1.0 else 0.0
    probabilities = _explored(share, allowed, chosen)
    drawn = _draw(probabilities, chosen.model, draw)
    if drawn != chosen.model:
        mechanism = "explored"
    return Decision(
        drawn, chosen.model, mechanism, probabilities[drawn], probabilities, good, bars, refused, gap, turns_below
    )


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
# A request that the router does not trust itself with comes before all others for the share that was promised, which is
# kept all the same: traffic that is new through and through must not turn a promise of 20 % into 100 %.
_FIRST_IN_LINE = 2.0


def _allowed(
    policy: PolicyConfig, candidates: Sequence[Candidate], situation: Situation
) -> tuple[list[Candidate], dict[str, str]]:
    refused = {}
    floor = _floor_cost(policy, candidates, situation.tenant)
    for candidate in candidates:
        num_tokens = situation.num_tokens if candidate.num_tokens is None else candidate.num_tokens
        if not candidate.is_up:
            refused[candidate.model] = "down"
        elif candidate.max_context is not None and num_tokens > candidate.max_context:
            refused[candidate.model] = "context window"
        elif candidate.cost_usd < floor:
            refused[candidate.model] = "below the tenant's floor"
    allowed = [candidate for candidate in candidates if candidate.model not in refused]
    return sorted(allowed, key=lambda candidate: (candidate.cost_usd, candidate.model)), refused


def _floor_cost(policy: PolicyConfig, candidates: Sequence[Candidate], tenant: str) -> float:
    floor = policy.floors.get(tenant, policy.floor)
    if floor is None:
        return 0.0
    costs = {candidate.model: candidate.cost_usd for candidate in candidates}
    if floor not in costs:
        raise PolicyError(f"the floor of this tenant, {floor}, is not a candidate")
    return costs[floor]


def _good_enough(allowed: Sequence[Candidate], candidates: Sequence[Candidate], need: float | None) -> dict[str, float]:
    """1 - gap of each allowed model to the dearest of them, all moved as `need` moves that of the extremes.

    0 where an ability is unknown.
    """
    move = 0.0 if need is None else need - _widest_gap(candidates, need)
    dearest = allowed[-1].prob_right
    found = {allowed[-1].model: 1.0}
    for candidate in allowed[:-1]:
        if dearest is None or candidate.prob_right is None:
            found[candidate.model] = 0.0
        else:
            found[candidate.model] = 1 - (dearest - candidate.prob_right) - move
    return found


def _widest_gap(candidates: Sequence[Candidate], default: float) -> float:
    """P(dearest right) - P(cheapest right) of all candidates, which is what the router's need is about."""
    ordered = sorted(candidates, key=lambda candidate: (candidate.cost_usd, candidate.model))
    cheapest, dearest = ordered[0].prob_right, ordered[-1].prob_right
    return default if cheapest is None or dearest is None else dearest - cheapest


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
    goal: Goal,
    allowed: Sequence[Candidate],
    good: Mapping[str, float],
    bars: Mapping[str, float],
    situation: Situation,
) -> tuple[Candidate, Mechanism]:
    if len(allowed) == 1:
        return allowed[0], "only"
    chosen = next(c for c in allowed if c is allowed[-1] or good[c.model] > bars[c.model])
    if not situation.abstains or situation.quality <= 0.0:
        return chosen, "model"
    if isinstance(goal, ShareGoal) and chosen is not allowed[-1]:
        return chosen, "model"
    return allowed[-1], "abstained"


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
    if current is None or current is chosen or not 0.0 < situation.quality < 1.0:
        return chosen, mechanism, 0
    if chosen.cost_usd > current.cost_usd:
        gain = good[chosen.model] - good[current.model]
        is_worth_it = gain >= _least_gain(policy, current) or mechanism == "abstained"
        return (chosen, mechanism, 0) if is_worth_it else (current, "held", 0)
    turns = situation.turns_below + 1
    saved = current.cost_usd - chosen.cost_usd - policy.warm_token_usd * current.warm_tokens
    if turns < policy.step_down_patience or saved <= 0:
        return current, "held", turns
    return chosen, mechanism, 0


def _least_gain(policy: PolicyConfig, current: Candidate) -> float:
    """The gain in P(right) that pays for leaving `current`; with a price goal, its warm prefix at that price too."""
    if not isinstance(policy.goal, PriceGoal):
        return policy.hold_gain
    return max(policy.hold_gain, policy.warm_token_usd * current.warm_tokens / policy.goal.regret_usd)


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
