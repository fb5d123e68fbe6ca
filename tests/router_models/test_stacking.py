import numpy as np

from router_models.expert import VIEWS
from router_models.stacking import fit_mix, folds, held_out


def _views(num_rows: int, good: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every view is noise but one, which knows half of the target."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(num_rows, 1))
    views = rng.normal(size=(len(VIEWS), num_rows, 1)) * 0.3
    views[VIEWS.index(good)] = 0.5 * target + rng.normal(size=(num_rows, 1)) * 0.5
    return views, target


def test_folds_are_even_and_seeded() -> None:
    fold = folds(103, seed=1)
    assert np.bincount(fold).tolist() == [21, 21, 21, 20, 20]
    assert (fold == folds(103, seed=1)).all()
    assert len(np.unique(folds(3, seed=0))) == 3


def test_no_row_is_predicted_by_a_model_that_saw_it() -> None:
    fold, target = folds(40, seed=0), np.zeros((40, 1))
    seen: dict[int, set[int]] = {}

    def predict(kept: np.ndarray, out: np.ndarray) -> np.ndarray:
        seen.update({int(row): set(kept.tolist()) for row in out})
        return np.ones((len(out), 1))

    assert held_out(fold, target, predict).sum() == 40
    assert all(row not in kept for row, kept in seen.items())


def test_with_many_labels_the_view_that_predicts_has_the_weight() -> None:
    weights = fit_mix(*_views(20_000, "text")).weights[:, 0]
    assert VIEWS[int(np.argmax(weights))] == "text"
    assert weights[VIEWS.index("text")] > 0.6
    assert (weights >= 0).all()


def test_with_few_labels_the_simple_views_have_it() -> None:
    few, many = (fit_mix(*_views(size, "trees")).weights[:, 0] for size in (30, 20_000))
    simple = [VIEWS.index("shape"), VIEWS.index("length")]
    assert few[simple].sum() > 0.5
    assert many[simple].sum() < 0.1


def test_on_top_of_another_router_what_it_says_counts_before_any_label() -> None:
    views, target = _views(30, "trees")
    transfer = VIEWS.index("transfer")
    alone, on_top = (fit_mix(views, target, is_on_top).weights[transfer, 0] for is_on_top in (False, True))
    assert on_top > alone + 0.2


def test_difficulties_have_mean_zero_and_the_size_of_what_is_known() -> None:
    views, target = _views(20_000, "text")
    difficulty = fit_mix(views, target).of(views)[:, 0]
    assert abs(difficulty.mean()) < 1e-9
    assert 0.4 < difficulty.std() < 0.9
    # The least squares slope of the truth on the difficulty is one: neither too bold nor too shy.
    assert abs(np.polyfit(difficulty, target[:, 0], 1)[0] - 1) < 0.1


def test_unknown_targets_do_not_count() -> None:
    views, target = _views(2000, "shape")
    part = target.copy()
    part[1000:] = np.nan
    np.testing.assert_allclose(fit_mix(views, part).weights, fit_mix(views[:, :1000], target[:1000]).weights, atol=1e-9)
