"""Buckets and padding on CPU, with a graph that runs its function again on the memory it was recorded with."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from array import array
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engines.attention import AttentionBackend, select_backend
from engines.attention.reference import ReferenceAttention
from engines.attention.tiles import SHORT_QUERY_ROWS
from engines.batch import BatchItem, RaggedBatch, build_batch
from engines.cuda_graphs import BUCKETS, CudaCapture, GraphAttention, GraphRunner, StaticBatch, graph_runner
from engines.errors import ModelLoadError
from engines.loading import LoadedModel
from engines.model_runner import ModelRunner
from tests.engines import tiny_models
from tests.engines.fake_device import DEVICE, FakeDevice

BLOCK_SIZE = 4
NUM_BLOCKS = 24
SCRATCH = NUM_BLOCKS
MAX_MODEL_LEN = 32
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = [torch.randint(3, tiny_models.VOCAB_SIZE, (80,), generator=GENERATOR).tolist() for _ in range(3)]
TABLES = [[7, 1, 12, 4, 9, 2, 0, 3], [5, 20, 14, 6, 8, 10, 11, 13], [16, 15, 18, 17, 19, 21, 22, 23]]


class FromTensors(ReferenceAttention):
    """Reads a fixed batch's lengths from its tensors, as kernels do."""

    def __init__(self) -> None:
        self.fixed: dict[int, tuple[RaggedBatch, int]] = {}
        self.refills: list[tuple[int, ...]] = []

    def attend(self, query: Tensor, *tensors: Tensor, **options: object) -> Tensor:
        *rest, batch = tensors
        if id(batch) in self.fixed:
            lens = {"q_lens_cpu": batch.cu_seqlens_q.diff(), "kv_lens_cpu": batch.kv_lens}
            batch = dataclasses.replace(batch, **{name: tuple(values.tolist()) for name, values in lens.items()})
            assert batch.cu_seqlens_q[-1] == len(query)
        return super().attend(query, *rest, batch, **options)

    def fix(self, batch: RaggedBatch, max_kv_len: int) -> None:
        self.fixed[id(batch)] = (batch, max_kv_len)

    def refill(self, batch: RaggedBatch, q_lens: tuple[int, ...]) -> None:
        assert id(batch) in self.fixed
        assert sum(q_lens) == len(batch.input_ids)
        self.refills.append(q_lens)


class Rerun:
    """What replays a function, where nothing can be recorded."""

    num_replays = 0

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.result = run().clone()

    def replay(self) -> None:
        Rerun.num_replays += 1
        self.result.copy_(self._run())


def rerun(run: Callable[[], Tensor]) -> tuple[Rerun, Tensor]:
    graph = Rerun(run)
    return graph, graph.result


@pytest.fixture(autouse=True)
def _no_replays() -> None:
    Rerun.num_replays = 0


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_models.load("mistral")  # with a sliding window


def plain(loaded: LoadedModel, backend: AttentionBackend) -> ModelRunner:
    runner = ModelRunner(loaded, backend, NUM_BLOCKS + 1, BLOCK_SIZE)
    for cache in runner.kv_tensors:
        cache.fill_(torch.nan)
    return runner


def graphed(
    runner: ModelRunner,
    backend: GraphAttention,
    buckets: tuple[int, ...] = (2, 4, 8),
    *,
    max_model_len: int = MAX_MODEL_LEN,
) -> GraphRunner:
    settings = {"max_model_len": max_model_len, "block_size": BLOCK_SIZE, "scratch_block": SCRATCH, "buckets": buckets}
    return GraphRunner(runner, backend, rerun, device=torch.device("cpu"), **settings)


def step(*work: tuple[int, int, int, int], num_copies: int = 0, device: str = "cpu") -> RaggedBatch:
    """Of (sequence, tokens known before, new tokens, rows of logits)."""
    items = [
        BatchItem(TOKENS[i], start, start + num, (), array("i", TABLES[i]), rows, num_copies)
        for i, start, num, rows in work
    ]
    return build_batch(items, BLOCK_SIZE, torch.device(device))


# Prompts, more tokens than any bucket has; then decode and verification of different sizes.
STEPS = [
    step((0, 0, 9, 1), (1, 0, 3, 1)),
    step((0, 9, 1, 1), (1, 3, 1, 1)),
    step((0, 10, 3, 3), (1, 4, 1, 1), (2, 0, 2, 1)),
    step((0, 11, 1, 1)),
    step((2, 2, 4, 4), (0, 12, 2, 2), (1, 5, 1, 1)),
    step((2, 6, 8, 8)),
    step((1, 6, 1, 1), num_copies=2),
]


class TestPadding:
    def test_logits_equal_those_without_graphs(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        eager, graphs = plain(loaded, ReferenceAttention()), graphed(plain(loaded, backend), backend)
        for batch in STEPS:
            expected = eager.forward(batch)
            torch.testing.assert_close(graphs.forward(batch), expected, rtol=1e-4, atol=1e-4)
        assert Rerun.num_replays == len(STEPS) - 1
        # Two sequences of one row fill their bucket; the next step has 6 rows of 8, and so on.
        assert backend.refills == [
            (1, 1), (3, 1, 2, 1, 1), (1, 1), (4, 2, 1, 1), (8,), (1, 1, 1, 1),
        ]  # fmt: skip

    def test_only_the_steps_slots_and_the_scratch_block_are_written(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        runner = plain(loaded, backend)
        graphs = graphed(runner, backend)
        batch = step((0, 0, 3, 3))
        assert graphs.forward(batch).isfinite().all()
        assert Rerun.num_replays == 1
        for cache in runner.kv_tensors:
            written = cache.flatten(0, 1).isfinite().all(-1).all(-1).nonzero().flatten().tolist()
            assert written == sorted([*batch.slot_mapping.tolist(), SCRATCH * BLOCK_SIZE])

    def test_a_smaller_step_leaves_nothing_of_a_larger_one(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        runner = plain(loaded, backend)
        graphs = graphed(runner, backend, buckets=(8,))
        graphs.forward(step((0, 0, 8, 8)))
        before = [cache.clone() for cache in runner.kv_tensors]
        graphs.forward(step((1, 0, 1, 1)))
        for cache, old in zip(runner.kv_tensors, before, strict=True):
            torch.testing.assert_close(cache[TABLES[0]], old[TABLES[0]], rtol=0, atol=0, equal_nan=True)

    def test_logits_stand_in_the_order_asked_for(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        graphs = graphed(plain(loaded, backend), backend)
        batch = step((0, 0, 3, 2), (1, 0, 2, 1), num_copies=1)
        expected = plain(loaded, ReferenceAttention()).forward(batch)
        assert expected.shape == (5, tiny_models.VOCAB_SIZE)
        torch.testing.assert_close(graphs.forward(batch), expected, rtol=1e-4, atol=1e-4)


class TestFallback:
    @pytest.mark.parametrize(
        ("batch", "buckets"),
        [
            (step((0, 0, 9, 1)), (2, 8)),  # more tokens than any bucket
            (step((0, 0, 2, 1), num_copies=2), (2,)),  # more logits than tokens
        ],
    )
    def test_what_no_bucket_holds_runs_without(
        self, loaded: LoadedModel, batch: RaggedBatch, buckets: tuple[int, ...]
    ) -> None:
        backend = FromTensors()
        graphs = graphed(plain(loaded, backend), backend, buckets)
        expected = plain(loaded, ReferenceAttention()).forward(batch)
        torch.testing.assert_close(graphs.forward(batch), expected, rtol=1e-4, atol=1e-4)
        assert Rerun.num_replays == 0

    def test_prompts_run_without(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        graphs = graphed(plain(loaded, backend), backend, (80,), max_model_len=80)
        for num_tokens, num_replays in ((SHORT_QUERY_ROWS + 1, 0), (SHORT_QUERY_ROWS, 1)):
            item = BatchItem(TOKENS[0], 0, num_tokens, (), array("i", range(20)), 1)
            batch = build_batch([item], BLOCK_SIZE, torch.device("cpu"))
            expected = plain(loaded, ReferenceAttention()).forward(batch)
            torch.testing.assert_close(graphs.forward(batch), expected, rtol=1e-4, atol=1e-4)
            assert Rerun.num_replays == num_replays

    def test_longer_block_tables_than_recorded_run_without(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        graphs = graphed(plain(loaded, backend), backend)
        wide = torch.tensor([[*TABLES[0], 0]], dtype=torch.int32)
        graphs.forward(dataclasses.replace(step((0, 0, 1, 1)), block_table=wide))
        assert Rerun.num_replays == 0


class TestFilling:
    def test_putting_a_step_into_its_place_is_queued_like_the_graph(self) -> None:
        shape = (8, len(TABLES[0]), BLOCK_SIZE, SCRATCH)
        expected = StaticBatch(*shape, torch.device("cpu"))
        q_lens = expected.fill(step((0, 10, 3, 3), (1, 4, 1, 1), (2, 0, 2, 1)))
        with FakeDevice() as device:
            static = StaticBatch(*shape, DEVICE)
            assert static.fill(step((0, 10, 3, 3), (1, 4, 1, 1), (2, 0, 2, 1), device="meta")) == q_lens
        assert (device.num_sent, device.num_reads) == (1, 0)
        for name in ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "kv_lens", "block_table", "logit_rows"):
            assert torch.equal(device.values(getattr(static.batch, name)), getattr(expected.batch, name)), name


class TestRecording:
    def test_one_graph_for_each_bucket_with_the_longest_sequence(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        graphed(plain(loaded, backend), backend)
        assert [(len(batch.input_ids), longest) for batch, longest in backend.fixed.values()] == [
            (8, MAX_MODEL_LEN), (4, MAX_MODEL_LEN), (2, MAX_MODEL_LEN),
        ]  # fmt: skip

    def test_a_model_that_cannot_be_recorded_is_refused(self, loaded: LoadedModel) -> None:
        def capture(run: object) -> tuple[Rerun, Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        with pytest.raises(ModelLoadError, match=r"cuda_graphs: operation not permitted when stream is capturing$"):
            GraphRunner(
                plain(loaded, FromTensors()), FromTensors(), capture, max_model_len=8, block_size=BLOCK_SIZE,
                scratch_block=SCRATCH, device=torch.device("cpu"),
            )  # fmt: skip

    def test_backends_and_devices_without_graphs_are_refused(self, loaded: LoadedModel) -> None:
        settings = {"num_blocks": 4, "block_size": BLOCK_SIZE, "max_model_len": 8}
        with pytest.raises(ModelLoadError, match="needs attention_backend: triton, not reference"):
            graph_runner(loaded, ReferenceAttention(), **settings)
        with pytest.raises(ModelLoadError, match="needs a CUDA device, not cpu"):
            graph_runner(loaded, FromTensors(), **settings)

    def test_copied_blocks_reach_the_runner(self, loaded: LoadedModel) -> None:
        backend = FromTensors()
        runner = plain(loaded, backend)
        runner.kv_tensors[0][3].fill_(7.0)
        graphed(runner, backend).copy_blocks([(3, 5)])
        assert (runner.kv_tensors[0][5] == 7.0).all()

    def test_buckets_grow_by_no_more_than_half_from_8_tokens_on(self) -> None:
        assert list(BUCKETS) == sorted(set(BUCKETS))
        assert (BUCKETS[0], BUCKETS[-1]) == (1, 256)
        pairs = [pair for pair in itertools.pairwise(BUCKETS) if pair[0] >= 16]
        assert all(larger <= 1.5 * smaller for smaller, larger in pairs)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets only where there is no GPU")
def test_triton_reads_its_tiles_from_memory_that_stays(loaded: LoadedModel) -> None:
    backend = select_backend("triton", loaded.device)
    eager, graphs = plain(loaded, ReferenceAttention()), graphed(plain(loaded, backend), backend, buckets=(4,))
    for batch in STEPS[:4]:
        torch.testing.assert_close(graphs.forward(batch), eager.forward(batch), rtol=1e-4, atol=1e-4)
    assert Rerun.num_replays == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorded_steps_equal_eager_ones_on_gpu() -> None:
    device = torch.device("cuda")
    loaded = tiny_models.load("mistral")
    loaded = dataclasses.replace(loaded, model=torch.nn.Module.to(loaded.model, device), device=device)
    backend = select_backend("triton", device)
    eager = plain(loaded, ReferenceAttention())
    graphs = GraphRunner(
        plain(loaded, backend), backend, CudaCapture(device), max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE,
        scratch_block=SCRATCH, device=device, buckets=(2, 4, 8),
    )  # fmt: skip
    for batch in STEPS:
        moved = {
            name: value.to(device)
            for name in RaggedBatch.__slots__
            if isinstance(value := getattr(batch, name), Tensor)
        }
        on_gpu = dataclasses.replace(batch, **moved)
        torch.testing.assert_close(graphs.forward(on_gpu), eager.forward(on_gpu), rtol=1e-3, atol=1e-3)
