"""The report of a training: each source judged by what was held out of the predictions for it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_models.ability import fit_ability
from router_models.data import Group
from router_models.drift import share_of
from router_models.evaluate import Evaluation, judge
from router_models.factors import factors
from router_models.features import Features, extract
from router_models.guard import Guard, unusual
from router_models.novelty import fit_novelty
from router_models.router import Predictions
from router_models.train import Trained
from router_models.views import LOG_CHARS

Array = NDArray[np.float64]
Rows = NDArray[np.intp]


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

    Each fold is judged as a gateway would serve it that has learnt from the others: what is usual is theirs, and the
    baselines are held out with the same prompts. How much the source leans on length was measured on all of its
    subsets, each left out. `features` of all prompts of the source, where they are known already.
    """
    index = [group.source for group in trained.groups].index(source)
    group, difficulty, fold = trained.groups[index], trained.held_out[index], trained.folds[index]
    rows = group.rows_with(*pair)
    found, target = group.take(rows), factors(group.results)[rows]
    prob_right = np.column_stack([_held_out(difficulty[rows], found.of(m), target, fold[rows]) for m in pair])
    inputs = features if features is not None else extract(group.prompts)
    lean = next(expert.lean for expert in trained.router.layers[-1] if expert.source == source)
    guarded = _guarded(prob_right, rows, inputs, fold, lean)
    share = share_of(float(guarded.novelty.mean()))
    evaluation = judge(
        guarded.adapted(share), found, found.pair(*pair), inputs.take(rows), pair, "held out", share, fold=fold[rows]
    )
    return evaluation, guarded.adapted(share)


def _guarded(prob_right: Array, rows: Rows, features: Features, fold: Rows, lean: float) -> Predictions:
    """Predictions of `rows`; `features` and `fold` are of all prompts of the source."""
    gap, lengths = prob_right[:, 0] - prob_right[:, 1], features.structure[:, LOG_CHARS].astype(np.float64)
    novelty, unknown = np.zeros(len(gap)), np.zeros(len(gap))
    usual_gap = float(gap.mean()), float(gap.std())
    for number in np.unique(fold[rows]):
        kept, out = np.flatnonzero(fold != number), np.flatnonzero(fold[rows] == number)
        novelty[out] = fit_novelty(features.take(kept), seed=0).of(features.take(rows[out]))
        guard = Guard(lean, (float(lengths[kept].mean()), max(float(lengths[kept].std()), 0.1)), usual_gap)
        unknown[out] = guard.unknown_need(gap[out], lengths[rows[out]])
    return Predictions(prob_right, novelty, gap + unusual(novelty) * (unknown - gap), unknown)


def _held_out(difficulty: Array, results: Array, target: Array, fold: Rows) -> Array:
    found = np.zeros(len(results))
    for number in np.unique(fold):
        kept = fold != number
        ability = fit_ability(difficulty[kept], results[kept], target[kept])
        found[~kept] = ability.prob_right(difficulty[~kept])
    return found
