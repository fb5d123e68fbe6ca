"""A model as a few numbers: P(right) = sigmoid(discrimination . difficulty + intercept).

The difficulties are held-out predictions for prompts, so the logistic fit also calibrates: what the prediction cannot
know shrinks the slope. That is why a new model needs some hundreds of labels and not a router of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]

_INVERSE_PENALTY = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class Ability:
    """One model among one source's difficulties. `discrimination` float64 [num_factors]."""

    discrimination: Array
    intercept: float
    num_labels: int

    def prob_right(self, difficulty: Array) -> Array:
        """Calibrated probability of a right answer, float64 [num_prompts]; `difficulty` [num_prompts, num_factors]."""
        return np.asarray(expit(difficulty @ self.discrimination + self.intercept), dtype=np.float64)


def fit_ability(difficulty: Array, results: Array) -> Ability:
    """The ability that explains `results` float64 [num_prompts] in [0, 1], NaN where unknown.

    A result between 0 and 1 counts as that share of a right answer.
    """
    known = np.isfinite(results)
    inputs, outcomes = difficulty[known], results[known]
    labels = np.repeat([1, 0], len(outcomes))
    weights = np.concatenate([outcomes, 1 - outcomes])
    used = weights > 0
    if len(np.unique(labels[used])) < 2:
        return _constant(float(outcomes.mean()) if len(outcomes) else 0.5, difficulty.shape[1], len(outcomes))
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
    model.fit(np.concatenate([inputs, inputs])[used], labels[used], sample_weight=weights[used])
    return Ability(model.coef_[0].astype(np.float64), float(model.intercept_[0]), len(outcomes))


def typical(abilities: list[Ability]) -> Ability:
    """What stands in for a model nobody knows: the mean of others."""
    discrimination = np.mean([ability.discrimination for ability in abilities], axis=0)
    return Ability(discrimination, float(np.mean([ability.intercept for ability in abilities])), 0)


def _constant(rate: float, num_factors: int, num_labels: int) -> Ability:
    # One pseudo-answer of either kind: a model that was never wrong so far is not perfect.
    rate = (rate * num_labels + 1) / (num_labels + 2)
    return Ability(np.zeros(num_factors), float(np.log(rate / (1 - rate))), num_labels)
