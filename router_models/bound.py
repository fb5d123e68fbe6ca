"""The least strong share that keeps quality within a bound, with a stated confidence.

Learn then test (arXiv 2110.01052) on held-out prompts: thresholds are tried from the safest down, each with a test at
the full level, and the first that fails ends it (fixed sequence), which keeps the chance of any wrong bound at
1 - confidence.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from router_models.metrics import Array, Pair

_NUM_THRESHOLDS = 50
_MIN_ROWS = 30


def threshold_for_loss(need: Array, pair: Pair, max_loss: float, confidence: float) -> float:
    """The highest threshold of `need`, at or above which the strong model answers, that is known to be safe.

    The loss is strong minus routed quality, mean over prompts; its upper bound is normal, of all rows' losses. -inf,
    which is always strong, where nothing else is safe or there are fewer than 30 prompts.
    """
    if len(need) < _MIN_ROWS:
        return float("-inf")
    quantile = NormalDist().inv_cdf(confidence)
    safe = float("-inf")
    for threshold in np.quantile(need, np.linspace(0, 1, _NUM_THRESHOLDS + 1)[1:]):
        loss = np.where(need >= threshold, 0.0, pair.strong - pair.weak)
        if loss.mean() + quantile * loss.std(ddof=1) / np.sqrt(len(loss)) > max_loss:
            break
        safe = float(threshold)
    return safe
