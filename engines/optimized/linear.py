"""Linear layers whose weights are packed for the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.native.activation import ActivationName
from engines.native.dtype import DTYPE_CODES
from engines.native.linear import PackedWeight


class PackedLinear(nn.Module):
    """nn.Linear for inference: one or several layers over the same input, their outputs side by side.

    It copies the weights and keeps no reference to the originals. With an `activation` (layers gate, up) the output is
    activation(gate) * up. A row's output has the same bits whatever the number of rows (engines.native.linear).
    """

    words: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        activation: ActivationName | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.packed = PackedWeight(
            [linear.weight for linear in linears], [linear.bias for linear in linears], activation, output_dtype
        )
        # Buffers, so that the module's memory is counted; they are not a checkpoint's.
        self.register_buffer("words", self.packed.words, persistent=False)
        self.register_buffer("bias", self.packed.bias, persistent=False)
        self.in_features = self.packed.in_features
        self.out_features = self.packed.out_features
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """[..., out_features] of an input [..., in_features] in the weights' dtype; no gradients."""
        return self.packed.linear(input)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.dtype}{activation}"


def is_packable(module: nn.Module) -> bool:
    """Whether the module is a plain nn.Linear that nobody listens to, in a dtype and on a device of the kernels.

    Subclasses, patched forwards and tensor subclasses as weights may all compute something else.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in DTYPE_CODES
        and module.weight.device.type == "cpu"
        and is_untouched(module)
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether the module runs its class's own forward, without hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
