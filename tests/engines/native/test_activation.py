"""Gated activations against torch's in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.native.activation import ActivationName, gated_activation
from engines.native.library import ISA_NAMES, isa_limited_to, library

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
NAMES: tuple[ActivationName, ...] = ("silu", "gelu_tanh")


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has {name} at best")
        yield name


def exact(gate: Tensor, up: Tensor, activation: ActivationName) -> Tensor:
    gate = gate.double()
    activated = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return activated * up.double()


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equals_torch_to_rounding(isa: str, dtype: torch.dtype, activation: ActivationName) -> None:
    gate = torch.linspace(-60.0, 60.0, 3 * 777).view(3, 777).to(dtype)
    up = torch.randn(3, 777, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = gated_activation(torch.cat((gate, up), dim=-1), activation)
    assert got.dtype == dtype
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), exact(gate, up, activation), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("activation", NAMES)
def test_edges(isa: str, activation: ActivationName) -> None:
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, float("inf"), float("nan")])
    got = gated_activation(torch.cat((gate, torch.ones(6))), activation)
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] == 1e4
    assert abs(got[3].item()) < 1e-30
    assert got[4] == torch.inf
    assert got[5].isnan()


@pytest.mark.parametrize("activation", NAMES)
def test_rows_and_threads_do_not_change_a_bit(isa: str, activation: ActivationName) -> None:
    gate_up = torch.randn(90, 2 * 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.cat([gated_activation(row[None], activation) for row in gate_up])
    try:
        torch.set_num_threads(2)
        assert torch.equal(gated_activation(gate_up, activation), expected)
    finally:
        torch.set_num_threads(1)
