"""A receipt is found here first, then where all gateways look; a state that is away costs a receipt and no request."""

import pytest

from gateway.receipt_shelf import ReceiptShelf
from gateway.receipts import Receipt, ReceiptStore
from gateway.shared_receipts import SharedReceipts
from gateway.state.config import StateConfig
from gateway.state.connection import StateClient
from gateway.state.errors import StateUnavailableError
from tests.gateway.state.conftest import client, clock, config, server

__all__ = ["client", "clock", "config", "server"]


class Away:
    """A shared state that does not answer."""

    def __init__(self) -> None:
        self.is_closed = False

    async def keep(self, receipt: Receipt) -> None:
        raise StateUnavailableError("away")

    async def get(self, request_id: str, tenant: str) -> Receipt | None:
        raise StateUnavailableError("away")

    async def close(self) -> None:
        self.is_closed = True


async def test_another_gateways_receipt_is_found_by_its_tenant_alone(client: StateClient) -> None:
    here = ReceiptShelf(ReceiptStore(), SharedReceipts(client, age_s=60))
    there = ReceiptShelf(ReceiptStore(), SharedReceipts(client, age_s=60))
    receipt = Receipt("id", "tenant")
    receipt.add("model", {"chosen": "ä"})
    here.keep(receipt)
    while (found := await there.get("id", "tenant")) is None:
        pass
    assert found.body() == receipt.body()
    assert await there.get("id", "other") is None
    assert await there.get("idtenant", "") is None


async def test_a_shared_receipt_has_an_age(client: StateClient) -> None:
    shared = SharedReceipts(client, age_s=0.02)
    await shared.keep(Receipt("id"))
    while await shared.get("id", "") is not None:
        pass


async def test_without_a_state_one_knows_ones_own() -> None:
    shelf = ReceiptShelf(ReceiptStore())
    receipt = Receipt("id")
    shelf.keep(receipt)
    assert await shelf.get("id", "") is receipt
    assert await shelf.get("other", "") is None
    await shelf.close()


async def test_a_state_that_is_away_is_counted_and_nothing_more() -> None:
    away = Away()
    shelf = ReceiptShelf(ReceiptStore(), away)
    receipt = Receipt("id")
    shelf.keep(receipt)
    assert await shelf.get("id", "") is receipt
    assert await shelf.get("other", "") is None
    await shelf.close()
    assert (shelf.num_failures, away.is_closed) == (2, True)


async def test_a_closed_server_raises_the_states_error(config: StateConfig) -> None:
    client = StateClient(config, "unix:///nowhere/redis.sock", "m", timeout_s=1.0)
    with pytest.raises(StateUnavailableError):
        await SharedReceipts(client, age_s=60).get("id", "")
    await client.close()
