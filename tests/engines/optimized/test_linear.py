"""PackedLinear stands in for nn.Linear; what is not a plain nn.Linear is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from engines.native.library import library
from engines.optimized.linear import PackedLinear, is_packable

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def _no_gradients() -> None:
    torch.manual_seed(0)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_linear_computes(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(40, 70, bias=bias, dtype=dtype)
    packed = PackedLinear([linear])
    input = torch.randn(2, 3, 40).to(dtype)
    assert (packed.in_features, packed.out_features) == (40, 70)
    torch.testing.assert_close(packed(input), linear(input).detach(), rtol=1e-2, atol=1e-3)


def test_memory_is_the_weights_own_and_no_checkpoints() -> None:
    linear = nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    packed = PackedLinear([linear])
    assert sum(buffer.nbytes for buffer in packed.buffers()) == linear.weight.nbytes
    assert not list(packed.parameters())
    assert not packed.state_dict()


def test_weights_are_copied() -> None:
    linear = nn.Linear(8, 8)
    packed, input = PackedLinear([linear]), torch.randn(1, 8)
    before = packed(input)
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(packed(input), before)


def test_only_plain_linears_are_packable() -> None:
    hooked, patched = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = patched.forward  # type: ignore[method-assign]
    others: list[nn.Module] = [
        Doubled(4, 4),
        hooked,
        patched,
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4, dtype=torch.float16),
        nn.Linear(4, 4, device="meta"),
        nn.Identity(),
    ]
    assert is_packable(nn.Linear(4, 4))
    assert not any(map(is_packable, others))
