"""A model is made faster, and shown to say the same as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engines import prepare
from engines.attention import select_backend
from engines.config import LocalEngineConfig
from engines.errors import UnsupportedModelError
from engines.loading import LoadedModel, weight_bytes
from engines.native.library import isa_name
from engines.optimized import Optimizations
from engines.optimized import optimize as really_optimize
from tests.engines import tiny_models

needs_kernels = pytest.mark.skipif(isa_name() in (None, "portable"), reason="no kernels for this machine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.SUPPORTED["llama"](), tmp_path_factory.mktemp("llama"))


def prepared(checkpoint: Path, backend: str = "auto", **settings: object) -> LoadedModel:
    config = LocalEngineConfig.model_validate({"model": str(checkpoint), "device": "cpu"} | settings)
    return prepare.prepare_model(config, select_backend(backend, torch.device("cpu")))


@needs_kernels
def test_a_model_whose_matrices_are_all_packed_runs_on_kernels(checkpoint: Path) -> None:
    loaded = prepared(checkpoint)
    assert loaded.runs_on_kernels
    assert loaded.weight_bytes == weight_bytes(loaded.model)
    assert not prepared(checkpoint, backend="torch").runs_on_kernels


def test_optimizing_can_be_switched_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "optimize", lambda model: pytest.fail("was optimized"))
    assert not prepared(checkpoint, optimize=False).runs_on_kernels


@needs_kernels
def test_an_exchange_that_changes_what_the_model_says_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrongly(model: PreTrainedModel) -> Optimizations:
        done = really_optimize(model)
        torch.nn.init.constant_(model.get_input_embeddings().weight, 0.5)
        return done

    monkeypatch.setattr(prepare, "optimize", wrongly)
    with pytest.raises(UnsupportedModelError, match="differs from its own eager output"):
        prepared(checkpoint)
    prepared(checkpoint, parity_probe=False)
