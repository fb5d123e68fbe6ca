"""How unlike the traffic a source was learnt from a prompt is: 0 like most of it, 1 unlike all of it.

Two views, each as a rank among held-out prompts of the source: the distance of the structure to the nearest of some
centres, and the share of the prompt's words that the source has never used. The greater of the two ranks counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from router_models.features import Features
from router_models.structure import CONVERSATION_NAMES, FEATURE_NAMES
from router_models.text import WORD_BITS

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

_NUM_CENTRES = 24
_LIMIT = 4.0
_LEAST_SPREAD = 1e-3
_QUANTILES = np.linspace(0, 1, 101)
_MIN_ROWS = 20


@dataclass(frozen=True, eq=False, slots=True)
class Novelty:
    """What a source's prompts look like.

    `centre` and `spread` float32 [num_features], a spread infinite for what does not count; `centres` float32
    [num_centres, num_features], standardised;
    `known_words` bool [2 ** WORD_BITS]; `distances` and `strangeness` float32 [101], quantiles of held-out prompts.
    """

    centre: Floats
    spread: Floats
    centres: Floats
    known_words: NDArray[np.bool_]
    distances: Floats
    strangeness: Floats

    def of(self, features: Features) -> Array:
        """Float64 [num_prompts] in [0, 1]."""
        far = _rank(self._distance(features.structure), self.distances)
        if not self.known_words.any():
            return far  # it was learnt from a log without texts
        strange = _rank(_unknown_share(features.counts, self.known_words), self.strangeness)
        return np.maximum(far, strange)

    def _distance(self, structure: Floats) -> Array:
        return _nearest(_standardised(structure, self.centre, self.spread), self.centres)


def fit_novelty(features: Features, seed: int) -> Novelty:
    """Learn what `features` of one source look like; every fifth prompt is held out to say what is usual."""
    order = np.random.default_rng(seed).permutation(len(features))
    num_held_out = len(order) // 5 if len(order) >= _MIN_ROWS else 0
    kept, held_out = features.take(order[num_held_out:]), features.take(order[:num_held_out] if num_held_out else order)
    centre = kept.structure.mean(axis=0)
    spread = _spread(kept.structure)
    points = _standardised(kept.structure, centre, spread)
    clusters = KMeans(min(_NUM_CENTRES, len(np.unique(points, axis=0))), n_init=1, max_iter=30, random_state=seed).fit(
        points
    )
    centres = clusters.cluster_centers_.astype(np.float32)
    words = _seen_words(kept.counts)
    distance = _nearest(_standardised(held_out.structure, centre, spread), centres)
    unknown = _unknown_share(held_out.counts, words)
    return Novelty(centre, spread, centres, _seen_words(features.counts), _quantiles(distance), _quantiles(unknown))


def _spread(structure: Floats) -> Floats:
    """Standard deviations; infinite for what is around a text and never varied.

    It says that a table of single prompts has no tools and no max_tokens, not that all traffic with them is unusual.
    """
    spread = structure.std(axis=0)
    is_unrecorded = (spread < _LEAST_SPREAD) & np.isin(FEATURE_NAMES, CONVERSATION_NAMES)
    return np.where(is_unrecorded, np.inf, np.maximum(spread, _LEAST_SPREAD)).astype(np.float32)


def _standardised(structure: Floats, centre: Floats, spread: Floats) -> Floats:
    return np.asarray(np.clip((structure - centre) / spread, -_LIMIT, _LIMIT), dtype=np.float32)


def _nearest(points: Floats, centres: Floats) -> Array:
    squares = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    return np.asarray(np.sqrt(np.maximum(squares.min(axis=1), 0)), dtype=np.float64)


def _seen_words(counts: sp.csr_matrix) -> NDArray[np.bool_]:
    return np.asarray(np.bincount(counts.indices, minlength=counts.shape[1])[: 1 << WORD_BITS] > 0)


def _unknown_share(counts: sp.csr_matrix, known: NDArray[np.bool_]) -> Array:
    # By hand: slices and products of sparse matrices cost a single prompt some ten times as much.
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    is_word = counts.indices < len(known)
    rows, columns, words = rows[is_word], counts.indices[is_word], counts.data[is_word].astype(np.float64)
    total = np.bincount(rows, words, counts.shape[0])
    return np.asarray(np.bincount(rows, words * ~known[columns], counts.shape[0]) / np.maximum(total, 1e-9))


def _quantiles(values: Array) -> Floats:
    return np.asarray(np.quantile(values, _QUANTILES), dtype=np.float32)


def _rank(values: Array, quantiles: Floats) -> Array:
    """The share of held-out values below each value. The last quantile counts as all of them but not beyond."""
    ranks = np.searchsorted(quantiles, values.astype(np.float32), side="left")
    return np.asarray(ranks.clip(0, 100) / 100)
