"""llama.cpp computes from our GGUF files what transformers computes from the checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'outrider[bench]'")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'outrider[bench]'")

import llama_cpp

from benchmarks import gguf_file
from benchmarks.llama_cpp_model import Context, Model, Options

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}
TOKENS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, kind: str, dtype: torch.dtype, tied: bool = True) -> Path:
    torch.manual_seed(0)
    settings = {**SIZES, "tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch.")}
    model: LlamaForCausalLM | Qwen3ForCausalLM
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    else:
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms of one would hide a norm that is left out
                weight += 0.3 * torch.randn(weight.shape)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE for the Llama, whole words for the Qwen3, as the demo and the random models have them."""
    if kind == "qwen3":
        made = Tokenizer(models.WordLevel({f" {i}": i for i in range(VOCAB)}, unk_token=" 0"))
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 2]
        vocab = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
        vocab[letters[0] + letters[1]] = VOCAB - 1
        made = Tokenizer(models.BPE(vocab, [(letters[0], letters[1])]))
        made.add_special_tokens(["<|end|>"])
        made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)  # type: ignore[no-untyped-call]


def expected_logits(path: Path, kind: str) -> torch.Tensor:
    """In float32, from the weights as they are stored."""
    model = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[kind].from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(TOKENS).logits[0]  # type: ignore[no-any-return]


def relative_error(answer: torch.Tensor, reference: torch.Tensor) -> float:
    return ((answer - reference).abs().amax(-1) / reference.abs().amax(-1)).max().item()


EXACT = Options(flash_attention=False, cache_type=llama_cpp.GGML_TYPE_F32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (torch.float32, EXACT, 1e-4),
        (torch.float32, Options(), 1e-2),  # flash attention rounds keys and values to float16
        (torch.bfloat16, Options(), 5e-2),  # and matrix products round their inputs to bfloat16
    ],
)
def test_logits_agree(
    tmp_path: Path, kind: str, dtype: torch.dtype, options: Options, tolerance: float, tied: bool
) -> None:
    path = checkpoint(tmp_path / "model", kind, dtype, tied)
    model = Model(gguf_file.materialize(path, tmp_path))
    assert model.vocab_size == VOCAB
    context = Context(model, 1, TOKENS.shape[1], 1, options)
    logits = torch.from_numpy(context.decode(TOKENS[0].numpy(), range(TOKENS.shape[1])).copy())
    assert relative_error(logits, expected_logits(path, kind)) < tolerance
    context.close()
    model.close()


def test_a_file_is_written_once_and_named_after_its_content(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", "qwen3", torch.bfloat16)
    first = gguf_file.materialize(path, tmp_path)
    written = first.stat().st_mtime_ns
    assert gguf_file.materialize(path, tmp_path) == first
    assert first.stat().st_mtime_ns == written
    other = checkpoint(tmp_path / "model", "qwen3", torch.float32)
    assert gguf_file.materialize(other, tmp_path) != first
    assert {made.suffix for made in tmp_path.iterdir()} == {"", ".gguf"}, "no unfinished file is left behind"


def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", "llama", torch.float16)
    with pytest.raises(ValueError, match="float16"):
        gguf_file.write(path, tmp_path / "model.gguf")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"default"', '"linear", "factor": 2.0'))
    with pytest.raises(ValueError, match="linear"):
        gguf_file.write(path, tmp_path / "model.gguf")
    (path / "config.json").write_text(config.replace('"llama"', '"mistral"'))
    with pytest.raises(ValueError, match="mistral"):
        gguf_file.write(path, tmp_path / "model.gguf")
