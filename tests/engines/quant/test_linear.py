from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from engines.native.library import library
from engines.quant import reference
from engines.quant.linear import QuantizedLinear
from engines.quant.scheme import Scheme

SCHEMES: list[Scheme] = ["int8", "int4"]
WITHOUT_KERNELS = "engines.quant.linear.native.available"


def linear(in_features: int = 96, out_features: int = 50, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias).to(torch.bfloat16).requires_grad_(False)


def inputs(rows: int = 9, in_features: int = 96) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(WITHOUT_KERNELS, lambda: False)
    elif library() is None:
        pytest.skip("the kernels are not built")
    return str(request.param)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.012), ("int4", 0.09)])
def test_is_close_to_the_layer_it_replaces(way: str, scheme: Scheme, bound: float, bias: bool) -> None:
    original = linear(bias=bias)
    layer = QuantizedLinear.of(original, scheme, 32)
    expected = original.float()(inputs())
    assert relative_error(layer(inputs()), expected) < bound
    assert relative_error(nn.functional.linear(inputs(), layer.dequantized(), layer.bias), expected) < bound
    for dtype in (torch.bfloat16, torch.float16):
        outputs = layer(inputs().to(dtype))
        assert outputs.dtype == dtype
        assert relative_error(outputs.float(), expected) < bound


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(96, 50), (32, 1), (704, 130)])
def test_torch_computes_what_the_kernels_do(
    scheme: Scheme, shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    original, rows = linear(*shape, bias=bias), inputs(5, shape[0])
    rows[1], rows[2, 3], rows[3] = 0, torch.nan, rows[3] * 1e4
    native = QuantizedLinear.of(original, scheme, 32)
    monkeypatch.setattr(WITHOUT_KERNELS, lambda: False)
    ours = QuantizedLinear.of(original, scheme, 32)
    assert torch.equal(native.steps(), ours.steps())
    assert torch.equal(native.scales(), ours.scales())
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(native(rows.to(dtype)), ours(rows.to(dtype)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_does_not_depend_on_the_others(way: str, scheme: Scheme) -> None:
    layer = QuantizedLinear.of(linear(), scheme, 32)
    rows = inputs(40)
    alone = torch.cat([layer(row[None]) for row in rows])
    for count in (2, 3, 5, 17, 40):
        assert torch.equal(layer(rows[:count]), alone[:count])


def test_int4_rows_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WITHOUT_KERNELS, lambda: False)
    layer = QuantizedLinear.of(linear(), "int4", 32)
    whole = layer(inputs())
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 4 * 3 * 50 * 2)  # two rows at a time
    assert torch.equal(layer(inputs()), whole)


def test_inputs_that_are_no_whole_groups_become_int8() -> None:
    assert QuantizedLinear.of(linear(50, 8), "int4", 32).bits == 8
    assert QuantizedLinear.of(linear(64, 8), "int4", 32).bits == 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pack_with_joins_outputs_bit_by_bit(way: str, scheme: Scheme) -> None:
    layers = [
        QuantizedLinear.of(linear(out_features=size, bias=size != 7, seed=size), scheme, 32) for size in (50, 7, 64)
    ]
    packed = layers[0].pack_with(layers[1:])
    assert packed is not None
    assert torch.equal(packed(inputs()), torch.cat([layer(inputs()) for layer in layers], dim=-1))


def test_pack_with_refuses_other_kinds() -> None:
    layer = QuantizedLinear.of(linear(), "int4", 32)
    for other in (
        nn.Linear(96, 8),
        QuantizedLinear.of(linear(), "int8", 32),
        QuantizedLinear.of(linear(128), "int4", 32),
        QuantizedLinear.of(linear(), "int4", 16),
    ):
        assert layer.pack_with([other]) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_copies_and_pickles(way: str, scheme: Scheme) -> None:
    layer = QuantizedLinear.of(linear(), scheme, 32)
    expected = layer(inputs())
    other = QuantizedLinear.of(linear(seed=3), scheme, 32)
    other(inputs())
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs()), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_a_model_leaves_its_scales(way: str, scheme: Scheme) -> None:
    layer = QuantizedLinear.of(linear(), scheme, 32)
    expected = layer(inputs())
    nn.Sequential(layer).to(torch.bfloat16).to("cpu").half()
    assert torch.equal(layer(inputs()), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moving_to_where_there_are_kernels_packs(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("the kernels are not built")
    with monkeypatch.context() as without:
        without.setattr(WITHOUT_KERNELS, lambda: False)
        layer = QuantizedLinear.of(linear(), scheme, 32)
    expected, size = layer(inputs()), len(layer.state_dict()["quantized_weight"].shape)
    moved = layer.to("cpu")
    assert (size, len(moved.state_dict()["quantized_weight"].shape)) == (2, 1)
    assert torch.equal(moved(inputs()), expected)


def test_int4_scales_take_two_bytes_where_that_is_exact() -> None:
    steps = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    exact, inexact = torch.full((16, 2), 0.5), torch.full((16, 2), 0.1)
    assert QuantizedLinear(steps, exact).weight_scale.dtype == torch.bfloat16
    assert QuantizedLinear(steps, inexact).weight_scale.dtype == torch.float32
    assert torch.equal(QuantizedLinear(steps, inexact).scales(), inexact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_computes_the_same(scheme: Scheme) -> None:
    layer = QuantizedLinear.of(linear(), scheme, 32)
    expected = layer(inputs())
    layer.to("cuda")
    outputs = layer(inputs().cuda())
    torch.testing.assert_close(outputs.cpu(), expected)
    for count in (1, 5, 9):
        assert torch.equal(layer(inputs()[:count].cuda()), outputs[:count])
    assert torch.equal(layer.to("cpu")(inputs()), expected)
