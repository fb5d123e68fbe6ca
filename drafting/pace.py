"""When not to speculate, whatever the estimates say: to measure plain steps, and to spare what is off its overhead."""

from __future__ import annotations

# Costs at one load alone do not tell the base from the slope: of the first steps every third is plain, and later one
# now and then.
_NUM_EARLY_STEPS = 24
_EARLY_PERIOD = 3
_PLAIN_PERIOD = 64
# A sequence that nothing was bought for so many times over is looked at every second step, then every third, ...
_IDLE_STEPS = 4
_MAX_REST_PERIOD = 8


class Pace:
    """Counts steps. `is_experienced`: costs are known from an earlier process."""

    def __init__(self, *, is_experienced: bool) -> None:
        self._turn = 0
        self._num_steps = _NUM_EARLY_STEPS if is_experienced else 0
        self._num_since_plain = 0
        self._num_idle: dict[int, int] = {}

    def __len__(self) -> int:
        """Sequences that state is kept of."""
        return len(self._num_idle)

    def begin_step(self) -> None:
        """A step begins, whether or not anything may be drafted in it."""
        self._turn += 1

    def rests(self, seq_id: int) -> bool:
        """Whether a sequence that nothing was bought for of late is left alone in this step."""
        period = min(1 + self._num_idle.get(seq_id, 0) // _IDLE_STEPS, _MAX_REST_PERIOD)
        return (self._turn + seq_id) % period != 0

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

    def forget(self, seq_id: int) -> None:
        """Drop all state of a sequence that has ended."""
        self._num_idle.pop(seq_id, None)
