"""A router and its baselines on outcomes of two models: the table that every claim comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_models import baselines
from router_models.data import MIN_LABELS, Group, digest
from router_models.drift import share_of
from router_models.errors import DataError, UnknownModelError
from router_models.features import Features
from router_models.metrics import (
    Array,
    Pair,
    apgr,
    apgr_exact,
    apgr_resamples,
    apgr_within,
    cpt_exact,
    cpt_routellm,
    exact_curve,
    expected_calibration_error,
    regret_to_oracle,
    reliability,
    routellm_curve,
)
from router_models.router import Predictions, Router

_NUM_CURVE_POINTS = 101
_NUM_RESAMPLES = 200
_MIN_SUBSET_ROWS = 20
_MAX_SEEN_SHARE = 0.02
_LEARNT = ("tfidf_logistic", "subset_mean")
_RIVALS = ("random", "shuffled_labels", "length", *_LEARNT)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How well one score orders the prompts. None where a figure is not defined: RouteLLM's need distinct scores."""

    apgr: float | None
    apgr_exact: float | None
    apgr_stderr: float | None
    apgr_within: float | None
    cpt50: float | None
    cpt80: float | None
    cpt50_exact: float | None
    cpt80_exact: float | None
    regret: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration errors, `ece` the worse one; bins of (mean predicted, observed, count)."""

    ece: float
    ece_strong: float
    ece_weak: float
    strong_bins: list[tuple[float, float, int]]
    weak_bins: list[tuple[float, float, int]]


@dataclass(frozen=True, slots=True)
class SubsetRow:
    """One subset, ordered within itself."""

    name: str
    n: int
    strong: float
    weak: float
    strong_share: float
    apgr_exact: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A router on one pair. `margin`: its exact APGR above prompt length's, with its standard error.

    `unknown_share`: how much of an unknown domain the prompts were taken for, by their mean novelty: as a gateway does
    that has seen some hundreds of them. `seen_share`: how many of the prompts the router was trained on.
    """

    source: str
    strong_model: str
    weak_model: str
    n: int
    strong: float
    weak: float
    ability: str
    router: Ranking
    calibration: Calibration
    abstention_rate: float
    mean_novelty: float
    unknown_share: float
    seen_share: float
    margin: float | None
    margin_stderr: float | None
    baselines: dict[str, Ranking | None]
    subsets: list[SubsetRow]
    curve: list[tuple[float, float]]
    oracle_curve: list[tuple[float, float]]
    refusals: list[str] = field(default_factory=list)

    @property
    def is_recommended(self) -> bool:
        """Whether nothing speaks against serving this router."""
        return not self.refusals

    def document(self) -> dict[str, object]:
        """What `outrider evaluate --json` prints."""
        router = asdict(self.router) | {
            key: getattr(self.calibration, key) for key in ("ece", "ece_strong", "ece_weak")
        }
        rest = asdict(self) | {"router": router, "is_recommended": self.is_recommended}
        return _without_nan(rest)


def evaluate(
    router: Router, group: Group, strong: str, weak: str, features: Features | None = None, source: str | None = None
) -> Evaluation:
    """Measure `router` on the prompts that both models answered; raises DataError if there are none, or no such expert.

    Where the artifact knows none of the models, typical ones of its sources stand in, and `ability` says so. `source`
    names the expert to use where it is not the data's own.
    """
    experts = sorted({expert.source for expert in router.experts})
    if source is not None and source not in experts:
        raise DataError(f"the artifact has no expert of {source!r}; it has {', '.join(experts)}")
    rows = group.rows_with(strong, weak)
    found, pair = group.take(rows), group.take(rows).pair(strong, weak)
    inputs = features.take(rows) if features is not None else router.extract(found.prompts)
    try:
        choices, ability = router.candidates([strong, weak], source or group.source), "known"
    except UnknownModelError:
        choices, ability = router.stand_ins(), "typical"
    predictions = router.predict(inputs, choices)
    share = share_of(float(predictions.novelty.mean()))
    seen = float(np.isin([digest(prompt) for prompt in found.prompts], router.seen).mean())
    return judge(predictions.adapted(share), found, pair, inputs, (strong, weak), ability, share, seen)


def judge(
    predictions: Predictions,
    group: Group,
    pair: Pair,
    features: Features,
    models: tuple[str, str],
    ability: str,
    unknown_share: float = 0.0,
    seen_share: float = 0.0,
    fold: NDArray[np.intp] | None = None,
) -> Evaluation:
    """Measure predictions for the strong and the weak model, in this order, of exactly the prompts of `group`.

    `unknown_share` is what the predictions were adapted by, and is only told; `seen_share` of the prompts is known to
    the router, if it is not held-out predictions that are judged. `fold` says which prompts the baselines are held out
    with, at random if not given.
    """
    need = predictions.need
    table = _baselines(group, pair, features, fold)
    margin, margin_error = _margin(need, baselines.length(features), pair)
    ranking = rank(need, pair, group.subset)
    return Evaluation(
        source=group.source,
        strong_model=models[0],
        weak_model=models[1],
        n=len(group),
        strong=float(pair.strong.mean()),
        weak=float(pair.weak.mean()),
        ability=ability,
        router=ranking,
        calibration=_calibration(predictions.prob_right, pair),
        abstention_rate=float(predictions.abstains.mean()),
        mean_novelty=float(predictions.novelty.mean()),
        unknown_share=unknown_share,
        seen_share=seen_share,
        margin=margin,
        margin_stderr=margin_error,
        baselines=table,
        subsets=_subsets(need, group, pair),
        curve=_points(need, pair),
        oracle_curve=_points(pair.strong - pair.weak, pair),
        refusals=_refusals(ranking, table, pair, ability) + _seen_refusal(seen_share),
    )


def rank(score: Array, pair: Pair, subset: NDArray[np.str_]) -> Ranking:
    """All figures of one score."""
    exact, coarse = exact_curve(score, pair), routellm_curve(score, pair)
    resamples = apgr_resamples(score, pair, _NUM_RESAMPLES, seed=0)
    return Ranking(
        apgr=_number(apgr(coarse, pair)) if coarse else None,
        apgr_exact=_number(apgr(exact, pair)),
        apgr_stderr=_number(float(np.nanstd(resamples, ddof=1))),
        apgr_within=_number(apgr_within(score, pair, subset)) if len(np.unique(subset)) > 1 else None,
        cpt50=cpt_routellm(coarse, pair, 0.5) if coarse else None,
        cpt80=cpt_routellm(coarse, pair, 0.8) if coarse else None,
        cpt50_exact=_number(cpt_exact(exact, pair, 0.5)),
        cpt80_exact=_number(cpt_exact(exact, pair, 0.8)),
        regret=regret_to_oracle(score, pair),
    )


def _baselines(
    group: Group, pair: Pair, features: Features, fold: NDArray[np.intp] | None
) -> dict[str, Ranking | None]:
    def averaged(make: Callable[[int], Array]) -> Ranking:
        return _mean([rank(make(seed), pair, group.subset) for seed in range(baselines.NUM_RUNS)])

    size = len(group)
    subset, words = baselines.subset_mean(group.subset, pair, fold), baselines.tfidf_logistic(features, pair, fold)
    return {
        "always_weak": _constant(pair, float(pair.weak.mean())),
        "always_strong": _constant(pair, float(pair.strong.mean())),
        "random": averaged(lambda seed: baselines.random_scores(size, seed)),
        "length": rank(baselines.length(features), pair, group.subset),
        "tfidf_logistic": None if words is None else rank(words, pair, group.subset),
        "subset_mean": None if subset is None else rank(subset, pair, group.subset),
        "shuffled_labels": averaged(lambda seed: baselines.shuffled_labels(features, pair, seed)),
        "oracle": rank(pair.strong - pair.weak, pair, group.subset),
    }


def _constant(pair: Pair, quality: float) -> Ranking:
    """One model for everything: a point, not a curve; only its regret against the oracle of any share is defined."""
    best = float(np.maximum(pair.strong, pair.weak).mean())
    return Ranking(None, None, None, None, None, None, None, None, best - quality)


def _mean(rankings: list[Ranking]) -> Ranking:
    def of(name: str) -> float | None:
        values = [value for ranking in rankings if (value := getattr(ranking, name)) is not None]
        return float(np.mean(values)) if values else None

    names = ("apgr", "apgr_exact", "apgr_stderr", "apgr_within", "cpt50", "cpt80", "cpt50_exact", "cpt80_exact")
    figures = {name: of(name) for name in names}
    return Ranking(**figures, regret=float(np.mean([ranking.regret for ranking in rankings])))


def _margin(need: Array, length: Array, pair: Pair) -> tuple[float | None, float | None]:
    resamples = [apgr_resamples(score, pair, _NUM_RESAMPLES, seed=0) for score in (need, length)]
    difference = apgr_exact(need, pair) - apgr_exact(length, pair)
    return _number(difference), _number(float(np.nanstd(resamples[0] - resamples[1], ddof=1)))


def _calibration(prob_right: Array, pair: Pair) -> Calibration:
    errors = [expected_calibration_error(prob_right[:, i], result) for i, result in ((0, pair.strong), (-1, pair.weak))]
    bins = reliability(prob_right[:, 0], pair.strong), reliability(prob_right[:, -1], pair.weak)
    return Calibration(max(errors), errors[0], errors[1], *bins)


def _subsets(need: Array, group: Group, pair: Pair) -> list[SubsetRow]:
    """Rows of each subset; its share of strong calls where half of all prompts get one."""
    half = float(np.median(need))
    found = []
    for name in np.unique(group.subset):
        rows = np.flatnonzero(group.subset == name)
        part = pair.take(rows)
        is_enough = len(rows) >= _MIN_SUBSET_ROWS and abs(part.gap) * len(rows) >= 1
        score = _number(apgr_exact(need[rows], part)) if is_enough else None
        means = float(part.strong.mean()), float(part.weak.mean())
        found.append(SubsetRow(str(name), len(rows), *means, float(np.mean(need[rows] >= half)), score))
    return found


def _points(score: Array, pair: Pair) -> list[tuple[float, float]]:
    shares = np.linspace(0, 1, _NUM_CURVE_POINTS)
    return list(zip(shares.tolist(), exact_curve(score, pair).at(shares).tolist(), strict=True))


def _refusals(router: Ranking, table: dict[str, Ranking | None], pair: Pair, ability: str) -> list[str]:
    """Why this router is not to be recommended: each baseline that it does not beat, learnt ones included."""
    if len(pair.strong) < MIN_LABELS:
        return [f"{len(pair.strong)} prompts are too few to judge by; {MIN_LABELS} are needed"]
    if pair.gap <= 0:
        return ["the strong model is no better than the weak one"]
    found = []
    for name in _RIVALS:
        rival = table[name]
        if rival and rival.apgr_exact is not None and (router.apgr_exact or 0.0) <= rival.apgr_exact:
            hint = ", which was trained on labels of this data" if ability == "typical" and name in _LEARNT else ""
            found.append(f"does not beat {name}: {router.apgr_exact:.3f} against {rival.apgr_exact:.3f}{hint}")
    return found


def _seen_refusal(share: float) -> list[str]:
    if share <= _MAX_SEEN_SHARE:
        return []
    return [f"was trained on {share:.0%} of these prompts: what it says of them is no prediction"]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _without_nan(value: object) -> dict[str, object]:
    def clean(part: object) -> object:
        if isinstance(part, dict):
            return {key: clean(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [clean(item) for item in part]
        return None if isinstance(part, float) and np.isnan(part) else part

    assert isinstance(value, dict)
    return {str(key): clean(item) for key, item in value.items()}
