"""Whole models: every linear layer quantized, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from engines.quant.linear import QuantizedLinear
from engines.quant.scheme import DEFAULT_GROUP_SIZE, Scheme

# A few rows that choose experts: little to save, and a wrong choice is no small error.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def quantize(
    model: PreTrainedModel,
    scheme: Scheme,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    keep_head: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Replace the model's nn.Linear modules by QuantizedLinear, in place; returns how many.

    The output layer is int8 in both schemes, since rounding errors there reach the logits directly; a copy of its own
    where it is tied, as the embedding stays as it is. So do routers and whatever is no nn.Linear. Each original is
    freed before the next is read. `progress` is told (layers done, layers).
    """
    head = output_layer(model)
    names = [name for name in quantizable(model) if not (keep_head and name == head)]
    for done, name in enumerate(names, start=1):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace(model, name, QuantizedLinear.of(linear, "int8" if name == head else scheme, group_size))
        if progress:
            progress(done, len(names))
    return len(names)


def quantizable(model: nn.Module) -> list[str]:
    """Names of the modules that `quantize` replaces."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in _ROUTERS
    ]


def output_layer(model: PreTrainedModel) -> str | None:
    """The name of the vocabulary projection, if the model has one."""
    head: nn.Module | None = cast(Any, model).get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def replace(model: nn.Module, name: str, by: nn.Module) -> None:
    """Put `by` where the module `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, by)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def describe(model: nn.Module) -> str:
    """Which kinds of quantized layers a model has, for people and for identities; "none" without any."""
    kinds = {(layer.bits, layer.group_size) for layer in quantized_layers(model).values()}
    names = [f"int{bits}" + (f" in groups of {size}" if size else "") for bits, size in sorted(kinds)]
    return ", ".join(names) or "none"
