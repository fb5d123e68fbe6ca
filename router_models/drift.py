"""How unlike its training a stream of prompts is.

One prompt says little: every seventh of the usual ones looks unusual. Hundreds of them say it surely: mean novelty is
about 0.55 for traffic that a source was learnt from and above 0.9 for a task that it has never seen.
"""

from __future__ import annotations

_USUAL = 0.55
_FROM, _TO = 0.7, 0.95


def share_of(mean_novelty: float) -> float:
    """How much such traffic is to be treated as an unknown domain: 0 like the training, 1 unlike all of it."""
    return min(max((mean_novelty - _FROM) / (_TO - _FROM), 0.0), 1.0)


class Drift:
    """Mean novelty of the most recent prompts of one kind of traffic, fading; starts as usual. One caller at a time."""

    def __init__(self, window: int = 200) -> None:
        if window < 1:
            raise ValueError("window is to be at least one prompt")
        self._window = window
        self._mean = _USUAL

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def share(self) -> float:
        """As `share_of`, of the traffic so far: what `Predictions.adapted` takes."""
        return share_of(self._mean)

    def observe(self, novelty: float) -> None:
        """Count one prompt."""
        self._mean += (novelty - self._mean) / self._window
