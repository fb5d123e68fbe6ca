"""What a router has to beat: scores for the same prompts that need little or no learning.

Baselines with labels are cross-fitted on the very labels they are measured with, five folds or the given ones: more
than a router gets that has never seen this data. Every function returns float64 [num_prompts], higher for the strong
model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge

from router_models.features import Features
from router_models.metrics import Pair
from router_models.structure import FEATURE_NAMES
from router_models.text import inverse_document_frequency, weigh

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

NUM_RUNS = 8
_NUM_FOLDS = 5
_MIN_ROWS = 50
_INVERSE_PENALTY = 1.0
_SUBSET_PRIOR_ROWS = 5.0
_SHUFFLED_PENALTY = 100.0
_LOG_CHARS = FEATURE_NAMES.index("log_chars")


def length(features: Features) -> Array:
    """Longer prompts to the strong model."""
    return features.structure[:, _LOG_CHARS].astype(np.float64)


def random_scores(num_prompts: int, seed: int) -> Array:
    return np.random.default_rng(seed).random(num_prompts)


def subset_mean(subset: NDArray[np.str_], pair: Pair, fold: Rows | None = None) -> Array | None:
    """The mean gap of the prompt's subset; None where there is only one."""
    if len(np.unique(subset)) < 2:
        return None
    gap = pair.strong - pair.weak

    def predict(kept: Rows, out: Rows) -> Array:
        return np.array([_shrunk_mean(gap[kept][subset[kept] == name], pair.gap) for name in subset[out]])

    return _cross_fitted(_random_folds(len(gap), 0) if fold is None else fold, predict)


def tfidf_logistic(features: Features, pair: Pair, fold: Rows | None = None) -> Array | None:
    """Logistic regression on TF-IDF, one for each model's results; None with too few prompts or one kind of result."""
    results = np.column_stack([pair.strong, pair.weak]) >= 0.5
    if len(features) < _MIN_ROWS or any(min(column.sum(), (~column).sum()) < _NUM_FOLDS * 2 for column in results.T):
        return None
    rows = weigh(features.counts, inverse_document_frequency(features.counts))

    def predict(kept: Rows, out: Rows) -> Array:
        strong, weak = (_prob_right(rows, column, kept, out) for column in results.T)
        return strong - weak

    return _cross_fitted(_random_folds(len(features), 0) if fold is None else fold, predict)


def shuffled_labels(features: Features, pair: Pair, seed: int) -> Array:
    """A model of structure that was fitted to other prompts' gaps: what chance and leaks can do."""
    gap = np.random.default_rng(seed).permutation(pair.strong - pair.weak)
    centre, spread = features.structure.mean(axis=0), np.maximum(features.structure.std(axis=0), 1e-6)
    inputs = (features.structure - centre) / spread

    def predict(kept: Rows, out: Rows) -> Array:
        return np.asarray(Ridge(alpha=_SHUFFLED_PENALTY).fit(inputs[kept], gap[kept]).predict(inputs[out]), np.float64)

    return _cross_fitted(_random_folds(len(gap), seed), predict)


def _random_folds(num_rows: int, seed: int) -> Rows:
    return np.random.default_rng(seed).permutation(num_rows) % _NUM_FOLDS


def _cross_fitted(fold: Rows, predict: Callable[[Rows, Rows], Array]) -> Array:
    found = np.zeros(len(fold))
    for number in np.unique(fold):
        out = np.flatnonzero(fold == number)
        if len(out) < len(fold):
            found[out] = predict(np.flatnonzero(fold != number), out)
    return found


def _shrunk_mean(gaps: Array, prior: float) -> float:
    return float((gaps.sum() + _SUBSET_PRIOR_ROWS * prior) / (len(gaps) + _SUBSET_PRIOR_ROWS))


def _prob_right(rows: sp.csr_matrix, results: NDArray[np.bool_], kept: Rows, out: Rows) -> Array:
    if len(np.unique(results[kept])) < 2:
        return np.full(len(out), float(results[kept].mean()))
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=200, tol=1e-3).fit(rows[kept], results[kept])
    return np.asarray(model.predict_proba(rows[out])[:, 1], dtype=np.float64)
