"""An upscaled checkpoint computes what its source computes, at another size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.upscale import (
    DEMO_TARGET,
    Growth,
    compare,
    materialize,
    upscaled_config,
    upscaled_weights,
)
from benchmarks.workloads import held_out_documents
from engines.config import LocalEngineConfig
from engines.loading import load_model

TINY = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-2,  # large enough to matter
}


def _checkpoint(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **settings}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def _rows(vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("growth", [Growth(4, 5), Growth(2, 2), Growth(1, 3), Growth(3, 7)])
def test_logits_agree_in_float32(tmp_path: Path, growth: Growth, tied: bool) -> None:
    source = _checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    path = materialize(source, growth, tmp_path / "cache")
    agreement = compare(source, path, _rows(), torch.float32)
    assert agreement.worst_relative_error < 1e-5
    assert agreement.same_argmax == 1.0
    assert agreement.num_positions == 60


def test_what_differs_is_seen(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "tiny")
    other = _checkpoint(tmp_path / "other", rope_theta=100.0)
    assert compare(source, other, _rows(), torch.float32).worst_relative_error > 1e-3


def test_all_sizes_grow_and_head_width_and_grouping_stay(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "tiny")
    model = LlamaForCausalLM.from_pretrained(materialize(source, Growth(4, 5), tmp_path / "cache"))
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 160, 5)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 8)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8 * 8, 96)
    assert config.vocab_size == 64


def test_only_what_must_be_zero_is_zero(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "tiny")
    for name, weight in upscaled_weights(source, Growth(4, 3)).items():
        zero_share = (weight == 0).float().mean().item()
        old_share = 0.0 if "layers.1." in name else 1 / 16  # layer 1 is the new one
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert zero_share == pytest.approx(1 - old_share, abs=0.01), name
        elif "embed_tokens" in name:
            assert zero_share == pytest.approx(3 / 4, abs=0.01), name
        else:
            assert zero_share == 0.0, name
        assert weight.isfinite().all()


def test_the_demo_target_agrees_in_both_dtypes(tmp_path: Path) -> None:
    path = materialize(DEMO_TARGET, Growth(4, 6), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "".join(document.text for document in held_out_documents())
    rows = torch.tensor(tokenizer.encode(text[:8000])[:512]).view(4, 128)
    exact = compare(DEMO_TARGET, path, rows, torch.float32)
    assert exact.worst_relative_error < 1e-4
    assert exact.same_argmax > 0.995
    rounded = compare(DEMO_TARGET, path, rows, torch.bfloat16)
    assert rounded.same_argmax > 0.97


def test_tokenizer_template_and_generation_config_come_along_and_the_engine_loads_it(tmp_path: Path) -> None:
    path = materialize(DEMO_TARGET, Growth(2, 5), tmp_path)
    assert {file.name for file in path.iterdir()} == {file.name for file in DEMO_TARGET.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (path / name).read_bytes() == (DEMO_TARGET / name).read_bytes()
    loaded = load_model(LocalEngineConfig(model=str(path)))
    assert loaded.dtype == torch.bfloat16
    assert len(loaded.layers) == 5
    assert [layer.num_kv_heads for layer in loaded.layers if layer] == [4] * 5


def test_it_is_made_once_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    source, cache = _checkpoint(tmp_path / "tiny"), tmp_path / "cache"
    path = materialize(source, Growth(2, 3), cache)
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert materialize(source, Growth(2, 3), cache) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made
    assert list(cache.iterdir()) == [path]


def test_the_folder_is_named_after_all_that_decides_its_content(tmp_path: Path) -> None:
    source, cache = _checkpoint(tmp_path / "tiny"), tmp_path / "cache"
    paths = {materialize(source, Growth(2, 3), cache), materialize(source, Growth(2, 4), cache)}
    paths.add(materialize(source, Growth(2, 3), cache, seed=1))
    other = shutil.copytree(source, tmp_path / "again" / "tiny")
    assert materialize(other, Growth(2, 3), cache) in paths
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    paths.add(materialize(other, Growth(2, 3), cache))
    assert len(paths) == 4


def test_a_loser_of_the_race_uses_what_the_winner_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = _checkpoint(tmp_path / "tiny"), tmp_path / "cache"
    rename = Path.rename

    def rename_after_the_winner(made: Path, path: Path) -> Path:
        path.mkdir()
        (path / "winner").touch()
        return rename(made, path)

    monkeypatch.setattr(Path, "rename", rename_after_the_winner)
    path = materialize(source, Growth(2, 3), cache)
    assert [file.name for file in path.iterdir()] == ["winner"]
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("growth", [Growth(0, 2), Growth(4, 1)])
def test_shrinking_is_refused(growth: Growth) -> None:
    with pytest.raises(ValueError, match="smaller"):
        upscaled_config(LlamaConfig(**TINY), growth)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(bias: str) -> None:
    with pytest.raises(ValueError, match="biases"):
        upscaled_config(LlamaConfig(**TINY, **{bias: True}), Growth())


def test_the_default_is_about_half_a_billion_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(upscaled_config(LlamaConfig.from_pretrained(DEMO_TARGET), Growth()))
    assert 480e6 < model.num_parameters() < 540e6


def test_the_command_prints_sizes_and_agreement(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.upscale", "--width", "1", "--layers", "6", "--json"]
    environment = {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    document = json.loads(answer.stdout.splitlines()[-1])
    assert document["sizes"]["upscaled"]["num_hidden_layers"] == 6
    assert document["sizes"]["upscaled"]["parameters"] > document["sizes"]["source"]["parameters"]
    assert document["agreement"]["float32"]["worst_relative_error"] < 1e-4
    assert document["agreement"]["bfloat16"]["same_argmax"] > 0.97
    assert Path(document["path"]).is_relative_to(tmp_path)
