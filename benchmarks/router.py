"""What the learned router is worth: every figure of its claims, cross-validated.

    python -m benchmarks.router --data FOLDER --json

FOLDER has `prompts.parquet` and `outcomes.parquet`. Nothing is measured on a prompt that training has seen:

- known: of every source one fold of prompts is held out, a router is trained on the rest and measured on that fold.
- left out: the same with whole subsets (subjects) in place of prompts; ordered within subsets as well as over all.
- unseen: whole sources are held out; then some hundreds of labels of their own are added on top of the rest.
- new model: one model keeps 300 labels of the training fold, beside a partner that keeps all.
- share: the promised share of strong calls, held online on a source that was held out.
- coverage: how often 90 % intervals of off-policy estimates cover the truth, on logs simulated with 5 % exploration.
- latency: one decision, features included.

Figures of all folds are pooled before they are computed. `--parts` names those to run: all take about an hour on two
cores, most of it training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.environment import describe
from router_models import artifact
from router_models.data import Group, data_hash, find, read_tables
from router_models.errors import DataError
from router_models.evaluate import Evaluation, evaluate, judge
from router_models.features import Features, extract
from router_models.off_policy import Logged, doubly_robust, ips, predict_results
from router_models.online_quantile import OnlineQuantile
from router_models.prompt import Prompt
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
    ("zeroeval_math_l5", "Qwen2.5-72B-Instruct", "Qwen2.5-3B-Instruct"),
    ("zeroeval_crux", "Qwen2.5-72B-Instruct", "Qwen2.5-7B-Instruct"),
)
PARTS = ("known", "left_out", "unseen", "new_model", "share", "coverage", "latency")
_NUM_FOLDS = 5
_NEW_MODEL: Pair = ("mmlu_pro", "Qwen1.5-72B-Chat", "Qwen1.5-7B-Chat")
_OWN_LABELS = (0, 100, 300, 1000)
_MATHEMATICS = (("mmlu_pro", "math"), ("llmrouter", "gsm8k"), ("llmrouter", "math"))
_console = Console(stderr=True, width=120)


@dataclass(frozen=True, eq=False, slots=True)
class World:
    """All groups, with the features of their prompts, computed once."""

    groups: tuple[Group, ...]
    features: tuple[Features, ...]

    def take(self, rows: Sequence[Rows]) -> World:
        kept = [(g.take(r), f.take(r)) for g, f, r in zip(self.groups, self.features, rows, strict=True) if len(r)]
        return World(tuple(group for group, _ in kept), tuple(features for _, features in kept))

    def train(self, base: Router | None = None) -> Router:
        return train(self.groups, base, features=self.features, progress=_progress).router

    def of(self, source: str) -> tuple[Group, Features]:
        group = find(self.groups, source)
        return group, self.features[self.groups.index(group)]


def main(
    data: Annotated[Path, typer.Option(help="folder with prompts.parquet and outcomes.parquet")],
    parts: Annotated[str, typer.Option(help="which figures, separated by commas")] = ",".join(PARTS),
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON at the end")] = False,
) -> None:
    """Measure, tell the figures as they come, and print them all at the end."""
    groups = tuple(read_tables(data))
    world = World(groups, tuple(extract(group.prompts) for group in groups))
    steps: dict[str, Callable[[World], object]] = {
        "known": lambda w: _cross_validated(w, _random_folds),
        "left_out": lambda w: _cross_validated(w, _subset_folds),
        "unseen": _unseen,
        "new_model": _new_model,
        "share": _share,
        "coverage": _coverage,
        "latency": _latency,
    }
    found: dict[str, object] = {"environment": describe(), "data_hash": data_hash(groups)}
    for part in parts.split(","):
        found[part] = steps[part](world)
        _console.print(part, found[part])
    if as_json:
        print(json.dumps(found))


def _random_folds(group: Group) -> Rows:
    return np.random.default_rng(0).permutation(len(group)) % _NUM_FOLDS


def _subset_folds(group: Group) -> Rows:
    """A fold for each prompt, whole subsets together; -1, always trained on, where there are too few subsets."""
    names = np.unique(group.subset)
    if len(names) < _NUM_FOLDS:
        return np.full(len(group), -1)
    fold = dict(zip(np.random.default_rng(0).permutation(names), np.arange(len(names)) % _NUM_FOLDS, strict=True))
    return np.array([fold[name] for name in group.subset])


def _cross_validated(world: World, folds_of: Callable[[Group], Rows]) -> list[dict[str, Any]]:
    folds = [folds_of(group) for group in world.groups]
    answers: dict[Pair, list[tuple[Rows, Predictions]]] = {}
    for number in range(_NUM_FOLDS):
        router = world.take([np.flatnonzero(fold != number) for fold in folds]).train()
        for pair in _pairs(world):
            group, features = world.of(pair[0])
            known = group.rows_with(*pair[1:])
            rows = known[folds[world.groups.index(group)][known] == number]
            if len(rows):
                found = router.predict(features.take(rows), router.candidates(pair[1:], pair[0]))
                answers.setdefault(pair, []).append((rows, found))
    return [_summary(_pooled(world, pair, parts)) for pair, parts in answers.items()]


def _pooled(world: World, pair: Pair, parts: Sequence[tuple[Rows, Predictions]]) -> Evaluation:
    group, features = world.of(pair[0])
    rows = np.concatenate([rows for rows, _ in parts])
    found = Predictions(
        np.concatenate([part.prob_right for _, part in parts]),
        np.concatenate([part.novelty for _, part in parts]),
        np.concatenate([part.need for _, part in parts]),
    )
    taken = group.take(rows)
    return judge(found, taken, taken.pair(*pair[1:]), features.take(rows), pair[1:], "known")


def _pairs(world: World) -> Iterable[Pair]:
    for pair in PAIRS:
        try:
            find(world.groups, pair[0]).rows_with(*pair[1:])
        except DataError:
            continue
        yield pair


def _summary(found: Evaluation) -> dict[str, Any]:
    baselines = {name: part.apgr_exact for name, part in found.baselines.items() if part}
    within = {
        name: part.apgr_within
        for name, part in found.baselines.items()
        if part and name in ("length", "tfidf_logistic")
    }
    router = {
        key: getattr(found.router, key)
        for key in ("apgr", "apgr_exact", "apgr_stderr", "apgr_within", "cpt50", "cpt80")
    }
    calibration = {"ece_strong": found.calibration.ece_strong, "ece_weak": found.calibration.ece_weak}
    return {
        "source": found.source,
        "strong": found.strong_model,
        "weak": found.weak_model,
        "n": found.n,
        "ability": found.ability,
        **router,
        **calibration,
        "abstention_rate": found.abstention_rate,
        "margin_over_length": found.margin,
        "margin_stderr": found.margin_stderr,
        "baselines": baselines,
        "baselines_within": within,
    }


def _unseen(world: World) -> list[dict[str, Any]]:
    """Domains that training has never seen, alone and with labels of their own."""
    return [_curve_of(world, source, subset) for source, subset in _domains(world)]


def _domains(world: World) -> list[tuple[str, str | None]]:
    sources = {group.source for group in world.groups}
    whole: list[tuple[str, str | None]] = [(pair[0], None) for pair in PAIRS[4:] if pair[0] in sources]
    return [*whole, *((source, subset) for source, subset in _MATHEMATICS if source in sources)]


def _curve_of(world: World, source: str, subset: str | None) -> dict[str, Any]:
    group, features = world.of(source)
    pair = next(pair for pair in PAIRS if pair[0] == source)
    own = group.rows_with(*pair[1:])
    own = own if subset is None else own[group.subset[own] == subset]
    rest = world.take([_without(g, own, g is group, subset is None) for g in world.groups])
    base = rest.train()
    order = np.random.default_rng(0).permutation(own)
    test, pool = order[: len(order) // 3], order[len(order) // 3 :]
    found = []
    for count in (count for count in _OWN_LABELS if count <= len(pool)):
        router = base if count == 0 else _with_own(group, features, pool[:count], pair, base)
        expert = source if count == 0 else "own"
        measured = evaluate(router, group.take(test), *pair[1:], features.take(test), expert)
        found.append({"labels": count, **_summary(measured)})
    return {"source": source, "subset": subset, "curve": found}


def _without(group: Group, own: Rows, is_own: bool, is_whole: bool) -> Rows:
    if not is_own:
        return np.arange(len(group))
    return np.zeros(0, np.intp) if is_whole else np.setdiff1d(np.arange(len(group)), own)


def _with_own(group: Group, features: Features, rows: Rows, pair: Pair, base: Router) -> Router:
    part = group.take(rows)
    labelled = Group("own", part.ids, part.prompts, part.subset, pair[1:], np.column_stack([*map(part.of, pair[1:])]))
    return train([labelled], base, features=[features.take(rows)]).router


def _new_model(world: World) -> dict[str, Any]:
    """Exact APGR with all and with 300 labels of the weak model; the gain is what is above one half."""
    group, features = world.of(_NEW_MODEL[0])
    fold = _random_folds(group)
    kept, out = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    everything = world.take([kept if g is group else np.arange(len(g)) for g in world.groups])
    results = group.take(kept).results.copy()
    unknown = np.random.default_rng(0).permutation(len(kept))[300:]
    results[unknown, group.models.index(_NEW_MODEL[2])] = np.nan
    few = group.take(kept)
    poorer = Group(few.source, few.ids, few.prompts, few.subset, few.models, results)
    groups = tuple(poorer if g.source == group.source else g for g in everything.groups)
    routers = {"full": everything.train(), "300": World(groups, everything.features).train()}
    found = {
        name: evaluate(router, group.take(out), *_NEW_MODEL[1:], features.take(out)).router.apgr_exact or 0.5
        for name, router in routers.items()
    }
    return {**found, "share_of_gain": (found["300"] - 0.5) / (found["full"] - 0.5)}


def _share(world: World) -> list[dict[str, Any]]:
    """Promised and held share of strong calls on sources that were held out, in random order."""
    found = []
    for source, _ in (domain for domain in _domains(world) if domain[1] is None):
        group, features = world.of(source)
        router = world.take([np.zeros(0, np.intp) if g is group else np.arange(len(g)) for g in world.groups]).train()
        need = router.predict(features, router.stand_ins()).need
        need = np.random.default_rng(0).permutation(need)
        prior = router.predict(world.of("mmlu_pro")[1], router.stand_ins()).need
        for share in (0.2, 0.5):
            online = OnlineQuantile(share, prior)
            held = float(np.mean([online.decide(score) for score in need]))
            fixed = float(np.mean(need >= np.quantile(prior, 1 - share)))
            found.append({"source": source, "n": len(need), "promised": share, "online": held, "fixed": fixed})
    return found


def _coverage(world: World, num_runs: int = 100, exploration: float = 0.05) -> dict[str, Any]:
    """How many of the runs' intervals hold the true quality of one policy, from logs of another one."""
    group, features = world.of(PAIRS[0][0])
    results = np.column_stack([group.of(model) for model in PAIRS[0][:0:-1]])
    length = features.structure[:, 0] > np.median(features.structure[:, 0])
    names = features.structure[:, 2] > np.median(features.structure[:, 2])
    target = np.column_stack([~names, names]).astype(float)
    truth = float(np.mean(np.sum(target * results, axis=1)))
    logging = np.where(length[:, None], [exploration / 2, 1 - exploration / 2], [1 - exploration / 2, exploration / 2])
    covered = {"ips": 0, "doubly_robust": 0}
    widths: dict[str, list[float]] = {"ips": [], "doubly_robust": []}
    for seed in range(num_runs):
        rng = np.random.default_rng(seed)
        rows = rng.integers(len(group), size=len(group))
        action = (rng.random(len(rows)) < logging[rows, 1]).astype(np.intp)
        log = Logged(action, logging[rows, action], results[rows, action])
        inputs = features.structure[rows].astype(np.float64)
        estimates = {
            "ips": ips(log, target[rows]),
            "doubly_robust": doubly_robust(log, target[rows], predict_results(log, inputs, 2)),
        }
        for name, estimate in estimates.items():
            covered[name] += estimate.low <= truth <= estimate.high
            widths[name].append(estimate.high - estimate.low)
    return {"runs": num_runs, "covered": covered, "width": {name: float(np.mean(w)) for name, w in widths.items()}}


def _latency(world: World, num_prompts: int = 1000) -> dict[str, float]:
    """Seconds of one decision with the shipped artifact: p50, p90, p99."""
    router = artifact.load(artifact.DEFAULT).router
    prompts: list[Prompt] = [p for group in world.groups for p in group.prompts[:: max(1, len(group) // 200)]]
    choices = router.candidates(PAIRS[0][1:], PAIRS[0][0])
    taken = []
    for prompt in prompts[:num_prompts]:
        start = time.perf_counter()
        router.predict([prompt], choices)
        taken.append(time.perf_counter() - start)
    return dict(zip(("p50_s", "p90_s", "p99_s"), map(float, np.quantile(taken, [0.5, 0.9, 0.99])), strict=True))


def _progress(stage: str, done: int, total: int) -> None:
    _console.log(f"{stage} ({done}/{total})")


if __name__ == "__main__":
    typer.run(main)
