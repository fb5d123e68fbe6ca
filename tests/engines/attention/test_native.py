from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from engines.attention import select_backend
from engines.attention.batched import BatchedAttention
from engines.attention.native import NativeAttention
from engines.attention.reference import ReferenceAttention
from engines.errors import ModelLoadError
from engines.native.library import ISA_NAMES, isa_limited_to, library
from tests.engines.test_attention import MIXED, OPTIONS, Case, make_case

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not built")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# (query rows, context): decode, verification, prefill in one and several tiles, over chunk borders, and one row.
LONG = [(1, 600), (5, 257), (70, 70), (1, 128), (1, 129), (40, 300), (1, 1)]


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa_limited_to(request.param) as name:
        if name != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield name


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_equals_reference(case: Case, **options: object) -> None:
    output = case.attend(NativeAttention(), **options)
    expected = case.attend(ReferenceAttention(), **options)
    tolerance = TOLERANCE[case.query.dtype]
    assert output.dtype == case.query.dtype
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


class TestSelect:
    def test_it_is_what_a_cpu_gets(self) -> None:
        cpu = torch.device("cpu")
        assert select_backend("auto", cpu).name == select_backend("native", cpu).name == "native"

    def test_another_device_is_refused(self) -> None:
        with pytest.raises(ModelLoadError, match="for CPUs, not for cuda"):
            select_backend("native", torch.device("cuda"))

    def test_without_kernels_the_compiler_is_named_and_auto_takes_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engines.attention.library", lambda: None)
        with pytest.raises(ModelLoadError, match=r"C\+\+17 compiler"):
            select_backend("native", torch.device("cpu"))
        assert select_backend("auto", torch.device("cpu")).name == "torch"


class TestEqualsReference:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
    def test_windows_softcap_and_sinks(self, isa: str, options: dict[str, object], dtype: torch.dtype) -> None:
        assert_equals_reference(make_case(MIXED, dims=(64, 64), dtype=dtype, seed=1), **({"scaling": 0.125} | options))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256), (8, 24), (40, 16)], ids=str)
    def test_head_dims(self, isa: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
        case = make_case(LONG, heads=(2, 1), dims=dims, block_size=16, dtype=dtype)
        assert_equals_reference(case, scaling=dims[0] ** -0.5)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 1), (10, 2), (70, 1)], ids=str)
    def test_group_sizes(self, isa: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
        assert_equals_reference(make_case(MIXED, heads=heads, dims=(16, 16), block_size=16, dtype=dtype))

    @pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64, 200])
    def test_block_sizes(self, block_size: int) -> None:
        for dtype in TOLERANCE:
            assert_equals_reference(make_case(MIXED, dims=(16, 16), block_size=block_size, dtype=dtype))

    def test_random_batches(self) -> None:
        pick = random.Random(0)
        for seed in range(25):
            kv_heads, dtype = pick.choice([1, 2, 3]), pick.choice(list(TOLERANCE))
            lens = [(pick.choice([1, 1, 2, 5, 33]), pick.randrange(300)) for _ in range(pick.randint(1, 5))]
            case = make_case(
                [(q_len, q_len + past) for q_len, past in lens],
                heads=(kv_heads * pick.choice([1, 2, 4, 5]), kv_heads),
                dims=(pick.choice([8, 24, 64]), pick.choice([8, 32, 40])),
                block_size=pick.choice([1, 3, 16, 32, 64]),
                dtype=dtype,
                seed=seed,
            )
            with threads(pick.choice([1, 2])):
                assert_equals_reference(case, window=pick.choice([None, None, 1, 17, 128, 200]))


class TestRowIndependence:
    """Bitwise: whoever else is in the batch, however many rows a step has, however many threads there are."""

    LENS = ((1, 300), (5, 261), (33, 140), (1, 1), (70, 200))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("options", [{}, {"window": 50}], ids=["full", "window"])
    def test_a_sequence_alone_equals_itself_in_the_batch(
        self, isa: str, options: dict[str, object], dtype: torch.dtype
    ) -> None:
        lens = list(self.LENS)
        with threads(2):
            together = make_case(lens, dims=(80, 40), dtype=dtype).attend(NativeAttention(), **options)
        parts = together.split([q_len for q_len, _ in lens])
        for index, part in enumerate(parts):
            alone = make_case(lens, dims=(80, 40), dtype=dtype, keep=[index])
            assert torch.equal(alone.attend(NativeAttention(), **options), part)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("heads", [(2, 1), (5, 1), (3, 3)], ids=str)
    @pytest.mark.parametrize("window", [None, 130])
    def test_a_row_decoded_equals_the_row_verified_or_prefilled(
        self, isa: str, window: int | None, heads: tuple[int, int], dtype: torch.dtype
    ) -> None:
        kv_len = 290
        whole = make_case([(kv_len, kv_len)], heads=heads, dims=(72, 64), block_size=16, dtype=dtype)
        key_cache, value_cache = whole.key_cache.clone(), whole.value_cache.clone()
        expected = attend_rows(whole, kv_len, kv_len, (key_cache, value_cache), window)
        for q_len, stop in [(1, 290), (1, 129), (1, 257), (2, 128), (5, 259), (9, 140), (64, 200), (17, 290)]:
            rows = attend_rows(whole, q_len, stop, (key_cache, value_cache), window)
            assert torch.equal(rows, expected[stop - q_len : stop]), (q_len, stop)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_long_contexts_split_over_threads_equal_one_thread(self, isa: str, dtype: torch.dtype) -> None:
        case = make_case([(3, 2500)], heads=(2, 1), dims=(16, 16), block_size=16, dtype=dtype)
        with threads(1):
            expected = case.attend(NativeAttention(), window=2300)
        for count in (2, 3):
            with threads(count):
                assert torch.equal(case.attend(NativeAttention(), window=2300), expected)
        assert_equals_reference(case, window=2300)


def attend_rows(whole: Case, q_len: int, stop: int, caches: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    """The last q_len rows before position `stop` of a one-sequence case, as a step of their own."""
    rows = slice(stop - q_len, stop)
    step = make_case([(q_len, stop)], heads=(1, 1), block_size=whole.batch.block_size).batch
    slots = whole.batch.slot_mapping[rows]
    batch = type(step)(
        step.input_ids,
        step.positions,
        slots,
        step.cu_seqlens_q,
        step.kv_lens,
        whole.batch.block_table,
        step.logit_rows,
        (q_len,),
        (stop,),
        whole.batch.block_size,
    )
    return NativeAttention().attend(
        whole.query[rows],
        whole.key[rows],
        whole.value[rows],
        *caches,
        batch,
        scaling=0.3,
        sliding_window=window,
        softcap=None,
        sinks=None,
    )


class TestMasks:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("planted", [1e30, float("inf"), float("nan")])
    @pytest.mark.parametrize("q_len", [1, 3, 40])
    def test_what_is_masked_changes_nothing(self, isa: str, q_len: int, planted: float, dtype: torch.dtype) -> None:
        case = make_case([(q_len, 150)], heads=(4, 2), dims=(16, 16), block_size=16, dtype=dtype)
        for window in (None, 20, 21):
            expected = case.attend(NativeAttention(), window=window)
            for row in range(0, q_len, 7):
                changed = planted_at(case, row + 1, window, planted)
                assert torch.equal(changed.attend(NativeAttention(), window=window)[row], expected[row])

    def test_neighbours_in_a_block_are_not_read(self, isa: str) -> None:
        case = make_case([(1, 17), (1, 33)], dims=(16, 16), block_size=16)
        expected = case.attend(NativeAttention())
        for cache in (case.key_cache, case.value_cache):
            cache[case.batch.block_table[0, 1].item(), 1:] = torch.inf
        assert torch.equal(case.attend(NativeAttention()), expected)


def planted_at(case: Case, first: int, window: int | None, planted: float) -> Case:
    """The case with `planted` in all keys and values that row first - 1 of its only sequence does not see."""
    q_len, kv_len = case.batch.q_lens_cpu[0], case.batch.kv_lens_cpu[0]
    key, value = case.key.clone(), case.value.clone()
    key[first:] = value[first:] = planted
    key_cache, value_cache = case.key_cache.clone(), case.value_cache.clone()
    past = kv_len - q_len
    if window is not None:
        oldest = past + first - window
        key[: max(0, oldest - past)] = value[: max(0, oldest - past)] = planted
        positions = torch.arange(min(oldest, past))
        size = case.batch.block_size
        slots = case.batch.block_table[0].long()[positions // size] * size + positions % size
        key_cache.flatten(0, 1)[slots] = value_cache.flatten(0, 1)[slots] = planted
    return Case(case.batch, case.query, key, value, key_cache, value_cache, case.past)


class TestCalls:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_views_of_one_buffer_are_read_where_they_lie(self, dtype: torch.dtype) -> None:
        case = make_case(MIXED, heads=(4, 2), dims=(16, 24), dtype=dtype)
        expected = case.attend(NativeAttention())
        fused = torch.cat([part.flatten(1) for part in (case.query, case.key, case.value)], dim=1)
        query, key, value = fused.split([4 * 16, 2 * 16, 2 * 24], dim=1)
        case.query, case.key, case.value = (
            query.unflatten(1, (4, 16)),
            key.unflatten(1, (2, 16)),
            value.unflatten(1, (2, 24)),
        )
        assert torch.equal(case.attend(NativeAttention()), expected)
        case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers' modules pass it
        assert torch.equal(case.attend(NativeAttention()), expected)
        case.key = case.key.transpose(1, 2).contiguous().transpose(1, 2)  # last dimension not contiguous
        assert torch.equal(case.attend(NativeAttention()), expected)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_keys_and_values_go_to_their_slots_and_nowhere_else(self, isa: str, dtype: torch.dtype) -> None:
        case = make_case(MIXED, dims=(16, 24), dtype=dtype)
        expected = [case.key_cache.clone(), case.value_cache.clone()]
        expected[0].flatten(0, 1)[case.batch.slot_mapping] = case.key
        expected[1].flatten(0, 1)[case.batch.slot_mapping] = case.value
        options = {"scaling": 1.0, "sliding_window": None, "softcap": None, "sinks": None}
        caches = (case.key_cache, case.value_cache)
        NativeAttention().attend(case.query, case.key, case.value, *caches, case.batch, **options)
        for cache, wanted in zip(caches, expected, strict=True):
            assert torch.equal(cache.nan_to_num(nan=-7.0), wanted.nan_to_num(nan=-7.0))

    def test_a_sequence_reads_what_another_one_writes_in_the_same_step(self) -> None:
        case = make_case([(20, 20), (4, 20)], block_size=4)
        table = case.batch.block_table
        table[1, :4] = table[0, :4]
        case.key_cache.fill_(torch.nan)
        case.value_cache.fill_(torch.nan)
        with threads(2):
            assert_equals_reference(case)

    def test_steps_of_different_batches_follow_each_other(self) -> None:
        backend = NativeAttention()
        for seed, lens in enumerate([MIXED, [(1, 5)], MIXED[:2]]):
            case = make_case(lens, seed=seed)
            torch.testing.assert_close(case.attend(backend), case.attend(ReferenceAttention()))

    @pytest.mark.parametrize(("dtype", "dims"), [(torch.float16, (16, 16)), (torch.float32, (12, 16))], ids=str)
    def test_what_the_kernels_do_not_take_is_attended_by_torch(self, dtype: torch.dtype, dims: tuple[int, int]) -> None:
        case = make_case(MIXED, dims=dims, dtype=dtype)
        assert torch.equal(case.attend(NativeAttention()), case.attend(BatchedAttention()))

    def test_sinks_of_another_dtype_are_converted(self) -> None:
        case = make_case(MIXED, dims=(16, 16), dtype=torch.bfloat16)
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        expected = case.attend(NativeAttention(), sinks=sinks)
        assert torch.equal(case.attend(NativeAttention(), sinks=sinks.bfloat16()), expected)

    @pytest.mark.parametrize("inference", [False, True])
    def test_works_in_and_outside_of_inference_mode(self, inference: bool) -> None:
        with torch.inference_mode() if inference else nullcontext():
            assert_equals_reference(make_case(MIXED))
