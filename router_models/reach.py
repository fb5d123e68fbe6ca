"""How far a source's difficulties reach: do they order prompts of subjects that the source has never seen?

Exams of one kind teach much about other subjects' exams; a dozen tasks that have nothing in common teach nothing about
the next one, and prompt length, which needs no training, then orders its prompts better. Which of the two a source is
can be measured on itself, by leaving out whole subsets.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_models.data import MIN_LABELS, Group
from router_models.metrics import Pair, apgr_exact, apgr_standard_error
from router_models.stacking import held_out
from router_models.views import LOG_CHARS, fit_shape, fit_text, read_text

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

_NUM_FOLDS = 5
_NUM_FACTORS = 2
_SHARE = 1 / 3
_NUM_RESAMPLES = 50
_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_lean(group: Group, tfidf: sp.csr_matrix, structure: Floats, target: Array, seed: int) -> float:
    """The share, 0 to 1, that length is to have in the order of prompts of subjects unlike all of this source.

    The greatest of a few shares that orders left-out subsets as well as the best one does, within its standard error,
    by exact APGR of the better third of the models over the worse third: where nothing is known, length is the safer
    of two that are as good. All of them are ordered as one traffic, each prompt by what has not seen its subset:
    within each fold of subsets, the answer would hang on which ones happen to be left out together. 1 where there are
    too few subsets to leave any out, too few prompts that both thirds answered, or hardly a gap between them: nothing
    is known then but that length is safe. `target` float64 [num_prompts, num_factors].
    """
    names = np.unique(group.subset)
    better, worse = _thirds(group.results)
    known = np.flatnonzero(np.isfinite(better + worse))
    if len(names) < _NUM_FOLDS or len(known) < MIN_LABELS or better[known].mean() <= worse[known].mean():
        return 1.0
    fold = _subset_folds(group.subset, names, seed)
    gap = _predicted_gap(tfidf, structure, target[:, :_NUM_FACTORS], fold, better - worse)
    scores = _standardised(gap), _standardised(structure[:, LOG_CHARS].astype(np.float64))
    pair = Pair(better[known], worse[known])
    mixed = [((1 - share) * scores[0] + share * scores[1])[known] for share in _GRID]
    found = np.array([apgr_exact(score, pair) for score in mixed])
    error = apgr_standard_error(mixed[int(np.argmax(found))], pair, _NUM_RESAMPLES)
    return _GRID[int(np.flatnonzero(found >= found.max() - error)[-1])]


def _predicted_gap(tfidf: sp.csr_matrix, structure: Floats, target: Array, fold: Rows, gap: Array) -> Array:
    """What left-out models of words and structure say of every prompt's gap, float64 [num_prompts]."""
    words = held_out(fold, target, lambda kept, out: read_text(fit_text(tfidf[kept], target[kept]), tfidf[out]))
    shape = held_out(fold, target, lambda kept, out: fit_shape(structure[kept], target[kept]).predict(structure[out]))
    known = np.isfinite(gap)
    factors = np.nan_to_num(target[known])
    loadings = np.linalg.lstsq(factors, gap[known] - gap[known].mean(), rcond=None)[0]
    return np.asarray((words + shape) @ loadings)


def _thirds(results: Array) -> tuple[Array, Array]:
    """Mean results of the better and of the worse third of the models, float64 [num_prompts], NaN where unknown."""
    order = np.argsort(-np.nanmean(results, axis=0), kind="stable")
    count = max(1, round(len(order) * _SHARE))
    known = np.isfinite(results)
    sums, counts = np.where(known, results, 0.0), known
    parts = [(sums[:, part].sum(axis=1), counts[:, part].sum(axis=1)) for part in (order[:count], order[-count:])]
    better, worse = (np.where(number > 0, total / np.maximum(number, 1), np.nan) for total, number in parts)
    return better, worse


def _subset_folds(subset: NDArray[np.str_], names: NDArray[np.str_], seed: int) -> Rows:
    order = np.random.default_rng(seed).permutation(len(names))
    return (order % _NUM_FOLDS)[np.searchsorted(names, subset)]


def _standardised(values: Array) -> Array:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-9))
