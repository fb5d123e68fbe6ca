"""Pearson's chi-square test, as a number of standard deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence


def chi_square_z(counts: Sequence[float], law: Sequence[float]) -> float:
    """How surprising `counts` are under the probabilities `law`: about standard normal, large means a misfit.

    Wilson and Hilferty's approximation of the chi-square law. A count where the law has none is infinitely surprising.
    """
    total = sum(counts)
    assert math.isclose(sum(law), 1.0, abs_tol=1e-6)
    if any(count > 0 and p == 0 for count, p in zip(counts, law, strict=True)):
        return math.inf
    cells = [(count, total * p) for count, p in zip(counts, law, strict=True) if p > 0]
    freedom = len(cells) - 1
    if freedom == 0:
        return 0.0
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    spread = 2 / (9 * freedom)
    return (math.pow(statistic / freedom, 1 / 3) - (1 - spread)) / math.sqrt(spread)
