"""One automatic choice of a model with everything that led to it: for the receipt, and for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.auto.conversations import Key
from gateway.auto_config import AutoConfig
from gateway.fleet import ServedModel
from gateway.receipts import JsonObject
from router_models.policy import Candidate, Decision, Situation
from router_models.prompt import Prompt
from router_models.records import LoggedCandidate, LoggedDecision
from router_models.scorer import Score


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """`score` is None where no router could be asked; `artifact` and `feature_version` are that router's then.

    `turn` is the key under which the conversation is remembered; None for what is no conversation.
    """

    model: ServedModel
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    situation: Situation
    decision: Decision
    mechanism: str
    score: Score | None
    artifact: str | None
    feature_version: int | None
    turn: Key | None

    def receipt(self, config: AutoConfig) -> JsonObject:
        """The receipt's section "model"."""
        decision, situation = self.decision, self.situation
        return {
            "asked": "auto",
            "chosen": decision.model,
            "reason": self.mechanism,
            "propensity": decision.propensity,
            "preferred": decision.preferred,
            "policy": config.policy.version,
            "goal": config.policy.goal.model_dump(),
            "quality": situation.quality,
            "threshold": finite(situation.threshold),
            "floor": config.policy.floors.get(situation.tenant, config.policy.floor),
            "artifact": self.artifact,
            "feature_version": self.feature_version,
            "strong_win_prob": self._strong_win_prob(),
            "novelty": None if self.score is None else self.score.novelty,
            "abstains": situation.abstains,
            "conversation": self._conversation(),
            "candidates": [self._candidate(candidate, config) for candidate in self.candidates],
        }

    def logged(self, policy: str) -> LoggedDecision:
        """The same for the request log."""
        decision, situation = self.decision, self.situation
        return LoggedDecision(
            policy=policy,
            artifact=self.artifact,
            feature_version=self.feature_version,
            candidates=logged_candidates(self.candidates, decision.refused),
            choice=decision.model,
            propensity=decision.propensity,
            explored=self.mechanism == "explored",
            mechanism=self.mechanism,
            score=None if self.score is None else self.score.need,
            novelty=None if self.score is None else self.score.novelty,
            abstains=situation.abstains,
            threshold=finite(situation.threshold),
            quality=situation.quality,
            preferred=decision.preferred,
            current=situation.current,
            turns_below=situation.turns_below,
        )

    def _strong_win_prob(self) -> float | None:
        """How much more often the strongest model is expected to be right than the cheapest, by the router."""
        return None if self.score is None else self.score.need

    def _conversation(self) -> JsonObject | None:
        if self.situation.current is None:
            return None
        warm = {candidate.model: candidate.warm_tokens for candidate in self.candidates}
        return {
            "model": self.situation.current,
            "turns_below": self.situation.turns_below,
            "warm_tokens": warm.get(self.situation.current, 0),
        }

    def _candidate(self, candidate: Candidate, config: AutoConfig) -> JsonObject:
        model, decision = candidate.model, self.decision
        entry = config.candidate(model)
        return {
            "model": model,
            "ability": None if entry is None else entry.ability_name,
            "prob_right": candidate.prob_right,
            "good_enough": decision.good_enough.get(model),
            "bar": finite(decision.bars.get(model)),
            "cost_usd": candidate.cost_usd,
            "probability": decision.probabilities.get(model, 0.0),
            "refused": decision.refused.get(model),
        }


def logged_candidates(candidates: tuple[Candidate, ...], refused: Mapping[str, str]) -> tuple[LoggedCandidate, ...]:
    """Candidates as the log keeps them."""
    return tuple(
        LoggedCandidate(
            model=candidate.model,
            prob_right=candidate.prob_right,
            cost_usd=candidate.cost_usd,
            refused=refused.get(candidate.model),
            warm_tokens=candidate.warm_tokens,
        )
        for candidate in candidates
    )


def finite(value: float | None) -> float | None:
    """JSON has no infinity; "always" and "never" are told by the dial and the reason."""
    return value if value is not None and math.isfinite(value) else None
