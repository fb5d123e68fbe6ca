"""An artifact asked about this fleet's candidates."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from gateway.auto.live_router import LiveRouter, load_router
from gateway.auto_config import AutoConfig
from router_models.errors import CorruptArtifactError, DataError
from tests.gateway.auto_world import EASY, HARD, auto_config, auto_fields, candidate, damaged, prompt
from tests.router_models.tables import world, write_tables


def _mean_need(router: LiveRouter, words: list[str]) -> float:
    return float(np.mean([router.score(prompt(words, i)).need for i in range(10)]))


def test_hard_prompts_need_the_strong_model_more(router: Path) -> None:
    live = load_router(router, auto_config(router))
    assert live.known == ("acme/Strong-1_5", "weak")
    assert not live.is_stand_in
    assert _mean_need(live, HARD) > _mean_need(live, EASY) + 0.2
    weak, strong = live.score(prompt(HARD)).prob_right
    assert weak is not None
    assert strong is not None
    assert strong > weak


def test_features_give_the_same_score_as_the_prompt(router: Path) -> None:
    live = load_router(router, auto_config(router))
    score = live.score(prompt(HARD))
    assert live.score_features(score.features).prob_right == score.prob_right


def test_candidates_between_the_extremes_are_asked_about_where_they_are_known(router: Path) -> None:
    names = [("weak", "weak"), ("mid", "middle"), ("new", "nobody"), ("strong", "acme/Strong-1_5")]
    prices = {"weak": 1.0, "mid": 2.0, "new": 3.0, "strong": 4.0}

    def scored(*models: str) -> tuple[float | None, ...]:
        candidates = [candidate(model, prices[model], dict(names)[model]) for model in models]
        auto = AutoConfig.model_validate(auto_fields(router) | {"candidates": candidates})
        return load_router(router, auto).score(prompt(HARD)).prob_right

    known = scored("weak", "mid", "strong")
    assert [p is None for p in known] == [False, False, False]
    assert known[0] < known[1] < known[2]  # type: ignore[operator]
    assert [p is None for p in scored("weak", "new", "strong")] == [False, True, False]


def test_typical_models_stand_in_for_unknown_ones(router: Path) -> None:
    candidates = [candidate("a", 1.0), candidate("b", 2.0), candidate("c", 3.0)]
    live = load_router(router, AutoConfig.model_validate(auto_fields(router) | {"candidates": candidates}))
    assert (live.is_stand_in, live.known) == (True, ())
    cheap, middle, dear = live.score(prompt(HARD)).prob_right
    assert middle is None
    assert dear > cheap  # type: ignore[operator]


def test_usual_needs_are_like_the_needs_of_usual_prompts(router: Path) -> None:
    live = load_router(router, auto_config(router))
    group = world(60, seed=9)
    found = [live.score(p).need for p in group.prompts]
    assert np.mean(live.usual_needs()) == pytest.approx(np.mean(found), abs=0.1)


def test_a_bound_is_calibrated_on_prompts_that_the_router_has_not_seen(router: Path, tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(300, seed=1), world(400, seed=5, source="new"))
    group = world(300, seed=6)
    gaps = group.of("acme/Strong-1_5") - group.of("weak")
    thresholds = []
    for loss in (0.01, 0.3):
        goal = {"kind": "bound", "max_quality_loss": loss}
        live = load_router(router, auto_config(router, {"goal": goal}, calibration=str(data)))
        assert live.safe_threshold is not None
        thresholds.append(live.safe_threshold)
        is_strong = np.array([live.score(prompt).need >= thresholds[-1] for prompt in group.prompts])
        assert np.mean(np.where(is_strong, 0.0, gaps)) <= loss + 0.03
    assert -np.inf <= thresholds[0] < thresholds[1] < np.inf


def test_calibration_data_without_the_models_is_an_error(router: Path, tmp_path: Path) -> None:
    data = write_tables(tmp_path, world(60, seed=5, models=("weak", "tiny")))
    auto = auto_config(router, {"goal": {"kind": "bound", "max_quality_loss": 0.1}}, calibration=str(data))
    with pytest.raises(DataError, match=r"both acme/Strong-1_5 and weak"):
        load_router(router, auto)


def test_a_damaged_artifact_is_an_error(router: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="checksum"):
        load_router(damaged(router, tmp_path / "damaged"), auto_config(router))
    shutil.rmtree(tmp_path / "damaged")
    with pytest.raises(CorruptArtifactError, match="No such file"):
        load_router(tmp_path / "damaged", auto_config(router))
