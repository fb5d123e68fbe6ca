"""A router asked about a fleet's models, one request at a time: the same when it serves and when a log is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from router_models.errors import UnknownModelError
from router_models.prompt import Prompt

if TYPE_CHECKING:
    from router_models.artifact import Artifact
    from router_models.features import Features
    from router_models.router import Candidate, Router


@dataclass(frozen=True, eq=False, slots=True)
class Score:
    """What a router says of one request. `prob_right` in the order of the models, None where it has no ability.

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


class Scorer:
    """A router with a fleet's models looked up. Immutable, and may be asked from any thread."""

    def __init__(self, artifact: Artifact, names: Sequence[str], source: str) -> None:
        """`names`: the artifact's own of the models, cheapest first. `source`: the one to ask, if it has that one."""
        self.version = artifact.manifest.version
        self.feature_version = artifact.manifest.feature_version
        self._router = artifact.router
        self.known, self._choices = _choices(self._router, names, source)
        self.is_stand_in = not self.known
        self._columns = _columns(names, self.known or (names[-1], names[0]))

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
