"""Domains that training has never seen: how the router fares on them, and how fast it learns them from labels.

Domains are left out in a few batches, so that none of a batch helps another: harder than one at a time, and cheaper.
A learning curve tests on every prompt of its domain, a quarter at a time, with labels drawn from the other three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.router_world import PAIRS, Pair, Rows, World, console, summary
from router_models.data import Group
from router_models.drift import share_of
from router_models.errors import UnknownModelError
from router_models.evaluate import judge
from router_models.features import Features
from router_models.online_quantile import OnlineQuantile
from router_models.router import Candidate, Predictions, Router
from router_models.train import train

_NUM_FOLDS = 4
_LABELS = (100, 300, 1000)
_QUANTITATIVE = ("chemistry", "engineering", "math", "physics")


@dataclass(frozen=True, slots=True)
class Domain:
    """Some subsets of a source, all of them if none is named, and the pair to measure."""

    source: str
    subsets: tuple[str, ...]
    pair: Pair

    @property
    def name(self) -> str:
        return f"{self.source}/{'+'.join(self.subsets)}" if self.subsets else self.source

    def rows(self, group: Group) -> Rows:
        """Its prompts in its own group; none in any other."""
        if group.source != self.source:
            return np.zeros(0, np.intp)
        return np.flatnonzero(np.isin(group.subset, self.subsets)) if self.subsets else np.arange(len(group))


_LLMROUTER = PAIRS[6]
BATCHES: tuple[tuple[Domain, ...], ...] = (
    (
        Domain("routerarena", (), PAIRS[4]),
        Domain("llmrouter", ("gsm8k",), _LLMROUTER),
        Domain("llmrouter", ("math",), _LLMROUTER),
        Domain("mmlu_pro", ("math",), PAIRS[1]),
        Domain("mmlu_pro", _QUANTITATIVE, PAIRS[1]),
        Domain("zeroeval_math_l5", (), PAIRS[7]),
    ),
    (Domain("llmrouter", (), _LLMROUTER), Domain("zeroeval_crux", (), PAIRS[8])),
)


def unseen(world: World) -> list[dict[str, Any]]:
    """Each domain without labels of its own, and with more and more of them."""
    found = []
    for number, batch in enumerate(BATCHES):
        known = [domain for domain in batch if any(group.source == domain.source for group in world.groups)]
        base = _without(world, known, number) if known else None
        for domain in known:
            assert base is not None
            console.log(f"learning: {domain.name}")
            found.append({"domain": domain.name, "curve": _curve(world, domain, base)})
    return found


def share(world: World) -> list[dict[str, Any]]:
    """Promised and held share of strong calls on domains that were left out, in random order."""
    found = []
    for number, batch in enumerate(BATCHES):
        base = _without(world, batch, number)
        prior = base.predict(world.of("routellm_mmlu")[1], base.stand_ins()).need
        for domain in batch:
            group, features = world.of(domain.source)
            need = base.predict(features.take(domain.rows(group)), base.stand_ins()).need
            need = np.random.default_rng(0).permutation(need)
            for promised in (0.2, 0.5):
                online = OnlineQuantile(promised, prior)
                held = float(np.mean([online.decide(score) for score in need]))
                fixed = float(np.mean(need >= np.quantile(prior, 1 - promised)))
                row = {"domain": domain.name, "n": len(need), "promised": promised, "online": held, "fixed": fixed}
                found.append(row)
    return found


def _without(world: World, domains: Sequence[Domain], number: int) -> Router:
    left_out = [np.concatenate([domain.rows(group) for domain in domains]) for group in world.groups]
    kept = [np.setdiff1d(np.arange(len(g)), out) for g, out in zip(world.groups, left_out, strict=True)]
    return world.trained_on(kept, f"without batch {number}")


def _curve(world: World, domain: Domain, base: Router) -> list[dict[str, Any]]:
    group, features = world.of(domain.source)
    rows = np.intersect1d(domain.rows(group), group.rows_with(*domain.pair[1:]))
    order = np.random.default_rng(0).permutation(rows)
    fold = np.arange(len(order)) % _NUM_FOLDS
    pool = int(np.min([(fold != number).sum() for number in range(_NUM_FOLDS)]))
    found = [{"labels": 0, **_measured(group, features, domain, [(order, _unlabelled(base, features, order, domain))])}]
    for count in (count for count in (*_LABELS, pool) if count <= pool and (count != pool or count not in _LABELS)):
        parts = [
            (order[fold == k], _labelled(group, features, order[fold != k][:count], order[fold == k], domain, base))
            for k in range(_NUM_FOLDS)
        ]
        found.append({"labels": count, **_measured(group, features, domain, parts)})
    return found


def _unlabelled(base: Router, features: Features, rows: Rows, domain: Domain) -> Predictions:
    return _adapted(base, features, rows, _choices(base, domain.pair, domain.source))


def _labelled(group: Group, features: Features, labels: Rows, rows: Rows, domain: Domain, base: Router) -> Predictions:
    models = domain.pair[1:]
    part = group.take(labels)
    results = np.column_stack([part.of(model) for model in models])
    own = Group("own", part.ids, part.prompts, part.subset, models, results)
    router = train([own], base, features=[features.take(labels)]).router
    return _adapted(router, features, rows, _choices(router, domain.pair, "own"))


def _choices(router: Router, pair: Pair, source: str) -> Sequence[Sequence[Candidate]]:
    try:
        return router.candidates(pair[1:], source)
    except UnknownModelError:
        return router.stand_ins()


def _adapted(router: Router, features: Features, rows: Rows, choices: Sequence[Sequence[Candidate]]) -> Predictions:
    found = router.predict(features.take(rows), choices)
    return found.adapted(share_of(float(found.novelty.mean())))


def _measured(
    group: Group, features: Features, domain: Domain, parts: Sequence[tuple[Rows, Predictions]]
) -> dict[str, Any]:
    """Figures of all folds together; needs of different routers are compared by their ranks in their own folds."""
    rows = np.concatenate([rows for rows, _ in parts])
    ranks = [np.argsort(np.argsort(part.need, kind="stable")) / len(part.need) for _, part in parts]
    need = np.concatenate(ranks) if len(parts) > 1 else parts[0][1].need
    prob_right = np.concatenate([part.prob_right for _, part in parts])
    found = Predictions(prob_right, np.concatenate([part.novelty for _, part in parts]), need)
    taken, models = group.take(rows), domain.pair[1:]
    return summary(judge(found, taken, taken.pair(*models), features.take(rows), models, "unseen"))
