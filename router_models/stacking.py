"""Stacked generalisation (Wolpert 1992): views are mixed by how well they predict prompts held out of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from router_models.expert import VIEWS, Mix

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

_NUM_FOLDS = 5
# What is believed before any label is seen, and how many labels it takes to be believed half as much: with a hundred
# labels, the views with many parameters have mostly learnt noise, and held-out errors are too noisy themselves to tell.
_PRIOR = {"text": 0.0, "trees": 0.0, "transfer": 0.0, "shape": 0.5, "length": 0.5, "embedding": 0.0}
# On top of another router the transfer view does not start from nothing.
_PRIOR_ON_TOP = _PRIOR | {"transfer": 0.5}
_PRIOR_ROWS = 300.0


def folds(num_rows: int, seed: int) -> Rows:
    """The fold of each row, evenly and at random."""
    return np.random.default_rng(seed).permutation(num_rows) % min(_NUM_FOLDS, num_rows)


def held_out(fold: Rows, target: Array, predict: Callable[[Rows, Rows], NDArray[np.floating]]) -> Array:
    """Float64 [num_rows, num_factors]: what `predict(kept rows, held-out rows)` says of each fold."""
    found = np.zeros(target.shape)
    for number in np.unique(fold):
        out = np.flatnonzero(fold == number)
        found[out] = predict(np.flatnonzero(fold != number), out)
    return found


def fit_mix(views: Array, target: Array, is_on_top: bool = False) -> Mix:
    """Weights at or above zero that explain the held-out targets best; difficulties of mean 0.

    `views` float64 [num_views, num_rows, num_factors], held out, in the order of VIEWS; the last may be missing. A
    difficulty is the factor as far as it can be predicted, in the factor's own units: a factor that nothing predicts
    has difficulties near 0. `is_on_top`: of another router, by which the transfer view knows something without a label.
    """
    prior = np.array([(_PRIOR_ON_TOP if is_on_top else _PRIOR)[name] for name in VIEWS[: len(views)]])
    weights, shift = np.zeros((len(views), target.shape[1])), np.zeros(target.shape[1])
    for k in range(target.shape[1]):
        known, columns = np.isfinite(target[:, k]), views[:, :, k]
        centre = columns[:, known].mean(axis=1)
        found = _weigh((columns - centre[:, None])[:, known].T, target[known, k] - target[known, k].mean(), prior)
        weights[:, k], shift[k] = found, -float(found @ centre)
    return Mix(weights, shift)


def _weigh(columns: Array, target: Array, prior: Array) -> Array:
    """Least squares above zero, with the prior as rows of its own; float64 [num_views]."""
    strength = np.sqrt(_PRIOR_ROWS) * columns.std(axis=0)
    found, _ = nnls(np.vstack([columns, np.diag(strength)]), np.append(target, strength * prior))
    return np.asarray(found)
