from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from demo.losses import text_loss
from demo.recipe import Recipe
from demo.stream import ROW_TOKENS, TokenStream
from demo.training import TrainingRun
from tests.demo.conftest import tiny_model


@pytest.fixture
def stream() -> TokenStream:
    return TokenStream(np.random.default_rng(0).integers(5, 512, 2 * ROW_TOKENS).astype(np.uint16))


def make_run(model: LlamaForCausalLM, stream: TokenStream, recipe: Recipe, checkpoint: Path) -> TrainingRun:
    schedule = recipe.schedules["target"]
    return TrainingRun(model, text_loss(model, stream), len(stream.tokens), schedule, recipe.seed, checkpoint)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, recipe: Recipe, stream: TokenStream) -> None:
    whole = tiny_model(recipe)
    make_run(whole, stream, recipe, tmp_path / "whole.pt").run()

    make_run(tiny_model(recipe), stream, recipe, tmp_path / "parts.pt").run(until_step=3)
    resumed = tiny_model(recipe, seed=1)
    run = make_run(resumed, stream, recipe, tmp_path / "parts.pt")
    assert run.done.step == 3
    run.run()

    assert run.done.step == 6
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss(tmp_path: Path, recipe: Recipe) -> None:
    stream = TokenStream(np.tile(np.arange(5, 21), ROW_TOKENS // 8).astype(np.uint16))
    model = tiny_model(recipe)
    loss = text_loss(model, stream)
    before = loss([0], 32).item()
    make_run(model, stream, recipe, tmp_path / "run.pt").run()
    assert loss([0], 32).item() < before


def test_a_finished_run_changes_nothing(tmp_path: Path, recipe: Recipe, stream: TokenStream) -> None:
    make_run(tiny_model(recipe), stream, recipe, tmp_path / "run.pt").run()
    written = (tmp_path / "run.pt").read_bytes()
    make_run(tiny_model(recipe), stream, recipe, tmp_path / "run.pt").run()
    assert (tmp_path / "run.pt").read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
