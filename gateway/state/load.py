"""This gateway's own load on every replica: the one account that is right whatever happens to Redis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Reservation:
    """A request sent to a replica: queued until its first token, in flight until its end."""

    replica: str
    prompt_tokens: int
    new_tokens: int  # of the prompt, expected to be computed
    prefill_rate: float  # tokens/s, as assumed when it was sent
    sent_at: float
    promised_tokens: int = 0  # of the prompt, that its engine had said it holds: what it is held to
    first_token_at: float | None = None
    ended: bool = False

    @property
    def expected_warm_tokens(self) -> int:
        return self.prompt_tokens - self.new_tokens


@dataclass(slots=True)
class Totals:
    """What this gateway has at one replica. `version` grows with every change, and is never reused."""

    version: int = 0
    queued_tokens: int = 0
    in_flight: int = 0
    told: int = 0  # the last version that is known to have arrived

    def arrived(self, version: int) -> None:
        """So much has been told."""
        self.told = max(self.told, version)


class LoadLedger:
    """Totals per replica, changed by reservations alone; those of a replica that is gone go once all is told."""

    def __init__(self) -> None:
        self._totals: dict[str, Totals] = {}
        self._gone: set[str] = set()
        self._first_version = 0  # above all that were dropped: a replica may come back while they are known

    def totals(self, replica: str) -> Totals:
        """Zero where nothing was sent."""
        return self._totals.get(replica) or Totals()

    def forget(self, replica: str) -> None:
        """It is gone. What is not over there, or not told, is dropped when a later one goes."""
        busy = {name for name, _ in self.busy()}
        self._gone = (self._gone | {replica}) & self._totals.keys()
        for name in self._gone - busy:
            self._first_version = max(self._first_version, self._totals.pop(name).version)
        self._gone &= busy

    def busy(self) -> Iterator[tuple[str, Totals]]:
        """Replicas where something is in flight, or whose last word may not have arrived."""
        return (
            (replica, totals)
            for replica, totals in self._totals.items()
            if totals.in_flight or totals.told != totals.version
        )

    def add(self, reservation: Reservation) -> Totals:
        first = self._first_version
        totals = self._totals.setdefault(reservation.replica, Totals(version=first, told=first))
        self._gone.discard(reservation.replica)
        return self._change(totals, reservation.new_tokens, 1)

    def first_token(self, reservation: Reservation, now: float) -> Totals:
        """Its prompt is computed. Harmless when repeated, or after its end."""
        totals = self.totals(reservation.replica)
        if reservation.first_token_at is not None or reservation.ended:
            return totals
        reservation.first_token_at = now
        return self._change(totals, -reservation.new_tokens, 0)

    def end(self, reservation: Reservation) -> Totals:
        """It is over, however it ended. Harmless when repeated."""
        totals = self.totals(reservation.replica)
        if reservation.ended:
            return totals
        reservation.ended = True
        return self._change(totals, 0 if reservation.first_token_at is not None else -reservation.new_tokens, -1)

    def _change(self, totals: Totals, tokens: int, requests: int) -> Totals:
        totals.version += 1
        totals.queued_tokens += tokens
        totals.in_flight += requests
        assert totals.queued_tokens >= 0
        assert totals.in_flight >= 0
        return totals
