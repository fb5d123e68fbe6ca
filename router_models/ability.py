"""A model as a few numbers: P(right) = sigmoid(discrimination . difficulty + intercept).

The difficulties are held-out predictions for prompts, so the logistic fit also calibrates: what the prediction cannot
know shrinks the slope. That is why a new model needs some hundreds of labels and not a router of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]

# How sure the expected discrimination is, for difficulties of deviation 1: as sure as about 150 labels would make it.
_PRECISION = 30.0
_LEAST_DEVIATION = 1e-3
_LOADING_PENALTY = 10.0
_MAX_STEPS = 50


@dataclass(frozen=True, eq=False, slots=True)
class Ability:
    """One model among one source's difficulties. `discrimination` float64 [num_factors]."""

    discrimination: Array
    intercept: float
    num_labels: int

    def prob_right(self, difficulty: Array) -> Array:
        """Calibrated probability of a right answer, float64 [num_prompts]; `difficulty` [num_prompts, num_factors]."""
        return np.asarray(expit(difficulty @ self.discrimination + self.intercept), dtype=np.float64)


def fit_ability(difficulty: Array, results: Array, factors: Array | None = None) -> Ability:
    """The ability that explains `results` float64 [num_prompts] in [0, 1], NaN where unknown.

    `difficulty` [num_prompts, num_factors] predicts `factors`, NaN where unknown, whose relation to the results is what
    the discrimination is expected to be; without them that is 0. With few labels the expectation counts for more: a
    hundred noisy results can turn a slope round. A result between 0 and 1 counts as that share of a right answer.
    """
    known = np.isfinite(results)
    inputs, outcomes = difficulty[known], results[known]
    mean = float(outcomes.mean()) if len(outcomes) else 0.5
    if mean in (0.0, 1.0) or not len(outcomes):
        return _constant(mean, difficulty.shape[1], len(outcomes))
    scale = np.maximum(inputs.std(axis=0), _LEAST_DEVIATION)
    expected = np.zeros(len(scale)) if factors is None else _expected(factors[known], outcomes) * scale
    slopes, intercept = _logistic(inputs / scale, outcomes, expected)
    return Ability(slopes / scale, intercept, len(outcomes))


def typical(abilities: list[Ability]) -> Ability:
    """What stands in for a model nobody knows: the mean of others."""
    discrimination = np.mean([ability.discrimination for ability in abilities], axis=0)
    return Ability(discrimination, float(np.mean([ability.intercept for ability in abilities])), 0)


def _expected(factors: Array, outcomes: Array) -> Array:
    """Slopes, float64 [num_factors], if every difficulty were the mean of its factor given the prompt."""
    mean, known = outcomes.mean(), np.where(np.isfinite(factors), factors, 0.0)
    gram = known.T @ known + _LOADING_PENALTY * np.eye(known.shape[1])
    return np.asarray(np.linalg.solve(gram, known.T @ (outcomes - mean)) / (mean * (1 - mean)))


def _logistic(inputs: Array, outcomes: Array, expected: Array) -> tuple[Array, float]:
    """Maximum a posteriori slopes [num_factors] and intercept, by Newton's method; the intercept is free."""
    rows = np.column_stack([inputs, np.ones(len(inputs))])
    prior = np.append(expected, 0.0)
    precision = np.diag(np.append(np.full(len(expected), _PRECISION), 1e-6))
    found = np.append(expected, np.log(outcomes.mean() / (1 - outcomes.mean())))
    for _ in range(_MAX_STEPS):
        rate = expit(rows @ found)
        gradient = rows.T @ (outcomes - rate) - precision @ (found - prior)
        curvature = (rows * (rate * (1 - rate))[:, None]).T @ rows + precision
        step = np.linalg.solve(curvature, gradient)
        # Far from the solution the curvature vanishes and a whole step would leave the range of exp.
        found = found + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-6:
            break
    return found[:-1], float(found[-1])


def _constant(rate: float, num_factors: int, num_labels: int) -> Ability:
    # One pseudo-answer of either kind: a model that was never wrong so far is not perfect.
    rate = (rate * num_labels + 1) / (num_labels + 2)
    return Ability(np.zeros(num_factors), float(np.log(rate / (1 - rate))), num_labels)
