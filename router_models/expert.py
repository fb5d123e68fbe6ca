"""One source's difficulty model: five views of a prompt, mixed into a few difficulties, and models' abilities there.

The views of each factor: a linear model of hashed n-grams; trees over structure and over what all sources' models say
of the prompt; a linear model of the latter alone; a linear model of structure alone; the prompt's length; and, where it
was asked for, a linear model of a sentence embedding. What the
others say is most of what is known about subjects that the source itself has never seen; the last two need so few
labels that a new source can learn from its first hundred.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from router_models.ability import Ability
from router_models.features import Features
from router_models.novelty import Novelty
from router_models.trees import Forest

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

_MAX_GAPS = 64  # every decision asks for the same few
VIEWS = ("text", "trees", "transfer", "shape", "length", "embedding")


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """inputs @ `weights` + `bias`; float32 [num_inputs, num_factors] and [num_factors]."""

    weights: Floats
    bias: Floats

    def predict(self, inputs: Floats) -> Floats:
        return inputs @ self.weights + self.bias


@dataclass(frozen=True, eq=False, slots=True)
class Bounded:
    """A linear model of inputs clipped to what it has seen: `low` and `high` float32 [num_inputs].

    A line fitted to short questions says nothing about how much harder a book is.
    """

    linear: Linear
    low: Floats
    high: Floats

    def predict(self, inputs: Floats) -> Floats:
        return self.linear.predict(np.clip(inputs, self.low, self.high))


@dataclass(frozen=True, eq=False, slots=True)
class Mix:
    """difficulty = sum over views of `weights` [num_views, num_factors] x view, plus `shift` [num_factors]; float64."""

    weights: Array
    shift: Array

    def of(self, views: Array) -> Array:
        """Float64 [num_prompts, num_factors] of views [num_views, num_prompts, num_factors]."""
        return np.asarray(np.einsum("vnk,vk->nk", views, self.weights) + self.shift)


@dataclass(frozen=True, eq=False, slots=True)
class Expert:
    """What was learnt from one source. `num_rows` prompts; `signals` is how many inputs from other models it reads.

    `reference` float32 [num_reference, num_factors]: held-out difficulties, a sample of what is usual. `log_chars`:
    mean and standard deviation of the logarithm of prompts' lengths. `lean`: the share of length in the order of
    prompts of a domain that the source has never seen (see `reach`).
    """

    source: str
    num_rows: int
    sketch: Forest
    trees: Forest
    transfer: Linear
    shape: Bounded
    length: Bounded
    mix: Mix
    abilities: dict[str, Ability]
    novelty: Novelty
    reference: Floats
    log_chars: tuple[float, float]
    lean: float
    embedding: Linear | None = None
    _gaps: dict[tuple[Ability, Ability], tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_factors(self) -> int:
        return self.sketch.num_outputs

    @property
    def num_signals(self) -> int:
        return len(self.transfer.weights)

    def difficulty(self, features: Features, signals: Floats, text: Floats) -> Array:
        """Float64 [num_prompts, num_factors]; `text` is this expert's own view of the words, of the same shape."""
        read, structure = signals[:, : self.num_signals], features.structure
        views = [
            text,
            self.trees.predict(np.concatenate([structure, read], axis=1)),
            self.transfer.predict(read),
            self.shape.predict(structure),
            self.length.predict(structure),
        ]
        if self.embedding is not None:
            assert features.embedding is not None, "extracted by this router"
            views.append(self.embedding.predict(features.embedding))
        return self.mix.of(np.stack(views).astype(np.float64))

    def usual_gap(self, strong: Ability, weak: Ability) -> tuple[float, float]:
        """Mean and standard deviation of P(strong right) - P(weak right) over usual prompts."""
        key = strong, weak
        if (known := self._gaps.get(key)) is not None:
            return known
        difficulty = self.reference.astype(np.float64)
        gap = strong.prob_right(difficulty) - weak.prob_right(difficulty)
        if len(self._gaps) >= _MAX_GAPS:
            self._gaps.clear()
        found = self._gaps[key] = float(gap.mean()), float(gap.std())
        return found

    def skill(self, model: str) -> float:
        """P(right) of a model on a prompt of mean difficulty."""
        return float(expit(self.abilities[model].intercept))
