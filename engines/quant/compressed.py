"""Checkpoints in the compressed-tensors format (https://github.com/vllm-project/compressed-tensors).

int8 layers are its "int-quantized": `weight` int8 [out, in], `weight_scale` [out, 1], with inputs that become int8
token by token, which is how they are computed here. int4 layers are its "pack-quantized": `weight_packed` int32
[out, in / 8], the first input in the lowest 4 bits, plus 8, `weight_scale` [out, groups] and `weight_shape`.

transformers reads it through that library, whose own layers unpack their weights at the first forward; `adopt`
exchanges them before.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from engines.quant.linear import QuantizedLinear
from engines.quant.model import quantized_layers, replace

_TOKENWISE_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def adopt(model: nn.Module) -> int:
    """Replace compressed-tensors layers by QuantizedLinear, in place, where the scheme is ours; returns how many.

    Ours are symmetric whole numbers of 8 bits with one scale a channel or for all, or of 4 bits by channel or group,
    with inputs left alone or made int8 token by token. Other layers stay as they are. To be called before the first
    forward.
    """
    names = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    adopted = 0
    for name in names:
        layer = _adopted(model.get_submodule(name))
        if layer is not None:
            replace(model, name, layer)
            adopted += 1
    if adopted == len(names):
        _forget_unpacking(model)
    return adopted


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """A layer's tensors by their names in the format; the bias, if any, is float32."""
    steps, scales = layer.steps(), layer.scales()
    tensors = {"weight_scale": scales.reshape(layer.out_features, -1).to(_exact_dtype(scales))}
    if layer.bits == 8:
        tensors["weight"] = steps
    else:
        tensors["weight_packed"] = _pack_int4(steps)
        tensors["weight_shape"] = torch.tensor(steps.shape)
    return tensors if layer.bias is None else tensors | {"bias": layer.bias}


def quantization_config(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of a model's layers. The commonest kind is that of all "Linear", others go by name.

    Names come before the class, since readers take the first group that fits.
    """
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, layer in quantized_layers(model).items():
        kinds[layer.bits, layer.group_size].append(name)
    ordered = sorted(kinds.items(), key=lambda kind: len(kind[1]))
    groups = {
        f"group_{index}": _config_group(bits, group_size, names if index + 1 < len(ordered) else ["Linear"])
        for index, ((bits, group_size), names) in enumerate(ordered)
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, module in model.named_modules() if type(module) is nn.Linear],
        "kv_cache_scheme": None,
    }


def _config_group(bits: int, group_size: int, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return {
        "targets": targets,
        "format": "pack-quantized" if group_size else "int-quantized",
        "weights": weights,
        "input_activations": None if group_size else _TOKENWISE_INT8,
        "output_activations": None,
    }


def _adopted(module: nn.Module) -> QuantizedLinear | None:
    """The layer as one of ours; None for another scheme."""
    scheme: Any = module.quantization_scheme
    if type(module) is not nn.Linear or not _is_ours(scheme) or hasattr(module, "weight_g_idx"):
        return None
    scale = module.weight_scale
    assert isinstance(scale, Tensor)
    scales = scale.detach().reshape(-1 if scale.numel() == 1 else module.out_features, *scale.shape[1:])
    if scheme.weights.num_bits == 8:
        if scales.numel() not in (1, module.out_features):
            return None
        scales = scales.reshape(-1).expand(module.out_features)
    elif scales.dim() != 2 or module.in_features % (8 * scales.shape[1]):
        return None
    return QuantizedLinear(_steps(module, scheme.weights.num_bits), scales, module.bias)


def _forget_unpacking(model: nn.Module) -> None:
    """Remove the library's hook for the first forward, which would wrap every module of the model in its own."""
    hook: Any = vars(model).pop("ct_decompress_hook", None)
    if hook is not None:
        hook.remove()


def _is_ours(scheme: Any) -> bool:
    weights, inputs = scheme.weights, scheme.input_activations
    strategies = {8: ("channel", "tensor"), 4: ("channel", "group")}
    return (
        weights is not None
        and weights.type == "int"
        and weights.symmetric
        and weights.strategy in strategies.get(weights.num_bits, ())
        and (inputs is None or all(getattr(inputs, name) == value for name, value in _TOKENWISE_INT8.items()))
        and scheme.output_activations is None
    )


def _steps(module: nn.Linear, bits: int) -> Tensor:
    """int8 [out, in] of either layout."""
    if not hasattr(module, "weight_packed"):
        assert module.weight.dtype == torch.int8
        return module.weight.detach()
    packed = module.weight_packed
    assert isinstance(packed, Tensor)
    values = packed.detach().view(torch.uint8)
    if bits == 8:
        return (values ^ 128).view(torch.int8)[:, : module.in_features]
    return (torch.stack((values & 15, values >> 4), dim=-1).flatten(1).to(torch.int8) - 8)[:, : module.in_features]


def _pack_int4(steps: Tensor) -> Tensor:
    """int32 [out, in / 8] of int8 [out, in] of -8..7; the last word is filled up with zeros as they are, not plus 8."""
    values = functional.pad((steps + 8).to(torch.uint8), (0, -steps.shape[1] % 8))
    return (values[:, ::2] | (values[:, 1::2] << 4)).view(torch.int32)


def _exact_dtype(scales: Tensor) -> torch.dtype:
    is_exact = torch.equal(scales.to(torch.bfloat16).to(scales.dtype), scales)
    return torch.bfloat16 if is_exact else scales.dtype
