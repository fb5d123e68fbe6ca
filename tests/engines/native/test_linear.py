"""Packed linears are right to the last rounding, and give each row its bits whatever else is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.native.activation import ActivationName
from engines.native.library import ISA_NAMES, isa_limited_to, library
from engines.native.linear import PackedWeight

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
DTYPES = (torch.bfloat16, torch.float32)
# Outputs that are not whole panels of 64, inputs that are odd or no multiple of 32.
SHAPES = ((64, 64), (1, 1), (65, 33), (130, 127), (200, 514), (96, 1024))


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has {name} at best")
        yield name


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(input.double(), weight.double(), None if bias is None else bias.double())


def assert_rounded(got: Tensor, expected: Tensor, inputs: int) -> None:
    """Within the rounding of the result, and of a sum of `inputs` terms in fp32."""
    ulp = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-23
    sum_error = 2.0**-22 * inputs
    torch.testing.assert_close(got.double(), expected, rtol=ulp, atol=sum_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_equals_the_exact_product_to_rounding(
    isa: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    weight = random(out_features, in_features, dtype=dtype, seed=1)
    bias = random(out_features, dtype=dtype, seed=2)
    with_bias, without = PackedWeight([weight], [bias]), PackedWeight([weight])
    for rows in (1, 5, 7, 100):
        input = random(rows, in_features, dtype=dtype, seed=rows)
        assert_rounded(with_bias.linear(input), exact(input, weight, bias), in_features)
        assert_rounded(without.linear(input), exact(input, weight), in_features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(65, 33), (192, 514)])
def test_a_row_has_the_same_bits_in_any_company(
    isa: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    packed = PackedWeight([random(out_features, in_features, dtype=dtype)])
    input = random(300, in_features, dtype=dtype, seed=1)
    expected = torch.cat([packed.linear(row[None]) for row in input])
    for rows in (*range(1, 71), 300):
        assert torch.equal(packed.linear(input[:rows]), expected[:rows]), rows
        assert torch.equal(packed.linear(input[-rows:]), expected[-rows:]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 97, 200])
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype, rows: int) -> None:
    packed = PackedWeight([random(320, 130, dtype=dtype)])
    input = random(rows, 130, dtype=dtype, seed=1)
    alone = packed.linear(input)
    try:
        torch.set_num_threads(2)
        together = packed.linear(input)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_weights_give_their_outputs_side_by_side(isa: str, dtype: torch.dtype) -> None:
    sizes = (100, 28, 64)
    weights = [random(size, 70, dtype=dtype, seed=size) for size in sizes]
    biases = [random(100, dtype=dtype, seed=7), None, random(64, dtype=dtype, seed=8)]
    input = random(9, 70, dtype=dtype, seed=3)
    alone = [PackedWeight([weight], [bias]).linear(input) for weight, bias in zip(weights, biases, strict=True)]
    assert torch.equal(PackedWeight(weights, biases).linear(input), torch.cat(alone, dim=-1))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 48, 100])
def test_gates_are_applied_before_rounding(isa: str, dtype: torch.dtype, activation: ActivationName, size: int) -> None:
    gate, up = random(size, 66, dtype=dtype, seed=1), random(size, 66, dtype=dtype, seed=2)
    biases = [random(size, dtype=dtype, seed=3), random(size, dtype=dtype, seed=4)]
    input = random(11, 66, dtype=dtype, seed=5)
    got = PackedWeight([gate, up], biases, activation).linear(input)
    gated = exact(input, gate, biases[0])
    activated = functional.silu(gated) if activation == "silu" else functional.gelu(gated, approximate="tanh")
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), activated * exact(input, up, biases[1]), rtol=tolerance, atol=1e-4)


def test_output_may_be_wider_than_the_input(isa: str) -> None:
    weight, input = random(40, 64, dtype=torch.bfloat16), random(3, 64, dtype=torch.bfloat16, seed=1)
    got = PackedWeight([weight], output_dtype=torch.float32).linear(input)
    assert got.dtype == torch.float32
    assert_rounded(got, exact(input, weight), 64)
    assert torch.equal(got.bfloat16(), PackedWeight([weight]).linear(input))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_their_row_alone(isa: str, dtype: torch.dtype) -> None:
    packed = PackedWeight([random(70, 35, dtype=dtype).abs() + 0.1])
    input = random(8, 35, dtype=dtype, seed=1)
    clean = packed.linear(input)
    input[2, 34], input[5, 0] = torch.nan, torch.inf
    got = packed.linear(input)
    assert got[2].isnan().all()
    assert (got[5] == torch.inf).all()
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(got[others], clean[others])


def test_leading_dimensions_stay_and_strides_do_not_matter(isa: str) -> None:
    packed = PackedWeight([random(64, 32)])
    input = random(2, 32, 5, seed=1).transpose(1, 2)
    got = packed.linear(input)
    assert got.shape == (2, 5, 64)
    assert torch.equal(got.view(10, 64), packed.linear(input.reshape(10, 32)))
    assert packed.linear(input[:, :0]).shape == (2, 0, 64)


def test_foreign_inputs_are_refused() -> None:
    packed = PackedWeight([random(64, 32)])
    with pytest.raises(AssertionError):
        packed.linear(random(1, 31))
    with pytest.raises(AssertionError):
        packed.linear(random(1, 32, dtype=torch.bfloat16))
