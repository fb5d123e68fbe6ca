import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router_models import baselines
from router_models.evaluate import Evaluation, evaluate, judge
from router_models.features import extract
from router_models.fit import random_folds
from router_models.held_out import evaluate_held_out
from router_models.metrics import apgr_exact
from router_models.report import Report, as_html, write
from router_models.router import Predictions
from router_models.train import Trained, train
from tests.router_models.tables import world

_PAIR = ("acme/Strong-1_5", "weak")


@pytest.fixture(scope="module")
def evaluation(trained: Trained) -> Evaluation:
    return evaluate(trained.router, world(800, seed=9), *_PAIR)


def test_every_baseline_is_in_the_table(evaluation: Evaluation) -> None:
    names = {"always_weak", "always_strong", "random", "length", "tfidf_logistic", "subset_mean", "shuffled_labels"}
    assert set(evaluation.baselines) == names | {"oracle"}
    figures = {name: ranking.apgr_exact for name, ranking in evaluation.baselines.items() if ranking}
    assert figures["random"] == pytest.approx(0.5, abs=0.04)
    assert figures["shuffled_labels"] == pytest.approx(0.5, abs=0.06)
    assert figures["subset_mean"] > 0.64  # type: ignore[operator]
    assert figures["oracle"] > figures["subset_mean"] + 0.1  # type: ignore[operator]
    assert figures["always_weak"] is None


def test_a_router_that_learnt_beats_its_baselines_and_is_recommended(evaluation: Evaluation, trained: Trained) -> None:
    group = world(250, seed=9)
    unnamed = replace(group, subset=np.full(len(group), ""))
    assert evaluate(trained.router, unnamed, *_PAIR).is_recommended
    assert evaluation.router.apgr_exact > 0.64  # type: ignore[operator]
    assert evaluation.margin > 3 * evaluation.margin_stderr  # type: ignore[operator]
    assert evaluation.n == 800


def test_turning_the_models_round_is_not_recommended(trained: Trained) -> None:
    found = evaluate(trained.router, world(400, seed=9), *reversed(_PAIR))
    assert not found.is_recommended
    assert "no better" in found.refusals[0]


def test_a_router_is_not_judged_by_a_few_prompts(trained: Trained) -> None:
    found = evaluate(trained.router, world(29, seed=9), *_PAIR)
    assert found.refusals == ["29 prompts are too few to judge by; 30 are needed"]


def test_a_router_that_words_or_the_subject_alone_outdo_is_not_recommended() -> None:
    group = world(800, seed=9)
    pair, features = group.pair(*_PAIR), extract(group.prompts)
    # Half as sure of the topic as one could be: better than chance and length, worse than what labels teach.
    rng = np.random.default_rng(0)
    gap = np.array([pair.take(group.subset == name).gap for name in group.subset])
    need = np.where(rng.random(800) < 0.5, gap, rng.permutation(gap)) + 0.01 * rng.random(800)
    half = np.full((800, 2), 0.5)
    found = judge(Predictions(half, np.zeros(800), need), group, pair, features, _PAIR, "known")
    assert found.router.apgr_exact > 0.53  # type: ignore[operator]
    assert [reason.split(":")[0] for reason in found.refusals] == [
        "does not beat tfidf_logistic",
        "does not beat subset_mean",
    ]
    assert "labels of this data" not in "".join(found.refusals)
    typical = judge(Predictions(half, np.zeros(800), need), group, pair, features, _PAIR, "typical")
    assert "labels of this data" in typical.refusals[0]


def test_a_router_that_length_outdoes_is_not_recommended() -> None:
    group = world(400, seed=9)
    lengths = np.array([len(prompt.text) for prompt in group.prompts], dtype=np.float64)
    group.results[:, group.models.index(_PAIR[0])] = 1.0
    group.results[:, group.models.index(_PAIR[1])] = lengths < np.median(lengths)
    need = lengths + np.random.default_rng(0).normal(size=400) * lengths.std()
    half = Predictions(np.full((400, 2), 0.5), np.zeros(400), need)
    found = judge(half, group, group.pair(*_PAIR), extract(group.prompts), _PAIR, "known")
    assert any(reason.startswith("does not beat length") for reason in found.refusals)


def test_a_router_of_noise_is_not_recommended(trained: Trained) -> None:
    group = world(600, seed=9)
    group.results[:] = np.random.default_rng(0).permutation(group.results)
    found = evaluate(trained.router, group, *_PAIR)
    assert abs(found.router.apgr_exact - 0.5) < 0.1  # type: ignore[operator]
    assert found.calibration.ece > 0.15


def test_unknown_models_are_stood_in_for_and_it_is_said(trained: Trained) -> None:
    group = world(300, seed=9)
    renamed = type(group)("world", group.ids, group.prompts, group.subset, ("big", "m", "t", "small"), group.results)
    assert evaluate(trained.router, renamed, "big", "small").ability == "typical"


def test_a_router_that_is_shown_its_own_lessons_is_not_recommended(trained: Trained, evaluation: Evaluation) -> None:
    group = trained.groups[0]
    found = evaluate(trained.router, group, *_PAIR)
    assert found.seen_share == 1.0
    assert "trained on 100% of these prompts" in found.refusals[-1]
    assert evaluation.seen_share < 0.02


def test_the_document_is_strict_json(evaluation: Evaluation) -> None:
    document = json.loads(json.dumps(evaluation.document(), allow_nan=False))
    assert {"n", "strong", "weak", "router", "baselines"} <= set(document)
    assert {"apgr", "apgr_exact", "apgr_stderr", "cpt50", "cpt80", "ece"} <= set(document["router"])


def test_the_training_report_is_of_held_out_prompts(trained: Trained) -> None:
    found = evaluate_held_out(trained, *_PAIR)
    assert [e.source for e in found] == ["world", "other"]
    new = evaluate(trained.router, world(1500, seed=9), *_PAIR).router.apgr_exact
    assert found[0].router.apgr_exact == pytest.approx(new, abs=0.08)
    assert evaluate_held_out(trained, "nobody", "weak") == []


def test_subjects_left_out_are_new_ground_to_the_router_and_to_its_baselines() -> None:
    group = world(300, seed=1)
    found = {}
    for name, fold_of in (
        ("prompts", random_folds),
        ("subjects", lambda given, seed: np.unique(given.subset, return_inverse=True)[1]),
    ):
        found[name] = evaluate_held_out(train([group], fold_of=fold_of), *_PAIR)[0]
    known, unknown = found["prompts"], found["subjects"]
    assert known.baselines["subset_mean"].apgr_exact > 0.6  # type: ignore[union-attr, operator]
    assert unknown.baselines["subset_mean"].apgr_exact == pytest.approx(0.5)  # type: ignore[union-attr]
    assert known.unknown_share < 0.1
    assert unknown.unknown_share > 0.9
    # Lengths say nothing in this world, and a router of one source with few subjects then goes by them.
    assert unknown.router.apgr_exact == pytest.approx(unknown.baselines["length"].apgr_exact, abs=0.02)  # type: ignore[union-attr]


def test_the_report_is_written_and_escapes_what_it_shows(evaluation: Evaluation, tmp_path: Path) -> None:
    report = Report("abc", 1, "f" * 64, "<script>alert(1)</script>", [evaluation])
    write(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert page.count("<svg") == 2
    assert "topology" in page
    assert json.loads((tmp_path / "report.json").read_text())["is_recommended"] is evaluation.is_recommended
    assert "Not recommended: does not beat tfidf_logistic" in page
    assert "Beats its baselines" in as_html(replace(report, evaluations=[replace(evaluation, refusals=[])]))
    assert as_html(report) == page


def test_an_empty_report_recommends_nothing() -> None:
    assert Report("abc", 1, "f", "", []).document()["is_recommended"] is False


def test_baselines_with_labels_do_not_see_the_label_they_predict() -> None:
    group = world(200, seed=9)
    pair, features = group.pair(*_PAIR), extract(group.prompts)
    before = baselines.tfidf_logistic(features, pair)
    pair.strong[11] = 1 - pair.strong[11]
    after = baselines.tfidf_logistic(features, pair)
    assert before is not None
    assert after is not None
    assert before[11] == after[11]
    assert not (before == after).all()


def test_baselines_say_when_they_cannot_be_made() -> None:
    group = world(60, seed=9)
    pair, features = group.pair(*_PAIR), extract(group.prompts)
    assert baselines.subset_mean(np.full(60, "one"), pair) is None
    assert baselines.tfidf_logistic(features.take(np.arange(20)), pair.take(np.arange(20))) is None


def test_length_is_the_length() -> None:
    group = world(60, seed=9)
    order = np.argsort(baselines.length(extract(group.prompts)))
    sizes = [len(group.prompts[i].text) for i in order]
    assert sizes == sorted(sizes)
    assert apgr_exact(baselines.random_scores(60, 0), group.pair(*_PAIR)) == pytest.approx(0.5, abs=0.2)
