"""From tables or logs to a router: everything that `outrider train` does, apart from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_models import views
from router_models.data import MIN_LABELS, Group, prompt_digests
from router_models.embedding import SentenceEmbedding
from router_models.errors import DataError
from router_models.expert import Linear
from router_models.features import Features, extract, stack
from router_models.fit import FoldOf, Progress, fit_layer, random_folds, sources
from router_models.router import Router, TextWeights
from router_models.text import inverse_document_frequency

Floats = NDArray[np.float32]

_MAX_SEEN_SHARE = 0.02


@dataclass(frozen=True, eq=False, slots=True)
class Trained:
    """A router, the groups it was trained on, and its held-out difficulties of their prompts, in the same order.

    `folds`: the fold of each prompt; nothing that made its held-out difficulty was fitted to a prompt of its fold.
    """

    router: Router
    groups: tuple[Group, ...]
    held_out: tuple[NDArray[np.float64], ...]
    folds: tuple[NDArray[np.intp], ...]
    used_base: bool


def silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def train(
    groups: Sequence[Group],
    base: Router | None = None,
    seed: int = 0,
    progress: Progress = silent,
    features: Sequence[Features] | None = None,
    fold_of: FoldOf = random_folds,
    embedding: SentenceEmbedding | None = None,
) -> Trained:
    """A router for all models of all groups, on top of `base` if there is one.

    A base that has seen these prompts would recite their answers in place of predicting them, so it is left out then;
    the result says which. `features` of the groups' prompts, where they are known already. `fold_of` says which
    prompts of a group are held out together. With an `embedding`, or where the base has one, experts read that too;
    given `features` then have it. Raises DataError where a source has too few labels.
    """
    _check(groups)
    progress("features", 0, 1)
    embedding = embedding or (base.embedding if base else None)
    found = features or [extract(group.prompts, embedding) for group in groups]
    digests = np.unique(np.concatenate([prompt_digests(group.prompts) for group in groups]))
    if base is not None and np.isin(digests, base.seen).mean() > _MAX_SEEN_SHARE:
        base = None
    signals = [_signals(base, part) for part in found]
    idf = base.text.idf if base else _stored(inverse_document_frequency(stack(found).counts))
    log_odds = [_log_odds(base, group) for group in groups]
    fitted = fit_layer(sources(groups, found, idf, signals, log_odds), seed, progress, fold_of)
    text = _quantized(fitted.text.weights, fitted.text.bias, idf)
    if base is None:
        router = Router((fitted.experts,), text, digests, embedding)
    else:
        layers, seen = (*base.layers, fitted.experts), np.union1d(base.seen, digests)
        router = Router(layers, _beside(base.text, text), seen, embedding)
    return Trained(router, tuple(groups), fitted.held_out, fitted.folds, base is not None)


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise DataError("there is nothing to train on")
    for group in groups:
        if len(group) < MIN_LABELS:
            raise DataError(f"{group.source} has {len(group)} labelled prompts; {MIN_LABELS} are needed")
        if np.isfinite(group.results).sum(axis=0).max() < views.MIN_LABELS:
            raise DataError(f"{group.source} has no model with {views.MIN_LABELS} labelled prompts")


def _signals(base: Router | None, features: Features) -> Floats:
    return base.signals(features) if base else np.zeros((len(features), 0), np.float32)


def _log_odds(base: Router | None, group: Group) -> Linear:
    if base is not None:
        return base.log_odds(group.models, group.source)
    return Linear(np.zeros((0, len(group.models)), np.float32), np.zeros(len(group.models), np.float32))


def _stored(idf: Floats) -> Floats:
    # Rounded as the artifact stores it, so that what is fitted is what serves.
    return idf.astype(np.float16).astype(np.float32)


def _quantized(weights: Floats, bias: Floats, idf: Floats) -> TextWeights:
    scale = np.maximum(np.abs(weights).max(axis=0), 1e-12) / 127
    return TextWeights(np.round(weights / scale).astype(np.int8), scale.astype(np.float32), bias, idf)


def _beside(base: TextWeights, new: TextWeights) -> TextWeights:
    weights = np.concatenate([base.weights, new.weights], axis=1)
    return TextWeights(weights, np.append(base.scale, new.scale), np.append(base.bias, new.bias), base.idf)
