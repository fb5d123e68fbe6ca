"""Foreign quantized checkpoints: read where their library is installed, refused in one line that names it elsewhere."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from engines.attention import select_backend
from engines.checkpoint_formats import check_format, quantization_method, split_gguf
from engines.config import LocalEngineConfig
from engines.errors import ModelLoadError
from engines.loading import LoadedModel, load_model, resolve_source
from engines.parity import probe
from engines.tokenizer import Tokenizer
from tests.engines import quantized_checkpoints as checkpoints
from tests.engines.quantized_checkpoints import edit_config

CPU = torch.device("cpu")
# What the libraries say about themselves while they are imported and used.
QUIET = pytest.mark.filterwarnings(
    *("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    *("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:MatMul8bitLt:UserWarning"),
)
WRITERS: dict[str, tuple[Callable[[Path], checkpoints.Weights], tuple[str, ...]]] = {
    "fp8": (checkpoints.write_fp8_compressed_tensors, ("compressed_tensors",)),
    "int4": (checkpoints.write_int4_compressed_tensors, ("compressed_tensors",)),
    "gptq": (checkpoints.write_gptq, ("gptqmodel", "optimum", "accelerate")),
    "awq": (checkpoints.write_awq, ("gptqmodel", "accelerate")),
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return checkpoints.save_dense(tmp_path / "model")


def load(model: Path | str, **settings: object) -> LoadedModel:
    return load_model(LocalEngineConfig(model=str(model), device="cpu", **settings))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(5, 45)[None]).logits.float()


def check(loaded: LoadedModel, expected: torch.Tensor, tolerance: float) -> None:
    """The model says what is expected, to a relative `tolerance`, and its paged output equals its eager output."""
    loaded.model.set_attn_implementation("eager")
    error = (logits(loaded.model) - expected).norm() / expected.norm()
    loaded.model.set_attn_implementation("outrider")
    assert error < tolerance
    probe(loaded, select_backend("auto", loaded.device))


def save_quantized(dense: Path, settings: object) -> tuple[torch.Tensor, Path]:
    """Let the format's own library quantize and save; what its model says, and where it lies."""
    original = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    made = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=settings, dtype=torch.bfloat16, attn_implementation="eager"
    )
    made.save_pretrained(dense.parent / "quantized")
    expected = logits(made)
    assert 0.01 < (expected - original).norm() / original.norm() < 0.5
    return expected, dense.parent / "quantized"


def refusal(model: Path | str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(model)
    assert "\n" not in caught.value.message
    return caught.value.message


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let the modules look as if they were not installed, and all others as if they were."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name in modules else True)


class TestReading:
    @QUIET
    @pytest.mark.parametrize("name", WRITERS)
    def test_what_is_read_is_what_was_meant(self, dense: Path, name: str) -> None:
        write, modules = WRITERS[name]
        for module in modules:
            pytest.importorskip(module)
        reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        original = logits(reference)
        missing = reference.load_state_dict(write(dense), strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, "the output layer may be the embedding"
        expected = logits(reference)
        assert (expected - original).norm() / original.norm() > 0.02, "quantizing must have changed something"
        check(load(dense), expected, tolerance=0.02)

    @QUIET
    @pytest.mark.parametrize(
        ("options", "layer"),
        [
            ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, "Linear4bit"),
            ({"load_in_8bit": True}, "Linear8bitLt"),
        ],
    )
    def test_bitsandbytes(self, dense: Path, options: dict[str, object], layer: str) -> None:
        pytest.importorskip("bitsandbytes")
        expected, folder = save_quantized(dense, BitsAndBytesConfig(**options))
        loaded = load(folder)
        assert type(loaded.model.model.layers[0].mlp.up_proj).__name__ == layer
        check(loaded, expected, tolerance=0.02)

    @QUIET
    def test_torchao(self, dense: Path) -> None:
        torchao = pytest.importorskip("torchao.quantization")
        expected, folder = save_quantized(dense, transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig()))
        loaded = load(folder)
        assert "Int8Tensor" in str(loaded.model)
        check(loaded, expected, tolerance=0.02)


class TestGguf:
    @pytest.fixture
    def file(self, dense: Path) -> Path:
        pytest.importorskip("gguf")
        pytest.importorskip("accelerate")
        file = dense.parent / "tiny.Q8_0.gguf"
        self.meant = checkpoints.write_gguf(dense, file)
        return file

    def expected(self, dense: Path) -> torch.Tensor:
        reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        reference.load_state_dict(self.meant, strict=False)
        return logits(reference)

    def test_what_is_read_is_what_was_meant(self, dense: Path, file: Path) -> None:
        loaded = load(file, dtype="float32")
        assert loaded.dtype == torch.float32
        check(loaded, self.expected(dense), tolerance=1e-5)

    def test_unpacks_to_bf16_unless_told_otherwise(self, dense: Path, file: Path) -> None:
        loaded = load(file)
        assert loaded.dtype == torch.bfloat16
        check(loaded, self.expected(dense), tolerance=0.02)

    def test_relative_to_the_working_directory(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(file.parent.parent)
        assert load(f"{file.parent.name}/{file.name}").weights_fingerprint == load(file).weights_fingerprint

    def test_the_file_is_what_the_fingerprint_is_of(self, file: Path) -> None:
        before = load(file).weights_fingerprint
        with file.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"\x01")
        assert load(file).weights_fingerprint != before

    def test_the_tokenizer_is_the_files(self, file: Path) -> None:
        tokenizer = Tokenizer.load(str(file))
        token_ids = tokenizer.encode("ab ba")
        assert tokenizer.decode(token_ids) == "ab ba"
        assert tokenizer.eos_token_ids == {2}
        assert tokenizer.has_chat_template

    def test_one_beside_the_file_is_preferred(self, file: Path) -> None:
        own = checkpoints.tiny_tokenizer(["c", "d"])
        own.save_pretrained(file.parent)
        assert Tokenizer.load(str(file)).encode("cd") == tuple(own.encode("cd"))

    def test_no_such_file(self, tmp_path: Path) -> None:
        assert "no file" in refusal(tmp_path / "absent.gguf")
        assert "no file" in refusal("absent.gguf")

    def test_a_file_that_is_no_gguf(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        pytest.importorskip("accelerate")
        (tmp_path / "x.gguf").write_bytes(b"not at all")
        assert "cannot be read" in refusal(tmp_path / "x.gguf")

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hide(monkeypatch, "gguf")
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        assert refusal(tmp_path / "x.gguf").endswith(
            "is a GGUF file, and what reads it is not installed: pip install gguf"
        )

    @pytest.mark.parametrize(
        ("source", "parts"),
        [
            ("/models/x.gguf", ("/models", "x.gguf")),
            ("owner/repo/x.gguf", ("owner/repo", "x.gguf")),
            ("x.gguf", (".", "x.gguf")),
            ("owner/repo-gguf", ("owner/repo-gguf", None)),
            ("/models/x", ("/models/x", None)),
        ],
    )
    def test_split(self, source: str, parts: tuple[str, str | None]) -> None:
        assert split_gguf(source) == parts

    def test_hub_files_pass_through(self) -> None:
        assert resolve_source("nobody/nothing/x.gguf") == "nobody/nothing/x.gguf"


class TestRefusals:
    @pytest.mark.parametrize(
        ("write", "hidden", "words"),
        [
            (checkpoints.write_gptq, ("gptqmodel", "optimum"), "as GPTQ, .*: pip install gptqmodel optimum$"),
            (checkpoints.write_gptq, ("optimum",), "as GPTQ, .*: pip install optimum$"),
            (checkpoints.write_awq, ("gptqmodel",), "as AWQ, .*: pip install gptqmodel$"),
            (
                checkpoints.write_fp8_compressed_tensors,
                ("compressed_tensors",),
                "compressed-tensors, .*: pip install compressed-tensors$",
            ),
        ],
    )
    def test_what_to_install(
        self,
        dense: Path,
        monkeypatch: pytest.MonkeyPatch,
        write: Callable[[Path], object],
        hidden: tuple[str, ...],
        words: str,
    ) -> None:
        write(dense)
        hide(monkeypatch, *hidden)
        with pytest.raises(ModelLoadError, match=words):
            load(dense)

    @pytest.mark.parametrize(("bits", "warns"), [("load_in_8bit", True), ("load_in_4bit", False)])
    def test_numbers_that_depend_on_the_batch_are_warned_of(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bits: str, warns: bool
    ) -> None:
        hide(monkeypatch)
        check_format(LlamaConfig(quantization_config={"quant_method": "bitsandbytes", bits: True}), "m", CPU)
        assert ("depend on the others" in caplog.text) == warns

    @pytest.mark.parametrize("named", [True, False])
    def test_bitsandbytes_is_known_by_its_fields_too(
        self, dense: Path, monkeypatch: pytest.MonkeyPatch, named: bool
    ) -> None:
        edit_config(
            dense, quantization_config={"load_in_4bit": True} | ({"quant_method": "bitsandbytes"} if named else {})
        )
        hide(monkeypatch, "bitsandbytes")
        assert refusal(dense).endswith("pip install bitsandbytes")

    def test_fine_grained_fp8_needs_a_gpu(self, dense: Path) -> None:
        checkpoints.write_fine_grained_fp8(dense)
        words = refusal(dense)
        assert "fine-grained FP8, which needs a GPU of compute capability 8.9 or more, and this is device cpu" in words

    @pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
    def test_fine_grained_fp8_needs_a_new_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        hide(monkeypatch)
        config = LlamaConfig(quantization_config={"quant_method": "fp8"})
        if runs:
            check_format(config, "m", torch.device("cuda:0"))
            return
        with pytest.raises(ModelLoadError, match=r"this is device cuda:0 of 8\.0"):
            check_format(config, "m", torch.device("cuda:0"))

    def test_unknown_methods_are_refused_before_weights_are_read(self, dense: Path) -> None:
        edit_config(dense, quantization_config={"quant_method": "origami"})
        (dense / "model.safetensors").unlink()
        assert "quantized by 'origami', unknown" in refusal(dense)

    def test_a_quantization_without_a_name_is_unknown(self, dense: Path) -> None:
        edit_config(dense, quantization_config={"bits": 4})
        assert "quantized by '', unknown" in refusal(dense)

    def test_what_only_transformers_knows_is_left_to_it(self) -> None:
        check_format(LlamaConfig(quantization_config={"quant_method": "hqq"}), "m", CPU)


class TestQuantizationMethod:
    def test_of_plain_weights_is_none(self) -> None:
        assert quantization_method(LlamaConfig()) is None

    def test_is_found_in_a_text_config(self) -> None:
        config = transformers.Llama4Config(text_config={"quantization_config": {"quant_method": "awq"}})
        assert quantization_method(config) == "awq"

    def test_of_a_parsed_config(self) -> None:
        config = LlamaConfig()
        config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
        assert quantization_method(config) == "bitsandbytes"
        config.quantization_config = transformers.FineGrainedFP8Config()
        assert quantization_method(config) == "fp8"

    def test_survives_json(self) -> None:
        config = LlamaConfig(quantization_config={"quant_method": "gptq"})
        again = LlamaConfig(**json.loads(config.to_json_string()))
        assert quantization_method(again) == "gptq"
