from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from demo.model import save_model
from demo.quantize import dequantize, quantize, quantize_folder
from demo.recipe import Recipe
from tests.demo.conftest import tiny_model


def test_a_round_trip_is_within_half_a_step() -> None:
    weight = torch.randn(6, 32)
    steps, scale = quantize(weight)
    assert steps.dtype == torch.int8
    assert scale.shape == (6, 1)
    error = (dequantize(steps, scale) - weight).abs()
    # Half a step, and up to one more at a channel's extremes, where the rounded scale may fall short of them.
    inside = steps.abs() < 127
    assert (error <= 0.5 * scale.float() + 1e-6)[inside].all()
    assert (error <= scale.float()).all()


def test_what_is_on_the_grid_is_exact() -> None:
    steps = torch.randint(-126, 127, (4, 16), dtype=torch.int8)
    steps[:, 0] = 127
    weight = dequantize(steps, torch.full((4, 1), 0.5))
    assert torch.equal(dequantize(*quantize(weight)), weight)


def test_a_dead_channel_stays_zero() -> None:
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 8))), torch.zeros(2, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_loads_the_int8_folder(tmp_path: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny_model(recipe)
    save_model(model, tokenizer, tmp_path)
    quantize_folder(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = {
        name: dequantize(weight, stored[f"{name}_scale"]) if weight.dtype == torch.int8 else weight.float()
        for name, weight in stored.items()
        if not name.endswith("_scale")
    }
    model.load_state_dict(weights, strict=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(5, 37)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
