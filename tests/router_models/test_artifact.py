import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models import artifact
from router_models.artifact import Origin, load, save
from router_models.errors import ArtifactError, CorruptArtifactError, FeatureVersionError
from router_models.train import Trained
from tests.router_models.tables import world

_ORIGIN = Origin("2026-01-01T00:00:00+00:00", "0" * 64, 3)


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    save(trained.router, _ORIGIN, tmp_path / "router")
    return tmp_path / "router"


def _rewrite(folder: Path, **changes: object) -> None:
    manifest = artifact.Manifest.model_validate_json((folder / "artifact.json").read_text())
    changed = manifest.model_copy(update=changes)
    changed = changed.model_copy(update={"checksum": changed.digest()})
    (folder / "artifact.json").write_text(changed.model_dump_json())


def test_a_loaded_router_predicts_what_the_saved_one_did(trained: Trained, folder: Path) -> None:
    loaded = load(folder)
    prompts = world(30, seed=9).prompts
    pair = ["acme/Strong-1_5", "weak"]
    found = [r.predict(prompts, r.candidates(pair, "world")) for r in (trained.router, loaded.router)]
    np.testing.assert_allclose(found[0].prob_right, found[1].prob_right, atol=1e-6)
    assert (found[0].novelty == found[1].novelty).all()
    np.testing.assert_allclose(found[0].adapted(1.0).need, found[1].adapted(1.0).need, atol=1e-6)
    assert loaded.manifest.seed == 3


def test_equal_routers_have_equal_versions(trained: Trained, folder: Path, tmp_path: Path) -> None:
    again = save(trained.router, _ORIGIN, tmp_path / "again")
    assert again.version == load(folder).manifest.version
    assert len(again.version) == 12


@pytest.mark.parametrize("name", ["artifact.json", "arrays.npz"])
def test_a_missing_or_altered_file_is_corrupt(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    for broken in (data[: len(data) // 2], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        (folder / name).write_bytes(bytes(broken))
        with pytest.raises(CorruptArtifactError, match=name):
            load(folder)
    (folder / name).unlink()
    with pytest.raises(CorruptArtifactError, match=name):
        load(folder)


def test_other_versions_are_refused_by_name(folder: Path) -> None:
    _rewrite(folder, feature_version=0)
    with pytest.raises(FeatureVersionError, match="version 0"):
        load(folder)
    document = json.loads((folder / "artifact.json").read_text()) | {"format_version": 99}
    (folder / "artifact.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="format 99"):
        load(folder)


def test_arrays_that_do_not_fit_the_manifest_are_corrupt(folder: Path) -> None:
    manifest = load(folder).manifest
    _rewrite(folder, layers=(manifest.layers[0][:1],))
    with pytest.raises(CorruptArtifactError):
        load(folder)


def _store(folder: Path, arrays: dict[str, Any]) -> None:
    """Arrays in place of the artifact's own, with the checksums that they should have."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    (folder / "arrays.npz").write_bytes(buffer.getvalue())
    _rewrite(folder, arrays_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())


def test_nothing_is_unpickled(folder: Path) -> None:
    _store(folder, {"bomb": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(CorruptArtifactError, match="pickle"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("text.scale", lambda array: np.concatenate([array, array])),
        ("text.scale", lambda array: np.array(["x"] * len(array))),
        ("text.bias", lambda array: array[None, None]),
        ("0.sketch.value", lambda array: np.full_like(array, np.nan)),
        ("0.sketch.feature", lambda array: np.full_like(array, 255)),
        ("0.transfer.weights", lambda array: np.concatenate([array, array])),
        ("0.embedding.weights", lambda _: np.zeros((3, 1))),
    ],
)
def test_what_cannot_be_asked_is_corrupt_though_its_checksums_are_right(
    folder: Path, name: str, change: Callable[[Any], Any]
) -> None:
    with np.load(folder / "arrays.npz") as found:
        arrays = dict(found)
    _store(folder, arrays | {name: change(arrays.get(name))})
    with pytest.raises(CorruptArtifactError, match=r"arrays\.npz"):
        load(folder)


def test_a_router_that_knows_one_model_chooses_between_none(trained: Trained, tmp_path: Path) -> None:
    (layer,) = trained.router.layers
    layer = tuple(replace(expert, abilities={"weak": expert.abilities["weak"]}) for expert in layer)
    save(replace(trained.router, layers=(layer,)), _ORIGIN, tmp_path / "router")
    with pytest.raises(CorruptArtifactError, match="nothing to choose between"):
        load(tmp_path / "router")


def test_an_artifact_is_replaced_whole_and_nothing_else_is(trained: Trained, folder: Path, tmp_path: Path) -> None:
    (folder / "report.json").write_text("{}")
    save(trained.router, Origin("2027-01-01T00:00:00+00:00", "1" * 64, 4), folder)
    assert load(folder).manifest.seed == 4
    assert (folder / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["router"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not an artifact"):
        save(trained.router, _ORIGIN, tmp_path / "home")


def test_default_names_the_shipped_one() -> None:
    assert artifact.resolve("default") == artifact.DEFAULT
    assert artifact.resolve("some/folder") == Path("some/folder")
