"""Starts the kernels of triton_kernel.py: one layer's tensors and numbers in, the kernels' many arguments out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.attention.tiles import SHORT_QUERY_ROWS, SPLIT_TOKENS, TilePlan, TileShape
from engines.attention.triton_kernel import attend_kernel, merge_kernel, write_kernel
from engines.batch import RaggedBatch

_SHORT_TILE_QUERIES = 8  # query rows that a short tile has room for: with up to 7 drafts, keys are read once
_TILE_KEY_BYTES = 16 << 10  # of a tile's keys, so that two stages of keys and values fit the smallest GPUs
_MERGED_SPLITS = 16  # partial results that merge_kernel reads at a time
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's shape, all that decides on tiles: the same for every step."""

    num_kv_heads: int
    group: int  # query heads per KV head
    key_dim: int
    value_dim: int
    itemsize: int

    @classmethod
    def of(cls, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Heads:
        num_kv_heads, key_dim = key_cache.shape[2:]
        return cls(num_kv_heads, query.shape[1] // num_kv_heads, key_dim, value_cache.shape[3], key_cache.itemsize)

    @property
    def lanes(self) -> tuple[int, int]:
        """Key and value dimension as the kernels' vectors have them: a power of two, as matrix products want it."""
        return _lanes(self.key_dim), _lanes(self.value_dim)

    @property
    def row_bytes(self) -> int:
        return max(self.lanes) * self.itemsize

    @property
    def tile_keys(self) -> int:
        return min(max(_TILE_KEY_BYTES // self.row_bytes, 16), 64)

    @property
    def short_tile(self) -> TileShape:
        return TileShape.holding(_SHORT_TILE_QUERIES, self.group, least=16, most=64)

    @property
    def long_tile(self) -> TileShape:
        rows = 128 if self.row_bytes <= 256 else 64
        return TileShape.holding(SHORT_QUERY_ROWS, self.group, least=rows, most=rows)

    @property
    def constants(self) -> dict[str, int]:
        key_lanes, value_lanes = self.lanes
        return {
            "NUM_KV_HEADS": self.num_kv_heads,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "KEY_LANES": key_lanes,
            "VALUE_LANES": value_lanes,
        }


@dataclass(frozen=True, slots=True)
class Launch:
    """One layer's attention in one step. Tensors as in AttentionBackend.attend, rows contiguous in their last dim."""

    heads: Heads
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    output: Tensor
    batch: RaggedBatch
    scaling: float
    window: int
    softcap: float
    sinks: Tensor | None

    def write(self, key: Tensor, value: Tensor) -> None:
        """Copy the step's keys and values to their slots."""
        write_kernel[(len(key), self.heads.num_kv_heads)](
            key,
            value,
            self.key_cache,
            self.value_cache,
            self.batch.slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
            **self.heads.constants,
            num_warps=1,
        )

    def attend_long(self, plan: TilePlan) -> None:
        """The output of the long sequences."""
        grid = (len(plan.long_tiles), self.heads.num_kv_heads, 1)
        unused = (self.output,) * 3
        self._attend(grid, plan.long_tiles, self.heads.long_tile, unused, num_splits=1, is_split=False, num_warps=8)

    def attend_short(self, plan: TilePlan, wanted_programs: int) -> None:
        """The output of the short sequences: partial results of each split, then their merge."""
        shape = (len(plan.short_tokens), self.output.shape[1], plan.num_splits)
        partial_output = self.output.new_empty(*shape, self.heads.value_dim, dtype=torch.float32)
        partial_best, partial_total = self.output.new_empty(2, *shape, dtype=torch.float32)
        partial = (partial_output, partial_best, partial_total)
        num_tiles, num_kv_heads = len(plan.short_tiles), self.heads.num_kv_heads
        sharing = min(-(-wanted_programs // (num_tiles * num_kv_heads)), plan.num_splits)
        self._attend(
            (num_tiles, num_kv_heads, sharing),
            plan.short_tiles,
            self.heads.short_tile,
            partial,
            num_splits=plan.num_splits,
            is_split=True,
            num_warps=4,
        )
        self._merge(plan, partial)

    def _attend(
        self,
        grid: tuple[int, int, int],
        tiles: Tensor,
        shape: TileShape,
        partial: tuple[Tensor, Tensor, Tensor],
        *,
        num_splits: int,
        is_split: bool,
        num_warps: int,
    ) -> None:
        batch = self.batch
        attend_kernel[grid](
            self.query,
            self.key_cache,
            self.value_cache,
            self.output,
            *partial,
            tiles,
            batch.cu_seqlens_q,
            batch.kv_lens,
            batch.block_table,
            self.output if self.sinks is None else self.sinks,
            *self.query.stride()[:2],
            batch.block_table.stride(0),
            num_splits,
            self.scaling / self.softcap if self.softcap else self.scaling * _LOG2_E,
            HAS_SINKS=self.sinks is not None,
            SOFTCAP=self.softcap,
            WINDOW=self.window,
            IS_SPLIT=is_split,
            SPLIT_TOKENS=SPLIT_TOKENS,
            BLOCK_SIZE=batch.block_size,
            GROUP=self.heads.group,
            **self.heads.constants,
            TILE_ROWS=shape.rows,
            TILE_KEYS=self.heads.tile_keys,
            PRECISION="ieee",  # the products of fp32 stay fp32; no other dtype is concerned
            num_warps=num_warps,
            num_stages=2,
        )

    def _merge(self, plan: TilePlan, partial: tuple[Tensor, Tensor, Tensor]) -> None:
        num_heads = self.output.shape[1]
        merge_kernel[(len(plan.short_tokens), num_heads)](
            *partial,
            self.output,
            plan.short_tokens,
            self.batch.positions,
            self.output if self.sinks is None else self.sinks,
            plan.num_splits,
            HAS_SINKS=self.sinks is not None,
            WINDOW=self.window,
            SPLIT_TOKENS=SPLIT_TOKENS,
            NUM_HEADS=num_heads,
            VALUE_DIM=self.heads.value_dim,
            VALUE_LANES=self.heads.lanes[1],
            MERGED_SPLITS=_MERGED_SPLITS,
            num_warps=2,
        )


def _lanes(dim: int) -> int:
    return max(1 << (dim - 1).bit_length(), 16)
