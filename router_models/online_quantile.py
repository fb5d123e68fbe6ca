"""A threshold that keeps a promised share of strong calls on traffic nobody has seen.

A fixed threshold set for 20 % on old traffic gave 5 % on one new domain and 28 % on another. This one is the quantile
of the most recent scores, moved by what the promise is behind so far, as adaptive conformal inference moves its
level (arXiv 2106.00170).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np


class OnlineQuantile:
    """Decides score by score; holds the share of strong calls at `share` within a few calls per hundred.

    `prior` are scores of earlier traffic; they fade as `window` new ones arrive. Modified by every `decide` and
    `observe`; one caller at a time.
    """

    def __init__(self, share: float, prior: Iterable[float] = (), window: int = 500, gain: float = 0.02) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError("share is to be between 0 and 1")
        self.share = share
        self._gain = gain
        self._scores: deque[float] = deque(_thin(prior, window // 4), maxlen=window)
        self._owed = 0.0

    @property
    def owed(self) -> float:
        """Strong calls the promise is behind by; negative when there were too many."""
        return self._owed

    def threshold(self) -> float:
        """Scores at or above it go to the strong model; -inf before any score is known and a call is owed."""
        level = float(np.clip(self.share + self._gain * self._owed, 0.0, 1.0))
        if not self._scores:
            return -np.inf if level >= 0.5 else np.inf
        if level in (0.0, 1.0):
            return -np.inf if level else np.inf
        return float(np.quantile(np.fromiter(self._scores, float), 1 - level))

    def decide(self, score: float) -> bool:
        """Whether this request goes to the strong model; counts it."""
        is_strong = score >= self.threshold()
        self.observe(score, is_strong)
        return is_strong

    def observe(self, score: float, is_strong: bool) -> None:
        """Count a request that was decided, perhaps by something else: a floor, an exploration, a held model."""
        self._scores.append(score)
        limit = 0.5 / self._gain
        self._owed = float(np.clip(self._owed + self.share - is_strong, -limit, limit))


def _thin(scores: Iterable[float], count: int) -> list[float]:
    """At most `count` of the scores, evenly over their order, so that a long prior does not outlive its use."""
    values = np.sort(np.fromiter(scores, float))
    if len(values) <= count:
        return [float(value) for value in values]
    return [float(value) for value in np.quantile(values, (np.arange(count) + 0.5) / count)]
