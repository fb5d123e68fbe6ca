"""Where a gateway and Serve's router of one deployment meet: what runs, where a request should go, where it went.

Serve constructs its routers itself, on a thread of its own, and hands them JSON alone; a gateway decides on its event
loop. Both are in one process, and find each other here by the deployment's name. Every method is one operation on a
dict, a deque or an attribute, which needs no lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Wish:
    """Where a request should go, if that replica can take it; otherwise anywhere but to those in `avoid`."""

    replica: str | None = None
    avoid: frozenset[str] = field(default_factory=frozenset)
    on_placed: Callable[[str], None] | None = None  # called on the router's thread with the replica that took it


class Placements:
    """One deployment's, in one process."""

    def __init__(self) -> None:
        self.replicas: tuple[str, ...] = ()  # those that run, as Serve told last
        self._wishes: dict[str, Wish] = {}
        self._deaths: deque[str] = deque(maxlen=1024)

    def make_wish(self, request_id: str, wish: Wish) -> None:
        """To be withdrawn when the request is over."""
        self._wishes[request_id] = wish

    def wish_of(self, request_id: str) -> Wish | None:
        return self._wishes.get(request_id)

    def withdraw(self, request_id: str) -> None:
        """Harmless when repeated."""
        self._wishes.pop(request_id, None)

    @property
    def num_wishes(self) -> int:
        return len(self._wishes)

    def died(self, replica: str) -> None:
        """Its process is gone."""
        self.replicas = tuple(name for name in self.replicas if name != replica)
        self._deaths.append(replica)

    def take_deaths(self) -> list[str]:
        """Those that died since this was asked last."""
        return [self._deaths.popleft() for _ in range(len(self._deaths))]


_by_deployment: dict[tuple[str, str], Placements] = {}


def placements_of(app: str, deployment: str) -> Placements:
    """The same for everyone in this process who asks for this deployment."""
    return _by_deployment.setdefault((app, deployment), Placements())
