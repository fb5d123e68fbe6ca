"""Tiny checkpoints in other projects' quantized formats, written from their layouts and not by their libraries.

Each writer quantizes the linear layers of a saved Llama in place and returns the weights that the file now stands for,
so that a test can compare what a library reads with what was meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from tests.engines import tiny_models

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring columns each nibble of an AWQ word holds
_LETTERS = frozenset(ascii_letters + digits + "Ġ.,:;!?()+-'")  # with the three special tokens, not all of 96
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

Weights = dict[str, Tensor]


def save_dense(folder: Path) -> Path:
    """A Llama checkpoint in bf16 whose linear layers divide into groups of 32."""
    config = tiny_models._config(
        "LlamaConfig", hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.1
    )
    return tiny_models.save(config, folder, dtype=torch.bfloat16)


def write_fp8_compressed_tensors(folder: Path) -> Weights:
    """compressed-tensors "float-quantized": e4m3 weights, one scale an output channel, activations left alone."""
    return _rewrite(folder, _fp8_channels, _compressed_tensors("float-quantized", 8, "float", "channel"))


def write_int4_compressed_tensors(folder: Path) -> Weights:
    """compressed-tensors "pack-quantized": signed int4 in words of eight, a scale for each 32 inputs."""
    return _rewrite(folder, _packed_int4, _compressed_tensors("pack-quantized", 4, "int", "group"))


def write_fine_grained_fp8(folder: Path) -> Weights:
    """transformers' "fp8": e4m3 weights with a scale for each tile of 32 x 32."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}
    return _rewrite(folder, _fp8_tiles, settings)


def write_gptq(folder: Path) -> Weights:
    """GPTQ: unsigned 4-bit steps packed along the inputs, symmetric, no activation order."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    return _rewrite(folder, _gptq, settings)


def write_awq(folder: Path) -> Weights:
    """AWQ ("gemm"): unsigned 4-bit steps packed along the outputs in its interleaved order, with zero points."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _rewrite(folder, _awq, settings)


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of the checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _rewrite(folder: Path, quantize: Callable[[Tensor], tuple[Weights, Tensor]], settings: object) -> Weights:
    path = folder / "model.safetensors"
    stored: Weights = {}
    meant: Weights = {}
    for name, weight in load_file(path).items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = weight
            continue
        parts, meant[name] = quantize(weight.float())
        stored |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, path, metadata={"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return meant


def _compressed_tensors(layout: str, num_bits: int, kind: str, strategy: str) -> dict[str, object]:
    weights = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    weights |= {"group_size": GROUP} if strategy == "group" else {}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "format": layout, "weights": weights}},
        "ignore": ["lm_head"],
    }


def _fp8_channels(weight: Tensor) -> tuple[Weights, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
    steps = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": steps, "weight_scale": scale}, steps.float() * scale.float()


def _fp8_tiles(weight: Tensor) -> tuple[Weights, Tensor]:
    rows, columns = weight.shape
    tiles = weight.view(rows // GROUP, GROUP, columns // GROUP, GROUP)
    scale = tiles.abs().amax(dim=(1, 3)) / 448
    steps = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (steps.float() * scale[:, None, :, None]).view(rows, columns)
    return {"weight": steps.view(rows, columns), "weight_scale_inv": scale}, meant


def _signed_steps(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps in [-8, 7] [out, in], scales [out, in / 32] in fp16, and the weight that they stand for."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(dim=2) / 7).half()
    steps = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7)
    meant = (steps * scale.float().unsqueeze(2)).view_as(weight)
    return steps.view_as(weight).to(torch.int32), scale, meant


def _pack(nibbles: Tensor) -> Tensor:
    """Words [rows, columns / 8] int32 of values in [0, 15] [rows, columns]; the first is lowest."""
    shifts = torch.arange(0, 32, 4)
    words = (nibbles.long().view(nibbles.shape[0], -1, 8) << shifts).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _packed_int4(weight: Tensor) -> tuple[Weights, Tensor]:
    steps, scale, _ = _signed_steps(weight)
    scale = scale.bfloat16()
    meant = (steps.view(weight.shape[0], -1, GROUP) * scale.float().unsqueeze(2)).view_as(weight)
    parts = {"weight_packed": _pack(steps + 8), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return parts, meant


def _gptq(weight: Tensor) -> tuple[Weights, Tensor]:
    steps, scale, meant = _signed_steps(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7)  # this version of the format adds one when it reads
    parts = {
        "qweight": _pack(steps + 8).T,
        "qzeros": _pack(zeros),
        "scales": scale.T,
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }
    return parts, meant


def _awq(weight: Tensor) -> tuple[Weights, Tensor]:
    steps, scale, meant = _signed_steps(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 8)
    parts = {"qweight": _pack(_interleave(steps.T + 8)), "qzeros": _pack(_interleave(zeros)), "scales": scale.T}
    return parts, meant


def _interleave(columns: Tensor) -> Tensor:
    return columns.reshape(columns.shape[0], -1, 8)[:, :, list(_AWQ_ORDER)].reshape(columns.shape)


def tiny_tokenizer(extra: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges beyond `extra`, in a vocabulary of 96: three special tokens, then single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [character for character in alphabet if character in _LETTERS]
    tokens = ["<unk>", "<s>", "</s>", *letters, "".join(extra)]
    tokens += [f"<unused{i}>" for i in range(tiny_models.VOCAB_SIZE - len(tokens))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [(extra[0], extra[1])], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=_TEMPLATE
    )


def write_gguf(folder: Path, file: Path) -> Weights:
    """The Llama checkpoint in `folder` as GGUF with Q8_0 linear layers, tokenizer and chat template inside."""
    import gguf

    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    _gguf_header(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    meant: Weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored = _neighbours_rotate(name, weight.float(), config.head_dim)
        kind = gguf.GGMLQuantizationType.Q8_0 if name.endswith("_proj.weight") else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(stored.numpy(), kind)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", packed, raw_dtype=kind)
        read = torch.from_numpy(gguf.quants.dequantize(packed, kind)).view_as(weight)
        meant[name] = _halves_rotate(name, read, config.head_dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _gguf_header(writer: Any, config: PretrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer(["a", "b"]).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3 if token.startswith("<") else 1 for token in sorted(vocabulary, key=vocabulary.get)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(_TEMPLATE)


def _neighbours_rotate(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp rotates features 2i and 2i + 1 of a Llama head, transformers i and i + head_dim / 2."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _halves_rotate(name: str, weight: Tensor, head_dim: int) -> Tensor:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
