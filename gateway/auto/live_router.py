"""A router as it serves: an artifact, asked about this fleet's candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gateway.auto_config import AutoConfig
from router_models.policy_config import BoundGoal
from router_models.prompt import Prompt
from router_models.scorer import Scorer

if TYPE_CHECKING:
    from router_models.artifact import Artifact


class LiveRouter(Scorer):
    """A scorer of the configured candidates, with the threshold of a goal that is calibrated beforehand."""

    def __init__(self, artifact: Artifact, config: AutoConfig) -> None:
        super().__init__(artifact, [candidate.ability_name for candidate in config.candidates], config.source)
        self.safe_threshold = self._safe_threshold(config)

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
