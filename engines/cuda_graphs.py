"""Decode and verification as CUDA graphs: a step's launches recorded once per size, then replayed in one call.

A graph reads and writes the memory it was recorded with. A step is copied there, and padded to the next bucket of
tokens with sequences of one token each that live in a block of their own, the scratch block:

    tokens       a a a b  . . . .    bucket of 8, two sequences of 3 and 1 rows, four of padding
    slot_mapping their own  s s s s  s: the first slot of the scratch block
    kv_lens      9  17     1 1 1 1  then nothing: sequences without rows

So padding is ordinary work: it never reads unwritten memory or another's blocks, and its logits are dropped. Steps that
no bucket holds, and those with long prompts in them, run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engines.attention.interface import AttentionBackend
from engines.attention.tiles import SHORT_QUERY_ROWS
from engines.batch import RaggedBatch
from engines.errors import ModelLoadError
from engines.loading import LoadedModel
from engines.model_runner import ModelRunner, Runner

BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 32))  # tokens


@runtime_checkable
class GraphAttention(Protocol):
    """An attention backend whose launches depend on a batch's size only, once that batch is fixed."""

    def fix(self, batch: RaggedBatch, max_kv_len: int) -> None:
        """Let `attend` with this very batch read its work from memory that stays, filled by `refill`.

        The batch's tensors stay in place too. Its sequences have at most SHORT_QUERY_ROWS rows and `max_kv_len`
        positions. `q_lens_cpu` and `kv_lens_cpu` are what they are at the first call and not looked at later.
        """
        ...

    def refill(self, batch: RaggedBatch, q_lens: tuple[int, ...]) -> None:
        """The fixed batch has sequences of `q_lens` rows from the next launch on, as many rows in all as before."""
        ...


class Graph(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Records a function: what replays it, and the memory that its result is in after each replay."""


class CudaCapture:
    """Capture by torch.cuda.CUDAGraph; the graphs share their work space, so one replay's result ends with the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # compiles kernels and allocates what libraries keep, which a graph must not
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        return graph, result


class StaticBatch:
    """A batch of `num_tokens` tokens in memory that stays: filled with a step, and with padding behind it."""

    def __init__(
        self, num_tokens: int, max_blocks: int, block_size: int, scratch_block: int, device: torch.device
    ) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._scratch_block = scratch_block
        self._scratch_slot = scratch_block * block_size
        self._counting = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=device)
        self.batch = RaggedBatch(  # all padding
            input_ids=full(0, num_tokens),
            positions=full(0, num_tokens),
            slot_mapping=full(self._scratch_slot, num_tokens),
            cu_seqlens_q=torch.arange(num_tokens + 1, dtype=torch.int32, device=device),
            kv_lens=full(1, num_tokens, dtype=torch.int32),
            block_table=full(scratch_block, num_tokens, max_blocks, dtype=torch.int32),
            logit_rows=full(0, num_tokens),
            q_lens_cpu=(1,) * num_tokens,
            kv_lens_cpu=(1,) * num_tokens,
            block_size=block_size,
        )

    def holds(self, batch: RaggedBatch) -> bool:
        """Whether the step fits, rows of logits and block tables included."""
        size = len(self.batch.input_ids)
        return (
            len(batch.input_ids) <= size
            and len(batch.logit_rows) <= size
            and batch.block_table.shape[1] <= self.batch.block_table.shape[1]
        )

    def fill(self, batch: RaggedBatch) -> tuple[int, ...]:
        """Copy a step that fits; the query lengths of its sequences and of the padding behind them."""
        own, num_tokens, num_seqs = self.batch, len(batch.input_ids), batch.num_seqs
        num_padding = len(own.input_ids) - num_tokens
        _overwrite(own.input_ids, batch.input_ids, 0)
        _overwrite(own.positions, batch.positions, 0)
        _overwrite(own.slot_mapping, batch.slot_mapping, self._scratch_slot)
        _overwrite(own.kv_lens, batch.kv_lens, 1)
        _overwrite(own.logit_rows, batch.logit_rows, 0)
        own.cu_seqlens_q[: num_seqs + 1].copy_(batch.cu_seqlens_q)
        ends = self._counting[: len(own.input_ids) - num_seqs] + num_tokens
        own.cu_seqlens_q[num_seqs + 1 :].copy_(ends.clamp_(max=len(own.input_ids)))
        own.block_table[:num_seqs, : batch.block_table.shape[1]].copy_(batch.block_table)
        own.block_table[num_seqs:, 0] = self._scratch_block
        return (*batch.q_lens_cpu, *(1,) * num_padding)


@dataclass(frozen=True, slots=True)
class _Recorded:
    static: StaticBatch
    graph: Graph
    logits: Tensor  # [num_tokens, vocab]


class GraphRunner:
    """A Runner that replays graphs of another, one per bucket of tokens.

    A graph computes as many rows of logits as it has tokens: in decode and verification nearly all are wanted.
    `scratch_block` is the runner's last block, which no sequence is ever given.
    """

    def __init__(
        self,
        runner: Runner,
        attention: GraphAttention,
        capture: Capture,
        *,
        max_model_len: int,
        block_size: int,
        scratch_block: int,
        device: torch.device,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Records all graphs. Raises ModelLoadError if the model does something that cannot be recorded."""
        self.num_blocks = scratch_block
        self.block_size = block_size
        self._runner = runner
        self._attention = attention
        self._recorded: dict[int, _Recorded] = {}
        max_blocks = -(-max_model_len // block_size)
        for size in sorted(buckets, reverse=True):  # the largest first: the others then fit into its work space
            static = StaticBatch(size, max_blocks, block_size, scratch_block, device)
            attention.fix(static.batch, max_model_len)
            self._recorded[size] = self._record(static, capture)

    def forward(self, batch: RaggedBatch) -> Tensor:
        """As of Runner; the logits are valid until the next forward."""
        recorded = self._fitting(batch)
        if recorded is None:
            return self._runner.forward(batch)
        with torch.inference_mode():
            self._attention.refill(recorded.static.batch, recorded.static.fill(batch))
            recorded.graph.replay()
            return recorded.logits[: len(batch.logit_rows)]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self._runner.copy_blocks(copies)

    def _record(self, static: StaticBatch, capture: Capture) -> _Recorded:
        try:
            return _Recorded(static, *capture(lambda: self._runner.forward(static.batch)))
        except RuntimeError as error:
            raise ModelLoadError(f"This model cannot run with cuda_graphs: {str(error).splitlines()[0]}") from error

    def _fitting(self, batch: RaggedBatch) -> _Recorded | None:
        if max(batch.q_lens_cpu) > SHORT_QUERY_ROWS:
            return None
        fitting = [size for size, recorded in self._recorded.items() if recorded.static.holds(batch)]
        return self._recorded[min(fitting)] if fitting else None


def graph_runner(
    loaded: LoadedModel, backend: AttentionBackend, *, num_blocks: int, block_size: int, max_model_len: int
) -> GraphRunner:
    """A runner of `num_blocks` blocks and a scratch block, with its graphs recorded.

    Raises ModelLoadError where the backend, the device or the model does not allow it.
    """
    if not isinstance(backend, GraphAttention):
        raise ModelLoadError(f"cuda_graphs needs attention_backend: triton, not {backend.name}.")
    if loaded.device.type != "cuda":
        raise ModelLoadError(f"cuda_graphs needs a CUDA device, not {loaded.device}.")
    return GraphRunner(
        ModelRunner(loaded, backend, num_blocks + 1, block_size),
        backend,
        CudaCapture(loaded.device),
        max_model_len=max_model_len,
        block_size=block_size,
        scratch_block=num_blocks,
        device=loaded.device,
    )


def _overwrite(own: Tensor, given: Tensor, padding: int) -> None:
    own[: len(given)].copy_(given)
    own[len(given) :].fill_(padding)
