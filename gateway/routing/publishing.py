"""What a replica needs to publish its blocks, and the task that does it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engines.block_journal import BlockJournal
from engines.protocol import Engine
from gateway.routing.publisher import BlockPublisher
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.prefix_index import PrefixIndex

# Nobody waits for these answers.
_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Publishing:
    """Where a model's replicas publish. `url` is the server's address, resolved."""

    model: str
    state: StateConfig
    url: str
    period_s: float


def start_publishing(engine: Engine, journal: BlockJournal, replica: str, to: Publishing) -> asyncio.Task[None]:
    """Publish what `journal` tells until the engine is dead or the task is cancelled. Redis may be away at any time.

    Raises StateUnavailableError for a password that is not set.
    """
    client = StateClient(to.state, to.url, to.model, timeout_s=_TIMEOUT_S)
    publisher = BlockPublisher(PrefixIndex(client, to.state), replica, journal, to.state)

    async def kv_use() -> float:
        await engine.check_health()
        stats = await engine.stats()
        return stats.num_blocks_used / stats.num_blocks_total if stats.num_blocks_total else 0.0

    async def publish() -> None:
        try:
            await publisher.run(kv_use, to.period_s)
        finally:
            await client.close()

    return asyncio.create_task(publish())
