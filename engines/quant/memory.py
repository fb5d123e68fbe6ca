"""How much memory a quantized model takes, from its shapes alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engines.quant.model import output_layer, quantizable
from engines.quant.scheme import DEFAULT_GROUP_SIZE, Scheme

_TILE = 16  # the kernels' outputs at a time


def layer_bytes(
    in_features: int, out_features: int, scheme: Scheme, *, bias: bool = False, group_size: int = DEFAULT_GROUP_SIZE
) -> int:
    """Bytes of one quantized layer as the CPU kernels have it.

    int8: a byte a weight and 4 a channel. int4: half a byte a weight and 2 a group; layers whose inputs are no whole
    number of groups are int8. A bias has 4 bytes an output. Outputs are padded to 16, inputs of int8 to 4.
    """
    outputs = -(-out_features // _TILE) * _TILE
    bias_bytes = 4 * out_features if bias else 0
    if scheme == "int4" and in_features % group_size == 0:
        return outputs * in_features // 2 + 2 * outputs * (in_features // group_size) + bias_bytes
    return outputs * (-(-in_features // 4) * 4) + 4 * outputs + bias_bytes


def planned_bytes(
    hf_config: PretrainedConfig,
    scheme: Scheme,
    *,
    dtype: torch.dtype | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    keep_head: bool = False,
) -> int:
    """Bytes of the model of a config after `quantize`: parameters and buffers, what is shared counted once.

    `dtype` is that of what is not quantized, None for the config's own. Nothing is allocated.
    """
    rest = dtype or hf_config.dtype or torch.float32
    with torch.device("meta"):
        model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(hf_config, dtype=rest)
    head = output_layer(model)
    names = [name for name in quantizable(model) if not (keep_head and name == head)]
    total = 0
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = (linear.in_features, linear.out_features)
        of = "int8" if name == head else scheme
        total += layer_bytes(*shape, of, bias=linear.bias is not None, group_size=group_size)
    return total + _bytes_without(model, set(names))


def _bytes_without(model: nn.Module, quantized: set[str]) -> int:
    """Of tensors with an owner that is not quantized: an embedding counts even if its head has become a copy."""
    tensors = {
        id(tensor): tensor.nbytes
        for name, module in model.named_modules()
        if name not in quantized
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    return sum(tensors.values())
