from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.quant.scheme import GROUP_SIZES, quantize_channels, quantize_groups


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_int8_is_within_half_a_step() -> None:
    original = weight(9, 50)
    steps, scales = quantize_channels(original)
    assert (steps.dtype, scales.dtype, scales.shape) == (torch.int8, torch.bfloat16, (9,))
    error = (steps.float() * scales.float()[:, None] - original.float()).abs() / scales.float()[:, None]
    # The largest may be beyond the grid by what rounding took off the scale.
    assert (error <= torch.where(steps.abs() == 127, 1.0, 0.5 + 1e-5)).all()
    assert (steps.abs().amax(dim=1) >= 126).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int4_errs_less_than_the_plain_grid(group_size: int) -> None:
    original = weight(40, 256)
    steps, scales = quantize_groups(original, group_size)
    assert (steps.dtype, scales.dtype, scales.shape) == (torch.int8, torch.bfloat16, (40, 256 // group_size))
    assert steps.min() >= -8
    assert steps.max() <= 7
    groups = original.float().view(40, -1, group_size)
    plain = groups.abs().amax(-1, keepdim=True) / 7
    plain_error = ((groups / plain).round() * plain - groups).square().sum(-1)
    error = (steps.view(groups.shape).float() * scales.float()[..., None] - groups).square().sum(-1)
    assert error.sum() < 0.9 * plain_error.sum()
    assert (error <= plain_error * 1.05).all(), "the plain grid is among the candidates, but for its scale's rounding"


def test_zeros_stay_zero_and_scales_are_never_zero() -> None:
    zeros = torch.zeros(3, 64)
    for steps, scales in (quantize_channels(zeros), quantize_groups(zeros, 32)):
        assert not steps.any()
        assert (scales != 0).all()


def test_large_layers_are_done_in_parts_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight(50, 64)
    whole = (*quantize_channels(original), *quantize_groups(original, 32))
    monkeypatch.setattr("engines.quant.scheme._CHUNK_WEIGHTS", 7 * 64)
    parts = (*quantize_channels(original), *quantize_groups(original, 32))
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
