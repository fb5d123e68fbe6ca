"""Gated MLPs are found by their parts and by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engines.native.library import library
from engines.optimized.linear import PackedLinear
from engines.optimized.mlp import FusedMLP, fused_mlp
from engines.quant.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
HIDDEN, INTERMEDIATE = 32, 48


class MLP(nn.Module):
    def __init__(self, activation: str = "silu", dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias, dtype=dtype)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias, dtype=dtype)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias, dtype=dtype)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output


class ClampedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))
        return output


class ScaledMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))


class MaskedMLP(MLP):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps_are_fused_into_the_same(activation: str, dtype: torch.dtype, bias: bool) -> None:
    original = MLP(activation, dtype, bias)
    fused = fused_mlp(original, dtype)
    assert isinstance(fused, FusedMLP)
    assert isinstance(fused.gate_up, PackedLinear)
    input = torch.randn(2, 7, HIDDEN).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(fused(input), original(input).detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("original", [MLP("relu"), MLP("gelu"), ClampedMLP(), ScaledMLP(), MaskedMLP(), nn.Identity()])
def test_others_are_left_alone(original: nn.Module) -> None:
    assert fused_mlp(original, torch.float32) is None


def test_hooks_and_half_precision_are_left_alone() -> None:
    outside, inside = MLP(), MLP()
    outside.register_forward_hook(lambda *_: None)
    inside.up_proj.register_forward_hook(lambda *_: None)
    assert fused_mlp(outside, torch.float32) is None
    assert fused_mlp(inside, torch.float32) is None
    assert fused_mlp(MLP(dtype=torch.float16), torch.float16) is None


def test_quantized_projections_are_joined() -> None:
    original = MLP(dtype=torch.bfloat16)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(original, name, QuantizedLinear.of(original.get_submodule(name), "int8", 32))  # type: ignore[arg-type]
    fused = fused_mlp(original, torch.bfloat16)
    assert fused is not None
    assert fused.down_proj is original.down_proj
    input = torch.randn(1, 4, HIDDEN).bfloat16()
    torch.testing.assert_close(fused(input), original(input), rtol=2e-2, atol=2e-2)
