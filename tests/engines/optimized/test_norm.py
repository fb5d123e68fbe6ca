"""RMSNorms are found by name and by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from engines.native.library import library
from engines.optimized.norm import native_norm

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
SIZE = 48


def norm_of(kind: type[nn.Module], dtype: torch.dtype = torch.float32, **settings: float) -> nn.Module:
    torch.manual_seed(0)
    module = kind(SIZE, **settings).to(dtype)
    assert isinstance(module.weight, nn.Parameter)
    module.weight.data = torch.randn(SIZE).to(dtype)
    return module


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class WideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).float()


class Scale(LlamaRMSNorm):
    """The right computation under another name."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm])
def test_known_norms_are_replaced_by_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    original = norm_of(kind, dtype, eps=1e-5)
    native = native_norm(original)
    assert native is not None
    input = (torch.randn(2, 5, SIZE) * 4).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(native(input), original(input).detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [CenteredRMSNorm, GatedRMSNorm, Scale])
def test_others_are_left_alone(kind: type[nn.Module]) -> None:
    assert native_norm(norm_of(kind)) is None


def test_widening_hooks_and_half_precision_are_left_alone() -> None:
    hooked = norm_of(LlamaRMSNorm)
    hooked.register_forward_hook(lambda *_: None)
    assert native_norm(hooked) is None
    assert native_norm(norm_of(WideRMSNorm, torch.bfloat16)) is None
    assert native_norm(norm_of(LlamaRMSNorm, torch.float16)) is None
    assert native_norm(nn.LayerNorm(SIZE)) is None
