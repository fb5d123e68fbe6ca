import numpy as np
import pytest

from router_models.ability import fit_ability, typical
from router_models.metrics import expected_calibration_error


def _draw(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=(size, 3))
    right = 1 / (1 + np.exp(-(difficulty @ [1.5, -0.5, 0.0] + 0.7)))
    return difficulty, (rng.random(size) < right).astype(float), right


def test_some_hundreds_of_labels_place_a_model() -> None:
    difficulty, results, _ = _draw(300)
    new, _, right = _draw(4000, seed=1)
    ability = fit_ability(difficulty, results)
    assert np.corrcoef(ability.prob_right(new), right)[0, 1] > 0.97
    assert ability.num_labels == 300


def test_probabilities_are_calibrated_on_new_prompts() -> None:
    difficulty, results, _ = _draw(3000)
    new, outcomes, _ = _draw(4000, seed=1)
    assert expected_calibration_error(fit_ability(difficulty, results).prob_right(new), outcomes) < 0.04


def test_a_difficulty_that_predicts_nothing_is_ignored() -> None:
    difficulty, results, _ = _draw(3000)
    noise = np.random.default_rng(2).normal(size=difficulty.shape)
    ability = fit_ability(noise, results)
    assert np.abs(ability.discrimination).max() < 0.15
    assert ability.prob_right(noise).mean() == pytest.approx(results.mean(), abs=0.01)


def test_unknown_results_are_not_labels() -> None:
    difficulty, results, _ = _draw(500)
    half = results.copy()
    half[250:] = np.nan
    assert (
        fit_ability(difficulty, half).discrimination == fit_ability(difficulty[:250], results[:250]).discrimination
    ).all()


def test_shares_of_a_right_answer_count_as_shares() -> None:
    difficulty, _, right = _draw(2000)
    ability = fit_ability(difficulty, right)
    assert np.corrcoef(ability.prob_right(difficulty), right)[0, 1] > 0.99


def test_a_model_that_was_never_wrong_is_not_perfect() -> None:
    ability = fit_ability(np.zeros((8, 2)), np.ones(8))
    assert ability.prob_right(np.zeros((1, 2)))[0] == pytest.approx(0.9)
    assert fit_ability(np.zeros((0, 2)), np.zeros(0)).prob_right(np.zeros((1, 2)))[0] == pytest.approx(0.5)


def test_the_typical_model_lies_between_those_it_stands_for() -> None:
    difficulty, results, _ = _draw(500)
    good, bad = fit_ability(difficulty, results), fit_ability(difficulty, 1 - results)
    assert np.abs(typical([good, bad]).discrimination).max() < 1e-3


def test_a_few_unlucky_labels_do_not_turn_a_slope_round() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(60, 1))
    results = (rng.random(60) < 1 / (1 + np.exp(-2 * factors[:, 0]))).astype(float)
    # What predictions from sixty labels look like where the true relation is weak: worse than none.
    difficulty = 0.3 * (rng.normal(size=(60, 1)) - factors)
    assert fit_ability(difficulty, results).discrimination[0] < 0
    assert (
        fit_ability(difficulty, results, factors).discrimination[0] > fit_ability(difficulty, results).discrimination[0]
    )
    unrelated = 0.3 * rng.normal(size=(60, 1))
    assert fit_ability(unrelated, results, factors).discrimination[0] > 0.5


def test_with_thousands_of_labels_the_expectation_hardly_counts() -> None:
    difficulty, results, _ = _draw(8000)
    free, expected = fit_ability(difficulty, results), fit_ability(difficulty, results, -difficulty)
    np.testing.assert_allclose(free.discrimination, expected.discrimination, atol=0.06)


def test_a_difficulty_counts_the_same_in_any_unit() -> None:
    difficulty, results, _ = _draw(300)
    plain, large = fit_ability(difficulty, results), fit_ability(difficulty * 50, results)
    np.testing.assert_allclose(plain.discrimination, large.discrimination * 50, rtol=1e-4)
