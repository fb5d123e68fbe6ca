"""The report of a training: each source judged by what was held out of the predictions for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_models.ability import fit_ability
from router_models.data import Group
from router_models.evaluate import Evaluation, judge
from router_models.features import extract
from router_models.router import Predictions
from router_models.train import Trained

_NUM_FOLDS = 5


def evaluate_held_out(trained: Trained, strong: str | None = None, weak: str | None = None) -> list[Evaluation]:
    """One evaluation for each source with two models or more; sources without the named models are left out."""
    found = []
    for group, difficulty in zip(trained.groups, trained.held_out, strict=True):
        pair = _pair_of(group, strong, weak)
        if pair is not None:
            found.append(_evaluate(trained, group, difficulty, pair))
    return found


def _pair_of(group: Group, strong: str | None, weak: str | None) -> tuple[str, str] | None:
    """The named models, or the best of this source and its median."""
    order = [group.models[i] for i in np.argsort(-np.nanmean(group.results, axis=0), kind="stable")]
    pair = strong or order[0], weak or order[len(order) // 2]
    if pair[0] == pair[1] or not set(pair) <= set(group.models):
        return None
    return pair if np.isfinite(group.of(pair[0]) + group.of(pair[1])).any() else None


def _evaluate(trained: Trained, group: Group, difficulty: NDArray[np.float64], pair: tuple[str, str]) -> Evaluation:
    rows = group.rows_with(*pair)
    found = group.take(rows)
    prob_right = np.column_stack([_held_out(difficulty[rows], found.of(model)) for model in pair])
    expert = next(expert for expert in trained.router.layers[-1] if expert.source == group.source)
    features = extract(found.prompts)
    predictions = Predictions(prob_right, expert.novelty.of(features), prob_right[:, 0] - prob_right[:, 1])
    return judge(predictions, found, found.pair(*pair), features, pair, "held out")


def _held_out(difficulty: NDArray[np.float64], results: NDArray[np.float64]) -> NDArray[np.float64]:
    fold = np.random.default_rng(0).permutation(len(results)) % _NUM_FOLDS
    found = np.zeros(len(results))
    for number in np.unique(fold):
        kept = fold != number
        found[~kept] = fit_ability(difficulty[kept], results[kept]).prob_right(difficulty[~kept])
    return found
