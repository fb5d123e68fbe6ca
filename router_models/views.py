"""How each view of a prompt is fitted to difficulties: targets float64 [num_rows, num_factors], NaN where unknown.

Of a factor with fewer than MIN_LABELS known rows nothing is learnt: it is 0, the mean of every factor.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV

from router_models.expert import Bounded, Linear
from router_models.structure import FEATURE_NAMES
from router_models.trees import Forest, TreeSettings, grow

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

LOG_CHARS = FEATURE_NAMES.index("log_chars")
MIN_LABELS = 10
_TEXT_PENALTY = 15.0
_PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)
_FEW_ROWS = 1500
# What lies beyond these shares of the training prompts is cut off before a line is laid through the rest.
_BOUNDS = (0.005, 0.995)


def fit_text(rows: sp.csr_matrix, target: Array) -> Linear:
    """Ridge regression on TF-IDF rows."""
    weights, bias = np.zeros((rows.shape[1], target.shape[1]), np.float32), np.zeros(target.shape[1], np.float32)
    for columns, known in _patterns(target):
        model = Ridge(alpha=_TEXT_PENALTY, solver="sparse_cg", tol=1e-3).fit(rows[known], target[known][:, columns])
        weights[:, columns], bias[columns] = np.atleast_2d(model.coef_).T, model.intercept_
    return Linear(weights, bias)


def read_text(model: Linear, rows: sp.csr_matrix) -> Floats:
    """Float32 [num_rows, num_factors] of sparse rows."""
    return np.asarray(rows @ model.weights + model.bias, dtype=np.float32)


def fit_forest(features: Floats, target: Array, seed: int) -> Forest:
    """Boosted trees, smaller ones where there are few rows."""
    settings = TreeSettings() if len(features) >= _FEW_ROWS else TreeSettings(num_trees=80, max_leaves=6)
    models = []
    for column in _learnable(target).T:
        known = np.isfinite(column)
        models.append(grow(features[known], column[known], settings, seed))
    return Forest.of(models)


def fit_transfer(signals: Floats, target: Array, start: Linear | None = None) -> Linear:
    """Ridge regression on standardised signals; the penalty by leave-one-out error of each factor.

    What is penalised is the difference from `start`, from nothing where there is none.
    """
    if start is not None:
        found = fit_transfer(signals, target - start.predict(signals))
        return Linear(start.weights + found.weights, start.bias + found.bias)
    centre, spread = signals.mean(axis=0), np.maximum(signals.std(axis=0), 1e-6)
    inputs = ((signals - centre) / spread).astype(np.float64)
    weights, bias = np.zeros((signals.shape[1], target.shape[1])), np.zeros(target.shape[1])
    for columns, known in _patterns(target):
        model = RidgeCV(alphas=_PENALTIES, alpha_per_target=True)
        model.fit(inputs[known], target[known][:, columns])
        weights[:, columns] = np.atleast_2d(model.coef_).T / spread[:, None]
        bias[columns] = model.intercept_ - centre @ weights[:, columns]
    return Linear(weights.astype(np.float32), bias.astype(np.float32))


def fit_shape(structure: Floats, target: Array) -> Bounded:
    """Ridge regression on all of the structure."""
    low, high = np.quantile(structure, _BOUNDS, axis=0).astype(np.float32)
    return Bounded(fit_transfer(np.clip(structure, low, high), target), low, high)


def fit_length(structure: Floats, target: Array) -> Bounded:
    """A straight line over the logarithm of the length: two numbers, which a hundred labels can find."""
    low, high = np.quantile(structure, _BOUNDS, axis=0).astype(np.float32)
    length = np.clip(structure[:, LOG_CHARS], low[LOG_CHARS], high[LOG_CHARS]).astype(np.float64)
    weights, bias = np.zeros((structure.shape[1], target.shape[1]), np.float32), np.zeros(target.shape[1], np.float32)
    for k, column in enumerate(_learnable(target).T):
        known = np.isfinite(column)
        spread = length[known] - length[known].mean()
        slope = float(spread @ column[known]) / max(float(spread @ spread), 1e-9)
        weights[LOG_CHARS, k], bias[k] = slope, column[known].mean() - slope * length[known].mean()
    return Bounded(Linear(weights, bias), low, high)


def _learnable(target: Array) -> Array:
    """Zeros in place of factors with too few known rows."""
    return np.where(np.isfinite(target).sum(axis=0) >= MIN_LABELS, target, 0.0)


def _patterns(target: Array) -> list[tuple[list[int], Rows]]:
    """Factors that are known of the same rows, with those rows; none that are known of too few."""
    found: dict[bytes, tuple[list[int], Rows]] = {}
    for i, column in enumerate(target.T):
        known = np.isfinite(column)
        if known.sum() >= MIN_LABELS:
            found.setdefault(known.tobytes(), ([], np.flatnonzero(known)))[0].append(i)
    return list(found.values())
