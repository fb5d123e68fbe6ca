import numpy as np
import pytest

from router_models.factors import factors, loadings


def _results(num_prompts: int, num_models: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ease = rng.normal(size=num_prompts)
    right = 1 / (1 + np.exp(-(ease[:, None] + np.linspace(-1, 1, num_models))))
    return (rng.random((num_prompts, num_models)) < right).astype(float), ease


def test_the_first_factor_of_many_models_is_how_easy_a_prompt_is() -> None:
    results, ease = _results(600, 20)
    found = factors(results)
    assert np.corrcoef(found[:, 0], ease)[0, 1] > 0.85
    assert abs(np.corrcoef(results[:, 3], ease)[0, 1]) < 0.6
    assert found.shape == (600, 2)


def test_factors_are_standardised_and_more_with_more_prompts() -> None:
    found = factors(_results(3000, 20)[0])
    assert found.shape == (3000, 8)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(found.std(axis=0), 1)


def test_few_models_are_their_own_factors() -> None:
    results, _ = _results(100, 2)
    found = factors(results)
    assert found.shape == (100, 2)
    assert np.corrcoef(found[:, 1], results[:, 1])[0, 1] == pytest.approx(1.0)


def test_unknown_results_stay_unknown_where_every_prompt_has_only_some() -> None:
    results, _ = _results(400, 4)
    taken = np.random.default_rng(1).integers(4, size=400)
    results[np.arange(4) != taken[:, None]] = np.nan
    found = factors(results)
    assert (np.isnan(found) == np.isnan(results)).all()


def test_a_model_with_few_answers_does_not_disturb_the_factors_of_the_others() -> None:
    results, _ = _results(600, 20)
    with_new = np.column_stack([results, np.full(600, np.nan)])
    with_new[:50, -1] = 1.0
    np.testing.assert_allclose(factors(with_new), factors(results))


@pytest.mark.parametrize("num_models", [1, 20])
def test_models_that_are_always_right_are_a_constant_factor(num_models: int) -> None:
    assert (factors(np.ones((40, num_models))) == 0).all()


@pytest.mark.parametrize("num_models", [2, 20])
def test_factors_are_made_up_of_results_by_their_loadings(num_models: int) -> None:
    results, _ = _results(900, num_models)
    found = factors(results)
    again = (results - results.mean(axis=0)) @ loadings(results, found)
    np.testing.assert_allclose(again, found, atol=1e-6)
