"""Who a request belongs to, as far as this gateway can tell."""

from __future__ import annotations

from typing import Protocol


class Salted(Protocol):
    """A request that may name its prefix cache."""

    @property
    def cache_salt(self) -> str | None: ...


def tenant_of(request: Salted) -> str:
    """The tenant's name; empty for all who name none.

    It is the request's `cache_salt`: who knows it may use the prefixes computed under it, and so may read what was
    noted under it. An operator with tenants that do not trust each other sets it in front of the gateway.
    """
    return request.cache_salt or ""
