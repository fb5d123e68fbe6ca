"""Recorded decisions made again by another policy, and what its answers would have been worth.

Every row is taken as it was: the candidates and costs that were logged, the model that the conversation had then, and
the probabilities too, unless another router scores the requests. What the other policy would itself have led to,
conversations that took another course for example, is not in a log. Rows without an outcome count for decisions and
costs, rows with one for quality as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from router_models.errors import DataError, PolicyError
from router_models.logs import Log
from router_models.off_policy import Array, Estimate, Logged, doubly_robust, ips, predict_results
from router_models.online_quantile import OnlineQuantile
from router_models.policy import USUAL_QUALITY, Candidate, Decision, Situation, decide
from router_models.policy_config import BoundGoal, PolicyConfig, ShareGoal
from router_models.records import LoggedDecision, RequestRecord
from router_models.rescore import Rescorer

# What the policy in the log has refused is refused here too where it was the fleet's doing and not the policy's.
_FLEETS_DOING = ("down", "context window")


@dataclass(frozen=True, slots=True)
class Row:
    """One logged decision and the one made in its place. `result` of the model that answered, None where unknown."""

    logged: LoggedDecision
    replayed: Decision
    result: float | None

    def cost_usd(self, model: str) -> float:
        return next(candidate.cost_usd for candidate in self.logged.candidates if candidate.model == model)


@dataclass(frozen=True, slots=True)
class Worth:
    """Mean quality of a policy's answers, and of its decisions the cost and the share of the strongest model."""

    cost_usd: float
    strong_share: float
    ips: Estimate | None
    doubly_robust: Estimate | None


@dataclass(frozen=True, slots=True)
class Replay:
    """`changes`: how many rows went from which model to which. `refusal` tells why there are no estimates."""

    num_rows: int
    num_outcomes: int
    num_left_out: int
    confidence: float
    logged_quality: Estimate | None
    logged: Worth
    replayed: Worth
    changes: dict[tuple[str, str], int]
    refusal: str | None

    def document(self) -> dict[str, object]:
        """As plain data for JSON."""
        document = asdict(self)
        document["changes"] = [{"from": old, "to": new, "rows": n} for (old, new), n in sorted(self.changes.items())]
        return document


def replay(log: Log, policy: PolicyConfig, confidence: float = 0.9, rescorer: Rescorer | None = None) -> Replay:
    """Decide every automatic choice of the log again. Raises DataError where there is none, or the goal needs more.

    `rescorer`: whose scores the decisions go by; those that the log has if None.
    """
    if isinstance(policy.goal, BoundGoal):
        raise DataError("a goal of kind bound needs prompts with both models' results; a log has one result for each")
    decided = [
        (record, log.results.get(key, {})) for key, record in log.requests.items() if record.decision is not None
    ]
    rows, num_left_out = _rows(sorted(decided, key=lambda pair: pair[0].time), policy, rescorer)
    if not rows:
        raise DataError("the log has no automatic choice that this policy can be asked about")
    judged = [row for row in rows if row.result is not None]
    (quality, *estimates), refusal = _estimates(judged, confidence)
    return Replay(
        num_rows=len(rows),
        num_outcomes=len(judged),
        num_left_out=num_left_out,
        confidence=confidence,
        logged_quality=quality,
        logged=_worth(rows, [{row.logged.choice: 1.0} for row in rows]),
        replayed=_worth(rows, [row.replayed.probabilities for row in rows], *estimates),
        changes=dict(Counter((row.logged.preferred or row.logged.choice, row.replayed.preferred) for row in rows)),
        refusal=refusal,
    )


def _rows(
    decided: Iterable[tuple[RequestRecord, Mapping[str, float]]], policy: PolicyConfig, rescorer: Rescorer | None
) -> tuple[list[Row], int]:
    """Of records with their results by model, in the order given; those that cannot be decided again are counted."""
    quantile = OnlineQuantile(policy.goal.strong_share) if isinstance(policy.goal, ShareGoal) else None
    rows, num_left_out = [], 0
    for record, results in decided:
        logged = record.decision if rescorer is None else rescorer.decision(record)
        if logged is None:
            num_left_out += 1
            continue
        candidates = _candidates(logged)
        threshold = quantile.threshold() if quantile is not None else None
        try:
            decision = decide(policy, candidates, _situation(record, logged, threshold), draw=0.0)
        except PolicyError:
            num_left_out += 1
            continue
        if quantile is not None and logged.score is not None and logged.quality == USUAL_QUALITY:
            quantile.observe(
                logged.score if decision.gap is None else decision.gap, decision.preferred == candidates[-1].model
            )
        served = record.use is not None and record.use.model == logged.choice
        result = results.get(logged.choice) if served else None
        rows.append(Row(logged, decision, result))
    return rows, num_left_out


def _candidates(logged: LoggedDecision) -> list[Candidate]:
    return [
        Candidate(
            model=candidate.model,
            cost_usd=candidate.cost_usd,
            prob_right=candidate.prob_right,
            is_up=candidate.refused not in _FLEETS_DOING,
            is_saturated=candidate.refused == "saturated",
            warm_tokens=candidate.warm_tokens,
        )
        for candidate in logged.candidates
    ]


def _situation(record: RequestRecord, logged: LoggedDecision, threshold: float | None) -> Situation:
    return Situation(
        num_tokens=0,
        tenant=record.tenant or "",
        quality=logged.quality,
        need=logged.score,
        threshold=threshold,
        abstains=logged.abstains,
        current=logged.current,
        turns_below=logged.turns_below,
    )


def _worth(
    rows: Sequence[Row],
    probabilities: Sequence[Mapping[str, float]],
    by_ips: Estimate | None = None,
    by_both: Estimate | None = None,
) -> Worth:
    pairs = list(zip(rows, probabilities, strict=True))
    costs = [sum(p * row.cost_usd(model) for model, p in found.items()) for row, found in pairs]
    strong = [found.get(row.logged.candidates[-1].model, 0.0) for row, found in pairs]
    return Worth(float(np.mean(costs)), float(np.mean(strong)), by_ips, by_both)


def _estimates(rows: Sequence[Row], confidence: float) -> tuple[list[Estimate | None], str | None]:
    """Quality of the log, and of the other policy by IPS and doubly robust; or why nothing can be said."""
    if len(rows) < 2:
        return [None] * 3, f"{'one' if rows else 'no'} request of the log has an outcome"
    models = sorted({candidate.model for row in rows for candidate in row.logged.candidates})
    action = np.array([models.index(row.logged.choice) for row in rows], dtype=np.intp)
    result = np.array([row.result for row in rows], dtype=np.float64)
    log = Logged(action, np.array([row.logged.propensity for row in rows]), result)
    target = np.array([[row.replayed.probabilities.get(model, 0.0) for model in models] for row in rows])
    itself = np.zeros_like(target)
    itself[np.arange(len(rows)), action] = log.propensity
    quality = ips(log, itself, confidence)
    try:
        predicted = predict_results(log, _features(rows, models), len(models))
        return [quality, ips(log, target, confidence), doubly_robust(log, target, predicted, confidence)], None
    except DataError as error:
        return [quality, None, None], error.message


def _features(rows: Sequence[Row], models: Sequence[str]) -> Array:
    """What the log says of each request, float64 [num_rows, models + 2]: probabilities, need and novelty."""
    table = np.full((len(rows), len(models) + 2), 0.5)
    for place, row in enumerate(rows):
        for candidate in row.logged.candidates:
            if candidate.prob_right is not None:
                table[place, models.index(candidate.model)] = candidate.prob_right
        table[place, -2] = row.logged.score or 0.0
        table[place, -1] = 1.0 if row.logged.novelty is None else row.logged.novelty
    return table
