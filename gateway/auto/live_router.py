"""A router as it serves: an artifact, asked about this fleet's candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gateway.auto_config import AutoConfig
from router_models.errors import UnknownModelError
from router_models.policy_config import BoundGoal
from router_models.prompt import Prompt

if TYPE_CHECKING:
    from router_models.artifact import Artifact
    from router_models.features import Features
    from router_models.router import Candidate, Router


@dataclass(frozen=True, eq=False, slots=True)
class Score:
    """What a router says of one request. `prob_right` in the order of the candidates, None where it has no ability.

    `need`: how much better the strongest is expected to be than the cheapest; `unknown_need`: the same if the request
    were of a domain that nothing is known of.
    """

    prob_right: tuple[float | None, ...]
    need: float
    unknown_need: float
    novelty: float
    abstains: bool
    features: Features

    def adapted(self, share: float) -> Score:
        """The same within traffic that is to that share unknown: only the need changes."""
        return replace(self, need=(1 - share) * self.need + share * self.unknown_need)


class LiveRouter:
    """A router with its candidates looked up. Immutable, and may be asked from any thread."""

    def __init__(self, artifact: Artifact, config: AutoConfig) -> None:
        self.version = artifact.manifest.version
        self.feature_version = artifact.manifest.feature_version
        self._router = artifact.router
        names = [candidate.ability_name for candidate in config.candidates]
        self.known, self._choices = _choices(self._router, names, config.source)
        self.is_stand_in = not self.known
        self._columns = _columns(names, self.known or (names[-1], names[0]))
        self.safe_threshold = self._safe_threshold(config)

    def score(self, prompt: Prompt) -> Score:
        """Features and probabilities of one request; some milliseconds."""
        return self.score_features(self._router.extract([prompt]))

    def score_again(self, prompt: Prompt, features: Features) -> Score:
        """The same where another router has extracted features already."""
        if self._router.embedding is not None and features.embedding is None:
            return self.score(prompt)
        return self.score_features(features)

    def score_features(self, features: Features) -> Score:
        """Probabilities of one request whose features, all that this router reads, are known."""
        found = self._router.predict(features, self._choices)
        row = found.prob_right[0]
        return Score(
            prob_right=tuple(None if column is None else float(row[column]) for column in self._columns),
            need=float(found.need[0]),
            unknown_need=float(found.need[0] if found.unknown_need is None else found.unknown_need[0]),
            novelty=float(found.novelty[0]),
            abstains=bool(found.abstains[0]),
            features=features,
        )

    def usual_needs(self) -> list[float]:
        """The need of the strongest model over the cheapest on prompts like those it was trained on."""
        gaps = []
        for models in self._choices:
            difficulty = self._router.experts[models[0].expert].reference.astype(np.float64)
            gaps.append(models[0].ability.prob_right(difficulty) - models[-1].ability.prob_right(difficulty))
        return [float(gap) for gap in np.concatenate(gaps)]

    def _safe_threshold(self, config: AutoConfig) -> float | None:
        """For a goal of kind bound; None for others."""
        goal = config.policy.goal
        if not isinstance(goal, BoundGoal) or config.calibration is None:
            return None
        from router_models import logs
        from router_models.safe_threshold import safe_threshold

        groups = logs.read(Path(config.calibration).expanduser())
        strong, weak = config.candidates[-1].ability_name, config.candidates[0].ability_name
        found = safe_threshold(
            self._router, self._choices, groups, strong, weak, goal.max_quality_loss, goal.confidence
        )
        return found.threshold


def load_router(folder: Path, config: AutoConfig) -> LiveRouter:
    """The router of an artifact, warmed up. Takes seconds. Raises ArtifactError, DataError of the calibration data."""
    from router_models import artifact as artifacts  # scikit-learn takes a second to import

    router = LiveRouter(artifacts.load(folder), config)
    router.score(Prompt.from_text("Which model answers this?"))
    return router


def _choices(
    router: Router, names: Sequence[str], source: str
) -> tuple[tuple[str, ...], Sequence[Sequence[Candidate]]]:
    """The names that the artifact knows together, strongest first, and their abilities.

    If it does not know all of them, then the strongest and the cheapest; if not even these, no name, and abilities of a
    typical strong and a typical weak model.
    """
    for known in (tuple(reversed(names)), (names[-1], names[0])):
        try:
            return known, router.candidates(known, source)
        except UnknownModelError:
            continue
    return (), router.stand_ins()


def _columns(names: Sequence[str], known: Sequence[str]) -> tuple[int | None, ...]:
    return tuple(known.index(name) if name in known else None for name in names)
