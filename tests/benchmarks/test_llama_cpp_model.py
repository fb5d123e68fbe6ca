"""The batches that llama.cpp is given mean what we think they mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'outrider[bench]'")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'outrider[bench]'")

from benchmarks import gguf_file, random_model
from benchmarks.llama_cpp_model import Context, Model

TEXTS = np.random.default_rng(0).integers(0, 512, (3, 20))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("models")
    loaded = Model(gguf_file.materialize(random_model.materialize("qwen3-tiny", folder), folder))
    yield loaded
    loaded.close()


def alone(model: Model, text: np.ndarray) -> np.ndarray:
    context = Context(model, 1, len(text), 1)
    logits = context.decode(text, np.arange(len(text))).copy()
    context.close()
    return logits


def test_sequences_of_a_batch_do_not_see_each_other(model: Model) -> None:
    context = Context(model, 3, 20, 1)
    positions, sequences = np.tile(np.arange(19), 3), np.arange(3).repeat(19)
    first = context.decode(TEXTS[:, :19].ravel(), positions, sequences, positions == 18).copy()
    second = context.decode(TEXTS[:, 19], np.full(3, 19), np.arange(3)).copy()
    for number, text in enumerate(TEXTS):
        expected = alone(model, text)
        np.testing.assert_allclose(first[number], expected[18], atol=0.01)
        np.testing.assert_allclose(second[number], expected[19], atol=0.01)
    context.close()


def test_what_is_forgotten_can_be_written_again(model: Model) -> None:
    context = Context(model, 1, 20, 1)
    context.decode(TEXTS[0], np.arange(20), wanted=False)
    context.forget(start=5)
    logits = context.decode(TEXTS[1][5:], np.arange(5, 20)).copy()
    np.testing.assert_allclose(logits, alone(model, np.concatenate([TEXTS[0][:5], TEXTS[1][5:]]))[5:], atol=0.01)
    context.clear()
    np.testing.assert_allclose(context.decode(TEXTS[2], np.arange(20)), alone(model, TEXTS[2]), atol=0.01)
    context.close()


def test_failures_are_errors(model: Model, tmp_path: Path) -> None:
    context = Context(model, 1, 8, 1)
    context.decode(TEXTS[0], np.arange(20))
    with pytest.raises(RuntimeError, match="20 tokens"):
        context.decode(TEXTS[0], np.arange(20))  # those positions are taken
    context.close()
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(OSError, match=r"empty\.gguf"):
        Model(tmp_path / "empty.gguf")
