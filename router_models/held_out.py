"""The report of a training: each source judged by what was held out of the predictions for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_models.ability import fit_ability
from router_models.data import Group
from router_models.evaluate import Evaluation, judge
from router_models.factors import factors
from router_models.features import Features, extract
from router_models.router import Predictions
from router_models.train import Trained

Array = NDArray[np.float64]


def evaluate_held_out(trained: Trained, strong: str | None = None, weak: str | None = None) -> list[Evaluation]:
    """One evaluation for each source with two models or more; sources without the named models are left out."""
    pairs = [(group.source, _pair_of(group, strong, weak)) for group in trained.groups]
    return [evaluate_pair(trained, source, pair)[0] for source, pair in pairs if pair is not None]


def _pair_of(group: Group, strong: str | None, weak: str | None) -> tuple[str, str] | None:
    """The named models, or the best of this source and its median."""
    order = [group.models[i] for i in np.argsort(-np.nanmean(group.results, axis=0), kind="stable")]
    pair = strong or order[0], weak or order[len(order) // 2]
    if pair[0] == pair[1] or not set(pair) <= set(group.models):
        return None
    return pair if np.isfinite(group.of(pair[0]) + group.of(pair[1])).any() else None


def evaluate_pair(
    trained: Trained, source: str, pair: tuple[str, str], features: Features | None = None
) -> tuple[Evaluation, Predictions]:
    """One source and pair, with the predictions, in the order of the prompts that both models answered.

    `features` of all prompts of the source, where they are known already.
    """
    index = [group.source for group in trained.groups].index(source)
    group, difficulty, fold = trained.groups[index], trained.held_out[index], trained.folds[index]
    rows = group.rows_with(*pair)
    found, target = group.take(rows), factors(group.results)[rows]
    prob_right = np.column_stack([_held_out(difficulty[rows], found.of(m), target, fold[rows]) for m in pair])
    expert = next(expert for expert in trained.router.layers[-1] if expert.source == source)
    inputs = features.take(rows) if features is not None else extract(found.prompts)
    predictions = Predictions(prob_right, expert.novelty.of(inputs), prob_right[:, 0] - prob_right[:, 1])
    return judge(predictions, found, found.pair(*pair), inputs, pair, "held out"), predictions


def _held_out(difficulty: Array, results: Array, target: Array, fold: NDArray[np.intp]) -> Array:
    found = np.zeros(len(results))
    for number in np.unique(fold):
        kept = fold != number
        ability = fit_ability(difficulty[kept], results[kept], target[kept])
        found[~kept] = ability.prob_right(difficulty[~kept])
    return found
