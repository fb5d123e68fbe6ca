"""When not to speculate, whatever the estimates say: to measure plain steps, and where looking costs too much.

Estimates price forwards; that lookups and bookkeeping take time as well shows in what steps really took.
"""

from __future__ import annotations

# Costs at one load alone do not tell the base from the slope: of the first steps every third is plain, and later one
# now and then.
_NUM_EARLY_STEPS = 24
_EARLY_PERIOD = 3
_PLAIN_PERIOD = 64
# A sequence that nothing was bought for so many times over is looked at every second step, then every fourth, ...
_IDLE_STEPS = 4
_MAX_REST_PERIOD = 8
# After so many steps that took longer, all told, than plain ones would have, everybody rests; twice as long next time.
_TRIAL_STEPS = 12
_FIRST_REST = 12
_MAX_REST = 96
_MIN_GAIN = 0.99
_DRAINED = 0.7


class Pace:
    """Counts steps. `is_experienced`: costs are known from an earlier process."""

    def __init__(self, *, is_experienced: bool) -> None:
        self._turn = 0
        self._num_steps = _NUM_EARLY_STEPS if is_experienced else 0
        self._num_since_plain = 0
        self._num_idle: dict[int, int] = {}
        self._plain_s = self._spent_s = 0.0
        self._num_judged = 0
        self._num_to_rest = 0
        self._num_decodes = 0  # when the rest began, or now
        self._rest = _FIRST_REST

    def __len__(self) -> int:
        """Sequences that state is kept of."""
        return len(self._num_idle)

    def begin_step(self, num_decodes: int = 1) -> None:
        """A step of so many decoding sequences begins, whether or not anything may be drafted for them."""
        self._turn += 1
        self._num_to_rest = max(0, self._num_to_rest - 1)
        if num_decodes < _DRAINED * self._num_decodes:
            # Another load, with other prices: what was found out does not hold for it.
            self._num_idle.clear()
            self._num_to_rest, self._rest = 0, _FIRST_REST
            self._restart_trial()
        if not self._num_to_rest:
            self._num_decodes = num_decodes

    def rests(self, seq_id: int) -> bool:
        """Whether a sequence that nothing was bought for of late is left alone in this step."""
        # All wake in the same steps: what a round of the draft model costs is shared by whoever is awake.
        period = min(2 ** (self._num_idle.get(seq_id, 0) // _IDLE_STEPS), _MAX_REST_PERIOD)
        return self._turn % period != 0 or self._num_to_rest > 0

    @property
    def is_plain_due(self) -> bool:
        """Whether this step is to be plain, for its cost to be known."""
        if self._num_steps < _NUM_EARLY_STEPS:
            return self._num_steps % _EARLY_PERIOD == 0
        return self._num_since_plain >= _PLAIN_PERIOD

    def note(self, seq_id: int, *, bought: bool) -> None:
        """A sequence was looked at, and something was bought for it, or nothing."""
        self._num_idle[seq_id] = 0 if bought else self._num_idle.get(seq_id, 0) + 1

    def end_step(self, *, was_plain: bool) -> None:
        """A step in which something might have been drafted is over."""
        self._num_steps += 1
        self._num_since_plain = 0 if was_plain else self._num_since_plain + 1

    def judge(self, plain_s: float, spent_s: float) -> None:
        """A step took `spent_s` with all that drafting needs, where `plain_s` is believed of plain decoding."""
        self._plain_s += plain_s
        self._spent_s += spent_s
        self._num_judged += 1
        if self._num_judged < _TRIAL_STEPS:
            return
        if self._plain_s < _MIN_GAIN * self._spent_s:
            self._num_to_rest = self._rest
            self._rest = min(2 * self._rest, _MAX_REST)
        else:
            self._rest = _FIRST_REST
        self._restart_trial()

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        self._num_idle.pop(seq_id, None)

    def _restart_trial(self) -> None:
        self._plain_s = self._spent_s = 0.0
        self._num_judged = 0
