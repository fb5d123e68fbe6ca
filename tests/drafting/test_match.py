from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafting.match import GrowingTokens, Match, TokenArray, continuations, longest_suffix_match

# Few ids, so that texts repeat themselves.
TEXTS = st.lists(st.integers(0, 2), max_size=50)


def tokens(token_ids: list[int]) -> TokenArray:
    return np.array(token_ids, dtype=np.int32)


def brute_force(text: list[int], suffix: list[int]) -> tuple[int, list[int]]:
    """Length and ends of the longest match, tried out place by place."""
    best, ends = 0, list[int]()
    for end in range(1, len(text) + 1):
        length = 0
        while length < min(end, len(suffix)) and text[end - 1 - length] == suffix[-1 - length]:
            length += 1
        if length > best:
            best, ends = length, []
        if length == best > 0:
            ends.append(end)
    return best, ends


def plain(match: Match) -> tuple[int, list[int]]:
    return match.length, match.ends.tolist()


@given(TEXTS, TEXTS)
def test_the_longest_match_is_the_one_that_trying_every_place_finds(text: list[int], suffix: list[int]) -> None:
    assert plain(longest_suffix_match(tokens(text), tokens(suffix))) == brute_force(text, suffix)


@given(TEXTS.filter(bool), st.integers(1, 40))
def test_a_sequence_is_searched_for_its_own_newest_tokens(text: list[int], max_length: int) -> None:
    found = longest_suffix_match(tokens(text)[:-1], tokens(text)[-max_length:])
    assert plain(found) == brute_force(text[:-1], text[-max_length:])


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_where_matches_abound_the_latest_true_ones_are_found(text: list[int], suffix: list[int], most: int) -> None:
    length, ends = plain(longest_suffix_match(tokens(text), tokens(suffix), max_matches=most))
    longest, all_ends = brute_force(text, suffix)
    assert len(ends) <= most
    assert min(longest, 8) <= length <= longest
    for end in ends:
        assert text[end - length : end] == suffix[len(suffix) - length :]
    if length == longest:
        assert ends == all_ends[-len(ends) :]


def test_a_long_match_is_found_among_a_thousand_short_ones() -> None:
    common = [1, 2, 9] * 1000
    text = [5, 6, 1, 2, 7, *common]
    assert plain(longest_suffix_match(tokens(text), tokens([5, 6, 1, 2]))) == (4, [4])


def test_matches_that_end_at_once_but_abound_are_cut_to_the_latest() -> None:
    assert plain(longest_suffix_match(tokens([0, 0, 0, 0]), tokens([1, 0]), max_matches=2)) == (1, [3, 4])


def test_in_one_token_over_and_over_the_latest_matches_have_full_length() -> None:
    assert plain(longest_suffix_match(tokens([5] * 200), tokens([5] * 32))) == (32, list(range(137, 201)))


def test_nothing_matches_in_or_with_nothing() -> None:
    assert plain(longest_suffix_match(tokens([]), tokens([1]))) == (0, [])
    assert plain(longest_suffix_match(tokens([1]), tokens([]))) == (0, [])
    assert plain(longest_suffix_match(tokens([1, 2]), tokens([3]))) == (0, [])


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=100), max_size=10))
def test_tokens_grow_by_what_is_new(chunks: list[list[int]]) -> None:
    growing, text = GrowingTokens(), list[int]()
    for chunk in chunks:
        text += chunk
        growing.catch_up(text)
        assert growing.view.tolist() == text
        assert len(growing) == len(text)


def test_growing_copies_seldom() -> None:
    growing, text = GrowingTokens(), list[int]()
    moves = 0
    last = growing.view
    for token_id in range(10_000):
        text.append(token_id)
        growing.catch_up(text)
        moves += not np.shares_memory(growing.view, last)
        last = growing.view
    assert moves <= 20


def test_ids_beyond_int32_are_refused_rather_than_wrapped() -> None:
    with pytest.raises(OverflowError):
        GrowingTokens().catch_up([2**31])


def test_a_continuation_is_what_follows() -> None:
    text = tokens([1, 2, 3, 4, 1, 2])
    assert continuations(text, np.array([2]), 2).tolist() == [[3, 4]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(2, 5), st.integers(1, 30), st.data())
def test_a_periodic_text_goes_on_periodically(period: list[int], rounds: int, count: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(period) - 1))
    forever = period * (rounds + 40)
    text = forever[: rounds * len(period) + cut]
    end = data.draw(st.integers(1, rounds - 1)) * len(period) + cut
    assert continuations(tokens(text), np.array([end]), count).tolist() == [forever[len(text) :][:count]]
