"""Whether other gateways send requests to the same fleet: if so, a decision may have been overtaken by one of theirs.

Every replica's record counts the requests it was ever sent. What this gateway did not send, another one did. Answers on
one connection come in the order of the questions, so that what a look counts is compared with exactly those of our own
requests that Redis had counted before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.state.fleet_view import ReplicaState

# So long a gateway looks around before it believes to be alone; and so long after another one's last known request,
# that one may send the next any moment.
_FIRST_S = 3.0
_ATTENTION_S = 60.0


@dataclass(slots=True)
class _Sends:
    """To one replica: by others, as seen; by ourselves, as sent, as Redis has confirmed, and as it may have counted."""

    others: int
    sent: int = 0
    confirmed: int = 0
    unsure: int = 0


class Company:
    """One gateway's view of one fleet. In company until it has looked around for a while."""

    def __init__(self) -> None:
        self._sends: dict[str, _Sends] = {}
        self._until: float | None = None

    def is_alone(self, now: float) -> bool:
        """Whether nobody else has sent anything for a while."""
        return self._until is not None and now >= self._until

    def look(self, replicas: Iterable[ReplicaState], now: float) -> None:
        """These were seen just now (s)."""
        if self._until is None:
            self._until = now + _FIRST_S
        for replica in replicas:
            if (known := self._sends.get(replica.replica)) is None:
                self._sends[replica.replica] = _Sends(replica.sends)
                continue
            others = replica.sends - known.confirmed
            if others == known.others:
                continue
            if 0 < others - known.others <= known.sent - known.confirmed:
                continue  # these may be our own, counted and not yet confirmed: a later look tells
            own = min(max(others - known.others, 0), known.unsure)
            known.unsure, known.others = known.unsure - own, known.others + own
            if others > known.others:
                self._until = now + _ATTENTION_S
            if others > known.others or known.sent == known.confirmed:
                known.others = others  # a fall: the record was lost, and counts anew

    def sends(self, replica: str) -> int:
        """Requests that were ever sent there, if we are alone."""
        known = self._sends.get(replica)
        return known.others + known.sent if known else 0

    def sending(self, replica: str) -> None:
        """A request of our own is being counted there."""
        self._sends.setdefault(replica, _Sends(0)).sent += 1

    def sent(self, replica: str, was_counted: bool | None) -> None:
        """It was, or was not; None: nobody knows, for the answer did not come in time."""
        known = self._sends[replica]
        if was_counted:
            known.confirmed += 1
        else:
            known.sent -= 1
            known.unsure += was_counted is None

    def forget(self, replica: str) -> None:
        """It is gone."""
        known = self._sends.get(replica)
        if known is not None and known.sent == known.confirmed:
            del self._sends[replica]
