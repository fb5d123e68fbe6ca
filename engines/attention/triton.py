"""Paged attention on GPUs by our own Triton kernels; Triton comes with torch for CUDA, nothing else is needed.

Row independence: short sequences (decode, verification) always take one tile shape and splits at fixed positions, long
ones (prefill) another tile shape and no splits; see triton_kernel.py. Under TRITON_INTERPRET=1 the kernels run on CPU,
slowly, for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.attention.tiles import FixedTiles, TilePlan, plan_tiles
from engines.attention.triton_launch import Heads, Launch
from engines.batch import RaggedBatch

_PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True, slots=True)
class _FixedBatch:
    """A batch whose memory stays, and its tiles by the number of query heads per KV head."""

    batch: RaggedBatch
    max_kv_len: int
    tiles: dict[int, FixedTiles] = field(default_factory=dict)

    def plan(self, heads: Heads) -> TilePlan:
        if heads.group not in self.tiles:
            device = self.batch.block_table.device
            tiles = FixedTiles(heads.short_tile, len(self.batch.input_ids), self.max_kv_len, device)
            tiles.refill(self.batch.q_lens_cpu)
            self.tiles[heads.group] = tiles
        return self.tiles[heads.group].plan


class TritonAttention:
    """AttentionBackend for CUDA devices; fp32, bf16 and fp16, any dimension and block size. Softmax is in fp32.

    A GraphAttention as well (engines.cuda_graphs).
    """

    name = "triton"
    block_multiple = 1

    def __init__(self, device: torch.device) -> None:
        self._batch: RaggedBatch | None = None
        self._plans: dict[int, TilePlan] = {}  # of `_batch`, by the number of query heads per KV head
        self._fixed: dict[int, _FixedBatch] = {}  # by the id of the batch, which it keeps alive
        # Triton launches on the current device, whatever the tensors are on.
        self._on_device: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        self._wanted_programs = _PROGRAMS_PER_PROCESSOR * _num_processors(device)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: RaggedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        heads = Heads.of(query, key_cache, value_cache)
        query, key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (query, key, value))
        launch = Launch(
            heads=heads,
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=query.new_empty(*query.shape[:2], heads.value_dim),
            batch=batch,
            scaling=scaling,
            window=sliding_window or 0,
            softcap=softcap or 0.0,
            sinks=sinks,
        )
        plan = self._plan(batch, heads)
        with self._on_device:
            launch.write(key, value)
            if len(plan.short_tiles):
                launch.attend_short(plan, self._wanted_programs)
            if len(plan.long_tiles):
                launch.attend_long(plan)
        return launch.output

    def fix(self, batch: RaggedBatch, max_kv_len: int) -> None:
        self._fixed[id(batch)] = _FixedBatch(batch, max_kv_len)

    def refill(self, batch: RaggedBatch, q_lens: tuple[int, ...]) -> None:
        for tiles in self._fixed[id(batch)].tiles.values():
            tiles.refill(q_lens)

    def _plan(self, batch: RaggedBatch, heads: Heads) -> TilePlan:
        if fixed := self._fixed.get(id(batch)):
            return fixed.plan(heads)
        if batch is not self._batch:
            self._batch, self._plans = batch, {}
        if heads.group not in self._plans:
            self._plans[heads.group] = plan_tiles(batch, heads.short_tile, heads.long_tile)
        return self._plans[heads.group]


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
