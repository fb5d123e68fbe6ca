"""Layers over one input are joined, by their own method where they have one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.native.library import library
from engines.optimized.packing import pack, pack_gated

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")


class Own(nn.Module):
    """A layer with its own way of being joined, which only works with its kind."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight)

    def pack_with(self, others: Sequence[nn.Module]) -> nn.Module | None:
        weights = [other.weight for other in (self, *others) if isinstance(other, Own)]
        return Own(torch.cat(weights)) if len(weights) == 1 + len(others) else None


def test_linears_become_one() -> None:
    linears = [nn.Linear(16, size) for size in (8, 24, 3)]
    packed, input = pack(linears), torch.randn(4, 16)
    assert packed is not None
    expected = torch.cat([linear(input) for linear in linears], dim=-1)
    torch.testing.assert_close(packed(input), expected.detach())


def test_other_kinds_join_themselves() -> None:
    first, second = Own(torch.randn(8, 4)), Own(torch.randn(2, 4))
    packed, input = pack([first, second]), torch.randn(3, 4)
    assert packed is not None
    assert torch.equal(packed(input), torch.cat((first(input), second(input)), dim=-1))
    assert pack([first]) is first


def test_what_does_not_fit_together_is_left_alone() -> None:
    own, linear = Own(torch.randn(8, 4)), nn.Linear(4, 8)
    assert pack([own, linear]) is None
    assert pack([linear, own]) is None
    assert pack([linear, nn.Linear(4, 8, dtype=torch.bfloat16)]) is None
    assert pack([nn.Identity()]) is None
    own.register_forward_hook(lambda *_: None)
    assert pack([own]) is None


def test_gates_of_either_kind() -> None:
    gate, up, input = torch.randn(32, 16), torch.randn(32, 16), torch.randn(5, 16)
    expected = functional.silu(input @ gate.T) * (input @ up.T)
    linears = [nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)]
    for linear, weight in zip(linears, (gate, up), strict=True):
        linear.weight.data = weight
    for pair in (linears, [Own(gate), Own(up)]):
        gated = pack_gated(pair[0], pair[1], "silu")
        assert gated is not None
        with torch.no_grad():
            torch.testing.assert_close(gated(input), expected, rtol=1e-4, atol=1e-4)


def test_gates_of_unequal_shape_or_unknown_kind_are_left_alone() -> None:
    assert pack_gated(nn.Linear(4, 8), nn.Linear(4, 16), "silu") is None
    assert pack_gated(nn.Identity(), nn.Identity(), "silu") is None
