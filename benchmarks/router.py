"""What the learned router is worth: every figure of its claims, cross-validated, in one document.

    python -m benchmarks.router --data FOLDER --out benchmarks/results/router.json

FOLDER has `prompts.parquet` and `outcomes.parquet`. Nothing is measured on a prompt that training has seen:

- known: every prompt by what was held out of it in one training on everything, five folds.
- fresh: a fifth of every source's prompts is held out of a training altogether; fewer prompts, and no doubt about it.
- left_out: as known, with whole subsets (subjects) in place of prompts; ordered within subsets as well as over all.
- unseen: whole domains are held out; then some hundreds of labels of their own are added on top of the rest.
- new_model: one model keeps 300 labels of the training fold, beside a partner that keeps all.
- share: the promised share of strong calls, held online on domains that were held out.
- acceptance: the acceptance of speculative decoding as a label that costs nothing (`benchmarks.router_acceptance`).
- coverage: how often 90 % intervals of off-policy estimates cover the truth, on logs simulated with 5 % exploration.
- shipped: the shipped artifact on the prompts that it did not learn from, since their licence is not an open one.
- latency: one decision, features included.

`--parts` names those to run; with `--out`, parts that the
file has of the same data and features stay in it. All take about half an hour on one core, most of it training six
routers. With `--embedding`, routers read the sentence embedding as well, and the prompts take ten minutes more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.environment import describe
from benchmarks.router_acceptance import measure as _acceptance
from benchmarks.router_domains import share, unseen
from benchmarks.router_world import (
    PAIRS,
    Pair,
    Rows,
    World,
    console,
    ece_floor,
    subset_folds,
    summary,
    without_twins,
)
from router_models import artifact
from router_models.data import MIN_LABELS, Group, data_hash, digest, read_tables
from router_models.embedding import SentenceEmbedding
from router_models.evaluate import Evaluation, evaluate
from router_models.features import extract
from router_models.held_out import evaluate_pair
from router_models.off_policy import Logged, doubly_robust, ips, predict_results
from router_models.prompt import Prompt
from router_models.router import Predictions, Router
from router_models.train import Trained, train

_NUM_FOLDS = 5
_NEW_MODEL: Pair = ("mmlu_pro", "Qwen1.5-72B-Chat", "Qwen1.5-7B-Chat")
_NEW_LABELS = 300


def main(
    data: Annotated[Path, typer.Option(help="folder with prompts.parquet and outcomes.parquet")],
    parts: Annotated[str | None, typer.Option(help="which figures, separated by commas; all if not given")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write after each part, and to keep other parts of")] = None,
    embedding: Annotated[bool, typer.Option("--embedding", help="routers read a sentence embedding too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON at the end")] = False,
) -> None:
    """Measure, tell the figures as they come, and print them all at the end."""
    groups = tuple(read_tables(data))
    reader = SentenceEmbedding.load() if embedding else None
    world = World(groups, tuple(extract(group.prompts, reader) for group in groups))
    about = {"data_hash": data_hash(groups)} | ({"embedding": reader.checksum} if reader else {})
    found = _earlier(out, about)
    for part in parts.split(",") if parts else STEPS:
        start = time.process_time()
        found[part] = {"environment": describe(), "figures": STEPS[part](world)}
        found[part]["cpu_s"] = time.process_time() - start
        console.print(part, found[part]["figures"])
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found))


def _earlier(out: Path | None, about: dict[str, str]) -> dict[str, Any]:
    """The document so far; one without parts if it was measured on other data or features."""
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    return document if {key: value for key, value in document.items() if key not in STEPS} == about else about


def _known(world: World) -> list[dict[str, Any]]:
    return _cross_fitted(world, train(world.groups, features=world.features))


def _left_out(world: World) -> list[dict[str, Any]]:
    return _cross_fitted(world, train(world.groups, features=world.features, fold_of=subset_folds))


def _cross_fitted(world: World, trained: Trained) -> list[dict[str, Any]]:
    return [
        _row(world, pair, *evaluate_pair(trained, pair[0], pair[1:], world.of(pair[0])[1])) for pair in world.pairs()
    ]


def _fresh(world: World) -> list[dict[str, Any]]:
    router, found = _without_a_fold(world), []
    for pair in world.pairs():
        group, features = world.of(pair[0])
        rows = np.intersect1d(_last_fold(group), group.rows_with(*pair[1:]))
        found.append(summary(evaluate(router, group.take(rows), *pair[1:], features.take(rows))))
    return found


def _without_a_fold(world: World) -> Router:
    kept = [np.setdiff1d(np.arange(len(group)), _last_fold(group)) for group in world.groups]
    return world.trained_on(kept, "four fifths")


def _last_fold(group: Group) -> Rows:
    return np.sort(np.random.default_rng(0).permutation(len(group))[: len(group) // _NUM_FOLDS])


def _row(world: World, pair: Pair, evaluation: Evaluation, found: Predictions) -> dict[str, Any]:
    extra: dict[str, Any] = {"ece_floor": ece_floor(found.prob_right)}
    if pair == PAIRS[0]:
        extra["without_twins"] = without_twins(world, pair, found)
    return summary(evaluation) | extra


def _new_model(world: World) -> dict[str, Any]:
    """Exact APGR with all and with 300 labels of the weak model; the gain is what is above one half."""
    group, features = world.of(_NEW_MODEL[0])
    out = _last_fold(group)
    kept = [np.setdiff1d(np.arange(len(g)), _last_fold(g)) for g in world.groups]
    poorer = _with_few_labels(group, _NEW_MODEL[2], kept[world.groups.index(group)])
    few = World(tuple(poorer if g is group else g for g in world.groups), world.features)
    routers = {"all": _without_a_fold(world), "300": few.trained_on(kept, "300 labels")}
    found = {
        name: evaluate(router, group.take(out), *_NEW_MODEL[1:], features.take(out)).router.apgr_exact or 0.5
        for name, router in routers.items()
    }
    gain = found["all"] - 0.5
    return {**found, "share_of_gain": (found["300"] - 0.5) / gain if gain else None}


def _with_few_labels(group: Group, model: str, kept: Rows) -> Group:
    results = group.results.copy()
    unknown = np.random.default_rng(0).permutation(kept)[_NEW_LABELS:]
    results[unknown, group.models.index(model)] = np.nan
    return Group(group.source, group.ids, group.prompts, group.subset, group.models, results)


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


def _shipped(world: World) -> list[dict[str, Any]]:
    router, found = artifact.load(artifact.DEFAULT).router, []
    for pair in world.pairs():
        group, features = world.of(pair[0])
        rows = group.rows_with(*pair[1:])
        new = rows[np.isin([digest(group.prompts[row]) for row in rows], router.seen, invert=True)]
        if len(new) >= MIN_LABELS:
            found.append(summary(evaluate(router, group.take(new), *pair[1:], features.take(new))))
    return found


def _latency(world: World, num_prompts: int = 1000) -> dict[str, float]:
    """Seconds of one decision with the shipped artifact, one at a time: p50, p90, p99."""
    router = artifact.load(artifact.DEFAULT).router
    prompts: list[Prompt] = [p for group in world.groups for p in group.prompts[:: max(1, len(group) // 200)]]
    choices = router.candidates(PAIRS[0][1:], PAIRS[0][0])
    taken = []
    for prompt in prompts[:num_prompts]:
        start = time.perf_counter()
        router.predict([prompt], choices)
        taken.append(time.perf_counter() - start)
    return dict(zip(("p50_s", "p90_s", "p99_s"), map(float, np.quantile(taken, [0.5, 0.9, 0.99])), strict=True))


STEPS: dict[str, Callable[[World], object]] = {
    "known": _known,
    "fresh": _fresh,
    "left_out": _left_out,
    "unseen": unseen,
    "new_model": _new_model,
    "share": share,
    "acceptance": lambda _: _acceptance(),
    "coverage": _coverage,
    "shipped": _shipped,
    "latency": _latency,
}


if __name__ == "__main__":
    typer.run(main)
