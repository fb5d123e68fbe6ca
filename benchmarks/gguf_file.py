"""Writes our Llama and Qwen3 checkpoints as GGUF files, bit for bit the same weights, for llama.cpp to be measured on.

Two things differ between the formats. llama.cpp rotates neighbouring features of a Llama head (2i, 2i + 1) where
transformers rotates a feature with the one half a head away, so the rows of `q_proj` and `k_proj` change places; its
Qwen3 rotates as transformers does. And vectors (norm weights) are float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

CACHE = Path.home() / ".cache" / "outrider" / "benchmarks"
_FORMAT = 1  # part of a cached file's name: raise it when another file comes out of the same checkpoint
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
_NEIGHBOURS_ROTATE = frozenset({"llama"})
_TYPES = {
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}


def materialize(checkpoint: Path, folder: Path = CACHE) -> Path:
    """The GGUF file, under `folder`, of a checkpoint; written there if it is not there yet.

    It appears at once and whole, and is named after the checkpoint's content. Raises what `write` raises.
    """
    path = folder / f"{checkpoint.name}-{_identity(checkpoint)}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        made = Path(workplace) / path.name
        write(checkpoint, made)
        os.replace(made, path)
    return path


def write(checkpoint: Path, path: Path) -> None:
    """Write a Llama or Qwen3 checkpoint of one safetensors file, bfloat16 or float32, to `path`.

    Raises ValueError if it is of another kind, quantized, has biases, scaled rotary positions or mixed dtypes.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    dtype = _check(config, weights)
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config)
    writer.add_file_type(_TYPES[dtype][1])
    _add_vocabulary(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_weight(writer, f"{names.get_name(name.removesuffix('.weight'))}.weight", _arranged(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: PretrainedConfig, weights: dict[str, Tensor]) -> torch.dtype:
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(f"{config.model_type} checkpoints are not written as GGUF, only {', '.join(_ARCHITECTURES)}")
    if unknown := [name for name in weights if not name.endswith(".weight")]:
        raise ValueError(f"quantized checkpoints and ones with biases are not written as GGUF: {unknown[0]}")
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise ValueError(f"{kind} rotary positions are not written as GGUF")
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) != 1 or not dtypes < _TYPES.keys():
        raise ValueError(f"a checkpoint of {', '.join(map(str, dtypes))} is not written as GGUF")
    return dtypes.pop()


def _add_sizes(writer: Any, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any], config: PretrainedConfig) -> None:
    """Byte-level BPE is written out, with the nearest of llama.cpp's built-in splits; other kinds leave token ids only.

    llama.cpp is given token ids here, so that its tokenizer costs nothing and need not agree.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        writer.add_tokenizer_model("none")
        return
    tokens = {token_id: token for token, token_id in model["vocab"].items()}
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"] if added["special"]}
    tokens |= special
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("dbrx")
    writer.add_token_list([tokens[i] for i in range(config.vocab_size)])
    writer.add_token_types([kinds[i in special] for i in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)


def _arranged(name: str, weight: Tensor, config: PretrainedConfig) -> Tensor:
    """A weight with its rows in llama.cpp's order."""
    if config.model_type not in _NEIGHBOURS_ROTATE or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_weight(writer: Any, name: str, weight: Tensor) -> None:
    kept = weight.float() if weight.ndim == 1 else weight
    as_bytes = kept.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, as_bytes, raw_dtype=_TYPES[kept.dtype][0])


def _identity(checkpoint: Path) -> str:
    digest = hashlib.sha256(str(_FORMAT).encode())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (checkpoint / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
