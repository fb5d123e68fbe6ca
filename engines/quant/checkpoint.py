"""Writes a quantized model to a folder, in the compressed-tensors format (engines.quant.compressed)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from engines.fingerprint import weight_files
from engines.quant.compressed import layer_tensors, quantization_config
from engines.quant.model import output_layer, quantized_layers

# Everything else of a checkpoint that a model is run with: tokenizer, templates, generation config. Not its weights,
# nor the index of them, nor the config, which are written anew.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*")
_WRITTEN = frozenset({"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"})


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and config; `folder` is made if it does not exist. Raises OSError."""
    layers = quantized_layers(model)
    model.save_pretrained(folder, state_dict=_state_dict(model))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if output_layer(model) in layers:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(model)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy what is neither weights nor config from one checkpoint's folder to another's; returns the names."""
    weights = {path.name for path in weight_files(source)}
    paths = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in paths if path.name not in _WRITTEN | weights)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def checkpoint_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def _state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own, with the format's tensors for quantized layers."""
    layers = quantized_layers(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer_tensors(layer).items()}
    return tensors
