"""Tenants as the request log names them: a digest under a key that lies beside the log, never their own name."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

KEY_FILE = "tenant.key"
_KEY_BYTES = 32


def tenant_key(folder: Path) -> bytes:
    """The folder's key, made where there is none. All gateways that share the folder have the same. Raises OSError."""
    path = folder / KEY_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=folder, prefix=f".{KEY_FILE}-")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            # A link, for it appears whole, and only where nobody else's is there already.
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            Path(name).unlink()
    return path.read_bytes()


def tenant_digest(key: bytes, tenant: str) -> str:
    """16 hex digits; those who name no tenant have one too, so that nobody speaks for another."""
    return keyed_digest(key, tenant)[:16]


def keyed_digest(key: bytes, text: str) -> str:
    """HMAC-SHA-256 in hex: equal texts have equal digests, and nobody without the key can try texts."""
    return hmac.new(key, text.encode(errors="replace"), hashlib.sha256).hexdigest()
