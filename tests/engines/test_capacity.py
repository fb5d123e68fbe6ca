"""What a memory budget holds."""

import pytest
import torch

from engines.capacity import Capacity, plan_capacity
from engines.config import LocalEngineConfig
from engines.errors import MemoryBudgetError, ModelLoadError

KIB = 1024


def plan(max_position: int | None = 256, **settings: int) -> Capacity:
    config = LocalEngineConfig.model_validate({"model": "m", "block_size": 16, **settings})
    return plan_capacity(
        config,
        bytes_per_block=KIB,
        max_position=max_position,
        activation_bytes=0,
        device=torch.device("cpu"),
    )


def test_the_budget_is_cut_into_whole_blocks() -> None:
    assert plan(kv_cache_bytes=100 * KIB + 5) == Capacity(num_blocks=100, max_model_len=256, kv_cache_bytes=100 * KIB)


def test_max_model_len_shrinks_to_what_the_cache_holds_unless_it_was_asked_for() -> None:
    assert plan(kv_cache_bytes=10 * KIB).max_model_len == 160
    with pytest.raises(MemoryBudgetError, match=r"160 tokens.*one sequence of 256 tokens"):
        plan(kv_cache_bytes=10 * KIB, max_model_len=256)


def test_max_model_len_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"257.*ends at 256"):
        plan(kv_cache_bytes=KIB * KIB, max_model_len=257)


def test_a_model_without_a_limit_is_limited_by_the_cache() -> None:
    assert plan(max_position=None, kv_cache_bytes=10 * KIB).max_model_len == 160


def test_less_than_one_block_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match="Raise kv_cache_bytes"):
        plan(kv_cache_bytes=KIB - 1)


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    with pytest.raises(MemoryBudgetError, match=r"take 1,073,741,824.00 MiB, but cpu has .* MiB free"):
        plan(kv_cache_bytes=1 << 50)
