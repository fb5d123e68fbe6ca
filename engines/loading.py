"""Brings a transformers causal language model into memory, or says in one line why it cannot be served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

import engines
from engines.attention.dispatch import ATTENTION_NAME, register
from engines.attention.interface import LayerSpec
from engines.checkpoint_formats import GGUF_SUFFIX, check_format, check_gguf, gguf_arguments, split_gguf
from engines.config import LocalEngineConfig
from engines.discovery import observe
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.fingerprint import fingerprint, weight_files
from engines.quant.compressed import adopt
from engines.quant.model import describe, quantize

_log = logging.getLogger(__name__)

_SERVABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Rotary scalings that change all frequencies once the longest position in the *batch* passes the original length, so
# that a sequence's keys would depend on its neighbours. Below that length they do nothing.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be run: eval mode, no gradients, the engine's attention selected.

    layers[i] is None where layer i attends to the keys and values of layer kv_sources[i]. `max_position` is the longest
    sequence in tokens, None without a limit. `dtype` is that of keys and values. `weight_bytes` counts parameters and
    buffers in memory. `weights_fingerprint` is described in engines.fingerprint. `runs_on_kernels`: all that takes long
    is done by native kernels, and torch has small things to do only.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    layers: tuple[LayerSpec | None, ...]
    kv_sources: tuple[int, ...]
    sliding_windows: tuple[int | None, ...]
    vocab_size: int
    max_position: int | None
    dtype: torch.dtype
    device: torch.device
    weights_fingerprint: str
    weight_bytes: int
    runs_on_kernels: bool = False

    @property
    def architecture(self) -> str:
        """The model class and its type, as error messages name them."""
        return f"{type(self.model).__name__} ({self.config.model_type})"


def load_model(config: LocalEngineConfig) -> LoadedModel:
    """Load `config.model` and learn its layers.

    Raises ModelLoadError (missing or damaged files, missing packages, no such device), UnsupportedModelError (no
    causal language model, recurrent or convolution layers, attention that the engine cannot take over).
    """
    register()
    device = resolve_device(config.device)
    source = resolve_source(config.model)
    hf_config = _read_config(source, config, device)
    check_servable(hf_config)
    check_format(hf_config, config.model, device)
    model = _read_weights(source, config, hf_config, device)
    return inspect_model(model, _weights_identity(source, config))


def inspect_model(model: PreTrainedModel, weights_fingerprint: str) -> LoadedModel:
    """A model in memory, whose attention implementation is the engine's, as a LoadedModel. Sets eval mode."""
    model.train(False).requires_grad_(False)
    anatomy = observe(model)
    return LoadedModel(
        model=model,
        config=model.config,
        layers=anatomy.layers,
        kv_sources=anatomy.kv_sources,
        sliding_windows=anatomy.sliding_windows,
        vocab_size=anatomy.vocab_size,
        max_position=max_position(model.config),
        dtype=anatomy.kv_dtype,
        device=model.device,
        weights_fingerprint=weights_fingerprint,
        weight_bytes=weight_bytes(model),
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers in memory, what is shared counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def resolve_device(name: str) -> torch.device:
    """The device for a config's name. Raises ModelLoadError if it does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"{name!r} is not a device: {_first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"Device {name!r} is not supported; there are: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"Device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices.")
    return device


def resolve_source(model: str) -> str:
    """The absolute path of a local folder or GGUF file, or the hub id (with a GGUF file behind it) unchanged.

    Relative paths are looked up in the working directory, then beside the engines package. Raises ModelLoadError for
    what can only be a path and does not exist.
    """
    roots = dict.fromkeys((Path.cwd(), Path(engines.__file__).resolve().parent.parent))
    is_gguf = model.endswith(GGUF_SUFFIX)
    for path in (root / Path(model).expanduser() for root in roots):
        if path.is_file() if is_gguf else path.is_dir():
            return str(path)
    depth = model.count("/") - is_gguf  # of a hub id: one slash or none
    if Path(model).is_absolute() or model.startswith((".", "~")) or not 0 <= depth <= 1:
        what = "file" if is_gguf else "folder"
        raise ModelLoadError(f"There is no {what} {model!r}, in {' or '.join(map(str, roots))} if it is relative.")
    return model


def check_servable(hf_config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError for configs that no probe needs to look at."""
    kind = hf_config.model_type
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"transformers has no causal language model of type {kind!r}; it cannot be served.")
    model_class = causal_class(hf_config)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{model_class.__name__} ({kind}) does not let its attention be replaced; the engine cannot serve it."
        )
    foreign = sorted(set(_layer_types(hf_config)) - _SERVABLE_LAYERS)
    if foreign:
        raise UnsupportedModelError(
            f"{model_class.__name__} ({kind}) has layers that are no plain attention over keys and values: "
            f"{', '.join(foreign)}; the engine cannot serve it."
        )


def causal_class(hf_config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class of a config that has one."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    assert isinstance(model_class, type)
    return model_class


def max_position(hf_config: PretrainedConfig) -> int | None:
    """The longest sequence, in tokens, for which the model's own forward is position by position; None: no limit."""
    text = hf_config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _rope_parameters(text):
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(text, "original_max_position_embeddings", None))
    if "chunked_attention" in _layer_types(hf_config):
        limits.append(getattr(text, "attention_chunk_size", None))
    return min((int(limit) for limit in limits if limit), default=None)


def _layer_types(hf_config: PretrainedConfig) -> list[str]:
    return list(getattr(hf_config.get_text_config(), "layer_types", None) or ())


def _rope_parameters(text: PretrainedConfig) -> list[dict[str, object]]:
    """The rope settings of all layer types; transformers keeps one dict, or one per layer type."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def _read_config(source: str, config: LocalEngineConfig, device: torch.device) -> PretrainedConfig:
    folder, gguf_file = split_gguf(source)
    if gguf_file:
        check_gguf(config.model, device)
    try:
        hf_config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, revision=config.revision, trust_remote_code=False, **gguf_arguments(gguf_file)
        )
        return hf_config
    except Exception as error:  # transformers raises nearly anything on a foreign file
        what = "" if Path(source).exists() else ", which is no folder here,"
        raise ModelLoadError(f"The config of {config.model!r}{what} cannot be read: {_first_line(error)}") from error


def _read_weights(
    source: str, config: LocalEngineConfig, hf_config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    folder, gguf_file = split_gguf(source)
    own = torch.bfloat16 if gguf_file else "auto"  # unpacked numbers have no type of their own
    dtype = own if config.dtype == "auto" else getattr(torch, config.dtype)
    quantized = getattr(hf_config, "quantization_config", None) is not None
    # GPU quantizers choose kernels for the device that the weights are loaded to; everything else is moved afterwards.
    placement = {"device_map": {"": device}} if quantized and device.type == "cuda" else {}
    loader = cast(Callable[..., tuple[PreTrainedModel, dict[str, Any]]], AutoModelForCausalLM.from_pretrained)
    try:
        model, report = loader(
            folder,
            config=hf_config,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=False,
            output_loading_info=True,
            **gguf_arguments(gguf_file, weights=True),
            **placement,
        )
    except Exception as error:  # as above; quantizers add their own
        raise ModelLoadError(f"The weights of {config.model!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelLoadError(f"The checkpoint {config.model!r} lacks {len(missing)} tensors: {shown}")
    _quantize(model, config, quantized)
    return model if placement else nn.Module.to(model, device)


def _quantize(model: PreTrainedModel, config: LocalEngineConfig, quantized: bool) -> None:
    """Bring quantized layers into the engine's own form, or make them. Raises ModelLoadError if there are none."""
    if quantized:
        adopt(model)
        if config.quantization != "none":
            _log.warning("%s is quantized already and stays as it is: %s", config.model, describe(model))
    elif config.quantization != "none" and not quantize(model, config.quantization):
        raise ModelLoadError(f"{config.model!r} has no linear layers that `quantization` could apply to.")


def _weights_identity(source: str, config: LocalEngineConfig) -> str:
    folder, gguf_file = split_gguf(source)
    try:
        file = cached_file(folder, gguf_file or "config.json", revision=config.revision)
        assert file is not None, "cached_file raises for what does not exist"
        return fingerprint([Path(file)] if gguf_file else weight_files(Path(file).parent))
    except OSError as error:
        raise ModelLoadError(f"The weights of {config.model!r} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
