"""The work of one step, cut into tiles of query rows: built on the host from lengths it knows, sent in one copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.batch import RaggedBatch
from engines.staging import send, to_device

# Verification of the most drafts a configuration allows (64) is short, so that a row verified has the bits of a row
# decoded. Short sequences are split over their keys, long ones (prefill) have enough tiles to fill a GPU.
SHORT_QUERY_ROWS = 65
SPLIT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows of a tile: query rows of one sequence times the query heads that share a KV head, rounded up."""

    rows: int
    group: int

    @classmethod
    def holding(cls, query_rows: int, group: int, *, least: int, most: int) -> TileShape:
        """The power of two for `query_rows` in [least, most], or larger if one query row's heads do not fit."""
        wanted = min(max(query_rows * group, least), most)
        return cls(_power_of_two(max(wanted, group)), group)

    @property
    def query_rows(self) -> int:
        return self.rows // self.group

    def cut(self, sequences: Iterable[int], q_lens: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """The tiles of `sequences`, as TilePlan has them."""
        tiles, place = [], 0
        for i in sequences:
            tiles += [(i, row, place) for row in range(0, q_lens[i], self.query_rows)]
            place += q_lens[i]
        return tiles


@dataclass(frozen=True, slots=True)
class TilePlan:
    """What the kernels walk through, int32 on the batch's device.

    short_tiles and long_tiles [num_tiles, 3] are (sequence, first query row of the tile, place of the sequence's first
    row among the rows of its kind); a sequence of -1 is no tile. short_tokens [num_short_rows]: the batch's rows that
    are of short sequences, by that place. num_splits bounds the splits of any short sequence.
    """

    short_tiles: Tensor
    long_tiles: Tensor
    short_tokens: Tensor
    num_splits: int


def plan_tiles(batch: RaggedBatch, short: TileShape, long: TileShape) -> TilePlan:
    """The batch's tiles on its device, without a synchronisation."""
    q_lens = batch.q_lens_cpu
    few = [i for i, q_len in enumerate(q_lens) if q_len <= SHORT_QUERY_ROWS]
    many = [i for i, q_len in enumerate(q_lens) if q_len > SHORT_QUERY_ROWS]
    starts = np.cumsum((0, *q_lens))
    parts = (
        _flat(short.cut(few, q_lens)),
        _flat(long.cut(many, q_lens)),
        _flat([np.arange(starts[i], starts[i + 1]) for i in few]),
    )
    short_tiles, long_tiles, short_tokens = send(parts, batch.block_table.device)
    longest = max((batch.kv_lens_cpu[i] for i in few), default=1)
    return TilePlan(short_tiles.view(-1, 3), long_tiles.view(-1, 3), short_tokens, num_splits(longest))


class FixedTiles:
    """Tiles in memory that never moves, for a captured graph: of any step of `num_tokens` rows in short sequences."""

    def __init__(self, shape: TileShape, num_tokens: int, max_kv_len: int, device: torch.device) -> None:
        self._shape = shape
        self.plan = TilePlan(
            short_tiles=torch.full((num_tokens, 3), -1, dtype=torch.int32, device=device),
            long_tiles=torch.empty(0, 3, dtype=torch.int32, device=device),
            short_tokens=torch.arange(num_tokens, dtype=torch.int32, device=device),
            num_splits=num_splits(max_kv_len),
        )

    def refill(self, q_lens: tuple[int, ...]) -> None:
        """Send the tiles of a step with these query lengths, whose sum is at most `num_tokens`."""
        assert max(q_lens) <= SHORT_QUERY_ROWS
        tiles = self.plan.short_tiles
        cut = _flat(self._shape.cut(range(len(q_lens)), q_lens))
        padded = np.full(tiles.numel(), -1, np.int32)
        padded[: len(cut)] = cut
        tiles.view(-1).copy_(to_device(torch.from_numpy(padded), tiles.device))


def num_splits(kv_len: int) -> int:
    return -(-kv_len // SPLIT_TOKENS)


def _flat(parts: list[tuple[int, int, int]] | list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.empty(0, np.int32)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
