"""An engine's side of the prefix index: its blocks, told in batches, in order, for as long as it lives.

The step thread writes a journal; this reads it on the event loop and keeps what is held and what has not been told
yet. A message that got no answer is sent again as it was, under its number. When the index has forgotten the replica or
missed a message, a new epoch begins with everything that is held.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from engines.block_hash import BlockHash
from engines.block_journal import BlockJournal
from engines.errors import EngineDeadError
from gateway.state.config import StateConfig
from gateway.state.errors import StateUnavailableError
from gateway.state.prefix_index import MAX_BATCH, Applied, EngineReport, PrefixIndex

_log = logging.getLogger(__name__)

# More untold changes than this, and than twice what is held, are dropped: telling all that is held is shorter.
_MAX_UNTOLD = 8192


@dataclass(frozen=True, slots=True)
class _Message:
    seq: int
    added: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]


class BlockPublisher:
    """Tells the index about one replica. Belongs to one event loop."""

    def __init__(
        self,
        index: PrefixIndex,
        replica: str,
        journal: BlockJournal,
        config: StateConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._replica = replica
        self._journal = journal
        self._renew_s = min(config.replica_lease_s, config.report_ttl_s) / 3
        self._repeat_s = config.block_ttl_s / 2
        self._clock = clock
        self._held: set[BlockHash] = set()
        self._untold: dict[BlockHash, bool] = {}  # hash -> whether it is held
        self._message: _Message | None = None  # sent, and not yet answered
        self._epoch: str | None = None
        self._seq = 0
        self._told_s = self._repeated_s = clock()
        self.num_epochs = 0

    async def run(self, kv_use: Callable[[], Awaitable[float]], period_s: float) -> None:
        """Publish until the engine is dead, which `kv_use` (share of its blocks in use) tells by EngineDeadError.

        After any other error it begins again, after a pause that doubles up to a third of the lease.
        """
        is_failing, pause_s = False, period_s
        while True:
            try:
                await self.publish(await kv_use())
                is_failing, pause_s = False, period_s
            except StateUnavailableError:  # gateways see the lease end; the next message says what this one would have
                is_failing, pause_s = False, period_s
            except EngineDeadError:
                await self._forget()
                return
            except Exception:  # noqa: BLE001 - the task's border: a replica that tells nothing is never warm
                if not is_failing:
                    _log.exception("the prefix cache could not be published; beginning again")
                is_failing, pause_s = True, max(period_s, min(2 * pause_s, self._renew_s))
                self._epoch = None
            await asyncio.sleep(pause_s)

    async def publish(self, kv_use: float) -> None:
        """Bring the index up to date and keep the lease. Raises StateUnavailableError; a later call goes on."""
        self._collect()
        if self._epoch is None:
            await self._begin_epoch()
        while self._message is not None or self._untold or self._clock() - self._told_s > self._renew_s:
            if not await self._tell(EngineReport(kv_use)):
                self._epoch = None
                return

    def _collect(self) -> None:
        for block_hash, is_held in self._journal.take():
            (self._held.add if is_held else self._held.discard)(block_hash)
            self._untold[block_hash] = is_held
        if self._clock() - self._repeated_s > self._repeat_s:
            self._repeated_s = self._clock()
            self._untold.update(dict.fromkeys(self._held, True))
        if len(self._untold) > max(_MAX_UNTOLD, 2 * len(self._held)):
            self._epoch = None
            self._untold.clear()

    async def _begin_epoch(self) -> None:
        epoch = uuid.uuid4().hex
        await self._index.register(self._replica, epoch)
        self._epoch, self._seq, self._message = epoch, 0, None
        self._untold = dict.fromkeys(self._held, True)
        self._told_s = self._repeated_s = self._clock()
        self.num_epochs += 1

    async def _tell(self, report: EngineReport) -> bool:
        """Whether the index took the message; if not, all is to be told again."""
        message = self._message = self._message or self._next_message()
        assert self._epoch is not None
        applied = await self._index.apply(
            self._replica, self._epoch, message.seq, message.added, message.removed, report
        )
        if applied is not Applied.OK:
            return False
        self._message, self._seq, self._told_s = None, message.seq, self._clock()
        return True

    def _next_message(self) -> _Message:
        """Of what is untold, as much as a message takes; with nothing to tell, the last number again."""
        told = dict(itertools.islice(self._untold.items(), MAX_BATCH))
        for block_hash in told:
            del self._untold[block_hash]
        added = tuple(block_hash for block_hash, is_held in told.items() if is_held)
        removed = tuple(block_hash for block_hash, is_held in told.items() if not is_held)
        return _Message(self._seq + 1 if told else self._seq, added, removed)

    async def _forget(self) -> None:
        try:
            await self._index.forget(self._replica)
        except StateUnavailableError:
            return  # its lease ends by itself
