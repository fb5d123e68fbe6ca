"""Exchanges the modules of a model for faster ones that compute the same."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from engines.native.library import isa_name
from engines.optimized.attention import fused_attention
from engines.optimized.decoder_layer import FusedDecoderLayer, fused_layer
from engines.optimized.linear import is_packable
from engines.optimized.mlp import fused_mlp
from engines.optimized.norm import native_norm
from engines.optimized.packing import pack

Kind = Literal["attentions", "mlps", "norms", "linears", "layers"]
KINDS: frozenset[Kind] = frozenset(("attentions", "mlps", "norms", "linears", "layers"))


@dataclass(frozen=True, slots=True)
class Optimizations:
    """How many modules were exchanged, by kind; linears and norms inside fused blocks are not counted again.

    `layers`, whose parts count as well, run in one call each. `leaves_matrices`: torch still has some to multiply by.
    """

    attentions: int = 0
    mlps: int = 0
    norms: int = 0
    linears: int = 0
    layers: int = 0
    leaves_matrices: bool = True

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.attentions} attention blocks and {self.mlps} MLPs fused, "
            f"{self.norms} norms and {self.linears} linears replaced by native kernels, "
            f"{self.layers} layers in one call each"
        )


def optimize(model: PreTrainedModel, kinds: Collection[Kind] = KINDS) -> Optimizations:
    """Exchange attention blocks, gated MLPs, RMSNorms and linears of a CPU model, in place; returns what was done.

    `kinds` limits it to some of them. For inference in eval mode. Each module's original is freed as soon as its
    replacement is in place, so at most one block is in memory twice; an embedding keeps a weight that it shares with
    the output layer. Whatever is not recognised, or computes something else on trial, stays; so does everything where
    there are no kernels for this machine, or where the model is elsewhere.
    """
    if isa_name() in (None, "portable") or model.device.type != "cpu" or model.training:
        return Optimizations()
    walk = _Walk(model, kinds)
    walk.descend(model)
    done = walk.counts
    return Optimizations(**{kind: done[kind] for kind in KINDS}, leaves_matrices=_has_matrices(model))


def _has_matrices(model: PreTrainedModel) -> bool:
    """Whether parameters with rows and columns are left, other than those that rows are only picked from."""
    picked = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return any(parameter.ndim > 1 and id(parameter) not in picked for parameter in model.parameters())


class _Walk:
    """Goes through the modules from the outside in and replaces the largest that it can, then layers of such parts."""

    def __init__(self, model: PreTrainedModel, kinds: Collection[Kind]) -> None:
        self.counts: Counter[Kind] = Counter()
        self._kinds = kinds
        self._dtype = cast(torch.Tensor, model.get_input_embeddings().weight).dtype
        # A module with several parents would be replaced in one of them only.
        self._parents = Counter(id(child) for module in model.modules() for child in module.children())

    def descend(self, parent: nn.Module) -> None:
        for name in [name for name, _ in parent.named_children()]:
            child = parent.get_submodule(name)
            found = self._replacement(parent, name, child) if self._parents[id(child)] == 1 else None
            if found is None:
                self.descend(child)
                found = self._whole_layer(parent, child)
            if found is None:
                continue
            kind, replacement = found
            setattr(parent, name, replacement)
            self.counts[kind] += 1

    def _whole_layer(self, parent: nn.Module, child: nn.Module) -> tuple[Kind, nn.Module] | None:
        is_wanted = "layers" in self._kinds and not isinstance(parent, FusedDecoderLayer)
        layer = fused_layer(child, self._dtype) if is_wanted else None
        return None if layer is None else ("layers", layer)

    def _replacement(self, parent: nn.Module, name: str, child: nn.Module) -> tuple[Kind, nn.Module] | None:
        finders: tuple[tuple[Kind, Callable[[], nn.Module | None]], ...] = (
            ("attentions", lambda: fused_attention(child, self._dtype)),
            ("mlps", lambda: fused_mlp(child, self._dtype)),
            ("norms", lambda: native_norm(child)),
            ("linears", lambda: _packed_linear(parent, name, child)),
        )
        for kind, find in finders:
            if kind in self._kinds and (replacement := find()) is not None:
                return kind, replacement
        return None


def _packed_linear(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    if not is_packable(child) or f"self.{name}.weight" in _source(type(parent)):
        return None  # some architectures read the weight of a linear, mostly for its dtype
    return pack([child])


def _source(kind: type[nn.Module]) -> str:
    return inspect.getsource(kind)
