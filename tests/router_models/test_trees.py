import numpy as np
import pytest

from router_models.trees import Forest, TreeSettings, grow


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(700, 6)).astype(np.float32)
    return features, np.column_stack([np.sin(2 * features[:, 0]) + features[:, 1], features[:, 2] ** 2])


def _forest() -> tuple[Forest, list[object], np.ndarray, np.ndarray]:
    features, target = _data()
    models = [grow(features, column, TreeSettings(num_trees=30), seed=1) for column in target.T]
    return Forest.of(models), models, features, target


def test_arrays_predict_what_scikit_learn_does() -> None:
    forest, models, features, _ = _forest()
    expected = np.column_stack([model.predict(features) for model in models])  # type: ignore[attr-defined]
    np.testing.assert_allclose(forest.predict(features), expected, atol=1e-5)


def test_values_at_a_threshold_fall_to_the_left() -> None:
    forest, models, features, _ = _forest()
    on_edge = np.tile(features[:1], (len(forest.threshold), 1))
    on_edge[np.arange(len(on_edge)), forest.feature] = forest.threshold
    expected = np.column_stack([model.predict(on_edge) for model in models])  # type: ignore[attr-defined]
    np.testing.assert_allclose(forest.predict(on_edge), expected, atol=1e-5)


def test_trees_learn() -> None:
    forest, _, features, target = _forest()
    assert np.corrcoef(forest.predict(features)[:, 0], target[:, 0])[0, 1] > 0.8
    assert forest.num_outputs == 2


def test_arrays_round_trip() -> None:
    forest, _, features, _ = _forest()
    again = Forest.from_arrays(forest.arrays())
    assert (again.predict(features) == forest.predict(features)).all()
    assert again.predict(features[:0]).shape == (0, 2)


def test_pointers_out_of_the_forest_are_refused() -> None:
    arrays = _forest()[0].arrays()
    with pytest.raises(ValueError, match="outside"):
        Forest.from_arrays(arrays | {"left": arrays["left"] + 10_000})
    with pytest.raises(ValueError, match="lengths"):
        Forest.from_arrays(arrays | {"value": arrays["value"][:-1]})


def test_few_rows_still_grow_a_tree() -> None:
    features, target = _data()
    forest = Forest.of([grow(features[:30], target[:30, 0], TreeSettings(num_trees=5), seed=0)])
    assert np.isfinite(forest.predict(features)).all()
