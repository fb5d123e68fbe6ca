"""The router that serves: replaced whole, and kept where its successor cannot be loaded."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.auto.artifact_folder import ArtifactFolder
from gateway.auto.router_watch import RouterWatch
from gateway.auto_config import AutoConfig
from gateway.log import make_logger
from gateway.router_metrics import RouterMetrics
from router_models.errors import ArtifactError
from tests.gateway.auto_world import auto_config, damaged, until, version_of


class _Watched:
    def __init__(self, config: AutoConfig) -> None:
        self.registry = CollectorRegistry()
        self.watch = RouterWatch(config, RouterMetrics("test", self.registry), make_logger("error"))

    @property
    def version(self) -> str | None:
        return None if self.watch.active is None else self.watch.active.router.version

    @property
    def failures(self) -> int:
        line = 'outrider_router_load_failures_total{ingress="test"} '
        text = generate_latest(self.registry).decode()
        return next((int(float(row.removeprefix(line))) for row in text.splitlines() if row.startswith(line)), 0)


async def test_the_configured_router_serves_until_one_is_promoted(
    router: Path, other_router: Path, tmp_path: Path
) -> None:
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    assert found.version == version_of(router)
    before = found.watch.active
    await found.watch.look()
    assert found.watch.active is before
    ArtifactFolder(tmp_path).promote(other_router)
    await found.watch.look()
    assert found.version == version_of(other_router)
    ArtifactFolder(tmp_path).promote(router)
    ArtifactFolder(tmp_path).rollback()
    await found.watch.look()
    assert found.version == version_of(other_router)


async def test_what_was_promoted_serves_after_a_restart(router: Path, other_router: Path, tmp_path: Path) -> None:
    ArtifactFolder(tmp_path).promote(other_router)
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    assert found.version == version_of(other_router)
    assert found.failures == 0


async def test_a_damaged_router_leaves_the_old_one_serving(router: Path, other_router: Path, tmp_path: Path) -> None:
    folder = ArtifactFolder(tmp_path)
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    before = found.watch.active
    promoted = folder.promote(other_router)
    arrays = folder.place(promoted.version) / "arrays.npz"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-1])
    await found.watch.look()
    assert found.watch.active is before
    assert found.failures == 1
    assert "does not match its checksum" in str(found.watch.status()["error"])
    await found.watch.look()
    assert found.failures == 1
    arrays.write_bytes(whole)
    folder.promote(other_router)
    await found.watch.look()
    assert found.version == promoted.version
    assert found.watch.status()["error"] is None


async def test_going_back_to_what_serves_ends_the_complaint(router: Path, other_router: Path, tmp_path: Path) -> None:
    folder = ArtifactFolder(tmp_path)
    folder.promote(router)
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    (folder.place(folder.promote(other_router).version) / "arrays.npz").unlink()
    await found.watch.look()
    assert found.watch.status()["error"] is not None
    folder.rollback()
    await found.watch.look()
    assert (found.version, found.watch.status()["error"]) == (version_of(router), None)


async def test_a_pointer_that_could_not_be_read_is_read_again(
    router: Path, other_router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ArtifactFolder(tmp_path)
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    promoted = folder.promote(other_router)
    monkeypatch.setattr(ArtifactFolder, "pointer", _unreadable)
    monkeypatch.setattr("gateway.auto.router_watch._RETRY_S", 0.0)
    await found.watch.look()
    assert (found.version, found.failures) == (version_of(router), 1)
    monkeypatch.undo()
    await found.watch.look()
    assert found.version == promoted.version


def _unreadable(folder: ArtifactFolder) -> None:
    raise ArtifactError(f"{folder.folder}: Input/output error")


async def test_whatever_a_router_does_when_it_is_loaded_the_watch_goes_on(
    router: Path, other_router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path), watch_period_s=0.01))
    await found.watch.start()
    task = asyncio.create_task(found.watch.run())

    def breaks(folder: Path, config: AutoConfig) -> None:
        raise IndexError("index 255 is out of bounds")

    with monkeypatch.context() as broken:
        broken.setattr("gateway.auto.router_watch.load_router", breaks)
        ArtifactFolder(tmp_path).promote(other_router)
        await until(lambda: found.failures == 1)
    assert "index 255" in str(found.watch.status()["error"])
    ArtifactFolder(tmp_path).promote(router)
    promoted = ArtifactFolder(tmp_path).promote(other_router)
    await until(lambda: found.version == promoted.version)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_damaged_promotion_falls_back_to_the_configured_router_at_the_start(
    router: Path, other_router: Path, tmp_path: Path
) -> None:
    folder = ArtifactFolder(tmp_path)
    promoted = folder.promote(other_router)
    (folder.place(promoted.version) / "arrays.npz").unlink()
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    await found.watch.start()
    assert found.version == version_of(router)
    assert "arrays.npz" in str(found.watch.status()["error"])


async def test_a_strange_pointer_changes_nothing(router: Path, tmp_path: Path) -> None:
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path)))
    (tmp_path / "current").write_text("{}")
    await found.watch.start()
    assert (found.version, found.failures) == (version_of(router), 1)


async def test_without_any_router_nothing_is_raised(tmp_path: Path) -> None:
    found = _Watched(auto_config(tmp_path / "absent"))
    await found.watch.start()
    assert (found.version, found.failures) == (None, 1)


async def test_a_shadow_is_loaded_beside_it_and_may_be_missing(
    router: Path, other_router: Path, tmp_path: Path
) -> None:
    found = _Watched(auto_config(router, shadow=str(other_router)))
    await found.watch.start()
    assert found.watch.status()["shadow"] == version_of(other_router)
    found = _Watched(auto_config(router, shadow=str(damaged(other_router, tmp_path / "damaged"))))
    await found.watch.start()
    assert (found.version, found.watch.shadow) == (version_of(router), None)


async def test_it_looks_by_itself(router: Path, other_router: Path, tmp_path: Path) -> None:
    found = _Watched(auto_config(router, artifact_folder=str(tmp_path), watch_period_s=0.01))
    await found.watch.start()
    task = asyncio.create_task(found.watch.run())
    for promotion in (other_router, router, other_router):
        promoted = await asyncio.to_thread(ArtifactFolder(tmp_path).promote, promotion)
        await until(lambda version=promoted.version: found.version == version)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
