"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from engines.attention.reference import ReferenceAttention
from engines.attention.tiles import SHORT_QUERY_ROWS, SPLIT_TOKENS
from engines.attention.triton import TritonAttention
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.parity import probe
from tests.engines import tiny_models
from tests.engines.test_attention import OPTIONS, Case, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Decode within a split, at its edges and beyond; verification across an edge; a whole and a chunked prompt.
MIXED = [(1, 9), (5, 5), (1, SPLIT_TOKENS), (4, SPLIT_TOKENS + 2), (1, 2 * SPLIT_TOKENS + 1), (66, 66), (70, 100)]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's matrix product as a GPU has it: of numbers, where it takes the bits of bf16 for integers, and
    row by row, where numpy adds up a row in an order that depends on the row's place."""

    def numbers(handle: interpreter.TensorHandle) -> npt.NDArray[np.float32]:
        is_bits = handle.dtype.scalar == interpreter.tl.bfloat16
        return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bits else handle.data.astype(np.float32)

    def create_dot(
        builder: object,
        a: interpreter.TensorHandle,
        b: interpreter.TensorHandle,
        d: interpreter.TensorHandle,
        *_: object,
    ) -> interpreter.TensorHandle:
        right = numbers(b)
        product = np.stack([row @ right for row in numbers(a)])
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def case(lens: list[tuple[int, int]], **options: object) -> Case:
    return make_case(lens, device=DEVICE, **{"dims": (16, 16), "block_size": 16, **options})


def check(given: Case, dtype: torch.dtype = torch.float32, **options: object) -> None:
    options = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
    expected = given.attend(ReferenceAttention(), **options)
    actual = given.attend(TritonAttention(DEVICE), **options)
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


class TestAgainstReference:
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
    def test_masks_caps_and_sinks(self, options: dict[str, object]) -> None:
        check(case(MIXED), **options)

    @pytest.mark.parametrize("window", [1, SPLIT_TOKENS - 1, SPLIT_TOKENS, SPLIT_TOKENS + 1])
    def test_windows_at_the_edge_of_a_split(self, window: int) -> None:
        check(case([(1, SPLIT_TOKENS), (5, SPLIT_TOKENS + 3), (1, 2 * SPLIT_TOKENS + 1), (66, 80)]), window=window)

    @pytest.mark.parametrize("heads", [(2, 2), (5, 1), (70, 1), (6, 3)], ids=str)
    def test_heads_that_share(self, heads: tuple[int, int]) -> None:
        check(case([(1, 40), (7, 20), (67, 70)], heads=heads))

    @pytest.mark.parametrize("dims", [(8, 12), (16, 40), (80, 96)], ids=str)
    def test_dimensions(self, dims: tuple[int, int]) -> None:
        check(case([(1, 40), (7, 20), (67, 70)], dims=dims))

    @pytest.mark.parametrize("block_size", [1, 4, 32, 512])
    def test_block_sizes(self, block_size: int) -> None:
        check(case([(1, 40), (7, 20), (67, 70)], block_size=block_size))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=["plain", "all"])
    def test_half_precision(self, dtype: torch.dtype, options: dict[str, object]) -> None:
        check(case([(1, SPLIT_TOKENS + 9), (5, 20), (67, 70)], dtype=dtype), dtype, **options)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_batches(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lens = []
        for _ in range(4):
            kv_len = int(torch.randint(1, 2 * SPLIT_TOKENS, (), generator=generator))
            most = [1, 8, 80][int(torch.randint(3, (), generator=generator))]
            lens.append((min(kv_len, int(torch.randint(1, most + 1, (), generator=generator))), kv_len))
        check(case(lens, heads=(6, 3), seed=seed), window=[None, 20, 150][seed % 3])

    def test_more_splits_than_are_merged_at_a_time(self) -> None:
        check(case([(2, 17 * SPLIT_TOKENS + 5)], heads=(2, 1)))
        check(case([(2, 17 * SPLIT_TOKENS + 5)], heads=(2, 1)), window=300)

    def test_strided_rows(self) -> None:
        given = case([(1, 9), (3, 20)])
        given.query, given.key, given.value = (
            rows.transpose(0, 1).contiguous().transpose(0, 1) for rows in (given.query, given.key, given.value)
        )
        check(given)
        given.key = given.key.transpose(1, 2).contiguous().transpose(1, 2)
        check(given)

    def test_writes_keys_and_values_to_their_slots_and_nowhere_else(self) -> None:
        given = case([(2, 6), (1, 1), (70, 75)])
        caches = []
        for backend in (ReferenceAttention(), TritonAttention(DEVICE)):
            caches.append((given.key_cache.clone(), given.value_cache.clone()))
            options = {"scaling": 1.0, "sliding_window": None, "softcap": None, "sinks": None}
            backend.attend(given.query, given.key, given.value, *caches[-1], given.batch, **options)
        for expected, actual in zip(*caches, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class TestRowIndependence:
    """Bit by bit."""

    @pytest.mark.parametrize("window", [None, 270])
    def test_neighbours_change_nothing(self, window: int | None) -> None:
        together = case(MIXED)
        shared = together.attend(TritonAttention(DEVICE), window=window).split(together.batch.q_lens_cpu)
        for index, rows in enumerate(shared):
            alone = case(MIXED, keep=[index])
            assert torch.equal(alone.attend(TritonAttention(DEVICE), window=window), rows)

    @pytest.mark.parametrize("window", [None, 100])
    @pytest.mark.parametrize("num_rows", [5, 12, SHORT_QUERY_ROWS])
    def test_a_row_verified_is_a_row_decoded(self, num_rows: int, window: int | None) -> None:
        kv_len = SPLIT_TOKENS + num_rows // 2
        given = case([(num_rows, kv_len)])
        caches = (given.key_cache.clone(), given.value_cache.clone())
        options = {"scaling": 0.3, "sliding_window": window, "softcap": None, "sinks": None}
        backend = TritonAttention(DEVICE)
        verified = backend.attend(given.query, given.key, given.value, *caches, given.batch, **options)
        for row in (0, 1, num_rows // 2, num_rows - 1):
            batch = decode(given.batch, kv_len - num_rows + row)
            rows = (part[row : row + 1] for part in (given.query, given.key, given.value))
            assert torch.equal(backend.attend(*rows, *caches, batch, **options)[0], verified[row])

    def test_programs_may_share_the_splits_in_any_number(self) -> None:
        given, backend = case([(1, 5 * SPLIT_TOKENS), (3, 30)]), TritonAttention(DEVICE)
        results = []
        for num_programs in (1, 12, 1000):
            backend._wanted_programs = num_programs
            results.append(given.attend(backend, window=3 * SPLIT_TOKENS))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def decode(batch: RaggedBatch, position: int) -> RaggedBatch:
    """The step that decodes the token at `position` of a batch's only sequence."""
    table = array("i", batch.block_table[0].tolist())
    item = BatchItem([0] * (position + 1), position, position + 1, (), table, num_logit_rows=1)
    return build_batch([item], batch.block_size, DEVICE)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])  # windows, and soft caps or sinks
def test_whole_models_equal_their_own_attention(architecture: str) -> None:
    loaded = tiny_models.load(architecture)
    loaded = dataclasses.replace(loaded, model=torch.nn.Module.to(loaded.model, DEVICE), device=DEVICE)
    assert probe(loaded, TritonAttention(DEVICE)).backend == "triton"


class TestPlans:
    def test_are_rebuilt_for_each_batch(self) -> None:
        backend = TritonAttention(DEVICE)
        for lens in ([(1, 9), (1, 300)], [(1, 300), (1, 9)], [(70, 70)]):
            given = case(lens)
            torch.testing.assert_close(given.attend(backend), given.attend(ReferenceAttention()), rtol=2e-6, atol=2e-6)

    def test_layers_of_different_heads_share_a_batch(self) -> None:
        backend, wide, narrow = TritonAttention(DEVICE), case([(9, 20)], heads=(8, 1)), case([(9, 20)], heads=(2, 2))
        narrow.batch = wide.batch
        wide.attend(backend)
        torch.testing.assert_close(narrow.attend(backend), narrow.attend(ReferenceAttention()), rtol=2e-6, atol=2e-6)
