"""How likely the target is to agree with a drafter's tokens, learnt from verdicts.

A drafter's belief in a token is any monotone score. Two tables say what it is worth:

- *by belief*: the acceptance rate at some nodes of the belief's log-odds, linear between them, kept apart for a draft's
  first token and for later ones (where a first token stood, the drafter is likely to be on the right track);
- *by position*: the acceptance rate of token j where all before it stood, for drafts that are not made yet.

Both are counts that fade over pseudo-counts of a prior, so that what is no longer tried is slowly forgotten. A sequence
is off them by an *offset* in log-odds, one for each table: a random effect around zero that wanders, followed by a
Kalman filter on the logistic likelihood (West, Harrison, Migon, JASA 1985). So a new sequence starts at the drafter's
rates, departs from them within some ten verdicts, and drifts back while nothing is heard of it. Sequences of one kind
of text differ little, and lengths bought by noise are lost; but a text may change its kind. So the filter is slow until
surprises to one side add up, and then doubts all it knew (monitoring and intervention: West, JRSS B 1986).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any, Self

_HALF_LIFE = 300  # verdicts
_GROWTH = 2 ** (1 / _HALF_LIFE)
_MAX_WEIGHT = 1e9
_MAX_UNTABULATED = 16  # verdicts; the tables cost as much as several of those, and a step has many
_PSEUDO_COUNTS = 4.0
_FIRST_RATE = 0.6  # prior of the first position; that of each further one is its predecessor's rate
_MAX_POSITIONS = 64
_MAX_RATE = 0.999  # nothing is certain, and odds must be finite

_MAX_LOG_ODDS = 6.0
_NODE_DISTANCE = 1.2
_NUM_NODES = 11
_MAX_BELIEF = 1 / (1 + math.exp(-_MAX_LOG_ODDS))

_OFFSET_VARIANCE = 0.5
_OFFSET_DRIFT = 1 / 50  # per verdict, back to zero
_CHANGED_VARIANCE = 2.0  # of a text that is no longer what it was
_SURPRISE_FADE = 0.8  # per verdict
_MAX_SURPRISE = 2.5  # standard deviations
_MAX_OFFSET = 4.0
_MAX_OFFSET_STEP = 1.5  # the likelihood is curved: a long run of surprises moves the mode by less than it seems


def _prior(belief: float) -> float:
    """The acceptance rate to expect of a drafter that nothing is known of."""
    return 0.15 + 0.7 * belief


_NODE_PRIORS = [_prior(1 / (1 + math.exp(_MAX_LOG_ODDS - node * _NODE_DISTANCE))) for node in range(_NUM_NODES)]


def _shifted(rate: float, odds_factor: float) -> float:
    """The probability whose odds are `odds_factor` times those of `rate`."""
    return rate * odds_factor / (1 + rate * (odds_factor - 1))


def _bounded(rate: float) -> float:
    return min(max(rate, 1 - _MAX_RATE), _MAX_RATE)


def _node(belief: float) -> tuple[int, float]:
    """The node at or below a belief, 0 to _NUM_NODES - 2, and the way from there to the next, 0 to 1."""
    belief = min(max(0.0 if math.isnan(belief) else belief, 1 - _MAX_BELIEF), _MAX_BELIEF)
    place = (math.log(belief / (1 - belief)) + _MAX_LOG_ODDS) / _NODE_DISTANCE
    node = min(int(place), _NUM_NODES - 2)
    return node, min(max(place - node, 0.0), 1.0)


class _Counts:
    """Accepted and judged tokens in a row of cells, weighted."""

    __slots__ = ("accepted", "judged")

    def __init__(self, num_cells: int) -> None:
        self.accepted = [0.0] * num_cells
        self.judged = [0.0] * num_cells

    def add(self, node: int, way: float, weight: float, stood: bool) -> None:
        """Count a token between two nodes, in part for each."""
        upper = weight * way
        self.judged[node] += weight - upper
        self.judged[node + 1] += upper
        if stood:
            self.accepted[node] += weight - upper
            self.accepted[node + 1] += upper

    def add_run(self, num_accepted: int, num_known: int, weight: float) -> None:
        """Count a token for each of the first `num_known` cells, as accepted in the first `num_accepted`."""
        for cell in range(min(num_known, len(self.judged))):
            self.judged[cell] += weight
            if cell < num_accepted:
                self.accepted[cell] += weight

    def scale(self, factor: float) -> None:
        self.accepted = [count * factor for count in self.accepted]
        self.judged = [count * factor for count in self.judged]

    def odds_factor(self, pseudo_counts: float, factor: float) -> float:
        """By how much the odds of all nodes together are off their priors; `factor` is what to expect."""
        judged = sum(self.judged)
        if judged == 0:
            return factor
        believed: float = sum(map(mul, self.judged, _NODE_PRIORS)) / judged
        expected = pseudo_counts * _shifted(believed, factor)
        rate = _bounded((sum(self.accepted) + expected) / (judged + pseudo_counts))
        return float(rate * (1 - believed) / ((1 - rate) * believed))

    def rates(self, pseudo_counts: float, odds_factor: float) -> list[float]:
        """Each node's acceptance rate, where its prior's odds are off by `odds_factor`."""
        return [
            _bounded((accepted + pseudo_counts * _shifted(prior, odds_factor)) / (judged + pseudo_counts))
            for accepted, judged, prior in zip(self.accepted, self.judged, _NODE_PRIORS, strict=True)
        ]

    def state(self, weight: float) -> dict[str, list[float]]:
        return {
            "accepted": [count / weight for count in self.accepted],
            "judged": [count / weight for count in self.judged],
        }

    @classmethod
    def restore(cls, state: object, num_cells: int) -> Self:
        """Raises ValueError."""
        if not isinstance(state, Mapping):
            raise ValueError("counts of accepted and judged tokens are missing")
        counts = cls(num_cells)
        counts.accepted, counts.judged = (_numbers(state.get(name), num_cells) for name in ("accepted", "judged"))
        if not all(0 <= a <= n < math.inf for a, n in zip(counts.accepted, counts.judged, strict=True)):
            raise ValueError("counts of accepted tokens must lie between 0 and the judged ones")
        return counts


def _numbers(values: object, length: int) -> list[float]:
    if not isinstance(values, list) or len(values) != length or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"expected {length} numbers")
    return [float(value) for value in values]


class _Offset:
    """How far a sequence's log-odds are off the drafter's."""

    __slots__ = ("_mean", "_surprise", "_variance", "odds_factor")

    def __init__(self) -> None:
        self._mean = 0.0
        self._variance = _OFFSET_VARIANCE
        self._surprise = 0.0
        self.odds_factor = 1.0

    def update(self, num_accepted: int, rates: list[float]) -> None:
        """Learn from one verdict, where `rates` were expected at the positions that are known."""
        expected = sum(rates)
        information = expected - sum(map(mul, rates, rates))  # of a token: rate * (1 - rate)
        if information > 0:
            self._watch((num_accepted - expected) / math.sqrt(information * (1 + information * self._variance)))
        self._variance /= 1 + self._variance * information
        step = self._variance * (num_accepted - expected)
        mean = self._mean + min(max(step, -_MAX_OFFSET_STEP), _MAX_OFFSET_STEP)
        self._mean = min(max(mean, -_MAX_OFFSET), _MAX_OFFSET) * (1 - _OFFSET_DRIFT)
        self._variance += 2 * _OFFSET_DRIFT * (_OFFSET_VARIANCE - self._variance)
        self.odds_factor = math.exp(self._mean)

    def _watch(self, surprise: float) -> None:
        """Add a surprise, in standard deviations, to a fading sum; while nothing changes, its own is 1 as well."""
        self._surprise = _SURPRISE_FADE * self._surprise + math.sqrt(1 - _SURPRISE_FADE**2) * surprise
        if abs(self._surprise) > _MAX_SURPRISE:
            self._surprise, self._variance = 0.0, max(self._variance, _CHANGED_VARIANCE)


class Acceptance:
    """How likely the target agrees with one drafter's tokens; learnt from verdicts. Not safe for threads.

    Beliefs are as in Draft. What is kept per sequence is of constant size and goes with `forget`.
    """

    def __init__(self) -> None:
        self._first, self._later = _Counts(_NUM_NODES), _Counts(_NUM_NODES)
        self._positions = _Counts(_MAX_POSITIONS)
        self._weight = 1.0  # of a verdict; it grows, which fades the older ones
        self._offsets: dict[int, tuple[_Offset, _Offset]] = {}
        self._tabulate()

    def rates(self, seq_id: int, beliefs: Sequence[float]) -> list[float]:
        """P(token j accepted | all before it accepted) for each j, given the draft's beliefs; all in (0, 1)."""
        if self._num_untabulated:
            self._tabulate()
        offsets = self._offsets.get(seq_id)
        return self._believed([_node(belief) for belief in beliefs], offsets[0].odds_factor if offsets else 1.0)

    def expected(self, seq_id: int, depth: int) -> list[float]:
        """The same for positions 0 to `depth` - 1 of a draft that is not made yet."""
        offsets = self._offsets.get(seq_id)
        factor = offsets[1].odds_factor if offsets else 1.0
        accepted, judged = self._positions.accepted, self._positions.judged
        pseudo_counts = _PSEUDO_COUNTS * self._weight
        rate = _FIRST_RATE
        rates = []
        for position in range(min(depth, _MAX_POSITIONS)):
            rate = _bounded((accepted[position] + pseudo_counts * rate) / (judged[position] + pseudo_counts))
            rates.append(rate * factor / (1 + rate * (factor - 1)))
        return rates + rates[-1:] * (depth - len(rates))

    def observe(self, seq_id: int, beliefs: Sequence[float], num_accepted: int, num_judged: int) -> None:
        """Learn from a verdict: the draft's first `num_accepted` tokens were right, the next one was wrong if
        `num_accepted` < `num_judged`, and of later ones nothing is known.

        `num_judged` 0 says that time passes: the sequence's offsets drift back. Raises ValueError unless
        0 <= num_accepted <= num_judged <= len(beliefs).
        """
        if not 0 <= num_accepted <= num_judged <= len(beliefs):
            raise ValueError(f"{num_accepted} accepted of {num_judged} judged of {len(beliefs)} drafts")
        num_known = min(num_accepted + 1, num_judged)
        offsets = self._offsets.get(seq_id)
        if offsets is None:
            if not num_judged:
                return  # nothing to drift back from
            offsets = self._offsets[seq_id] = (_Offset(), _Offset())
        nodes = [_node(belief) for belief in beliefs[:num_known]]
        offsets[0].update(num_accepted, self._believed(nodes, offsets[0].odds_factor))
        offsets[1].update(num_accepted, self.expected(seq_id, num_known))
        if num_known:
            self._count(nodes, num_accepted)

    def forget(self, seq_id: int) -> None:
        """Drop what is known of a sequence that has ended; unknown ones are ignored."""
        self._offsets.pop(seq_id, None)

    def state(self) -> dict[str, Any]:
        """What was learnt of the drafter, not of sequences, for `restore`; plain lists of numbers."""
        counts = {"first": self._first, "later": self._later, "positions": self._positions}
        return {name: row.state(self._weight) for name, row in counts.items()}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Self:
        """An instance that knows what another one's `state()` did. Raises ValueError if it is not such a state."""
        acceptance = cls()
        acceptance._first = _Counts.restore(state.get("first"), _NUM_NODES)
        acceptance._later = _Counts.restore(state.get("later"), _NUM_NODES)
        acceptance._positions = _Counts.restore(state.get("positions"), _MAX_POSITIONS)
        acceptance._tabulate()
        return acceptance

    def _believed(self, nodes: list[tuple[int, float]], odds_factor: float) -> list[float]:
        table = self._first_rates
        rates = []
        for node, way in nodes:
            rate = table[node] + way * (table[node + 1] - table[node])
            rates.append(rate * odds_factor / (1 + rate * (odds_factor - 1)))
            table = self._later_rates
        return rates

    def _count(self, nodes: list[tuple[int, float]], num_accepted: int) -> None:
        self._weight *= _GROWTH
        counts = self._first
        for position, (node, way) in enumerate(nodes):
            counts.add(node, way, self._weight, position < num_accepted)
            counts = self._later
        self._positions.add_run(num_accepted, len(nodes), self._weight)
        if self._weight > _MAX_WEIGHT:
            self._normalise()
        self._num_untabulated += 1
        if self._num_untabulated == _MAX_UNTABULATED:
            self._tabulate()

    def _normalise(self) -> None:
        for counts in (self._first, self._later, self._positions):
            counts.scale(1 / self._weight)
        self._weight = 1.0

    def _tabulate(self) -> None:
        pseudo_counts = _PSEUDO_COUNTS * self._weight
        factor = self._first.odds_factor(pseudo_counts, 1.0)
        self._first_rates = self._first.rates(pseudo_counts, factor)
        # Before any second token was judged, the first ones are the best guide.
        self._later_rates = self._later.rates(pseudo_counts, self._later.odds_factor(pseudo_counts, factor))
        self._num_untabulated = 0
