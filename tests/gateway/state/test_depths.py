import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.state.depths import held_depths, sent_depths

Depths = Callable[[int], tuple[int, ...]]
_lengths = st.integers(1, 5000)
_kinds = pytest.mark.parametrize(("depths", "num_dense"), [(held_depths, 32), (sent_depths, 8)])


@_kinds
@given(one=_lengths, other=_lengths)
def test_a_shorter_prompt_is_told_where_a_longer_looks(depths: Depths, num_dense: int, one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert depths(shorter) == tuple(depth for depth in depths(longer) if depth <= shorter)


@_kinds
@given(num_blocks=_lengths)
def test_little_of_a_match_is_missed(depths: Depths, num_dense: int, num_blocks: int) -> None:
    asked = (*depths(num_blocks), num_blocks + 1)
    assert asked[0] == 1
    for depth, following in itertools.pairwise(asked):
        assert following == depth + 1 or (following - 1 - depth) * num_dense // 2 < following - 1


@_kinds
@given(num_blocks=_lengths)
def test_a_long_prompt_costs_little_more(depths: Depths, num_dense: int, num_blocks: int) -> None:
    octaves = max(0, (num_blocks - 1).bit_length() - num_dense.bit_length() + 1)
    assert len(depths(num_blocks)) <= num_dense + num_dense // 2 * octaves


def test_first_blocks_are_asked_one_by_one() -> None:
    assert held_depths(0) == sent_depths(0) == ()
    assert held_depths(32) == tuple(range(1, 33))
    assert held_depths(69)[31:] == (32, *range(34, 65, 2), 68)
    assert sent_depths(33) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)


@given(_lengths)
def test_what_was_sent_is_told_where_what_is_held_is_asked(num_blocks: int) -> None:
    assert set(sent_depths(num_blocks)) <= set(held_depths(num_blocks))
