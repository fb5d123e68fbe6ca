"""Logged decisions with another router's scores in place of those that were logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from router_models.data import digest
from router_models.drift import Drift
from router_models.logs import prompt_of
from router_models.records import LoggedDecision, RequestRecord
from router_models.scorer import Scorer

if TYPE_CHECKING:
    from router_models.artifact import Artifact


class Rescorer:
    """Scores requests in the order of their times, as a gateway with this router would have: drift included.

    `num_seen`: those of them that the router was trained on. There it errs less than it will.
    """

    def __init__(self, artifact: Artifact, abilities: Mapping[str, str]) -> None:
        """`abilities`: the artifact's names of served models; a model that is not among them has its own name."""
        self._artifact = artifact
        self._abilities = abilities
        self._scorers: dict[tuple[tuple[str, ...], str], Scorer] = {}
        self._drift = Drift()
        self._seen = set(artifact.router.seen.tolist())
        self.num_seen = 0

    @property
    def is_stand_in(self) -> bool:
        """Whether there were fleets of which the artifact does not know both the cheapest and the strongest model."""
        return any(scorer.is_stand_in for scorer in self._scorers.values())

    def decision(self, record: RequestRecord) -> LoggedDecision | None:
        """None where the log has kept neither the request's text nor features of this version, or no decision."""
        prompt, logged = prompt_of(record), record.decision
        if prompt is None or logged is None:
            return None
        self.num_seen += digest(prompt) in self._seen
        scorer = self._scorer(tuple(candidate.model for candidate in logged.candidates), record.source)
        score = scorer.score(prompt).adapted(self._drift.share)
        self._drift.observe(score.novelty)
        candidates = tuple(
            candidate.model_copy(update={"prob_right": prob_right})
            for candidate, prob_right in zip(logged.candidates, score.prob_right, strict=True)
        )
        found = {"candidates": candidates, "score": score.need, "novelty": score.novelty, "abstains": score.abstains}
        return logged.model_copy(update=found | {"artifact": scorer.version, "feature_version": scorer.feature_version})

    def _scorer(self, models: tuple[str, ...], source: str) -> Scorer:
        key = models, source
        if key not in self._scorers:
            names = [self._abilities.get(model, model) for model in models]
            self._scorers[key] = Scorer(self._artifact, names, source)
        return self._scorers[key]
