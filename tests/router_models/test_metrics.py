import numpy as np
import pytest

from router_models.metrics import (
    Pair,
    apgr,
    apgr_exact,
    apgr_standard_error,
    apgr_within,
    cpt_exact,
    cpt_routellm,
    exact_curve,
    expected_calibration_error,
    regret_to_oracle,
    reliability,
    routellm_curve,
)


def _pair(size: int = 4000, seed: int = 0) -> tuple[Pair, np.ndarray]:
    rng = np.random.default_rng(seed)
    strong, weak = (rng.random(size) < 0.8).astype(float), (rng.random(size) < 0.5).astype(float)
    return Pair(strong, weak), rng.random(size)


def test_a_random_order_recovers_half_of_the_gap() -> None:
    pair, score = _pair()
    assert apgr_exact(score, pair) == pytest.approx(0.5, abs=0.03)
    assert cpt_exact(exact_curve(score, pair), pair, 0.5) == pytest.approx(0.5, abs=0.05)


def test_equal_scores_are_the_straight_line_exactly() -> None:
    pair, _ = _pair()
    curve = exact_curve(np.ones(len(pair.strong)), pair)
    assert len(curve.share) == 2
    assert apgr(curve, pair) == pytest.approx(0.5)
    assert cpt_exact(curve, pair, 0.8) == pytest.approx(0.8)


def test_the_curve_of_four_prompts_by_hand() -> None:
    pair = Pair(np.array([1.0, 1, 1, 0]), np.array([0.0, 1, 0, 1]))
    curve = exact_curve(np.array([4.0, 3, 2, 1]), pair)
    assert curve.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.quality.tolist() == [0.5, 0.75, 0.75, 1.0, 0.75]
    assert curve.area() == pytest.approx((0.5 / 2 + 0.75 + 0.75 + 1.0 + 0.75 / 2) / 4)
    assert apgr(curve, pair) == pytest.approx((curve.area() - 0.5) / 0.25)
    assert cpt_exact(curve, pair, 1.0) == 0.25


def test_tied_prompts_count_as_in_random_order() -> None:
    pair = Pair(np.array([1.0, 0, 1, 1]), np.array([0.0, 0, 1, 0]))
    tied = np.array([2.0, 2, 1, 1])
    orders = [[4, 3, 2, 1], [3, 4, 2, 1], [4, 3, 1, 2], [3, 4, 1, 2]]
    mean = np.mean([apgr_exact(np.array(order, float), pair) for order in orders])
    assert apgr_exact(tied, pair) == pytest.approx(mean)


def test_knowing_the_outcomes_gives_more_than_one_and_no_regret_where_nothing_is_tied() -> None:
    pair, score = _pair()
    oracle = pair.strong - pair.weak
    assert apgr_exact(oracle, pair) > 1
    assert regret_to_oracle(score, pair) > 0.1
    assert 0 <= regret_to_oracle(oracle, pair) < regret_to_oracle(score, pair) / 2


def test_routellm_points_are_deciles_of_the_scores_and_the_last_sends_none() -> None:
    pair, _ = _pair(100)
    curve = routellm_curve(np.arange(100.0), pair)
    assert curve is not None
    np.testing.assert_allclose(curve.share, np.linspace(0, 1, 11), atol=0.011)
    assert curve.share[0] == 0.0
    assert curve.quality[0] == pair.weak.mean()
    assert curve.quality[-1] == pair.strong.mean()


def test_routellm_and_the_whole_curve_agree_on_many_prompts() -> None:
    pair, noise = _pair()
    score = pair.strong - pair.weak + 3 * noise
    curve = routellm_curve(score, pair)
    assert curve is not None
    assert apgr(curve, pair) == pytest.approx(apgr_exact(score, pair), abs=0.02)
    assert cpt_routellm(curve, pair, 0.5) == pytest.approx(cpt_exact(exact_curve(score, pair), pair, 0.5), abs=0.05)


def test_routellm_has_no_curve_where_scores_are_too_equal() -> None:
    pair, _ = _pair(100)
    assert routellm_curve(np.repeat([0.0, 1.0], 50), pair) is None


def test_the_error_shrinks_with_the_number_of_prompts() -> None:
    small, large = _pair(500), _pair(8000)
    errors = [apgr_standard_error(score, pair) for pair, score in (small, large)]
    assert errors[0] == pytest.approx(errors[1] * 4, rel=0.35)
    assert errors[1] < 0.02


def test_order_between_groups_does_not_count_within_them() -> None:
    pair, _ = _pair()
    group = np.where(pair.strong > pair.weak, "hard", "easy")
    by_group = (group == "hard").astype(float)
    assert apgr_exact(by_group, pair) > 0.9
    assert apgr_within(by_group, pair, group) == pytest.approx(0.5)


def test_models_of_equal_quality_leave_nothing_to_recover() -> None:
    same = Pair(np.array([1.0, 0]), np.array([0.0, 1]))
    assert np.isnan(apgr_exact(np.array([1.0, 2]), same))


def test_a_pair_needs_results() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Pair(np.zeros(0), np.zeros(0))


def test_calibration_error_is_the_distance_from_what_happened() -> None:
    probability, outcome = np.full(1000, 0.9), np.repeat([1.0, 0.0], [600, 400])
    assert expected_calibration_error(probability, outcome) == pytest.approx(0.3)
    assert reliability(probability, outcome) == [(pytest.approx(0.9), pytest.approx(0.6), 1000)]


def test_draws_from_the_predicted_probability_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(20_000)
    outcome = (rng.random(20_000) < probability).astype(float)
    assert expected_calibration_error(probability, outcome) < 0.02
    assert expected_calibration_error(np.ones(3), np.ones(3)) == 0.0
