"""On ground that a source has never seen, the order of prompts leans towards their length, which needs no training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_FROM = 0.9
_MOST_DEVIATIONS = 3.0


@dataclass(frozen=True, slots=True)
class Guard:
    """Of one source and pair of models.

    `lean`: the share of length in the order of an unknown domain (see `reach`). Mean and standard deviation over usual
    prompts: `log_chars` of the logarithm of the length, `gap` of P(strong right) - P(weak right).
    """

    lean: float
    log_chars: tuple[float, float]
    gap: tuple[float, float]

    def unknown_need(self, gap: Array, log_chars: Array) -> Array:
        """What takes the place of `gap` in an unknown domain. All float64 [num_prompts]."""
        mean, spread = self.log_chars
        # Bounded without losing the order.
        deviations = _MOST_DEVIATIONS * np.tanh((log_chars - mean) / spread / _MOST_DEVIATIONS)
        return (1 - self.lean) * gap + self.lean * (self.gap[0] + self.gap[1] * deviations)


def unusual(novelty: Array) -> Array:
    """How surely a prompt is of an unknown domain, by itself: 0 for nine in ten of the usual prompts."""
    return np.asarray(np.clip((novelty - _FROM) / (1 - _FROM), 0.0, 1.0))
