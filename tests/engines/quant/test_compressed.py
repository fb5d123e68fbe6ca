"""Checkpoints: ours, as we and as compressed-tensors read them, and theirs, made by their own library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engines.config import LocalEngineConfig
from engines.loading import load_model
from engines.quant.checkpoint import copy_companions, save_quantized
from engines.quant.compressed import adopt
from engines.quant.model import describe, quantize, quantized_layers
from engines.quant.scheme import Scheme
from tests.engines import tiny_models

compressed = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MID = Path(__file__).parents[3] / "demo" / "models" / "mid"
TOKENS = torch.arange(3, 43)[None]
SCHEMES: list[Scheme] = ["int8", "int4"]


def tiny_config() -> PretrainedConfig:
    return tiny_models._config("LlamaConfig", tie_word_embeddings=True, attention_bias=True, initializer_range=0.1)


def logits(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(TOKENS).logits.float()


def read(folder: Path, **settings: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_round_trip_is_exact(scheme: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models.build(tiny_config(), dtype=dtype)
    quantize(model, scheme, group_size=16)
    save_quantized(model, tmp_path)
    loaded = load_model(LocalEngineConfig(model=str(tmp_path), device="cpu"))
    assert describe(loaded.model) == describe(model)
    for name, layer in quantized_layers(loaded.model).items():
        saved = quantized_layers(model)[name]
        assert torch.equal(layer.steps(), saved.steps())
        assert torch.equal(layer.scales(), saved.scales())
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_reads_the_same_weights(scheme: Scheme, tmp_path: Path) -> None:
    model = tiny_models.build(tiny_config(), dtype=torch.bfloat16)
    quantize(model, scheme, group_size=16)
    save_quantized(model, tmp_path)
    theirs = read(tmp_path, dtype=torch.float32)
    theirs(TOKENS)  # unpacks
    for name, layer in quantized_layers(model).items():
        weight = theirs.get_submodule(name).weight
        torch.testing.assert_close(weight.detach().float(), layer.dequantized())
    assert relative_error(logits(theirs), logits(model)) < 0.03


def test_int8_files_hold_whole_numbers_and_say_what_is_done(tmp_path: Path) -> None:
    model = tiny_models.build(tiny_config(), dtype=torch.bfloat16)
    quantize(model, "int8", keep_head=True)
    save_quantized(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert "lm_head.weight" not in tensors, "kept, and still tied"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    settings = config["quantization_config"]
    assert settings["ignore"] == ["lm_head"]
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"]["strategy"] == "token"


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, folder = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "model.bin", "training.log"):
        (source / name).write_text(name)
    wanted = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    for name in wanted:
        (source / name).write_text(name)
    assert copy_companions(source, folder) == wanted
    assert sorted(path.name for path in folder.iterdir()) == wanted


def their_checkpoint(folder: Path, weights: dict[str, Any], **group: Any) -> Path:
    """A tiny Llama that compressed-tensors itself has quantized to the nearest, output layer left alone."""
    model = tiny_models.build(tiny_config(), dtype=torch.bfloat16)
    scheme = {"targets": ["Linear"], "weights": weights | {"dynamic": False}, **group}
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]})
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            fit_scales(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def fit_scales(module: nn.Module, weights: dict[str, Any]) -> None:
    largest = 2 ** (weights["num_bits"] - 1) - 1
    width = weights.get("group_size") or module.weight.shape[1]
    groups = module.weight.detach().abs().view(module.weight.shape[0], -1, width).amax(-1)
    if weights["strategy"] == "tensor":
        groups = groups.amax()
    module.weight_scale.data.copy_((groups / largest).reshape(module.weight_scale.shape))


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
OURS = {
    "w8a16 by channel": ({**INT8, "strategy": "channel"}, {}),
    "w8a16 for all": ({**INT8, "strategy": "tensor"}, {}),
    "w8a8": ({**INT8, "strategy": "channel"}, {"input_activations": TOKENWISE}),
    "w4a16 in groups": ({**INT4, "strategy": "group", "group_size": 16}, {}),
    "w4a16 by channel": ({**INT4, "strategy": "channel"}, {}),
}
OTHERS = {
    "int8 in groups": ({**INT8, "strategy": "group", "group_size": 16}, {}),
    "three bits": ({**INT4, "num_bits": 3, "strategy": "channel"}, {}),
    "activations for all": (
        {**INT8, "strategy": "channel"},
        {"input_activations": {**INT8, "strategy": "tensor", "dynamic": True}},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_foreign_schemes_that_are_ours_are_adopted(name: str, tmp_path: Path) -> None:
    weights, group = OURS[name]
    folder = their_checkpoint(tmp_path, weights, **group)
    ours = read(folder)
    assert adopt(ours) == 21
    assert not any(hasattr(module, "quantization_scheme") for module in ours.modules())
    assert not ours._forward_pre_hooks
    assert relative_error(logits(ours), logits(read(folder))) < 0.06


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_keep_their_modules(name: str, tmp_path: Path) -> None:
    weights, group = OTHERS[name]
    folder = their_checkpoint(tmp_path, weights, **group)
    model, expected = read(folder), logits(read(folder))
    assert adopt(model) == 0
    assert torch.equal(logits(model), expected)


def test_asymmetric_layers_keep_their_modules() -> None:
    model = tiny_models.build(tiny_config(), dtype=torch.bfloat16)
    weights = {**INT4, "symmetric": False, "strategy": "group", "group_size": 16}
    scheme = {"targets": ["Linear"], "weights": weights}
    apply_quantization_config(model, QuantizationConfig.model_validate({"config_groups": {"group_0": scheme}}))
    assert adopt(model) == 0
    assert not quantized_layers(model)


@pytest.mark.skipif(not MID.exists(), reason="no checkpoints in demo/models")
def test_the_demo_fleets_int8_model_runs_on_our_layers() -> None:
    loaded = load_model(LocalEngineConfig(model=str(MID), device="cpu"))
    assert describe(loaded.model) == "int8"
    tokens = torch.arange(100, 164)[None]
    theirs = read(MID)
    loaded.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        ours, expected = (model(tokens).logits.float() for model in (loaded.model, theirs))
    assert relative_error(ours, expected) < 0.02
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.build(tiny_config(), dtype=torch.bfloat16)
    quantize(model, "int8")
    save_quantized(model, tmp_path)
    loaded = load_model(LocalEngineConfig(model=str(tmp_path), device="cpu", quantization="int4"))
    assert describe(loaded.model) == "int8"
    assert "is quantized already and stays as it is: int8" in caplog.text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantization_at_load(scheme: Scheme, tmp_path: Path) -> None:
    tiny_models.save(tiny_config(), tmp_path, dtype=torch.bfloat16)
    dense = load_model(LocalEngineConfig(model=str(tmp_path), device="cpu"))
    loaded = load_model(LocalEngineConfig(model=str(tmp_path), device="cpu", quantization=scheme))
    assert set(quantized_layers(loaded.model)) == {
        name for name, module in dense.model.named_modules() if type(module) is nn.Linear
    }
    bounds: dict[Scheme, Callable[[float], bool]] = {"int8": lambda e: 0 < e < 0.05, "int4": lambda e: 0.01 < e < 0.3}
    assert bounds[scheme](relative_error(logits(loaded.model), logits(dense.model)))
    assert loaded.weights_fingerprint == dense.weights_fingerprint
