"""Fitting a layer of experts, with every prediction that is learnt from held out of the model that makes it.

The sketches that final models read, the views that are mixed and the difficulties that abilities and calibration are
fitted to are all cross-fitted, five folds a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from router_models.ability import fit_ability
from router_models.data import Group, digest
from router_models.expert import Expert, Linear
from router_models.factors import factors, loadings
from router_models.features import Features
from router_models.novelty import fit_novelty
from router_models.reach import fit_lean
from router_models.stacking import fit_mix, folds, held_out
from router_models.text import weigh
from router_models.trees import Forest
from router_models.views import LOG_CHARS, fit_forest, fit_length, fit_shape, fit_text, fit_transfer, read_text

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Rows = NDArray[np.intp]
Progress = Callable[[str, int, int], None]
FoldOf = Callable[[Group, int], Rows]

_NUM_REFERENCE = 128


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """Groups with what is computed of them once: features and TF-IDF rows; and what an earlier router says of them.

    `signals` float32 [num_prompts, num_signals]; `log_odds` of right answers, from signals to the group's models.
    """

    groups: Sequence[Group]
    features: Sequence[Features]
    tfidf: Sequence[sp.csr_matrix]
    signals: Sequence[Floats]
    log_odds: Sequence[Linear]


@dataclass(frozen=True, eq=False, slots=True)
class Fitted:
    """A layer, its text models (weights [NUM_COLUMNS, num_factors], experts in order) and held-out difficulties.

    `folds`: the fold of each prompt; its difficulty was predicted without it.
    """

    experts: tuple[Expert, ...]
    text: Linear
    held_out: tuple[Array, ...]
    folds: tuple[Rows, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Sketch:
    """One source's first models, and what they say of every group's prompts; of their own, held out."""

    text: Linear
    forest: Forest
    said: list[Floats]


def sources(
    groups: Sequence[Group],
    features: Sequence[Features],
    idf: Floats,
    signals: Sequence[Floats],
    log_odds: Sequence[Linear],
) -> Sources:
    return Sources(groups, features, [weigh(part.counts, idf) for part in features], signals, log_odds)


def random_folds(group: Group, seed: int) -> Rows:
    """Prompts are held out at random, five folds; one that was asked again, together with itself."""
    numbers: dict[int, int] = {}
    same = [numbers.setdefault(digest(prompt), len(numbers)) for prompt in group.prompts]
    return folds(len(numbers), seed)[same]


def fit_layer(data: Sources, seed: int, progress: Progress, fold_of: FoldOf = random_folds) -> Fitted:
    """One expert for every group; `fold_of` says which prompts are held out together."""
    targets = [factors(group.results) for group in data.groups]
    fold = [fold_of(group, seed + i) for i, group in enumerate(data.groups)]
    total, sketches = 2 * len(data.groups), []
    for i, group in enumerate(data.groups):
        progress(f"sketch of {group.source}", i, total)
        sketches.append(_sketch(data, i, targets[i], fold[i], seed))
    experts, difficulties = [], []
    for i, group in enumerate(data.groups):
        progress(f"expert of {group.source}", len(data.groups) + i, total)
        signals = np.concatenate([data.signals[i], *(sketch.said[i] for sketch in sketches)], axis=1)
        expert, difficulty = _expert(data, i, signals, targets[i], fold[i], sketches[i], seed)
        experts.append(expert)
        difficulties.append(difficulty)
    progress("experts", total, total)
    weights = np.concatenate([sketch.text.weights for sketch in sketches], axis=1)
    bias = np.concatenate([sketch.text.bias for sketch in sketches])
    return Fitted(tuple(experts), Linear(weights, bias), tuple(difficulties), tuple(fold))


def _sketch(data: Sources, own: int, target: Array, fold: Rows, seed: int) -> _Sketch:
    rows, structure = data.tfidf[own], data.features[own].structure
    text, forest = fit_text(rows, target), fit_forest(structure, target, seed)
    said = [
        np.concatenate([read_text(text, tfidf), forest.predict(features.structure)], axis=1)
        for tfidf, features in zip(data.tfidf, data.features, strict=True)
    ]
    held_text = held_out(fold, target, lambda kept, out: read_text(fit_text(rows[kept], target[kept]), rows[out]))
    held_forest = held_out(
        fold, target, lambda kept, out: fit_forest(structure[kept], target[kept], seed).predict(structure[out])
    )
    said[own] = np.concatenate([held_text, held_forest], axis=1).astype(np.float32)
    return _Sketch(text, forest, said)


def _expert(
    data: Sources, own: int, signals: Floats, target: Array, fold: Rows, sketch: _Sketch, seed: int
) -> tuple[Expert, Array]:
    group, features = data.groups[own], data.features[own]
    structure, text = features.structure, sketch.said[own][:, : target.shape[1]].astype(np.float64)
    inputs = np.concatenate([structure, signals], axis=1)
    start = _start(data.log_odds[own], group.results, target, signals.shape[1])
    views = np.stack([text, *_held_out_views(inputs, structure, signals, start, target, fold, seed)])
    embedding = features.embedding
    if embedding is not None:
        held = held_out(
            fold, target, lambda kept, out: fit_transfer(embedding[kept], target[kept]).predict(embedding[out])
        )
        views = np.concatenate([views, held[None]])
    mix = fit_mix(views, target, is_on_top=len(data.log_odds[own].weights) > 0)
    difficulty = mix.of(views)
    lengths = structure[:, LOG_CHARS]
    sample = np.random.default_rng(seed).permutation(len(group))[:_NUM_REFERENCE]
    expert = Expert(
        source=group.source,
        num_rows=len(group),
        sketch=sketch.forest,
        trees=fit_forest(inputs, target, seed + 1),
        transfer=fit_transfer(signals, target, start),
        shape=fit_shape(structure, target),
        length=fit_length(structure, target),
        mix=mix,
        abilities={model: fit_ability(difficulty, group.of(model), target) for model in group.models},
        novelty=fit_novelty(features, seed),
        reference=difficulty[sample].astype(np.float32),
        log_chars=(float(lengths.mean()), max(float(lengths.std()), 0.1)),
        lean=fit_lean(group, data.tfidf[own], structure, target, seed),
        embedding=None if embedding is None else fit_transfer(embedding, target),
    )
    return expert, difficulty


def _start(log_odds: Linear, results: Array, target: Array, num_signals: int) -> Linear:
    """Difficulties as an earlier router sees them: what it thinks of the models, in the units of the factors."""
    rate = np.nanmean(results, axis=0)
    # Of a probability, log odds move rate x (1 - rate).
    share = (rate * (1 - rate))[:, None] * loadings(results, target)
    weights = np.zeros((num_signals, target.shape[1]), np.float32)
    weights[: len(log_odds.weights)] = log_odds.weights @ share
    return Linear(weights, (log_odds.bias @ share).astype(np.float32))


def _held_out_views(
    inputs: Floats, structure: Floats, signals: Floats, start: Linear, target: Array, fold: Rows, seed: int
) -> list[Array]:
    """All views but the text and the embedding, in the order of VIEWS."""
    return [
        held_out(fold, target, lambda kept, out: fit_forest(inputs[kept], target[kept], seed + 1).predict(inputs[out])),
        held_out(
            fold, target, lambda kept, out: fit_transfer(signals[kept], target[kept], start).predict(signals[out])
        ),
        held_out(fold, target, lambda kept, out: fit_shape(structure[kept], target[kept]).predict(structure[out])),
        held_out(fold, target, lambda kept, out: fit_length(structure[kept], target[kept]).predict(structure[out])),
    ]
