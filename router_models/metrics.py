"""How good a ranking of prompts is: quality over the share of strong calls.

Terms: a *score* says how much a prompt needs the strong model; strong and weak are the two models' results per prompt.
PGR (performance gap recovered) of a quality is (quality - weak) / (strong - weak) with the models' own means.
APGR is PGR averaged over the share of strong calls, CPT(x) the share at which PGR reaches x (RouteLLM: arXiv
2406.18665). RouteLLM's code takes 11 points; the exact variants take the whole curve, equal scores in random order.
All arrays are float64 [num_prompts]. 0.5 is a random order; knowing the outcomes gives more than 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_NUM_BINS = 10
_ECE_BINS = 15


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean `quality` at a `share` of strong calls; both float64 [num_points], shares ascending."""

    share: Array
    quality: Array

    def area(self) -> float:
        return float(np.trapezoid(self.quality, self.share))

    def at(self, share: Array | float) -> Array:
        """Quality at given shares, linear between points."""
        return np.asarray(np.interp(share, self.share, self.quality))


@dataclass(frozen=True, slots=True)
class Pair:
    """Results of both models on the same prompts."""

    strong: Array
    weak: Array

    def __post_init__(self) -> None:
        if len(self.strong) == 0 or self.strong.shape != self.weak.shape:
            raise ValueError("strong and weak are to have the same number of results, at least one")

    @property
    def gap(self) -> float:
        """What the strong model is better by, on average."""
        return float(self.strong.mean() - self.weak.mean())

    def quality_at(self, pgr: float) -> float:
        return float(self.weak.mean()) + pgr * self.gap

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Pair:
        return Pair(self.strong[rows], self.weak[rows])


def exact_curve(score: Array, pair: Pair) -> Curve:
    """The whole curve, from no strong calls to all: a point wherever a threshold can fall."""
    return _curve_of(*_ordered(score, pair), np.ones(len(score)), float(pair.weak.mean()))


def routellm_curve(score: Array, pair: Pair) -> Curve | None:
    """RouteLLM's 11 points; None where its `qcut` fails, for want of 11 different edges."""
    edges = np.quantile(score, np.linspace(0, 1, _NUM_BINS + 1))
    if len(np.unique(edges)) <= _NUM_BINS:
        return None
    to_strong = [score >= edge for edge in edges[:-1]] + [score > edges[-1]]
    share = np.array([chosen.mean() for chosen in to_strong])
    quality = np.array([np.where(chosen, pair.strong, pair.weak).mean() for chosen in to_strong])
    order = np.argsort(share, kind="stable")
    return Curve(share[order], quality[order])


def apgr(curve: Curve, pair: Pair) -> float:
    """The curve's area between weak and strong; NaN where the models are equally good."""
    span = float(curve.share[-1] - curve.share[0])
    denominator = pair.gap * span
    return (curve.area() - float(pair.weak.mean()) * span) / denominator if denominator else float("nan")


def cpt_routellm(curve: Curve, pair: Pair, pgr: float) -> float:
    """RouteLLM's CPT: interpolates shares over qualities, which means little where the curve falls."""
    return float(np.interp(pair.quality_at(pgr), curve.quality, curve.share))


def cpt_exact(curve: Curve, pair: Pair, pgr: float) -> float:
    """The first share of strong calls at which the curve reaches `pgr`; NaN if it never does."""
    sign = np.sign(pair.gap)
    reached = np.flatnonzero(sign * curve.quality >= sign * pair.quality_at(pgr) - 1e-12)
    if len(reached) == 0:
        return float("nan")
    i = int(reached[0])
    if i == 0:
        return float(curve.share[0])
    low, high = curve.quality[i - 1], curve.quality[i]
    part = (pair.quality_at(pgr) - low) / (high - low)
    return float(curve.share[i - 1] + part * (curve.share[i] - curve.share[i - 1]))


def apgr_exact(score: Array, pair: Pair) -> float:
    return apgr(exact_curve(score, pair), pair)


def apgr_within(score: Array, pair: Pair, group: NDArray[np.str_]) -> float:
    """Exact APGR inside each group, weighted by the group's total gap; groups with no gap of one prompt are left out.

    Ordering whole subjects is easy and flatters length where one subject has long prompts; this takes it away.
    """
    areas, gaps = 0.0, 0.0
    for name in np.unique(group):
        rows = np.flatnonzero(group == name)
        part = pair.take(rows)
        total = part.gap * len(rows)
        if abs(total) >= 1:
            areas += apgr_exact(score[rows], part) * total
            gaps += total
    return areas / gaps if gaps else float("nan")


def apgr_standard_error(score: Array, pair: Pair, num_resamples: int = 200, seed: int = 0) -> float:
    """Standard deviation of the exact APGR over bootstrap resamples of the prompts."""
    return float(np.nanstd(apgr_resamples(score, pair, num_resamples, seed), ddof=1))


def apgr_resamples(score: Array, pair: Pair, num_resamples: int, seed: int) -> Array:
    """Exact APGR of bootstrap resamples, float64 [num_resamples]; equal seeds resample equal prompts."""
    ordered, strong, weak = _ordered(score, pair)
    order = np.argsort(-score, kind="stable")
    rng, size = np.random.default_rng(seed), len(score)
    found = np.empty(num_resamples)
    for i in range(num_resamples):
        weights = np.bincount(rng.integers(size, size=size), minlength=size)[order].astype(np.float64)
        quality_weak = float(weights @ weak) / size
        gap = float(weights @ strong) / size - quality_weak
        area = _curve_of(ordered, strong, weak, weights, quality_weak).area()
        found[i] = (area - quality_weak) / gap if gap else np.nan
    return found


def regret_to_oracle(score: Array, pair: Pair) -> float:
    """Mean quality lost against knowing the outcomes, over all shares of strong calls, at equal shares.

    The oracle spends at most the share it is given: it stops where more strong calls would make it worse.
    """
    shares = np.linspace(0, 1, 1001)
    best = np.maximum.accumulate(exact_curve(pair.strong - pair.weak, pair).at(shares))
    return float(np.mean(best - exact_curve(score, pair).at(shares)))


def expected_calibration_error(probability: Array, outcome: Array) -> float:
    """Mean |predicted - observed| over 15 equally wide bins, weighted by size (arXiv 1706.04599)."""
    return sum(abs(mean - rate) * count for mean, rate, count in reliability(probability, outcome)) / len(probability)


def reliability(probability: Array, outcome: Array) -> list[tuple[float, float, int]]:
    """Mean prediction, mean outcome and size of each bin that is not empty."""
    bins = np.minimum((probability * _ECE_BINS).astype(int), _ECE_BINS - 1)
    rows = [np.flatnonzero(bins == i) for i in range(_ECE_BINS)]
    return [(float(probability[r].mean()), float(outcome[r].mean()), len(r)) for r in rows if len(r)]


def _ordered(score: Array, pair: Pair) -> tuple[Array, Array, Array]:
    order = np.argsort(-score, kind="stable")
    return score[order], pair.strong[order], pair.weak[order]


def _curve_of(ordered: Array, strong: Array, weak: Array, weights: Array, quality_weak: float) -> Curve:
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    total = weights.sum()
    gained = np.cumsum(weights * (strong - weak))[ends] / total
    return Curve(
        np.concatenate([[0.0], np.cumsum(weights)[ends] / total]), np.concatenate([[0.0], gained]) + quality_weak
    )
