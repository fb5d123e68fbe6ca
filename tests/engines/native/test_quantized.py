"""The kernels against whole numbers in float64, bit by bit: sums are exact, the float steps after them fixed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.native import quantized as native
from engines.native.library import ISA_NAMES, isa_limited_to, library

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not built")

# (rows, in, out): one, odd, more than one panel, a panel with a part of a tile, several blocks of rows
SHAPES = [(1, 64, 64), (3, 7, 5), (5, 50, 17), (7, 1024, 200), (29, 96, 352), (13, 704, 130)]


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as got:
        if got != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield got


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded_rows(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [rows, n] as whole numbers in float64, and float32 scales [rows, 1]."""
    largest = inputs.float().abs().amax(dim=1, keepdim=True)
    return (inputs.float() * (127 * (1 / largest))).round().double(), largest * torch.tensor(1 / 127)


def expected_int8(inputs: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    rows, row_scales = rounded_rows(inputs)
    sums = (rows @ steps.double().t()).float()
    exact = sums.double() * (row_scales * scales).double()
    return (exact if bias is None else exact + bias.double()).to(torch.float32).to(inputs.dtype)


def expected_int4(inputs: Tensor, steps: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    size = inputs.shape[1] // scales.shape[1]
    total = torch.zeros(len(inputs), len(steps))
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        rows, row_scales = rounded_rows(inputs[:, columns])
        sums = rows @ steps[:, columns].double().t()
        total = (total.double() + sums * (row_scales * scales[:, group].float()).double()).float()
    return (total if bias is None else total + bias).to(inputs.dtype)


def int8_kernel(steps: Tensor, scales: Tensor, bias: Tensor | None = None) -> native.QuantizedKernel:
    out_features, in_features = steps.shape
    padded = functional.pad(scales, (0, -out_features % 16))
    return native.QuantizedKernel(native.pack_weights(steps, 8), padded, bias, in_features, out_features, 0)


def int4_kernel(steps: Tensor, scales: Tensor, bias: Tensor | None = None) -> native.QuantizedKernel:
    out_features, in_features = steps.shape
    weights, packed_scales = native.pack_weights(steps, 4), native.pack_scales(scales)
    size = in_features // scales.shape[1]
    return native.QuantizedKernel(weights, packed_scales, bias, in_features, out_features, size)


@pytest.mark.parametrize(("_", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_unpacking_gives_back_what_was_packed(bits: int, _: int, in_features: int, out_features: int) -> None:
    in_features = in_features if bits == 8 else -(-in_features // 8) * 8
    largest = 2 ** (bits - 1)
    steps = integers(-largest, largest - 1, out_features, in_features)
    packed = native.pack_weights(steps, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(native.unpack_weights(packed, out_features, in_features, bits), steps)
    scales = floats(out_features, 3)
    assert torch.equal(native.unpack_scales(native.pack_scales(scales), out_features), scales)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_exact(isa: str, shape: tuple[int, int, int], has_bias: bool, dtype: torch.dtype) -> None:
    rows, in_features, out_features = shape
    steps = integers(-128, 127, out_features, in_features)
    scales, bias = floats(out_features).abs() / 100, floats(out_features, seed=2) if has_bias else None
    inputs = floats(rows, in_features, seed=3).to(dtype)
    outputs = int8_kernel(steps, scales, bias)(inputs)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, expected_int8(inputs, steps, scales, bias))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 8, 5), (5, 96, 200), (13, 704, 130)])
@pytest.mark.parametrize("size", [8, 32])
def test_int4_is_exact(
    isa: str, size: int, shape: tuple[int, int, int], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    rows, in_features, out_features = shape
    if in_features % size:
        size = in_features  # one scale for the whole channel
    steps = integers(-8, 7, out_features, in_features)
    scales = (floats(out_features, in_features // size).abs() / 10).to(scale_dtype)
    bias = floats(out_features, seed=2)
    inputs = floats(rows, in_features, seed=3).to(dtype)
    for given in (None, bias):
        outputs = int4_kernel(steps, scales, given)(inputs)
        assert torch.equal(outputs, expected_int4(inputs, steps, scales, given))


@needs_kernels
def test_extreme_weights_and_inputs_do_not_saturate(isa: str) -> None:
    inputs = torch.full((2, 4096), 3.0)
    inputs[1] = -3.0
    for steps in (torch.full((16, 4096), -128, dtype=torch.int8), torch.full((16, 4096), 127, dtype=torch.int8)):
        scales = torch.ones(16)
        assert torch.equal(int8_kernel(steps, scales)(inputs), expected_int8(inputs, steps, scales, None))
    steps, scales = torch.full((16, 4096), -8, dtype=torch.int8), torch.ones(16, 1)
    assert torch.equal(int4_kernel(steps, scales)(inputs), expected_int4(inputs, steps, scales, None))


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_the_others(isa: str, bits: int, num_threads: int) -> None:
    in_features, out_features = 96, 150
    if bits == 8:
        kernel = int8_kernel(integers(-127, 127, out_features, in_features), floats(out_features).abs())
    else:
        kernel = int4_kernel(integers(-8, 7, out_features, in_features), floats(out_features, 3).abs())
    inputs = floats(70, in_features, seed=4).to(torch.bfloat16)
    inputs[33] *= 1000
    before = torch.get_num_threads()
    alone = torch.cat([kernel(row[None]) for row in inputs])
    try:
        torch.set_num_threads(num_threads)
        for count in range(1, 71):
            assert torch.equal(kernel(inputs[:count]), alone[:count])
        assert torch.equal(kernel(inputs.flip(0)), alone.flip(0))
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_zero_or_not_finite(isa: str, bits: int) -> None:
    kernel = (
        int8_kernel(integers(-127, 127, 20, 64), floats(20).abs(), torch.ones(20))
        if bits == 8
        else int4_kernel(integers(-8, 7, 20, 64), floats(20, 2).abs(), torch.ones(20))
    )
    inputs = floats(6, 64, seed=5)
    usual = kernel(inputs)
    inputs[1, 40], inputs[2, 3], inputs[3, 63] = torch.nan, torch.inf, -torch.inf
    inputs[4] = 0
    inputs[5] = torch.finfo(torch.float32).tiny
    outputs = kernel(inputs)
    assert outputs[1:4].isnan().all()
    assert torch.equal(outputs[4:], torch.ones(2, 20)), "what cannot be scaled counts as zero: the bias is left"
    assert torch.equal(outputs[0], usual[0])


@needs_kernels
def test_empty_batches_and_leading_dimensions() -> None:
    kernel = int8_kernel(integers(-127, 127, 20, 64), floats(20).abs())
    inputs = floats(2, 3, 64)
    assert kernel(inputs[:0]).shape == (0, 3, 20)
    assert torch.equal(kernel(inputs).view(6, 20), kernel(inputs.view(6, 64)))
    transposed = floats(64, 4).t()
    assert torch.equal(kernel(transposed), kernel(transposed.contiguous()))
