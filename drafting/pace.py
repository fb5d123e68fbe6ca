"""When not to speculate, whatever the estimates say: to measure plain steps, and where looking costs too much.

Estimates price forwards; that lookups and bookkeeping take time as well shows in what steps really took.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

# Costs at one load alone do not tell the base from the slope: of the first steps every third is plain, and later one
# now and then.
_NUM_EARLY_STEPS = 24
_EARLY_PERIOD = 3
_PLAIN_PERIOD = 64
# A sequence that nothing was bought for so many times over, though there was something, is looked at every second step,
# then every fourth, ...
_IDLE_STEPS = 4
_MAX_REST_PERIOD = 8
# Once the steps in which drafts were looked for have lost so much of a step, all told, beside plain ones, everybody
# rests; twice as long next time. What costs a twentieth is found out in some six steps, what costs a fiftieth in
# thirty, in which drafts that are found now and then have time to pay. One step says little: the machine may have been
# held up in it.
_MAX_LOSS = 0.3
_MAX_LOSS_OF_ONE = 0.1
# Of what was gained so much may be lost again first. Drafts that double the speed may well bring nothing in every other
# step: six such steps in a row come by often, thirteen hardly ever.
_MAX_SAVED = 1.0
_MIN_GAIN = 0.99
_FIRST_REST = 24
_MAX_REST = 96


@dataclass(slots=True)
class _Trial:
    """Whether looking for drafts pays under one load: a bounded sum of losses (CUSUM, Page 1954), and the rest."""

    lost: float = 0.0
    num_to_rest: int = 0
    rest: int = _FIRST_REST

    def judge(self, plain_s: float, spent_s: float) -> None:
        self.lost += min(_MIN_GAIN - plain_s / spent_s, _MAX_LOSS_OF_ONE)
        if self.lost > _MAX_LOSS:
            self.lost, self.num_to_rest = 0.0, self.rest
            self.rest = min(2 * self.rest, _MAX_REST)
        elif self.lost < -_MAX_SAVED:
            self.lost, self.rest = -_MAX_SAVED, _FIRST_REST


class Pace:
    """Counts steps. `is_experienced`: costs are known from an earlier process.

    What is found out about looking for drafts holds for the load it was found at, within a factor of two in sequences,
    and for the drafters that are asked for.
    """

    def __init__(self, *, is_experienced: bool) -> None:
        self._turn = 0
        self._num_steps = _NUM_EARLY_STEPS if is_experienced else 0
        self._num_since_plain = 0
        self._num_idle: dict[int, int] = {}
        self._size = 0  # of the batch: the power of two above it
        self._trials: dict[Hashable, _Trial] = {}
        self._trial = _Trial()

    def __len__(self) -> int:
        """Sequences that state is kept of."""
        return len(self._num_idle)

    def begin_step(self, num_decodes: int = 1, drafters: Hashable = None) -> None:
        """A step of so many decoding sequences begins, whether or not anything may be drafted for them.

        `drafters` are those that the sequences may use.
        """
        self._turn += 1
        size = num_decodes.bit_length()
        if size < self._size:
            self._num_idle.clear()  # with fewer sequences a draft is cheaper
        self._size = size
        self._trial = self._trials.setdefault((size, drafters), _Trial())
        self._trial.num_to_rest = max(0, self._trial.num_to_rest - 1)

    def rests(self, seq_id: int) -> bool:
        """Whether a sequence that nothing was bought for of late is left alone in this step."""
        # All wake in the same steps: what a round of the draft model costs is shared by whoever is awake.
        period = min(2 ** (self._num_idle.get(seq_id, 0) // _IDLE_STEPS), _MAX_REST_PERIOD)
        return self._turn % period != 0 or self._trial.num_to_rest > 0

    @property
    def is_plain_due(self) -> bool:
        """Whether this step is to be plain, for its cost to be known."""
        if self._num_steps < _NUM_EARLY_STEPS:
            return self._num_steps % _EARLY_PERIOD == 0
        return self._num_since_plain >= _PLAIN_PERIOD

    def note(self, seq_id: int, *, bought: bool) -> None:
        """Of what could be drafted for a sequence something was bought, or nothing."""
        self._num_idle[seq_id] = 0 if bought else self._num_idle.get(seq_id, 0) + 1

    def end_step(self, *, was_plain: bool) -> None:
        """A step in which something might have been drafted is over."""
        self._num_steps += 1
        self._num_since_plain = 0 if was_plain else self._num_since_plain + 1

    def judge(self, plain_s: float, spent_s: float) -> None:
        """A step took `spent_s` with all that drafting needs, where `plain_s` is believed of plain decoding."""
        if plain_s > 0:
            self._trial.judge(plain_s, spent_s)

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        self._num_idle.pop(seq_id, None)
