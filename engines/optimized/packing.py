"""Joins layers that read the same input into one, whatever kind they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from engines.native.activation import ActivationName, gated_activation
from engines.optimized.linear import PackedLinear, is_packable, is_untouched


@runtime_checkable
class Packable(Protocol):
    """A layer that knows how to be joined with others of its kind."""

    def pack_with(self, others: Sequence[nn.Module]) -> nn.Module | None:
        """One module with the outputs of this layer and of `others` side by side, in that order; None if it cannot."""
        ...


class GatedActivation(nn.Module):
    """activation(gate) * up of an input [..., 2 * size] that has the gates first."""

    def __init__(self, activation: ActivationName) -> None:
        super().__init__()
        self.activation: ActivationName = activation

    def forward(self, gate_up: Tensor) -> Tensor:
        return gated_activation(gate_up, self.activation)


def pack(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One layer with the outputs of `linears`, which read the same input, side by side; None if they are of no kind
    that can be packed. The given layers are left as they are; a single Packable is its own packing.
    """
    first = linears[0]
    if isinstance(first, Packable):
        if not all(map(is_untouched, linears)):
            return None
        return first.pack_with(linears[1:]) if len(linears) > 1 else first
    if all(map(is_packable, linears)) and len({cast(nn.Linear, linear).weight.dtype for linear in linears}) == 1:
        return PackedLinear(cast(Sequence[nn.Linear], linears))
    return None


def pack_gated(gate: nn.Module, up: nn.Module, activation: ActivationName) -> nn.Module | None:
    """One module for activation(gate(x)) * up(x); None if the layers are of no kind that can be packed."""
    if is_packable(gate) and is_packable(up):
        gate, up = cast(nn.Linear, gate), cast(nn.Linear, up)
        same = gate.weight.shape == up.weight.shape and gate.weight.dtype == up.weight.dtype
        return PackedLinear([gate, up], activation) if same else None
    packed = pack([gate, up])
    return None if packed is None else nn.Sequential(packed, GatedActivation(activation))
