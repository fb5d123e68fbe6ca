import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.state.depths import asked_depths, heat_depths

_lengths = st.integers(1, 5000)


@given(_lengths, _lengths)
def test_a_shorter_prompt_is_told_where_a_longer_one_looks(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert asked_depths(shorter) == tuple(depth for depth in asked_depths(longer) if depth <= shorter)


@given(_lengths)
def test_little_of_a_match_is_missed(num_blocks: int) -> None:
    depths = (*asked_depths(num_blocks), num_blocks + 1)
    assert depths[0] == 1
    for depth, following in itertools.pairwise(depths):
        assert following == depth + 1 or (following - 1 - depth) * 16 < following - 1


@given(_lengths)
def test_a_long_prompt_costs_little_more(num_blocks: int) -> None:
    assert len(asked_depths(num_blocks)) <= 32 + 16 * max(0, (num_blocks - 1).bit_length() - 5)


def test_first_blocks_are_asked_one_by_one() -> None:
    assert asked_depths(0) == ()
    assert asked_depths(32) == tuple(range(1, 33))
    assert asked_depths(69)[31:] == (32, *range(34, 65, 2), 68)
    assert heat_depths(5) == (1, 2, 3, 4)
