from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig, T5Config

from engines.attention import select_backend
from engines.attention.interface import LayerSpec
from engines.config import LocalEngineConfig
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.fingerprint import fingerprint, weight_files
from engines.loading import (
    LoadedModel,
    check_servable,
    inspect_model,
    load_model,
    max_position,
    resolve_device,
    resolve_source,
)
from engines.parity import probe
from tests.engines import tiny_models


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.SUPPORTED["qwen3"](), tmp_path / "model", dtype=torch.bfloat16)


def load(folder: Path | str, **settings: object) -> LoadedModel:
    return load_model(LocalEngineConfig(model=str(folder), device="cpu", **settings))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestLoadModel:
    def test_reports_what_the_model_is(self, checkpoint: Path) -> None:
        loaded = load(checkpoint)
        assert loaded.layers == (LayerSpec(num_kv_heads=2, head_dim=8, value_head_dim=8),) * 3
        assert loaded.kv_sources == (0, 1, 2)
        assert loaded.sliding_windows == (None, None, None)
        assert (loaded.vocab_size, loaded.max_position) == (tiny_models.VOCAB_SIZE, 512)
        assert loaded.dtype == torch.bfloat16
        assert loaded.device == torch.device("cpu")
        assert loaded.architecture == "Qwen3ForCausalLM (qwen3)"
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        assert loaded.weight_bytes >= 2 * sum(parameter.numel() for parameter in loaded.model.parameters())

    def test_a_loaded_model_passes_the_probe(self, checkpoint: Path) -> None:
        loaded = load(checkpoint, dtype="float32")
        assert loaded.dtype == torch.float32
        probe(loaded, select_backend("auto", loaded.device))

    def test_relative_to_the_working_directory(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(checkpoint.parent)
        assert load(checkpoint.name).vocab_size == tiny_models.VOCAB_SIZE

    def test_layers_that_share_keys_and_values(self) -> None:
        config = tiny_models._config(
            "Gemma3nTextConfig",
            head_dim=8,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            intermediate_size=[48] * 4,
            activation_sparsity_pattern=[0.0] * 4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=tiny_models.WINDOW,
            vocab_size_per_layer_input=tiny_models.VOCAB_SIZE,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            altup_num_inputs=2,
        )
        loaded = inspect_model(tiny_models.build(config), "x")
        assert loaded.kv_sources == (0, 1, 0, 1)
        assert [spec is None for spec in loaded.layers] == [False, False, True, True]
        probe(loaded, select_backend("auto", loaded.device))


class TestRefusals:
    """Each is one readable line that names the model or the part at fault."""

    def check(self, folder: Path | str, match: str, **settings: object) -> ModelLoadError:
        with pytest.raises(ModelLoadError, match=match) as caught:
            load(folder, **settings)
        assert "\n" not in caught.value.message
        return caught.value

    def test_no_such_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path / "absent", "There is no folder .*absent")

    def test_empty_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path, "config of .* cannot be read")

    def test_config_that_is_no_json(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text("{")
        self.check(checkpoint, "config of .* cannot be read")

    def test_unknown_model_type(self, checkpoint: Path) -> None:
        edit_config(checkpoint, model_type="hal9000")
        self.check(checkpoint, "hal9000")

    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        self.check(checkpoint, "weights of .* cannot be loaded")

    def test_truncated_weights(self, checkpoint: Path) -> None:
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.check(checkpoint, "weights of .* cannot be loaded")

    def test_missing_tensor_is_not_made_up(self, checkpoint: Path) -> None:
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        self.check(checkpoint, r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight")

    def test_tensor_of_another_shape(self, checkpoint: Path) -> None:
        edit_config(checkpoint, intermediate_size=64)
        self.check(checkpoint, "weights of .* cannot be loaded")

    def test_unknown_quantization(self, checkpoint: Path) -> None:
        edit_config(checkpoint, quantization_config={"quant_method": "origami"})
        self.check(checkpoint, "quantized by 'origami', unknown")

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        T5Config(vocab_size=96, d_model=32, num_layers=1, num_heads=2, d_ff=32).save_pretrained(tmp_path)
        assert isinstance(self.check(tmp_path, "no causal language model of type 't5'"), UnsupportedModelError)

    @pytest.mark.parametrize("name", ["falcon", "minimax"])
    def test_known_misfits_are_refused_before_their_weights_are_read(self, tmp_path: Path, name: str) -> None:
        make_config, reason = tiny_models.REFUSED[name]
        make_config().save_pretrained(tmp_path)
        assert isinstance(self.check(tmp_path, reason), UnsupportedModelError)

    def test_devices(self) -> None:
        assert resolve_device("auto").type in ("cpu", "cuda")
        assert resolve_device("cpu") == torch.device("cpu")
        for name, reason in (("tpu", "is not a device"), ("meta", "not supported"), ("cuda:99", "not here")):
            with pytest.raises(ModelLoadError, match=reason) as caught:
                resolve_device(name)
            assert "\n" not in caught.value.message


class TestResolveSource:
    def test_hub_ids_pass_through(self) -> None:
        assert resolve_source("nobody/nothing") == "nobody/nothing"
        assert resolve_source("gpt2") == "gpt2"

    def test_relative_to_the_installation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert resolve_source("engines/attention").endswith("engines/attention")

    @pytest.mark.parametrize("path", ["./absent", "/absent", "a/b/c", "~/absent"])
    def test_paths_must_exist(self, path: str) -> None:
        with pytest.raises(ModelLoadError, match="no folder"):
            resolve_source(path)


def llama_config(**settings: object) -> PretrainedConfig:
    return LlamaConfig(max_position_embeddings=512, **settings)


class TestMaxPosition:
    def test_is_the_configs(self) -> None:
        assert max_position(llama_config()) == 512

    def test_batch_dependent_rope_ends_where_its_scaling_begins(self) -> None:
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
        rope |= {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
        assert max_position(llama_config(rope_parameters=rope)) == 64

    def test_static_rope_scaling_keeps_the_whole_length(self) -> None:
        rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        assert max_position(llama_config(rope_parameters=rope)) == 512

    def test_rope_settings_by_layer_type_are_read(self) -> None:
        config = tiny_models.SUPPORTED["gemma3_text"]()
        assert max_position(config) == 512
        config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "original_max_position_embeddings": 32}
        assert max_position(config) == 32

    def test_chunked_attention_ends_with_its_first_chunk(self) -> None:
        config = llama_config(layer_types=["chunked_attention"] * 32, attention_chunk_size=128)
        assert max_position(config) == 128
        check_servable(config)

    def test_none_where_the_model_has_no_limit(self) -> None:
        assert max_position(tiny_models.REFUSED["bloom"][0]()) is None


class TestFingerprint:
    def test_changes_with_any_byte_of_a_small_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        seen = set()
        for content in (b"abc", b"abd", b"ab", b""):
            file.write_bytes(content)
            seen.add(fingerprint([file]))
        assert len(seen) == 4

    def test_same_content_same_fingerprint(self, checkpoint: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in weight_files(checkpoint):
            (copy / file.name).write_bytes(file.read_bytes())
        assert fingerprint(weight_files(copy)) == load(checkpoint).weights_fingerprint

    def test_large_files_are_sampled_with_their_header(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engines.fingerprint._WHOLE_FILE_BYTES", 1000)
        monkeypatch.setattr("engines.fingerprint._SAMPLE_BYTES", 4)
        file = tmp_path / "model.safetensors"
        content = bytearray((100).to_bytes(8, "little") + bytes(4000))
        prints = {}
        for name, position in (("none", None), ("header", 50), ("first", 8), ("last", 4007), ("between", 1003)):
            changed = bytearray(content)
            if position is not None:
                changed[position] = 1
            file.write_bytes(changed)
            prints[name] = fingerprint([file])
        assert prints["between"] == prints["none"], "documented: an edit between two samples goes unseen"
        assert len(set(prints.values())) == 4

    def test_safetensors_are_preferred(self, tmp_path: Path) -> None:
        for name in ("b.safetensors", "a.safetensors", "c.bin"):
            (tmp_path / name).touch()
        assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
