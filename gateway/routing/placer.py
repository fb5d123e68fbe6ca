"""Who says where a request goes, and is told what became of it.

A Placer places requests of one model; a Seat is one request's place. HandleEngine asks for a seat before each try and
leaves it after.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, runtime_checkable

from engines.types import Delta, GenerateRequest, ModelCard
from gateway.answers import JsonObject
from gateway.routing.placement_counts import PlacementCounts
from gateway.routing.placements import Placements, Wish


class Seat(Protocol):
    """One try of one request. Belongs to the gateway's event loop."""

    @property
    def replica(self) -> str | None:
        """Where it is, or is meant to go; None where nobody knows."""
        ...

    def note(self, item: tuple[Delta, ...]) -> None:
        """An item of its stream has come."""
        ...

    def leave(self) -> None:
        """The try is over, however it ended. Harmless when repeated."""
        ...


class Placer(Protocol):
    """Places requests of one model."""

    @property
    def policy(self) -> str:
        """Its name in receipts."""
        ...

    async def open(self, card: ModelCard) -> None:
        """Begin, now that the engine is known. Harmless when repeated."""
        ...

    async def place(self, request: GenerateRequest, avoid: frozenset[str], entry: JsonObject) -> Seat:
        """A seat for the next try, on none of `avoid` if there is another. What is decided, and later what is found,
        is written into `entry`."""
        ...

    async def explain(self, request: GenerateRequest) -> JsonObject:
        """What `place` would write, were it to consider every replica. Changes nothing."""
        ...

    def has_other(self, avoid: frozenset[str]) -> bool:
        """Whether there is known to be a replica beyond `avoid`."""
        ...

    def counted(self) -> PlacementCounts | None:
        """What it has done so far; None where nothing is counted."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Explains(Protocol):
    """An engine of several processes, which can tell where its requests go."""

    @property
    def policy(self) -> str: ...

    def generate_noting(self, request: GenerateRequest, entry: JsonObject) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Engine.generate, with the choice of a replica written into `entry`."""
        ...

    async def explain(self, request: GenerateRequest) -> JsonObject:
        """What generate_noting would write, without inference."""
        ...


class FreeSeat:
    """Wherever Serve puts it."""

    replica: str | None = None

    def note(self, item: tuple[Delta, ...]) -> None:
        pass

    def leave(self) -> None:
        pass


class ServesChoice:
    """Leaves the choice to Serve."""

    def __init__(self, policy: str) -> None:
        self.policy = policy

    async def open(self, card: ModelCard) -> None:
        pass

    async def place(self, request: GenerateRequest, avoid: frozenset[str], entry: JsonObject) -> Seat:
        return FreeSeat()

    async def explain(self, request: GenerateRequest) -> JsonObject:
        return {}

    def has_other(self, avoid: frozenset[str]) -> bool:
        return False

    def counted(self) -> PlacementCounts | None:
        return None

    async def close(self) -> None:
        pass


class WishedSeat:
    """A place that is a wish and nothing more."""

    def __init__(self, placements: Placements, request_id: str, replica: str | None, avoid: frozenset[str]) -> None:
        self._placements = placements
        self._request_id = request_id
        self.replica = replica
        placements.make_wish(request_id, Wish(replica, avoid))

    def note(self, item: tuple[Delta, ...]) -> None:
        pass

    def leave(self) -> None:
        self._placements.withdraw(self._request_id)


class RoundRobin:
    """Replicas in turn, whatever they hold or have to do: what others are compared with."""

    policy = "round_robin"

    def __init__(self, placements: Placements) -> None:
        self._placements = placements
        self._turn = 0

    async def open(self, card: ModelCard) -> None:
        pass

    async def place(self, request: GenerateRequest, avoid: frozenset[str], entry: JsonObject) -> Seat:
        replica = self._next(avoid)
        self._turn += 1
        entry["chosen"] = replica
        return WishedSeat(self._placements, request.request_id, replica, avoid)

    async def explain(self, request: GenerateRequest) -> JsonObject:
        return {"chosen": self._next(frozenset())}

    def has_other(self, avoid: frozenset[str]) -> bool:
        return any(replica not in avoid for replica in self._placements.replicas)

    def counted(self) -> PlacementCounts | None:
        return None

    async def close(self) -> None:
        pass

    def _next(self, avoid: frozenset[str]) -> str | None:
        replicas = [name for name in self._placements.replicas if name not in avoid]
        return replicas[self._turn % len(replicas)] if replicas else None
