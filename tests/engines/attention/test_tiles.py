from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.attention.tiles import SHORT_QUERY_ROWS, SPLIT_TOKENS, FixedTiles, TileShape, num_splits, plan_tiles
from tests.engines.fake_device import DEVICE, FakeDevice
from tests.engines.test_attention import make_case

CPU = torch.device("cpu")
SHORT, LONG = TileShape(rows=16, group=2), TileShape(rows=128, group=2)


class TestShape:
    @pytest.mark.parametrize(
        ("group", "rows", "query_rows"), [(1, 16, 16), (2, 16, 8), (3, 32, 10), (8, 64, 8), (16, 64, 4), (71, 128, 1)]
    )
    def test_holds_whole_groups(self, group: int, rows: int, query_rows: int) -> None:
        shape = TileShape.holding(8, group, least=16, most=64)
        assert (shape.rows, shape.query_rows) == (rows, query_rows)

    def test_cuts_sequences_into_rows(self) -> None:
        assert SHORT.cut([0, 2], (1, 99, 17)) == [(0, 0, 0), (2, 0, 1), (2, 8, 1), (2, 16, 1)]


class TestPlan:
    def test_short_and_long_sequences_apart(self) -> None:
        batch = make_case([(1, 9), (66, 70), (9, SPLIT_TOKENS + 1)]).batch
        plan = plan_tiles(batch, SHORT, LONG)
        assert plan.short_tiles.tolist() == [[0, 0, 0], [2, 0, 1], [2, 8, 1]]
        assert plan.long_tiles.tolist() == [[1, 0, 0], [1, 64, 0]]
        assert plan.short_tokens.tolist() == [0, *range(67, 76)]
        assert plan.num_splits == 2

    def test_one_kind_leaves_the_other_empty(self) -> None:
        long_only = plan_tiles(make_case([(66, 70)]).batch, SHORT, LONG)
        assert (len(long_only.short_tiles), len(long_only.short_tokens)) == (0, 0)
        assert plan_tiles(make_case([(SHORT_QUERY_ROWS, 70)]).batch, SHORT, LONG).long_tiles.shape == (0, 3)

    def test_on_a_device_it_arrives_aligned_in_one_copy(self) -> None:
        for count in range(1, 6):
            batch = make_case([(1, 9)] * count + [(66, 66)]).batch
            expected = plan_tiles(batch, SHORT, LONG)
            with FakeDevice() as device:
                plan = plan_tiles(replace(batch, block_table=device.hold(batch.block_table)), SHORT, LONG)
            assert (device.num_sent, device.num_reads) == (1, 0)
            for name in ("short_tiles", "long_tiles", "short_tokens"):
                part = getattr(plan, name)
                assert torch.equal(device.values(part), getattr(expected, name))
                assert part.storage_offset() * part.itemsize % 16 == 0
                assert part.is_contiguous()

    @pytest.mark.parametrize(("kv_len", "splits"), [(1, 1), (SPLIT_TOKENS, 1), (SPLIT_TOKENS + 1, 2)])
    def test_splits_of_a_length(self, kv_len: int, splits: int) -> None:
        assert num_splits(kv_len) == splits


class TestFixed:
    def test_refills_in_place_and_clears_what_was_there(self) -> None:
        fixed = FixedTiles(SHORT, 12, 2 * SPLIT_TOKENS, CPU)
        tiles = fixed.plan.short_tiles
        fixed.refill((9, 1, 1, 1))
        assert tiles.tolist()[:5] == [[0, 0, 0], [0, 8, 0], [1, 0, 9], [2, 0, 10], [3, 0, 11]]
        fixed.refill((12,))
        assert tiles.tolist() == [[0, 0, 0], [0, 8, 0]] + [[-1, -1, -1]] * 10
        assert fixed.plan.short_tokens.tolist() == list(range(12))
        assert fixed.plan.num_splits == 2

    def test_as_many_sequences_as_tokens_fit(self) -> None:
        fixed = FixedTiles(SHORT, 3, 9, CPU)
        fixed.refill((1, 1, 1))
        assert fixed.plan.short_tiles.tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 2]]

    def test_prompts_do_not_belong_there(self) -> None:
        with pytest.raises(AssertionError):
            FixedTiles(SHORT, 80, 99, CPU).refill((SHORT_QUERY_ROWS + 1,))

    def test_refilling_is_not_waited_for(self) -> None:
        with FakeDevice() as device:
            fixed = FixedTiles(SHORT, 12, 9, DEVICE)
            fixed.refill((9, 1))
        assert (device.num_sent, device.num_reads) == (1, 0)
        tiles = device.values(fixed.plan.short_tiles)
        assert tiles.tolist()[:4] == [[0, 0, 0], [0, 8, 0], [1, 0, 9], [-1, -1, -1]]
