"""Gated MLPs: down(activation(gate(x)) * up(x)) with gate and up in one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.native.activation import ActivationName, gated_activation
from engines.native.dtype import DTYPE_CODES
from engines.optimized.agreement import agrees
from engines.optimized.linear import is_untouched
from engines.optimized.norm import takes_one_input
from engines.optimized.packing import pack, pack_gated

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ACTIVATIONS: tuple[ActivationName, ...] = ("silu", "gelu_tanh")
_ACTIVATION_TOLERANCE = 1e-5  # tells gelu's tanh form from the exact one, which is up to 5e-4 away


class FusedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); `gate_up` gives the product."""

    def __init__(self, gate_up: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] of an input [..., hidden_size]; no gradients."""
        output: Tensor = self.down_proj(self.gate_up(hidden_states))
        return output


def fused_mlp(module: nn.Module, dtype: torch.dtype) -> FusedMLP | None:
    """A replacement for a module that is a gated MLP by its parts and, on trial in `dtype`, by what it computes."""
    children = dict(module.named_children())
    if not is_untouched(module) or not _has_the_parts(module, children) or not takes_one_input(module):
        return None
    gate, up, down = children["gate_proj"], children["up_proj"], children["down_proj"]
    activation = _activation_of(module.act_fn)
    size = getattr(gate, "in_features", None)
    if activation is None or not isinstance(size, int) or dtype not in DTYPE_CODES:
        return None
    gate_up, packed_down = pack_gated(gate, up, activation), pack([down])
    if gate_up is None or packed_down is None:
        return None
    fused = FusedMLP(gate_up, packed_down)
    return fused if agrees(module, fused, size, dtype) else None


def _has_the_parts(module: nn.Module, children: dict[str, nn.Module]) -> bool:
    """Whether gate, up, down and an activation are all that there is."""
    parameterless = not [name for name, _ in module.named_parameters(recurse=False)]
    return parameterless and callable(getattr(module, "act_fn", None)) and children.keys() | {"act_fn"} == _PARTS


def _activation_of(function: object) -> ActivationName | None:
    """Which of the kernels' activations the function is, by its values in fp32."""
    assert callable(function)
    gate = torch.linspace(-12.0, 12.0, 961)
    with torch.inference_mode():
        expected = function(gate)
        for name in _ACTIVATIONS:
            got = gated_activation(torch.stack((gate, torch.ones_like(gate)), dim=-1), name).squeeze(-1)
            if isinstance(expected, Tensor) and torch.allclose(expected, got, rtol=0, atol=_ACTIVATION_TOLERANCE):
                return name
    return None
