"""Promotion and rollback: atomic, checked, and in order."""

import threading
from pathlib import Path

import pytest

from gateway.auto.artifact_folder import ArtifactFolder
from router_models.artifact import load
from router_models.errors import ArtifactError, CorruptArtifactError
from tests.gateway.auto_world import damaged, version_of


def test_promoted_routers_are_copied_and_kept(router: Path, other_router: Path, tmp_path: Path) -> None:
    folder = ArtifactFolder(tmp_path / "a")
    assert (folder.pointer(), folder.stamp()) == (None, None)
    first = folder.promote(router)
    assert (first.version, first.history) == (version_of(router), ())
    before = folder.stamp()
    second = folder.promote(other_router)
    assert (second.version, second.history) == (version_of(other_router), (first.version,))
    assert folder.pointer() == second
    assert folder.stamp() != before
    for version in (first.version, second.version):
        assert load(folder.place(version)).manifest.version == version


def test_rolling_back_twice_goes_back_two(router: Path, other_router: Path, tmp_path: Path) -> None:
    folder = ArtifactFolder(tmp_path)
    folder.promote(router)
    folder.promote(other_router)
    folder.promote(router)
    assert folder.rollback().version == version_of(other_router)
    assert folder.rollback().version == version_of(router)
    with pytest.raises(ArtifactError, match="no earlier version"):
        folder.rollback()
    assert folder.pointer() is not None


def test_promoting_the_current_one_again_mends_it_and_keeps_the_history(
    router: Path, other_router: Path, tmp_path: Path
) -> None:
    folder = ArtifactFolder(tmp_path)
    folder.promote(router)
    promoted = folder.promote(other_router)
    (folder.place(promoted.version) / "arrays.npz").write_bytes(b"")
    assert folder.promote(other_router) == promoted
    assert load(folder.place(promoted.version)).manifest.version == promoted.version


def test_a_damaged_router_is_neither_promoted_nor_gone_back_to(
    router: Path, other_router: Path, tmp_path: Path
) -> None:
    folder = ArtifactFolder(tmp_path / "a")
    first = folder.promote(router)
    with pytest.raises(CorruptArtifactError, match="checksum"):
        folder.promote(damaged(other_router, tmp_path / "damaged"))
    assert folder.pointer() == first
    second = folder.promote(other_router)
    (folder.place(first.version) / "artifact.json").unlink()
    with pytest.raises(CorruptArtifactError):
        folder.rollback()
    assert folder.pointer() == second


@pytest.mark.parametrize("text", ["", "not json", '{"version": "../../etc"}', '{"version": "0123456789ab", "x": 1}'])
def test_a_strange_pointer_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "current").write_text(text)
    with pytest.raises(ArtifactError, match="does not name a version"):
        ArtifactFolder(tmp_path).pointer()


def test_a_folder_that_cannot_be_written_is_an_error(router: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Not a directory"):
        ArtifactFolder(tmp_path / "file").promote(router)


def test_a_reader_never_finds_half_a_pointer(router: Path, other_router: Path, tmp_path: Path) -> None:
    folder = ArtifactFolder(tmp_path)
    folder.promote(router)
    seen, is_over = set(), threading.Event()

    def read() -> None:
        while not is_over.is_set():
            pointer = folder.pointer()
            assert pointer is not None
            seen.add(pointer.version)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        folder.promote(other_router)
        folder.rollback()
    is_over.set()
    reader.join()
    assert seen <= {version_of(router), version_of(other_router)}
    assert seen
