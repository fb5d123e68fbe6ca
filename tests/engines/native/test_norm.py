"""RMSNorm against its definition in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engines.native.library import ISA_NAMES, isa_limited_to, library
from engines.native.norm import rms_norm

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has {name} at best")
        yield name


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(input: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    wide = input.double()
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 100, 1024])
def test_equals_the_definition_to_rounding(isa: str, dtype: torch.dtype, size: int) -> None:
    scale = random(size, seed=1)
    for magnitude in (1e-3, 1.0, 1e3):
        input = (random(2, 3, size, seed=2) * magnitude).to(dtype)
        got = rms_norm(input, scale, 1e-6)
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got.double(), exact(input, scale, 1e-6), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    input, scale = random(200, 500, dtype=dtype), random(500, seed=1)
    expected = torch.cat([rms_norm(row[None], scale, 1e-6) for row in input])
    for rows in (1, 2, 17, 200):
        assert torch.equal(rms_norm(input[-rows:], scale, 1e-6), expected[-rows:])
    try:
        torch.set_num_threads(2)
        assert torch.equal(rms_norm(input, scale, 1e-6), expected)
    finally:
        torch.set_num_threads(1)


def test_nan_stays_in_its_row_and_zeros_stay_zero(isa: str) -> None:
    input = random(3, 64, dtype=torch.bfloat16)
    input[1, 7], input[2] = torch.nan, 0.0
    got = rms_norm(input, torch.ones(64), 1e-6)
    assert got[1].isnan().all()
    assert torch.equal(got[0], rms_norm(input[:1], torch.ones(64), 1e-6)[0])
    assert (got[2] == 0).all()


def test_strided_input_and_foreign_scales() -> None:
    input = random(8, 6).T
    assert torch.equal(rms_norm(input, torch.ones(8), 1e-6), rms_norm(input.contiguous(), torch.ones(8), 1e-6))
    with pytest.raises(AssertionError):
        rms_norm(input, torch.ones(7), 1e-6)
    with pytest.raises(AssertionError):
        rms_norm(input, torch.ones(8, dtype=torch.bfloat16), 1e-6)
