"""Where receipts are found again: in the process that served, and behind several of them in the shared state.

Gateways take turns behind one address, so whoever is asked for a receipt may not be the one that served. With a shared
state every gateway finds every receipt for a while; without one, each knows its own.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.receipts import Receipt, ReceiptStore
from gateway.state.errors import StateUnavailableError


class Shared(Protocol):
    """What all gateways can find. Methods raise StateUnavailableError."""

    async def keep(self, receipt: Receipt) -> None: ...

    async def get(self, request_id: str, tenant: str) -> Receipt | None: ...

    async def close(self) -> None: ...


class ReceiptShelf:
    """A gateway's receipts: its own, and all others' where there is a state to share them."""

    def __init__(self, own: ReceiptStore, shared: Shared | None = None) -> None:
        self._own = own
        self._shared = shared
        self._keeping: set[asyncio.Task[None]] = set()
        self.num_failures = 0

    def keep(self, receipt: Receipt) -> None:
        """Remember it here, and tell the others in the background. It must not change any more."""
        self._own.keep(receipt)
        if self._shared is not None:
            task = asyncio.ensure_future(self._share(self._shared, receipt))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    async def get(self, request_id: str, tenant: str) -> Receipt | None:
        """The tenant's receipt. None if nobody has it, or whoever has it cannot be asked now."""
        receipt = self._own.get(request_id, tenant)
        if receipt is not None or self._shared is None:
            return receipt
        try:
            return await self._shared.get(request_id, tenant)
        except StateUnavailableError:
            self.num_failures += 1
            return None

    async def close(self) -> None:
        if self._keeping:
            await asyncio.wait(self._keeping)
        if self._shared is not None:
            await self._shared.close()

    async def _share(self, shared: Shared, receipt: Receipt) -> None:
        try:
            await shared.keep(receipt)
        except StateUnavailableError:
            self.num_failures += 1
