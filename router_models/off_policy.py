"""What another policy would have earned, from a log of what one policy did.

Each logged row has the action taken, the probability with which it was taken, and its result. A new policy is a
probability for each action. Inverse propensity scoring (IPS) weighs results by new over old probability; the doubly
robust estimate (arXiv 1103.4601) adds a model of the results, and is right if either model or propensities are.
Intervals are Student's, with the degrees of freedom of the effective rows: a log in which few rows did as the new
policy would is a small sample, however long it is. Without exploration neither can say anything about actions that the
log had no chance of, and both refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from router_models.errors import DataError

Array = NDArray[np.float64]

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval. `effective_rows` are the equally weighted rows that would say as much."""

    value: float
    low: float
    high: float
    effective_rows: float


@dataclass(frozen=True, slots=True)
class Logged:
    """Rows of a log. `action` int [num_rows], `propensity` of it, `result` of it: float64 [num_rows]."""

    action: NDArray[np.intp]
    propensity: Array
    result: Array

    def __post_init__(self) -> None:
        if not len(self.action):
            raise DataError("the log has no rows to estimate from")
        if not np.all((self.propensity > 0) & (self.propensity <= 1)):
            raise DataError("every propensity is to be above 0 and at most 1")


def ips(log: Logged, target: Array, confidence: float = 0.9) -> Estimate:
    """Mean result under `target`, probabilities float64 [num_rows, num_actions]; self-normalised.

    Raises DataError where the target takes actions that the log nowhere took, or could not have taken.
    """
    weights = _weights(log, target)
    total, rows = weights.sum(), len(weights)
    mean = float(weights @ log.result / total)
    # The jackknife: by how much the mean moves without each row. A row of great weight draws the mean to itself.
    moves = weights * (log.result - mean) / (total - weights)
    return _estimate(mean, float(np.sqrt(moves @ moves * (rows - 1) / rows)), weights, confidence)


def doubly_robust(log: Logged, target: Array, predicted: Array, confidence: float = 0.9) -> Estimate:
    """Mean result under `target` with `predicted` results, both float64 [num_rows, num_actions].

    `predicted` must not have been fitted on the same rows (cross-fitting: arXiv 1608.00060).
    """
    weights = _weights(log, target)
    rows = np.arange(len(log.action))
    modelled = np.asarray(np.sum(target * predicted, axis=1))
    terms = modelled + weights * (log.result - predicted[rows, log.action])
    error = float(terms.std(ddof=1) / np.sqrt(len(terms)))
    return _estimate(float(terms.mean()), error, weights, confidence)


def predict_results(log: Logged, features: Array, num_actions: int, num_folds: int = 5, seed: int = 0) -> Array:
    """Cross-fitted results of every action on every row: float64 [num_rows, num_actions], ridge on `features`.

    An action's model sees the rows where the log took it; with fewer than ten of them it is their mean.
    """
    fold = np.random.default_rng(seed).permutation(len(log.action)) % num_folds
    inputs = np.column_stack([np.ones(len(features)), _standardised(features)])
    predicted = np.zeros((len(log.action), num_actions))
    for held_out in range(num_folds):
        for action in range(num_actions):
            rows = np.flatnonzero((fold != held_out) & (log.action == action))
            predicted[fold == held_out, action] = inputs[fold == held_out] @ _ridge(inputs[rows], log.result[rows])
    return predicted


def _ridge(inputs: Array, results: Array, strength: float = 10.0) -> Array:
    if len(results) < 10:
        constant = np.zeros(inputs.shape[1])
        constant[0] = results.mean() if len(results) else 0.5
        return constant
    penalty = np.diag([0.0] + [strength] * (inputs.shape[1] - 1))
    return np.asarray(np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ results), dtype=np.float64)


def _standardised(features: Array) -> Array:
    return np.asarray((features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-9))


def _weights(log: Logged, target: Array) -> Array:
    unseen = np.setdiff1d(np.flatnonzero(target.sum(axis=0) > 0), np.unique(log.action))
    if len(unseen):
        raise DataError(f"the log never takes action {int(unseen[0])}, so nothing is known about it")
    taken = target[np.arange(len(log.action)), log.action]
    elsewhere = target.sum(axis=1) - taken > _ROUNDING
    num_missed = int(np.sum(elsewhere & (log.propensity > 1 - _ROUNDING)))
    if num_missed:
        raise DataError(f"in {num_missed} of {len(taken)} rows the log had no chance to act otherwise than it did")
    if np.count_nonzero(taken) < 2:
        raise DataError("fewer than two rows of the log did what is asked about")
    return np.asarray(taken / log.propensity, dtype=np.float64)


def _estimate(mean: float, error: float, weights: Array, confidence: float) -> Estimate:
    effective_rows = float(weights.sum() ** 2 / (weights @ weights))
    half = float(stdtrit(max(effective_rows - 1, 1.0), (1 + confidence) / 2)) * error
    return Estimate(mean, mean - half, mean + half, effective_rows)
