"""A circuit breaker: after a failure nobody asks Redis for a pause that doubles, and an operator reads why once."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger(__name__)

# One slow answer says more about this process or the network than about Redis.
_SLOW_IN_A_ROW = 3
# Who comes and goes within this time is written about once.
_WARN_EVERY_S = 10.0


class Breaker:
    """One client's. The first call after a pause is the probe, and its success ends the outage."""

    def __init__(self, name: str, retry_s: float, max_retry_s: float) -> None:
        """`name` begins the lines in the log; the first pause is `retry_s`, none is longer than `max_retry_s`."""
        self._name = name
        self._retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._slow = 0
        self._pause_s = 0.0
        self._closed_until = 0.0
        self._warned_s = float("-inf")
        self._has_warned = False  # of the outage that goes on
        self.failures = 0

    @property
    def available(self) -> bool:
        """Whether a call would be tried now."""
        return time.monotonic() >= self._closed_until

    def answered(self) -> None:
        """In time, and as it should."""
        self._slow, self._pause_s, self._closed_until = 0, 0.0, 0.0
        if self._has_warned:
            self._has_warned = False
            _log.warning("%s: the shared state answers again", self._name)

    def too_slow(self, reason: str) -> None:
        """No answer in time: a failure once it has become a habit, or when an outage was about to end."""
        self._slow += 1
        if self._slow >= _SLOW_IN_A_ROW or self._pause_s:
            self.failed(reason)
        else:
            self.failures += 1

    def failed(self, reason: str) -> None:
        self.failures += 1
        now = time.monotonic()
        self._pause_s = min(max(self._retry_s, 2 * self._pause_s), self._max_retry_s)
        self._closed_until = now + self._pause_s
        if not self._has_warned and now - self._warned_s >= _WARN_EVERY_S:
            self._has_warned, self._warned_s = True, now
            _log.warning("%s: the shared state is unavailable: %s", self._name, reason)
