"""What is hard about prompts, from who answered them: a few factors in place of many models' noisy results.

One result is one draw of a coin. Where many models answered the same prompts, the leading singular vectors of the
results are the prompts' difficulties in several directions, far less noisy than any single model's column, and each
model is a point among them: multidimensional item response theory (Reckase 2009), estimated by least squares.
Where few models answered, or each prompt has only some of them, every model is its own factor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MAX_FACTORS = 8
_ROWS_PER_FACTOR = 300
_MIN_COVERAGE = 0.75
_FEW_MODELS = 3


def factors(results: Array) -> Array:
    """Float64 [num_prompts, num_factors], columns of mean 0 and standard deviation 1, NaN where nothing is known.

    `results` float64 [num_prompts, num_models] with NaN where a model did not answer. Higher is easier.
    """
    coverage = np.isfinite(results).mean(axis=0)
    dense = results[:, coverage >= _MIN_COVERAGE]
    if dense.shape[1] > _FEW_MODELS:
        return _leading(dense)
    known = np.argsort(-coverage, kind="stable")[:_MAX_FACTORS]
    return np.column_stack([_standardised(results[:, model]) for model in sorted(known)])


def loadings(results: Array, factors: Array) -> Array:
    """How each model's results make up `factors` of the same prompts: float64 [num_models, num_factors]."""
    centred = np.nan_to_num(results - np.nanmean(results, axis=0))
    return np.asarray(np.linalg.lstsq(centred, np.nan_to_num(factors), rcond=None)[0])


def _leading(results: Array) -> Array:
    centred = np.nan_to_num(results - np.nanmean(results, axis=0))
    if not centred.any():
        return np.zeros((len(results), 1))
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    room = max(2, len(results) // _ROWS_PER_FACTOR)
    count = min(_MAX_FACTORS, room, int(np.sum(values > 1e-9 * values[0])))
    signs = np.where(right[:count].sum(axis=1) < 0, -1.0, 1.0)
    return np.column_stack([_standardised(left[:, i] * signs[i]) for i in range(count)])


def _standardised(column: Array) -> Array:
    spread = float(np.nanstd(column))
    return np.asarray((column - np.nanmean(column)) / (spread if spread > 0 else 1.0))
