"""Confidence interval of a ratio of two sums over the same rows: the paired bootstrap (Efron 1979; Koehn 2004).

Rows, not tokens, are drawn again, since the tokens of a row rise and fall together; and both sums take the same rows,
so that how hard a row is cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ROWS = 30  # with fewer, the percentiles of redrawn rows are too narrow to be believed
_NUM_RESAMPLES = 10_000
_BATCH_VALUES = 1 << 20
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the limits of its two-sided percentile interval."""

    estimate: float
    low: float
    high: float


def relative_increase(
    rows: Sequence[tuple[float, float]], confidence: float, num_resamples: int = _NUM_RESAMPLES
) -> Interval:
    """The second sum over the first, minus 1, over rows of (baseline, candidate), with its interval at `confidence`.

    Numbers are not negative, and not all of them 0; `confidence` is in (0, 1). The same for the same input: the draws
    are seeded.
    """
    pairs = torch.tensor(rows, dtype=torch.float64).T  # [2, num_rows]
    limits = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(_resampled(pairs, num_resamples), limits).tolist()
    return Interval(_increase(pairs.sum(dim=1)).item(), low, high)


def _resampled(pairs: Tensor, num_resamples: int) -> Tensor:
    """The increase [num_resamples] in as many draws of the rows, with replacement."""
    num_rows = pairs.shape[1]
    generator = torch.Generator().manual_seed(_SEED)
    at_once = max(1, _BATCH_VALUES // num_rows)
    found = []
    for first in range(0, num_resamples, at_once):
        shape = (min(at_once, num_resamples - first), num_rows)
        found.append(_increase(pairs[:, torch.randint(num_rows, shape, generator=generator)].sum(dim=2)))
    return torch.cat(found)


def _increase(sums: Tensor) -> Tensor:
    return sums[1] / sums[0] - 1
