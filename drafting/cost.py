"""What a forward costs as a function of its load, learnt from the steps that are served anyway.

Seconds are a base, which moves with the machine, times a shape: 1, plus a slope in the number of tokens for each
stretch between two knots (flat while memory-bound, steep once compute-bound), plus a cost per sequence, per cached
token, and per further query of a cached token. An extended Kalman filter follows the base's logarithm and the shape,
one step at a time. What it must survive:

- The machine's speed as a whole changes within seconds (shared memory bandwidth, other processes). The base drifts fast
  and the shape slowly, so a slow phase that is seen at one load slows all loads alike, and ratios stay right.
- Some steps are several times too long. A surprise is not believed but raises doubt (the weight of Huber 1964), so that
  one passes and a second one, if it was news after all, is.
- Loads that are not bought are not measured. Their costs drift back to a prior in which further tokens cost next to
  nothing, their doubt grows, and a buyer that asks with optimism tries them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# A knot at 2 because one row has a kernel of its own nearly everywhere.
_KNOTS = 2.0 ** np.arange(13)  # 1 to 4096 tokens
_MANY_TOKENS = 2.0**24  # where the last stretch ends
_STRETCHES = np.diff(_KNOTS, append=_MANY_TOKENS)
_NUM_SLOPES = len(_KNOTS)
_TABLE_TOKENS = np.append(_KNOTS, _MANY_TOKENS)
_SLOPES = slice(_NUM_SLOPES)
_MAX_FURTHER_QUERIES = 16.0  # per sequence; beyond are prefills, whose keys are largely their own

# Of the slopes and the last three coefficients, in units of the base.
_MEANS = np.array([*[0.005] * _NUM_SLOPES, 0.005, 2e-6, 1e-7])
_SPREADS = np.array([0.1, *[0.03] * (_NUM_SLOPES - 1), 0.02, 1e-4, 2e-5])
_NEIGHBOUR_CORRELATION = 0.9  # of the slopes of adjacent stretches: one that was measured informs the next

_NOISE = 0.05  # of a step's time, relative
_SPEED_DRIFT = 0.03  # of the machine as a whole, per step, relative
_EARLY_DRIFT = 0.5  # divided by the number of steps seen: the first ones include all kinds of warming up
_FORGETTING = 1 / 2000  # per step, of the shape: back to the prior
_MAX_SHARE = 0.2  # of a step's time that one coefficient's drift may concern
_REDOUBT = 1.0  # by how much a surprise raises the variance of what it concerns, relative
_LEAST_ERROR = -0.999  # its logarithm is taken
_TINY = 1e-9
_MOST = 1e6  # of a base, in seconds, and of a coefficient: what is restored and lies above is no measurement
_SURPRISE = 2.5  # standard deviations from which on an observation loses weight


def _prior_correlation() -> Vector:
    correlation = np.eye(len(_MEANS))
    slopes = np.arange(_NUM_SLOPES)
    correlation[_SLOPES, _SLOPES] = _NEIGHBOUR_CORRELATION ** np.abs(slopes[:, None] - slopes)
    # From one row to two the kernel changes, which says little about more rows.
    correlation[0, 1:_NUM_SLOPES] *= 0.5
    correlation[1:_NUM_SLOPES, 0] *= 0.5
    return correlation


_CORRELATION = _prior_correlation()


class StepCost:
    """Seconds of one forward as a function of its load; learnt while serving. Not safe for threads.

    A load is `num_tokens` (queries of all sequences, drafts included; at least 1), `num_seqs` (at least 1) and
    `num_kv_tokens` (the sum of the sequences' lengths; at least 0).
    """

    def __init__(self) -> None:
        self._log_base = 0.0
        self._shape = _MEANS.copy()
        self._covariance = np.zeros((1 + len(_MEANS), 1 + len(_MEANS)))  # of the base's logarithm, then the shape
        self._num_observed = 0
        self._is_known = False
        self._tabulate()

    @property
    def is_known(self) -> bool:
        """Whether anything was observed or restored; if not, predictions are the prior's, in units of its base."""
        return self._is_known

    def predict(self, num_tokens: npt.ArrayLike, num_seqs: int, num_kv_tokens: int, optimism: float = 0.0) -> Vector:
        """Seconds for each of `num_tokens`, ascending, as float64 of its shape: positive and nondecreasing.

        With `optimism`, seconds as low as they may be within that many standard deviations: to choose by, so that what
        is doubtful gets tried (upper confidence bounds, Auer et al. 2002).
        """
        tokens = np.asarray(num_tokens, dtype=np.float64)
        per_sequence, per_kv_token, per_further_query = self._shape[_NUM_SLOPES:]
        further_queries = np.clip(tokens / num_seqs - 1, 0, _MAX_FURTHER_QUERIES)
        bases = np.interp(tokens, _TABLE_TOKENS, self._table)
        bases += per_sequence * num_seqs + per_kv_token * num_kv_tokens
        seconds: Vector = (bases + per_further_query * num_kv_tokens * further_queries) * math.exp(self._log_base)
        if optimism and tokens.size:
            seconds = seconds * np.exp(-optimism * self._doubt(tokens, num_seqs, num_kv_tokens))
            seconds = np.maximum.accumulate(seconds) if tokens.ndim else seconds
        return np.asarray(seconds)

    def observe(self, num_tokens: int, num_seqs: int, num_kv_tokens: int, seconds: float) -> None:
        """Learn from one forward. Raises ValueError if the load or the time is impossible."""
        if num_tokens < 1 or num_seqs < 1 or num_kv_tokens < 0 or not 0 < seconds < math.inf:
            raise ValueError(f"{num_tokens} tokens, {num_seqs} sequences, {num_kv_tokens} cached in {seconds} s")
        features = _features(num_tokens, num_seqs, num_kv_tokens)
        if not self._is_known:
            self._log_base = math.log(seconds / (1 + features @ self._shape))
            self._is_known = True
        if self._num_observed == 0:
            self._doubt_prior(features)
        self._num_observed += 1
        self._drift(features)
        self._update(features, seconds)
        self._tabulate()

    def state(self) -> dict[str, Any]:
        """What was learnt, for `restore`: numbers and lists of them. How sure it is goes unsaid: machines change."""
        names = ("per_sequence", "per_kv_token", "per_further_query")
        return {
            "base_s": math.exp(self._log_base),
            "knots": _KNOTS.tolist(),
            "per_token": self._shape[_SLOPES].tolist(),
            **dict(zip(names, self._shape[_NUM_SLOPES:].tolist(), strict=True)),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Self:
        """An instance that starts from another one's `state()`. Raises ValueError if it is not such a state."""
        try:
            base_s = float(state["base_s"])
            others = [state[name] for name in ("per_sequence", "per_kv_token", "per_further_query")]
            shape = np.array([*state["per_token"], *others], dtype=np.float64)
            is_valid = state["knots"] == _KNOTS.tolist() and shape.shape == _MEANS.shape
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a step cost's state: {error!r}") from error
        if not (is_valid and 0 < base_s < _MOST and (shape >= 0).all() and (shape < _MOST).all()):
            raise ValueError("not a step cost's state: its numbers are out of range")
        cost = cls()
        cost._log_base, cost._shape, cost._is_known = math.log(base_s), shape, True
        cost._tabulate()
        return cost

    def _doubt_prior(self, features: Vector) -> None:
        """Start from the prior's spreads; what multiplies large numbers is bounded by the step that was seen."""
        spreads = _SPREADS.copy()
        bound = (1 + features @ self._shape) / np.maximum(features, _TINY)
        spreads[_NUM_SLOPES:] = np.minimum(spreads, bound)[_NUM_SLOPES:]
        self._covariance[1:, 1:] = _CORRELATION * np.outer(spreads, spreads)

    def _drift(self, features: Vector) -> None:
        """What may have happened since the last step."""
        most = _MAX_SHARE * (1 + features @ self._shape) / np.maximum(features, _TINY)
        spreads = np.minimum(_SPREADS + self._shape, most)
        self._shape += _FORGETTING * (_MEANS - self._shape)
        self._covariance *= 1 - 2 * _FORGETTING
        self._covariance[1:, 1:] += _CORRELATION * np.outer(spreads, 2 * _FORGETTING * spreads)
        self._covariance[0, 0] += (_SPEED_DRIFT + _EARLY_DRIFT / self._num_observed) ** 2

    def _update(self, features: Vector, seconds: float) -> None:
        """The filter's correction, of the relative error, limited to what is no surprise."""
        bases = 1 + features @ self._shape
        gradient = np.append(1.0, features / bases)
        shared = self._covariance @ gradient
        doubt = gradient @ shared
        variance = doubt + _NOISE**2
        error = max(seconds / (bases * math.exp(self._log_base)) - 1, _LEAST_ERROR)
        excess = abs(error) / (_SURPRISE * math.sqrt(variance))
        error /= max(excess, 1.0)
        gains = shared / variance
        # Seconds are linear in the shape, but exponential in the base's logarithm.
        self._log_base += gains[0] * math.log1p(error)
        self._shape = np.maximum(self._shape + gains[1:] * error, 0.0)
        self._covariance += np.outer(shared, shared * (_REDOUBT / doubt if excess > 1 else -1 / variance))

    def _doubt(self, tokens: Vector, num_seqs: int, num_kv_tokens: int) -> Vector:
        """The standard deviation of each load's time, relative; exact at knots and both ends, linear between."""
        low, high = tokens.min(), tokens.max()
        grid = np.concatenate(([low], _KNOTS[(low < _KNOTS) & (high > _KNOTS)], [high]))
        features = np.array([_features(count, num_seqs, num_kv_tokens) for count in grid])
        gradients = np.insert(features / (1 + features @ self._shape)[:, None], 0, 1.0, axis=1)
        variances = ((gradients @ self._covariance) * gradients).sum(axis=1)
        doubt: Vector = np.interp(tokens, grid, np.sqrt(np.maximum(variances, 0.0)))
        return doubt

    def _tabulate(self) -> None:
        self._table = 1 + np.append(0.0, np.cumsum(self._shape[_SLOPES] * _STRETCHES))


def _features(num_tokens: float, num_seqs: int, num_kv_tokens: int) -> Vector:
    """What each coefficient of the shape is multiplied by."""
    features = np.empty(len(_MEANS))
    np.clip(num_tokens - _KNOTS, 0.0, _STRETCHES, out=features[_SLOPES])
    further_queries = min(max(num_tokens / num_seqs - 1, 0.0), _MAX_FURTHER_QUERIES)
    features[_NUM_SLOPES:] = num_seqs, num_kv_tokens, num_kv_tokens * further_queries
    return features
