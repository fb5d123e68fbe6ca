"""The routing tables in memory, the pairs of models that are compared on them, and one row of figures a pair."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from router_models.data import Group, find
from router_models.errors import DataError
from router_models.evaluate import Evaluation
from router_models.features import Features
from router_models.fit import random_folds
from router_models.metrics import apgr_exact, expected_calibration_error
from router_models.router import Predictions, Router
from router_models.train import train

Rows = NDArray[np.intp]
Pair = tuple[str, str, str]

PAIRS: tuple[Pair, ...] = (
    ("routellm_mmlu", "gpt-4-1106-preview", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    ("mmlu_pro", "Qwen1.5-72B-Chat", "Qwen1.5-7B-Chat"),
    ("mmlu_pro", "Mixtral-8x7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2"),
    ("mmlu_pro", "Meta-Llama-3_1-70B-Instruct", "Meta-Llama-3_1-8B-Instruct"),
    ("routerarena", "gemini-2.0-flash-001", "claude-3-haiku-20240307"),
    ("llmrouter", "llama-3.1-nemotron-51b-instruct", "llama-3.1-8b-instruct"),
    ("llmrouter", "llama-3.1-nemotron-51b-instruct", "mistral-7b-instruct-v0.3"),
    ("zeroeval_math_l5", "Qwen2.5-72B-Instruct", "Qwen2.5-3B-Instruct"),
    ("zeroeval_crux", "Qwen2.5-72B-Instruct", "Qwen2.5-7B-Instruct"),
)
_OPTION = re.compile(r"^[ \t]*\(?A[.)]", re.MULTILINE)
_STEM_LETTERS = 80
_NUM_FOLDS = 5
console = Console(stderr=True, width=120)


@dataclass(frozen=True, eq=False, slots=True)
class World:
    """All groups, with the features of their prompts, computed once. Routers that were trained are kept by name."""

    groups: tuple[Group, ...]
    features: tuple[Features, ...]
    routers: dict[str, Router] = field(default_factory=dict)

    def take(self, rows: Sequence[Rows]) -> World:
        """The given prompts of every group; groups with none of them are left out."""
        kept = [(g.take(r), f.take(r)) for g, f, r in zip(self.groups, self.features, rows, strict=True) if len(r)]
        return World(tuple(group for group, _ in kept), tuple(features for _, features in kept))

    def trained_on(self, rows: Sequence[Rows], name: str) -> Router:
        """A router of the given prompts of every group."""
        if name not in self.routers:
            console.log(f"training: {name}")
            part = self.take(rows)
            self.routers[name] = train(part.groups, features=part.features).router
        return self.routers[name]

    def of(self, source: str) -> tuple[Group, Features]:
        group = find(self.groups, source)
        return group, self.features[self.groups.index(group)]

    def pairs(self) -> Iterator[Pair]:
        """Those of PAIRS that have a prompt in common."""
        for pair in PAIRS:
            try:
                find(self.groups, pair[0]).rows_with(*pair[1:])
            except DataError:
                continue
            yield pair


def subset_folds(group: Group, seed: int) -> Rows:
    """A fold for each prompt, whole subsets together; by prompt where there are too few subsets."""
    names = np.unique(group.subset)
    if len(names) < _NUM_FOLDS:
        return random_folds(group, seed)
    fold = np.random.default_rng(seed).permutation(len(names)) % _NUM_FOLDS
    return fold[np.searchsorted(names, group.subset)]


def summary(found: Evaluation) -> dict[str, Any]:
    """What of an evaluation is worth a line."""
    names = ("apgr", "apgr_exact", "apgr_stderr", "apgr_within", "cpt50", "cpt80")
    within = {
        name: part.apgr_within
        for name, part in found.baselines.items()
        if part and name in ("length", "tfidf_logistic")
    }
    return {
        "source": found.source,
        "strong": found.strong_model,
        "weak": found.weak_model,
        "n": found.n,
        "ability": found.ability,
        **{name: getattr(found.router, name) for name in names},
        "regret_to_oracle": found.router.regret,
        "ece_strong": found.calibration.ece_strong,
        "ece_weak": found.calibration.ece_weak,
        "abstention_rate": found.abstention_rate,
        "mean_novelty": found.mean_novelty,
        "margin_over_length": found.margin,
        "margin_stderr": found.margin_stderr,
        "is_recommended": found.is_recommended,
        "baselines": {name: part.apgr_exact for name, part in found.baselines.items() if part},
        "baselines_within": within,
        "baselines_regret": {name: part.regret for name, part in found.baselines.items() if part},
    }


def ece_floor(prob_right: NDArray[np.float64], num_runs: int = 20) -> list[float]:
    """The calibration error that outcomes drawn from the very probabilities have: what the number of prompts allows."""
    rng = np.random.default_rng(0)
    return [
        float(
            np.mean(
                [
                    expected_calibration_error(column, (rng.random(len(column)) < column).astype(float))
                    for _ in range(num_runs)
                ]
            )
        )
        for column in prob_right.T
    ]


def without_twins(world: World, pair: Pair, found: Predictions) -> dict[str, Any]:
    """Exact APGR of the prompts whose question no other source has: MMLU-Pro is partly made of MMLU."""
    group, _ = world.of(pair[0])
    rows = group.rows_with(*pair[1:])
    others = {_stem(prompt.text) for other in world.groups if other is not group for prompt in other.prompts}
    alone = np.array([_stem(group.prompts[row].text) not in others for row in rows])
    results = group.take(rows).pair(*pair[1:]).take(alone)
    return {"n": int(alone.sum()), "apgr_exact": apgr_exact(found.need[alone], results)}


def _stem(text: str) -> str:
    """The last letters of the question before its options."""
    first = _OPTION.search(text)
    return re.sub(r"[^a-z0-9]", "", (text[: first.start()] if first else text).lower())[-_STEM_LETTERS:]
