"""Receipts: sections in order, a bounded store, and tenants that do not see each other."""

import pytest

from gateway.openai import ChatCompletionRequest
from gateway.receipts import Receipt, ReceiptStore
from gateway.tenant import tenant_of
from tests.gateway.fakes import chat


def test_a_body_has_the_sections_in_their_order() -> None:
    receipt = Receipt("id-1", "tenant", created_s=12.9)
    receipt.add("model", {"chosen": "a"})
    receipt.add("replica", {"chosen": "r1"})
    receipt.add("model", {"chosen": "b"})
    assert receipt.body() == {"id": "id-1", "created": 12, "model": {"chosen": "b"}, "replica": {"chosen": "r1"}}
    assert list(receipt.body()) == ["id", "created", "model", "replica"]


def test_a_body_becomes_the_same_receipt() -> None:
    receipt = Receipt("id-1", "tenant", created_s=12.0)
    receipt.add("model", {"chosen": "a"})
    again = Receipt.of(receipt.body(), "tenant")
    assert (again.body(), again.tenant) == (receipt.body(), "tenant")


@pytest.mark.parametrize("body", [{}, {"id": "a"}, {"id": 1, "created": 2}, {"id": "a", "created": 2, "model": "x"}])
def test_what_is_no_receipt_is_refused(body: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Receipt.of(body, "")


def test_the_store_forgets_the_oldest() -> None:
    store = ReceiptStore(max_receipts=2)
    for name in "abc":
        store.keep(Receipt(name))
    assert [store.get(name, "") is not None for name in "abc"] == [False, True, True]
    store.keep(Receipt("b"))
    store.keep(Receipt("d"))
    assert [store.get(name, "") is not None for name in "bcd"] == [True, False, True]


def test_a_receipt_is_its_tenants() -> None:
    store = ReceiptStore()
    mine, yours = Receipt("same", "me"), Receipt("same", "you")
    store.keep(mine)
    store.keep(yours)
    assert store.get("same", "me") is mine
    assert store.get("same", "you") is yours
    assert store.get("same", "") is None


def test_the_tenant_is_the_salt() -> None:
    assert tenant_of(ChatCompletionRequest.model_validate(chat(cache_salt="acme"), strict=False)) == "acme"
    assert tenant_of(ChatCompletionRequest.model_validate(chat(), strict=False)) == ""
