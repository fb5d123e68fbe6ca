from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.attention import AttentionBackend, select_backend
from engines.attention.batched import SHORT_QUERY_ROWS, BatchedAttention
from engines.attention.dispatch import AttentionCall, attending, effective_window, paged_attention, register
from engines.attention.layout import CHUNK_TOKENS, ShortQueries
from engines.attention.reference import ReferenceAttention
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.errors import ModelLoadError, UnsupportedModelError
from engines.native.library import library

CPU = torch.device("cpu")


@dataclass
class Case:
    """Query, key and value rows of a ragged step, with caches that hold each sequence's past and NaN elsewhere."""

    batch: RaggedBatch
    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    past: list[tuple[Tensor, Tensor]]  # all keys and values of each sequence, this step's included

    def attend(
        self,
        backend: AttentionBackend,
        *,
        scaling: float = 0.3,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return backend.attend(
            self.query,
            self.key,
            self.value,
            self.key_cache.clone(),
            self.value_cache.clone(),
            self.batch,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
            sinks=sinks,
        )


def make_case(
    lens: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    seed: int = 0,
    keep: list[int] | None = None,
) -> Case:
    """`lens` are (q_len, kv_len); `keep` builds the batch of some sequences only, with the same numbers in them."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims
    blocks = [-(-kv // block_size) for _, kv in lens]
    shuffled = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
    tables = [array("i", shuffled[sum(blocks[:i]) : sum(blocks[: i + 1])]) for i in range(len(lens))]
    queries = [torch.randn(q, num_heads, key_dim, generator=generator) for q, _ in lens]
    keys = [torch.randn(kv, num_kv_heads, key_dim, generator=generator) for _, kv in lens]
    values = [torch.randn(kv, num_kv_heads, value_dim, generator=generator) for _, kv in lens]
    chosen = list(range(len(lens))) if keep is None else keep
    items = [
        BatchItem([0] * lens[i][1], lens[i][1] - lens[i][0], lens[i][1], (), tables[i], num_logit_rows=1)
        for i in chosen
    ]
    caches = []
    for rows in (keys, values):
        cache = torch.full((len(shuffled), block_size, num_kv_heads, rows[0].shape[2]), torch.nan)
        for (q_len, kv_len), table, row in zip(lens, tables, rows, strict=True):
            past = torch.arange(kv_len - q_len)
            slots = torch.tensor(table)[past // block_size] * block_size + past % block_size
            cache.flatten(0, 1)[slots] = row[: kv_len - q_len]
        caches.append(cache.to(device, dtype))

    def step(rows: list[Tensor]) -> Tensor:
        return torch.cat([rows[i][-lens[i][0] :] for i in chosen]).to(device, dtype)

    return Case(
        build_batch(items, block_size, device),
        torch.cat([queries[i] for i in chosen]).to(device, dtype),
        step(keys),
        step(values),
        *caches,
        past=[(keys[i], values[i]) for i in chosen],
    )


MIXED = [(1, 9), (5, 5), (1, 130), (3, 140), (17, 17), (20, 300), (1, 1), (16, 90)]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
OPTIONS = [
    {},
    {"window": 5},
    {"window": 129},
    {"softcap": 1.5},
    {"sinks": SINKS},
    {"window": 7, "softcap": 1.5, "sinks": SINKS},
]


class TestReference:
    def test_equals_dense_attention_of_each_sequence(self) -> None:
        case = make_case(MIXED)
        output = case.attend(ReferenceAttention())
        start = 0
        for q_len, (keys, values) in zip(case.batch.q_lens_cpu, case.past, strict=True):
            mask = torch.ones(q_len, len(keys), dtype=torch.bool).tril(len(keys) - q_len)
            rows = case.query[start : start + q_len].transpose(0, 1)
            expected = F.scaled_dot_product_attention(
                rows, keys.transpose(0, 1), values.transpose(0, 1), mask, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(output[start : start + q_len], expected.transpose(0, 1))
            start += q_len

    def test_window_of_one_returns_the_own_value(self) -> None:
        case = make_case(MIXED, heads=(2, 2))
        torch.testing.assert_close(case.attend(ReferenceAttention(), window=1), case.value)

    def test_sink_takes_its_share_and_gives_nothing(self) -> None:
        case = make_case([(1, 1)], heads=(4, 4))
        output = case.attend(ReferenceAttention(), sinks=torch.full((4,), -torch.inf))
        torch.testing.assert_close(output, case.value)
        assert case.attend(ReferenceAttention(), sinks=torch.full((4,), 1e4)).abs().max() == 0

    def test_softcap_bounds_scores(self) -> None:
        case = make_case([(1, 30)], heads=(2, 2))
        uniform = case.past[0][1].mean(0)
        torch.testing.assert_close(case.attend(ReferenceAttention(), softcap=1e-6)[0], uniform)


class TestBatched:
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
    @pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=str)
    def test_equals_reference(self, heads: tuple[int, int], options: dict[str, object]) -> None:
        case = make_case(MIXED, heads=heads)
        expected = case.attend(ReferenceAttention(), **options)
        torch.testing.assert_close(case.attend(BatchedAttention(), **options), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("seed", range(8))
    def test_equals_reference_on_random_batches(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lens = []
        for _ in range(int(torch.randint(1, 7, (), generator=generator))):
            kv_len = int(torch.randint(1, 400, (), generator=generator))
            most = [1, SHORT_QUERY_ROWS, kv_len][int(torch.randint(3, (), generator=generator))]
            lens.append((min(kv_len, int(torch.randint(1, most + 1, (), generator=generator))), kv_len))
        block_size = [1, 3, 16, 32][seed % 4]
        case = make_case(lens, dims=(8, 12), heads=(6, 3), block_size=block_size, seed=seed)
        window = [None, 20, 150][seed % 3]
        expected = case.attend(ReferenceAttention(), window=window)
        torch.testing.assert_close(case.attend(BatchedAttention(), window=window), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_near_reference(self, dtype: torch.dtype) -> None:
        case = make_case(MIXED, dtype=dtype)
        expected = case.attend(ReferenceAttention()).float()
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(case.attend(BatchedAttention()).float(), expected, rtol=tolerance, atol=tolerance)

    def test_writes_keys_and_values_to_their_slots_and_nowhere_else(self) -> None:
        case = make_case([(2, 6), (1, 1)])
        written = [case.key_cache.clone(), case.value_cache.clone()]
        BatchedAttention().attend(
            case.query, case.key, case.value, *written, case.batch,
            scaling=1.0, sliding_window=None, softcap=None, sinks=None,
        )  # fmt: skip
        for before, after, rows in zip(
            (case.key_cache, case.value_cache), written, (case.key, case.value), strict=True
        ):
            expected = before.flatten(0, 1).clone()
            expected[case.batch.slot_mapping] = rows
            torch.testing.assert_close(after.flatten(0, 1), expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("index", range(len(MIXED)))
    def test_result_does_not_depend_on_neighbours(self, index: int) -> None:
        together, alone = make_case(MIXED), make_case(MIXED, keep=[index])
        rows = together.batch.cu_seqlens_q[index : index + 2].tolist()
        shared = together.attend(BatchedAttention())[rows[0] : rows[1]]
        assert torch.equal(alone.attend(BatchedAttention()), shared)

    def test_many_rows_per_kv_head_take_the_other_value_path(self) -> None:
        case = make_case([(16, 200), (9, 140)], heads=(8, 1))
        expected = case.attend(ReferenceAttention())
        torch.testing.assert_close(case.attend(BatchedAttention()), expected, rtol=1e-5, atol=2e-6)

    def test_plan_is_rebuilt_for_each_batch_and_window(self) -> None:
        backend = BatchedAttention()
        for lens in ([(1, 9), (1, 200)], [(1, 200), (1, 9)]):
            for window in (None, 6):
                case = make_case(lens)
                expected = case.attend(ReferenceAttention(), window=window)
                torch.testing.assert_close(case.attend(backend, window=window), expected, rtol=1e-5, atol=2e-6)

    def test_works_inside_and_outside_of_inference_mode(self) -> None:
        backend, case = BatchedAttention(), make_case([(1, 9)])
        with torch.inference_mode():
            inside = case.attend(backend)
        assert torch.equal(inside, case.attend(backend))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda o: "-".join(o) or "plain")
    def test_equals_reference_on_gpu(self, options: dict[str, object]) -> None:
        case = make_case(MIXED, device=torch.device("cuda"))
        expected = case.attend(ReferenceAttention(), **options)
        torch.testing.assert_close(case.attend(BatchedAttention(), **options), expected, rtol=1e-4, atol=1e-4)


class TestLayout:
    def test_chunks_outside_of_the_window_are_skipped(self) -> None:
        case = make_case([(1, 3 * CHUNK_TOKENS), (1, 10)])
        everything = ShortQueries(case.batch, [0, 1], 1, None)
        windowed = ShortQueries(case.batch, [0, 1], 1, CHUNK_TOKENS)
        assert (everything.num_items, windowed.num_items) == (4, 2)
        assert everything.rectangle is not None
        assert windowed.rectangle is None

    def test_every_cache_row_belongs_to_its_sequence(self) -> None:
        case = make_case([(2, 150), (1, 10)])
        group = ShortQueries(case.batch, [0, 1], 2, None)
        blocks = group.cache_rows(1).view(group.num_items, -1) // case.batch.block_size
        for item, owner in enumerate(group.owner.tolist()):
            used = -(-case.batch.kv_lens_cpu[owner] // case.batch.block_size)
            assert set(blocks[item].tolist()) <= set(case.batch.block_table[owner, :used].tolist())


class TestSelect:
    def test_names(self) -> None:
        assert select_backend("reference", CPU).name == "reference"
        assert select_backend("torch", CPU).name == "torch"
        assert select_backend("auto", CPU).name == ("torch" if library() is None else "native")

    def test_unknown_backend_lists_those_that_exist(self) -> None:
        with pytest.raises(ModelLoadError, match=r"'fastest'.*auto, flash, native, reference, torch, triton"):
            select_backend("fastest", CPU)

    @pytest.mark.parametrize("name", ["flash", "triton"])
    def test_what_needs_a_gpu_says_so(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ModelLoadError, match=f"'{name}' runs on CUDA devices only, not on cpu"):
            select_backend(name, CPU)


class Settings:
    """A config with the given attributes."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Layer(nn.Module):
    def __init__(self, layer_idx: int | None = 0, is_causal: bool = True, **config: object) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.config = Settings(**config)


def call(layer: nn.Module, batch: int = 1, **options: object) -> list[AttentionCall]:
    """The calls that arrive at the engine."""
    calls: list[AttentionCall] = []

    def attend(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.query

    query = torch.randn(batch, 4, 3, 8)
    with attending(attend):
        output, weights = paged_attention(layer, query, query[:, :2], query[:, :2], **options)
    assert output.shape == (1, 3, 4, 8)
    assert weights is None
    return calls


class TestDispatch:
    def test_call_arrives_token_major(self) -> None:
        (seen,) = call(Layer(3), scaling=0.5, softcap=2.0, s_aux=SINKS)
        assert (seen.layer_idx, seen.scaling, seen.softcap) == (3, 0.5, 2.0)
        assert seen.query.shape == (3, 4, 8)
        assert seen.key.shape == (3, 2, 8)
        assert seen.sinks is SINKS

    def test_scaling_defaults_to_the_head_size(self) -> None:
        assert call(Layer())[0].scaling == pytest.approx(8**-0.5)

    def test_bookkeeping_arguments_pass(self) -> None:
        call(Layer(), position_ids=torch.arange(3), use_cache=False, position_bias=None, output_attentions=False)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"attention_mask": torch.zeros(1)}, "mask of its own"),
            ({"dropout": 0.1}, "dropout of 0.1"),
            ({"is_causal": False}, "both directions"),
            ({"position_bias": torch.zeros(1)}, "position_bias"),
            ({"indices": 3, "alibi": 1}, "alibi, indices"),
            ({"batch": 2}, "splits the batch into 2"),
        ],
    )
    def test_what_it_cannot_honour_is_refused(self, options: dict[str, object], reason: str) -> None:
        with pytest.raises(UnsupportedModelError, match=reason):
            call(Layer(), **options)

    def test_bidirectional_module_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="both directions"):
            call(Layer(is_causal=False))

    def test_unnumbered_layer_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="does not number"):
            call(Layer(layer_idx=None))

    def test_call_outside_of_the_engine_is_a_bug(self) -> None:
        query = torch.randn(1, 4, 3, 8)
        with pytest.raises(AssertionError, match="outside of the engine"):
            paged_attention(Layer(), query, query, query)

    def test_contexts_nest_and_are_restored_after_an_error(self) -> None:
        with pytest.raises(UnsupportedModelError), attending(lambda call: call.query):
            call(Layer(), dropout=0.5)
        assert len(call(Layer())) == 1
        self.test_call_outside_of_the_engine_is_a_bug()

    def test_threads_do_not_see_each_other(self) -> None:
        with attending(lambda call: call.query), ThreadPoolExecutor(1) as pool:
            pool.submit(self.test_call_outside_of_the_engine_is_a_bug).result()

    def test_registering_twice_changes_nothing(self) -> None:
        register()
        register()


MIXED_TYPES = ["sliding_attention", "full_attention"]


class TestWindow:
    @pytest.mark.parametrize(
        ("layer", "passed", "expected"),
        [
            (Layer(), None, None),
            (Layer(), 8, 8),
            (Layer(), 0, None),
            (Layer(sliding_window=0), None, None),
            (Layer(sliding_window=8), None, 8),
            (Layer(sliding_window=8, use_sliding_window=False), None, None),
            (Layer(0, sliding_window=8, layer_types=MIXED_TYPES), None, 8),
            (Layer(0, sliding_window=8, layer_types=MIXED_TYPES), 8, 8),
            (Layer(1, sliding_window=8, layer_types=MIXED_TYPES), None, None),
        ],
    )
    def test_comes_from_call_or_config(self, layer: Layer, passed: int | None, expected: int | None) -> None:
        assert effective_window(layer, passed) == expected

    def test_contradiction_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="window of 8 in a layer declared as full"):
            effective_window(Layer(1, sliding_window=8, layer_types=MIXED_TYPES), 8)
