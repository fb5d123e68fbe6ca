"""Receipts in the shared state, so that every gateway finds them."""

from __future__ import annotations

import hashlib
import json

from gateway.receipts import Receipt
from gateway.state.connection import Script, StateClient

_KEEP = Script("redis.call('SET', ns .. ':receipt:' .. ARGV[3], ARGV[4], 'PX', ARGV[5]) return 1")
_GET = Script("return redis.call('GET', ns .. ':receipt:' .. ARGV[3])")


class SharedReceipts:
    """Receipts in the shared state, for `age_s` seconds each. Belongs to one event loop."""

    def __init__(self, client: StateClient, age_s: float) -> None:
        self._client = client
        self._age_ms = int(age_s * 1000)

    async def keep(self, receipt: Receipt) -> None:
        """Raises StateUnavailableError."""
        body = json.dumps(receipt.body())
        await self._client.run(_KEEP, _key(receipt.request_id, receipt.tenant), body, self._age_ms)

    async def get(self, request_id: str, tenant: str) -> Receipt | None:
        """Raises StateUnavailableError."""
        found = await self._client.run(_GET, _key(request_id, tenant))
        return None if found is None else Receipt.of(json.loads(found), tenant)

    async def close(self) -> None:
        await self._client.close()


def _key(request_id: str, tenant: str) -> str:
    """No pair reads like another, and no tenant's name is in a key."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{request_id}".encode(errors="surrogatepass")).hexdigest()
