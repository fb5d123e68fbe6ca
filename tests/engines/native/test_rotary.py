"""Head norms and rotary embedding against transformers' formulas in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engines.native.library import ISA_NAMES, isa_limited_to, library
from engines.native.rotary import RotaryLayer

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")
DTYPES = (torch.bfloat16, torch.float32)
QUERIES, KEYS = 4, 2
EPSILON = 1e-5


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has {name} at best")
        yield name


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(heads: Tensor, cosines: Tensor, sines: Tensor, norms: list[Tensor | None], head_dim: int) -> Tensor:
    """Queries and keys [rows, heads, head_dim] in double precision."""
    split = heads.double().view(heads.shape[0], -1, head_dim)[:, : QUERIES + KEYS]
    query, key = split.split([QUERIES, KEYS], dim=1)
    query, key = (normed(side, scale) for side, scale in zip((query, key), norms, strict=True))
    rotary_dim = cosines.shape[-1]
    turned = apply_rotary_pos_emb(
        query[..., :rotary_dim], key[..., :rotary_dim], cosines.double(), sines.double(), unsqueeze_dim=1
    )
    sides = [torch.cat((new, old[..., rotary_dim:]), -1) for new, old in zip(turned, (query, key), strict=True)]
    return torch.cat(sides, dim=1)


def normed(heads: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return heads
    return heads / (heads.square().mean(-1, keepdim=True) + EPSILON).sqrt() * scale.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (128, 128), (80, 80), (64, 32), (64, 0)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_equals_the_formulas_and_leaves_values_alone(
    isa: str, dtype: torch.dtype, head_dim: int, rotary_dim: int, with_norms: bool
) -> None:
    scales = [random(head_dim, seed=1), random(head_dim, seed=2)] if with_norms else [None, None]
    layer = RotaryLayer(
        QUERIES, KEYS, head_dim, dtype, *(None if scale is None else (scale, EPSILON) for scale in scales)
    )
    heads = random(5, (QUERIES + 2 * KEYS) * head_dim, dtype=dtype, seed=3)
    cosines, sines = random(5, rotary_dim, dtype=dtype, seed=4), random(5, rotary_dim, dtype=dtype, seed=5)
    expected, values = exact(heads, cosines, sines, scales, head_dim), heads.clone()
    layer.rotate_(heads, cosines, sines)
    got = heads.view(5, -1, head_dim)[:, : QUERIES + KEYS]
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=1e-6)
    rotated = (QUERIES + KEYS) * head_dim
    assert torch.equal(heads[:, rotated:], values[:, rotated:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    scale = random(128, seed=1)
    layer = RotaryLayer(QUERIES, KEYS, 128, dtype, (scale, EPSILON), (scale, EPSILON))
    heads = random(100, (QUERIES + 2 * KEYS) * 128, dtype=dtype)
    cosines, sines = random(100, 128, dtype=dtype, seed=4), random(100, 128, dtype=dtype, seed=5)
    alone = heads.clone()
    for row in range(100):
        layer.rotate_(alone[row : row + 1], cosines[row : row + 1], sines[row : row + 1])
    try:
        torch.set_num_threads(2)
        layer.rotate_(heads, cosines, sines)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(heads, alone)


def test_foreign_tables_are_refused() -> None:
    layer = RotaryLayer(QUERIES, KEYS, 8, torch.float32)
    heads = random(2, (QUERIES + 2 * KEYS) * 8)
    for table in (random(1, 8), random(2, 10), random(2, 7), random(2, 8, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError):
            layer.rotate_(heads, table, table)
