"""What the prefix cache gains and loses, told to whoever publishes it, without making the step wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from engines.block_hash import BlockHash


class BlockObserver(Protocol):
    """Told by the loop thread, in the middle of a step: it must be quick and must not raise."""

    def added(self, block_hash: BlockHash) -> None:
        """The content can be found from now on."""
        ...

    def evicted(self, block_hash: BlockHash) -> None:
        """It cannot any more."""
        ...


@runtime_checkable
class WatchesBlocks(Protocol):
    """An engine with a prefix cache that may be observed."""

    def watch_blocks(self, observer: BlockObserver) -> None:
        """Tell `observer` from the first block on; call it before `start`."""
        ...


class BlockJournal:
    """Events in order, written by the loop thread and taken by one other. A deque needs no lock for that.

    It grows until it is taken: a step adds at most the blocks it touches.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[BlockHash, bool]] = deque()

    def added(self, block_hash: BlockHash) -> None:
        self._events.append((block_hash, True))

    def evicted(self, block_hash: BlockHash) -> None:
        self._events.append((block_hash, False))

    def take(self) -> Iterator[tuple[BlockHash, bool]]:
        """The events so far, oldest first, removed as they are read: (hash, whether it is held now)."""
        for _ in range(len(self._events)):
            yield self._events.popleft()
