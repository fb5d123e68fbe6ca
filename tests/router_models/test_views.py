import numpy as np
import pytest
import scipy.sparse as sp

from router_models.expert import Linear
from router_models.structure import FEATURE_NAMES
from router_models.views import LOG_CHARS, fit_forest, fit_length, fit_shape, fit_text, fit_transfer, read_text

_NUM_FEATURES = len(FEATURE_NAMES)


def _structure(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, _NUM_FEATURES)).astype(np.float32)


def test_length_is_a_line_over_the_length_alone() -> None:
    structure = _structure(200)
    target = np.column_stack([2 * structure[:, LOG_CHARS] + 1, -structure[:, LOG_CHARS]]).astype(np.float64)
    view = fit_length(structure, target)
    low, high = np.quantile(structure[:, LOG_CHARS], (0.005, 0.995))
    usual = (structure[:, LOG_CHARS] > low) & (structure[:, LOG_CHARS] < high)
    np.testing.assert_allclose(view.predict(structure)[usual], target[usual], atol=0.15)
    other = structure.copy()
    other[:, np.arange(_NUM_FEATURES) != LOG_CHARS] += 5
    np.testing.assert_array_equal(view.predict(other), view.predict(structure))


def test_a_line_is_not_drawn_beyond_what_was_seen() -> None:
    structure = _structure(200)
    target = structure[:, :1].astype(np.float64)
    far = structure[:1] + 100
    for fit in (fit_length, fit_shape):
        assert fit(structure, target).predict(far)[0, 0] <= fit(structure, target).predict(structure).max() + 2


def test_the_shape_finds_what_a_hundred_labels_can_tell() -> None:
    structure = _structure(100)
    target = structure[:, [3]] * 0.8 + np.random.default_rng(1).normal(size=(100, 1)) * 0.6
    new = _structure(1000, seed=2)
    assert np.corrcoef(fit_shape(structure, target).predict(new)[:, 0], new[:, 3])[0, 1] > 0.5


def test_rows_that_are_unknown_of_a_factor_are_not_learnt_from() -> None:
    structure = _structure(300)
    target = np.column_stack([structure[:, 0], structure[:, 1]]).astype(np.float64)
    target[150:, 1] = np.nan
    for fit in (fit_length, fit_shape, fit_transfer):
        both, alone = fit(structure, target).predict(structure), fit(structure, target[:, :1]).predict(structure)
        np.testing.assert_allclose(both[:, :1], alone, atol=1e-4)
        assert np.isfinite(both).all()


def test_what_labels_do_not_tell_stays_as_it_was_at_the_start() -> None:
    signals = _structure(200)
    start = Linear(np.eye(_NUM_FEATURES, 1, dtype=np.float32), np.zeros(1, np.float32))
    noise = np.random.default_rng(1).normal(size=(200, 1))
    kept = fit_transfer(signals, start.predict(signals) + noise, start).predict(signals)
    assert np.corrcoef(kept[:, 0], signals[:, 0])[0, 1] > 0.95
    turned = fit_transfer(signals, -start.predict(signals).astype(np.float64), start).predict(signals)
    assert np.corrcoef(turned[:, 0], signals[:, 0])[0, 1] < -0.9


def test_words_are_read_as_they_were_fitted() -> None:
    rng = np.random.default_rng(0)
    rows = sp.csr_matrix(rng.random((200, 30)) < 0.2, dtype=np.float32)
    target = np.asarray(rows[:, [4]].todense(), dtype=np.float64) * 3
    found = read_text(fit_text(rows, target), rows)
    assert np.corrcoef(found[:, 0], target[:, 0])[0, 1] > 0.8


@pytest.mark.parametrize("num_rows", [60, 1600])
def test_few_rows_grow_small_trees(num_rows: int) -> None:
    structure = _structure(num_rows)
    forest = fit_forest(structure, structure[:, :1].astype(np.float64), seed=0)
    assert len(forest.roots) == (80 if num_rows < 1500 else 150)
