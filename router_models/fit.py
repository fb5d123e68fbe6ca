"""Fitting a layer of experts, with every prediction that is learnt from held out of the model that makes it.

Stacked generalisation (Wolpert 1992): the sketches that final models read, the views that are mixed and the
difficulties that abilities and calibration are fitted to are all cross-fitted, five folds a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.linear_model import Ridge, RidgeCV

from router_models.ability import fit_ability
from router_models.data import Group
from router_models.expert import Expert, Linear, Mix
from router_models.factors import factors
from router_models.features import Features
from router_models.novelty import fit_novelty
from router_models.structure import FEATURE_NAMES
from router_models.text import weigh
from router_models.trees import Forest, TreeSettings, grow

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_NUM_FOLDS = 5
_TEXT_PENALTY = 15.0
_TRANSFER_PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)
_NUM_REFERENCE = 128
_FEW_ROWS = 1500
_LOG_CHARS = FEATURE_NAMES.index("log_chars")


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """Groups with what is computed of them once: features, TF-IDF rows, and signals of an earlier router."""

    groups: Sequence[Group]
    features: Sequence[Features]
    tfidf: Sequence[sp.csr_matrix]
    signals: Sequence[Floats]


@dataclass(frozen=True, eq=False, slots=True)
class Fitted:
    """A layer, its text models (weights [NUM_COLUMNS, num_factors], experts in order) and held-out difficulties."""

    experts: tuple[Expert, ...]
    text: Linear
    held_out: tuple[Array, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Sketch:
    """One source's first models, and what they say of every group's prompts; of their own, held out."""

    text: Linear
    forest: Forest
    said: list[Floats]


def sources(groups: Sequence[Group], features: Sequence[Features], idf: Floats, signals: Sequence[Floats]) -> Sources:
    return Sources(groups, features, [weigh(part.counts, idf) for part in features], signals)


def fit_layer(data: Sources, seed: int, progress: Progress) -> Fitted:
    """One expert for every group."""
    targets = [factors(group.results) for group in data.groups]
    folds = [_folds(len(group), seed + i) for i, group in enumerate(data.groups)]
    total, sketches = 2 * len(data.groups), []
    for i, group in enumerate(data.groups):
        progress(f"sketch of {group.source}", i, total)
        sketches.append(_sketch(data, i, targets[i], folds[i], seed))
    experts, held_out = [], []
    for i, group in enumerate(data.groups):
        progress(f"expert of {group.source}", len(data.groups) + i, total)
        signals = np.concatenate([data.signals[i], *(sketch.said[i] for sketch in sketches)], axis=1)
        expert, difficulty = _expert(data, i, signals, targets[i], folds[i], sketches[i], seed)
        experts.append(expert)
        held_out.append(difficulty)
    progress("experts", total, total)
    weights = np.concatenate([sketch.text.weights for sketch in sketches], axis=1)
    bias = np.concatenate([sketch.text.bias for sketch in sketches])
    return Fitted(tuple(experts), Linear(weights, bias), tuple(held_out))


def _folds(num_rows: int, seed: int) -> NDArray[np.intp]:
    return np.random.default_rng(seed).permutation(num_rows) % min(_NUM_FOLDS, num_rows)


def _sketch(data: Sources, own: int, target: Array, fold: NDArray[np.intp], seed: int) -> _Sketch:
    rows, structure = data.tfidf[own], data.features[own].structure
    text, forest = _fit_text(rows, target), _fit_forest(structure, target, seed)
    said = [
        np.concatenate([_text(text, tfidf), forest.predict(features.structure)], axis=1)
        for tfidf, features in zip(data.tfidf, data.features, strict=True)
    ]
    held_text = _held_out(fold, target, lambda kept, out: _text(_fit_text(rows[kept], target[kept]), rows[out]))
    held_forest = _held_out(
        fold, target, lambda kept, out: _fit_forest(structure[kept], target[kept], seed).predict(structure[out])
    )
    said[own] = np.concatenate([held_text, held_forest], axis=1).astype(np.float32)
    return _Sketch(text, forest, said)


def _expert(
    data: Sources, own: int, signals: Floats, target: Array, fold: NDArray[np.intp], sketch: _Sketch, seed: int
) -> tuple[Expert, Array]:
    group, features = data.groups[own], data.features[own]
    inputs = np.concatenate([features.structure, signals], axis=1)
    held_trees = _held_out(
        fold, target, lambda kept, out: _fit_forest(inputs[kept], target[kept], seed + 1).predict(inputs[out])
    )
    held_transfer = _held_out(
        fold, target, lambda kept, out: _fit_transfer(signals[kept], target[kept]).predict(signals[out])
    )
    num_factors = target.shape[1]
    views = np.stack([sketch.said[own][:, :num_factors].astype(np.float64), held_trees, held_transfer])
    mix = _fit_mix(views, target)
    difficulty = mix.of(views)
    lengths = features.structure[:, _LOG_CHARS]
    sample = np.random.default_rng(seed).permutation(len(group))[:_NUM_REFERENCE]
    expert = Expert(
        source=group.source,
        num_rows=len(group),
        sketch=sketch.forest,
        trees=_fit_forest(inputs, target, seed + 1),
        transfer=_fit_transfer(signals, target),
        mix=mix,
        abilities={model: fit_ability(difficulty, group.of(model)) for model in group.models},
        novelty=fit_novelty(features, seed),
        reference=difficulty[sample].astype(np.float32),
        log_chars=(float(lengths.mean()), max(float(lengths.std()), 0.1)),
    )
    return expert, difficulty


def _held_out(
    fold: NDArray[np.intp],
    target: Array,
    predict: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.floating]],
) -> Array:
    """Float64 [num_rows, num_factors]: what `predict(kept rows, held-out rows)` says of each fold."""
    found = np.zeros(target.shape)
    for number in np.unique(fold):
        out = np.flatnonzero(fold == number)
        found[out] = predict(np.flatnonzero(fold != number), out)
    return found


def _fit_text(rows: sp.csr_matrix, target: Array) -> Linear:
    weights, bias = np.zeros((rows.shape[1], target.shape[1]), np.float32), np.zeros(target.shape[1], np.float32)
    for columns, known in _patterns(target):
        model = Ridge(alpha=_TEXT_PENALTY, solver="sparse_cg", tol=1e-3).fit(rows[known], target[known][:, columns])
        weights[:, columns], bias[columns] = np.atleast_2d(model.coef_).T, model.intercept_
    return Linear(weights, bias)


def _text(model: Linear, rows: sp.csr_matrix) -> Floats:
    return np.asarray(rows @ model.weights + model.bias, dtype=np.float32)


def _fit_forest(features: Floats, target: Array, seed: int) -> Forest:
    settings = TreeSettings() if len(features) >= _FEW_ROWS else TreeSettings(num_trees=80, max_leaves=6)
    models = []
    for column in target.T:
        known = np.isfinite(column)
        models.append(grow(features[known], column[known], settings, seed))
    return Forest.of(models)


def _fit_transfer(signals: Floats, target: Array) -> Linear:
    """Ridge regression on standardised signals; the penalty by leave-one-out error of each factor."""
    centre, spread = signals.mean(axis=0), np.maximum(signals.std(axis=0), 1e-6)
    inputs = ((signals - centre) / spread).astype(np.float64)
    weights, bias = np.zeros((signals.shape[1], target.shape[1])), np.zeros(target.shape[1])
    for columns, known in _patterns(target):
        model = RidgeCV(alphas=_TRANSFER_PENALTIES, alpha_per_target=True)
        model.fit(inputs[known], target[known][:, columns])
        weights[:, columns] = np.atleast_2d(model.coef_).T / spread[:, None]
        bias[columns] = model.intercept_ - centre @ weights[:, columns]
    return Linear(weights.astype(np.float32), bias.astype(np.float32))


def _patterns(target: Array) -> list[tuple[list[int], NDArray[np.intp]]]:
    """Factors that are known of the same rows, with those rows."""
    found: dict[bytes, tuple[list[int], NDArray[np.intp]]] = {}
    for i, column in enumerate(target.T):
        known = np.isfinite(column)
        found.setdefault(known.tobytes(), ([], np.flatnonzero(known)))[0].append(i)
    return list(found.values())


def _fit_mix(views: Array, target: Array) -> Mix:
    """Weights at or above zero that explain the held-out targets best; difficulties of mean 0 and deviation 1."""
    weights, shift = np.zeros((len(views), target.shape[1])), np.zeros(target.shape[1])
    for k in range(target.shape[1]):
        known = np.isfinite(target[:, k])
        columns = views[:, :, k]
        centre = columns.mean(axis=1)
        found, _ = nnls((columns - centre[:, None])[:, known].T, target[known, k] - target[known, k].mean())
        # Nothing predicts this factor; the mean of the views keeps it defined, and abilities give it no weight.
        found = found if found.any() else np.full(len(views), 1 / len(views))
        spread = max(float((found @ columns).std()), 1e-6)
        weights[:, k], shift[k] = found / spread, -float(found @ centre) / spread
    return Mix(weights, shift)
