"""Quantized checkpoints made by others: what a config.json says, which library reads it, and whether it can run here.

Reading them is transformers' business (its quantizers); what is done here is to say beforehand, in one line, what is
missing. GGUF files hold a whole model, config and tokenizer included, and are unpacked to floating point when read.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from engines.errors import ModelLoadError

GGUF_SUFFIX = ".gguf"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointFormat:
    """One way to store quantized weights.

    `packages` maps the modules it needs to what pip calls them. `compute_capability` is the least (major, minor) of a
    CUDA device that runs it, None where it runs on a CPU as well.
    """

    name: str
    packages: Mapping[str, str]
    compute_capability: tuple[int, int] | None = None


_ACCELERATE = {"accelerate": "accelerate"}
_GPTQMODEL = {"gptqmodel": "gptqmodel", **_ACCELERATE}
_FORMATS = {
    "awq": CheckpointFormat("AWQ", _GPTQMODEL),
    "gptq": CheckpointFormat("GPTQ", {**_GPTQMODEL, "optimum": "optimum"}),
    "bitsandbytes": CheckpointFormat("bitsandbytes", {"bitsandbytes": "bitsandbytes", **_ACCELERATE}),
    "compressed-tensors": CheckpointFormat("compressed-tensors", {"compressed_tensors": "compressed-tensors"}),
    "torchao": CheckpointFormat("torchao", {"torchao": "torchao"}),
    # transformers would unpack it on lesser devices, to twice the memory that the file's size suggests.
    "fp8": CheckpointFormat("fine-grained FP8", _ACCELERATE, compute_capability=(8, 9)),
    "fbgemm_fp8": CheckpointFormat("FBGEMM FP8", {"fbgemm_gpu": "fbgemm-gpu", **_ACCELERATE}, (9, 0)),
}
_GGUF = CheckpointFormat("GGUF", {"gguf": "gguf", **_ACCELERATE})


def check_format(hf_config: PretrainedConfig, model: str, device: torch.device) -> None:
    """Raise ModelLoadError if `model` is quantized in a way that cannot be read, or not run on `device`.

    The message names what to install, or the device that it needs. A format that transformers knows and this module
    does not is left to transformers. Warns of a format whose numbers depend on the batch.
    """
    method = quantization_method(hf_config)
    if method is None:
        return
    if method in _FORMATS:
        _check(_FORMATS[method], model, device)
        _warn(method, _fields(hf_config), model)
    elif method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelLoadError(f"The checkpoint {model!r} is quantized by {method!r}, unknown to transformers.")


def check_gguf(model: str, device: torch.device) -> None:
    """Raise ModelLoadError if what reads GGUF files is not installed."""
    _check(_GGUF, model, device)


def quantization_method(hf_config: PretrainedConfig) -> str | None:
    """The `quant_method` that the checkpoint's config names, None for plain weights.

    bitsandbytes' own configs may name none and be told by their fields; "" stands for anything else nameless.
    """
    fields = _fields(hf_config)
    if fields is None:
        return None
    if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
        return "bitsandbytes"
    return str(getattr(fields.get("quant_method"), "value", fields.get("quant_method") or ""))


def split_gguf(source: str) -> tuple[str, str | None]:
    """A checkpoint's folder or hub id, and the GGUF file in it if `source` ends in one's name.

    "/models/x.gguf" is ("/models", "x.gguf"); "owner/repo/x.gguf" is ("owner/repo", "x.gguf").
    """
    if not source.endswith(GGUF_SUFFIX):
        return source, None
    folder, _, file = source.rpartition("/")
    return folder or ".", file


def gguf_arguments(gguf_file: str | None, *, weights: bool = False) -> dict[str, Any]:
    """What `from_pretrained` of configs and tokenizers, or of weights, is to be told about a GGUF file; {} for None.

    Weights are always unpacked: kernels for packed ones come from a hub at run time, and only where `kernels` is there.
    """
    if gguf_file is None:
        return {}
    gguf_config = getattr(transformers, "GgufConfig", None)  # newer than the oldest transformers that engines run with
    unpack = {"quantization_config": gguf_config(dequantize=True)} if weights and gguf_config else {}
    return {"gguf_file": gguf_file, **unpack}


def has_own_tokenizer(folder: str) -> bool:
    """Whether a GGUF file's folder holds a tokenizer in Hugging Face format, which is then the better witness."""
    return (Path(folder) / "tokenizer.json").is_file()


def _fields(hf_config: PretrainedConfig) -> Mapping[str, Any] | None:
    """The config's quantization settings, parsed or not, as a mapping; None without any."""
    settings: Any = getattr(hf_config, "quantization_config", None)
    if settings is None:
        settings = getattr(hf_config.get_text_config(), "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()


def _warn(method: str, fields: Mapping[str, Any] | None, model: str) -> None:
    # LLM.int8 (arXiv 2208.07339) treats a feature apart if it is large in any row of the batch.
    if method == "bitsandbytes" and fields is not None and fields.get("load_in_8bit"):
        _log.warning(
            "%s is quantized as LLM.int8, where a sequence's numbers depend on the others in its batch: seeds and "
            "speculation then reproduce a text only up to rounding",
            model,
        )


def _check(checkpoint_format: CheckpointFormat, model: str, device: torch.device) -> None:
    name = checkpoint_format.name
    needed = checkpoint_format.compute_capability
    if needed is not None and _capability(device) < needed:
        raise ModelLoadError(
            f"The checkpoint {model!r} is quantized as {name}, which needs a GPU of compute capability "
            f"{needed[0]}.{needed[1]} or more, and this is {_describe(device)}; load unquantized weights with "
            "`quantization: int8` instead."
        )
    missing = [pip for module, pip in checkpoint_format.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        what = f"is a {name} file" if checkpoint_format is _GGUF else f"is quantized as {name}"
        raise ModelLoadError(
            f"The checkpoint {model!r} {what}, and what reads it is not installed: pip install {' '.join(missing)}"
        )


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"device {device}"
    major, minor = _capability(device)
    return f"device {device} of {major}.{minor}"
