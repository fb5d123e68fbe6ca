"""Boosted regression trees as plain arrays: grown by scikit-learn, stored without pickle, read by numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

Floats = NDArray[np.float32]
_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """Small trees and a low rate: a few thousand noisy labels carry no more."""

    num_trees: int = 150
    max_leaves: int = 8
    learning_rate: float = 0.05
    min_rows_per_leaf: int = 20
    l2: float = 5.0
    feature_share: float = 0.3


def grow(
    features: Floats, target: NDArray[np.float64], settings: TreeSettings, seed: int
) -> HistGradientBoostingRegressor:
    """Fit one ensemble to one target, least squares. Features [num_rows, num_features], target [num_rows]."""
    rows = len(target)
    model = HistGradientBoostingRegressor(
        max_iter=settings.num_trees,
        max_leaf_nodes=settings.max_leaves,
        learning_rate=settings.learning_rate,
        min_samples_leaf=max(2, min(settings.min_rows_per_leaf, rows // 10)),
        l2_regularization=settings.l2,
        max_features=settings.feature_share,
        early_stopping=False,
        random_state=seed,
    )
    return model.fit(features, target)


@dataclass(frozen=True, slots=True)
class Forest:
    """Several ensembles side by side: all their nodes in one set of arrays.

    `roots` int32 [num_trees] is each tree's first node, `outputs` int16 [num_trees] the ensemble it belongs to,
    `base` float32 [num_outputs] what each ensemble starts from. Nodes: `feature` uint8, `threshold` float32 (at or
    below goes left), `left` and `right` int32 (a leaf is its own child), `value` float32 (0 but in leaves).
    """

    roots: NDArray[np.int32]
    outputs: NDArray[np.int16]
    base: Floats
    feature: NDArray[np.uint8]
    threshold: Floats
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: Floats
    depth: int
    _children: NDArray[np.int32] = field(init=False, repr=False)  # of node n at 2n: right, left
    _starts: NDArray[np.intp] = field(init=False, repr=False)  # of each output's trees

    def __post_init__(self) -> None:
        object.__setattr__(self, "_children", np.stack((self.right, self.left), axis=1).ravel())
        object.__setattr__(self, "_starts", np.searchsorted(self.outputs, np.arange(len(self.base))))

    @classmethod
    def of(cls, models: Sequence[HistGradientBoostingRegressor]) -> Forest:
        """The given ensembles, one output each."""
        trees = [(output, tree[0].nodes) for output, model in enumerate(models) for tree in model._predictors]
        sizes = [len(nodes) for _, nodes in trees]
        roots = np.cumsum([0, *sizes])[:-1].astype(np.int32)
        nodes = np.concatenate([nodes for _, nodes in trees])
        offsets = np.repeat(roots, sizes)
        is_leaf, own = nodes["is_leaf"].astype(bool), np.arange(len(nodes), dtype=np.int32)
        return cls(
            roots=roots,
            outputs=np.array([output for output, _ in trees], np.int16),
            base=np.array([np.ravel(model._baseline_prediction)[0] for model in models], np.float32),
            feature=np.where(is_leaf, 0, nodes["feature_idx"]).astype(np.uint8),
            threshold=_round_down(np.where(is_leaf, 0.0, nodes["num_threshold"])),
            left=np.where(is_leaf, own, nodes["left"] + offsets).astype(np.int32),
            right=np.where(is_leaf, own, nodes["right"] + offsets).astype(np.int32),
            value=np.where(is_leaf, nodes["value"], 0.0).astype(np.float32),
            depth=int(nodes["depth"].max()),
        )

    @property
    def num_outputs(self) -> int:
        return len(self.base)

    def predict(self, features: Floats) -> Floats:
        """Float32 [num_rows, num_outputs] of features float32 [num_rows, num_features]."""
        chunks = [self._predict(features[i : i + _CHUNK_ROWS]) for i in range(0, len(features), _CHUNK_ROWS)]
        return np.concatenate(chunks) if chunks else np.zeros((0, self.num_outputs), np.float32)

    def _predict(self, features: Floats) -> Floats:
        nodes = np.tile(self.roots, len(features))
        first_features = np.repeat(np.arange(len(features)) * features.shape[1], len(self.roots))
        flat = np.ascontiguousarray(features).ravel()
        for _ in range(self.depth):
            goes_left = flat.take(first_features + self.feature.take(nodes)) <= self.threshold.take(nodes)
            nodes = self._children.take(2 * nodes + goes_left)
        values = self.value.take(nodes).reshape(len(features), len(self.roots))
        return np.add.reduceat(values, self._starts, axis=1) + self.base

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` needs, by name."""
        names = ("roots", "outputs", "base", "feature", "threshold", "left", "right", "value")
        return {name: getattr(self, name) for name in names} | {"depth": np.array([self.depth], np.int32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Forest:
        """The forest that `arrays` describes; raises ValueError where its nodes point outside of it."""
        fields = {name: np.asarray(arrays[name]) for name in ("roots", "outputs", "base", "feature", "threshold")}
        fields |= {name: np.asarray(arrays[name]) for name in ("left", "right", "value")}
        forest = cls(**fields, depth=int(np.asarray(arrays["depth"])[0]))
        num_nodes = len(forest.feature)
        if any(len(part) != num_nodes for part in (forest.threshold, forest.left, forest.right, forest.value)):
            raise ValueError("arrays of different lengths")
        for pointers in (forest.roots, forest.left, forest.right):
            if len(pointers) and not (pointers.min() >= 0 and pointers.max() < num_nodes):
                raise ValueError("a node points outside of the forest")
        return forest


def _round_down(thresholds: NDArray[np.float64]) -> Floats:
    """The largest float32 not above: float32 features then fall on the same side as they did in training."""
    rounded = thresholds.astype(np.float32)
    return np.where(rounded > thresholds, np.nextafter(rounded, np.float32(-np.inf)), rounded)
