"""How many requests may be tried again: a share of the traffic, so that retries never multiply an overload."""

from __future__ import annotations


class RetryBudget:
    """Each request earns a share of a retry, up to a bound; each retry spends one. It begins full."""

    def __init__(self, share: float, burst: int) -> None:
        self._share = share
        self._burst = burst
        self._balance = float(burst)
        self.num_retries = 0
        self.num_refused = 0

    def earn(self) -> None:
        """A request has come."""
        self._balance = min(self._balance + self._share, float(self._burst))

    def spend(self) -> bool:
        """Whether one may be tried again; it is then counted."""
        if self._balance < 1:
            self.num_refused += 1
            return False
        self._balance -= 1
        self.num_retries += 1
        return True
