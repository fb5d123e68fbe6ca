"""Tenants in the log: told apart, never named."""

import threading
from pathlib import Path

from gateway.tenant_digest import KEY_FILE, keyed_digest, tenant_digest, tenant_key


def test_a_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    key = tenant_key(folder)
    assert len(key) == 32
    assert tenant_key(folder) == key
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == [KEY_FILE]


def test_gateways_that_start_together_agree(tmp_path: Path) -> None:
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(tenant_key(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1


def test_digests_depend_on_tenant_and_key() -> None:
    assert tenant_digest(b"k", "bank") == tenant_digest(b"k", "bank")
    assert len({tenant_digest(b"k", "bank"), tenant_digest(b"k", ""), tenant_digest(b"other", "bank")}) == 3
    assert keyed_digest(b"k", "bank").startswith(tenant_digest(b"k", "bank"))
