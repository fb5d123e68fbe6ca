"""Receipts: what was decided about a request and why, kept for a while for the tenant that sent it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Self

from gateway.answers import JsonObject as JsonObject
from gateway.openai import JsonValue


class Receipt:
    """One request's receipt, written section by section while it is served. `created_s` is in seconds since 1970."""

    def __init__(self, request_id: str, tenant: str = "", created_s: float | None = None) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.created_s = time.time() if created_s is None else created_s
        self._sections: dict[str, Mapping[str, JsonValue]] = {}

    def add(self, section: str, content: Mapping[str, JsonValue]) -> None:
        """Write a section; one that is written again replaces the first."""
        self._sections[section] = content

    def body(self) -> JsonObject:
        """The receipt as JSON: `id`, `created`, and the sections in the order in which they were first written."""
        return {"id": self.request_id, "created": int(self.created_s), **self._sections}

    @classmethod
    def of(cls, body: Mapping[str, JsonValue], tenant: str) -> Self:
        """The receipt whose `body()` this is. Raises KeyError, TypeError or ValueError for anything else."""
        sections = dict(body)
        request_id, created = sections.pop("id"), sections.pop("created")
        if not isinstance(request_id, str) or not isinstance(created, int):
            raise TypeError("a receipt has a string `id` and an integer `created`")
        receipt = cls(request_id, tenant, float(created))
        for name, content in sections.items():
            if not isinstance(content, Mapping):
                raise TypeError(f"section {name} of a receipt is not an object")
            receipt.add(name, content)
        return receipt


class ReceiptStore:
    """The newest receipts of this process. Used from one event loop."""

    def __init__(self, max_receipts: int = 10_000) -> None:
        self._max_receipts = max_receipts
        self._receipts: OrderedDict[tuple[str, str], Receipt] = OrderedDict()

    def keep(self, receipt: Receipt) -> None:
        """Remember it, and forget the oldest beyond the limit."""
        key = (receipt.tenant, receipt.request_id)
        self._receipts[key] = receipt
        self._receipts.move_to_end(key)
        while len(self._receipts) > self._max_receipts:
            self._receipts.popitem(last=False)

    def get(self, request_id: str, tenant: str) -> Receipt | None:
        """The tenant's receipt of that request. Another tenant's is not found, nor told to exist."""
        return self._receipts.get((tenant, request_id))
