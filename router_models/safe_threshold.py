"""A threshold that bounds what is lost, from labelled prompts that the router has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_models.bound import threshold_for_loss
from router_models.data import Group, prompt_digests
from router_models.errors import DataError
from router_models.metrics import Pair
from router_models.router import Candidate, Router


@dataclass(frozen=True, slots=True)
class SafeThreshold:
    """The need at or above which the strong model answers; -inf, which is always, where too little is known."""

    threshold: float
    num_prompts: int


def safe_threshold(
    router: Router,
    choices: Sequence[Sequence[Candidate]],
    groups: Sequence[Group],
    strong: str,
    weak: str,
    max_loss: float,
    confidence: float,
) -> SafeThreshold:
    """Calibrate on the prompts that both models answered and that the router was not trained on.

    `choices` are the router's candidates, strong first and weak last. Raises DataError where no group has both models.
    """
    known = [group for group in groups if {strong, weak} <= set(group.models)]
    if not known:
        raise DataError(f"the calibration data has no source with results of both {strong} and {weak}")
    new = [part for group in known if len(part := _unseen(router, group.take(group.rows_with(strong, weak))))]
    if not new:
        return SafeThreshold(float("-inf"), 0)
    need = np.concatenate([router.predict(group.prompts, choices).need for group in new])
    pair = Pair(np.concatenate([group.of(strong) for group in new]), np.concatenate([group.of(weak) for group in new]))
    return SafeThreshold(threshold_for_loss(need, pair, max_loss, confidence), len(need))


def _unseen(router: Router, group: Group) -> Group:
    """Without the prompts of the router's own training: there it errs less than elsewhere."""
    seen = [bool(np.isin(prompt_digests([prompt]), router.seen).any()) for prompt in group.prompts]
    return group.take(np.flatnonzero(~np.array(seen, dtype=bool)))
