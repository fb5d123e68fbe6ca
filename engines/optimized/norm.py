"""RMSNorm modules of any architecture, replaced by the native kernel where it computes the same."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from engines.native.dtype import DTYPE_CODES
from engines.native.norm import rms_norm
from engines.optimized.agreement import agrees
from engines.optimized.linear import is_untouched

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class NativeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in fp32; `scale` [size] is the original's weight, or 1 + it (Gemma)."""

    scale: Tensor

    def __init__(self, scale: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().contiguous(), persistent=False)
        self.epsilon = epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Of [..., size] in bf16 or fp32, in its dtype; no gradients."""
        return rms_norm(hidden_states, self.scale, self.epsilon)

    def extra_repr(self) -> str:
        return f"{self.scale.shape[0]}, epsilon={self.epsilon}"


def native_norm(module: nn.Module) -> NativeRMSNorm | None:
    """A replacement for a module that is an RMSNorm by its name and, on trial, by what it computes; else None."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not is_untouched(module) or not takes_one_input(module):
        return None
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    epsilon = next((value for name in _EPSILON_NAMES if isinstance(value := getattr(module, name, None), float)), None)
    if epsilon is None or weight.dtype not in DTYPE_CODES:
        return None
    candidates = (NativeRMSNorm(weight, epsilon), NativeRMSNorm(weight.detach().float() + 1.0, epsilon))
    return next((norm for norm in candidates if agrees(module, norm, weight.shape[0], weight.dtype)), None)


def takes_one_input(module: nn.Module) -> bool:
    """Whether the module's forward has one parameter, so that nothing else can change what it computes."""
    return len(inspect.signature(module.forward).parameters) == 1
