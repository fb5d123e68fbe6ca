from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafting.ngram import NgramDrafter, belief, elect
from drafting.protocol import Draft, DraftRequest, Verdict
from tests.drafting.test_match import brute_force


def request(token_ids: list[int], max_drafts: int = 4, seq_id: int = 1) -> DraftRequest:
    return DraftRequest(seq_id, token_ids, num_prompt_tokens=1, max_drafts=max_drafts)


def draft(token_ids: list[int], max_drafts: int = 4, **options: int) -> Draft:
    return NgramDrafter(**options).propose([request(token_ids, max_drafts)])[0]


def test_what_followed_the_newest_tokens_before_is_drafted() -> None:
    assert draft([1, 2, 3, 4, 5, 9, 1, 2], 3).token_ids == (3, 4, 5)


def test_the_longest_match_wins_over_the_latest() -> None:
    assert draft([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1).token_ids == (3,)


def test_of_equally_long_matches_the_majority_wins_and_the_latest_a_tie() -> None:
    assert draft([1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2], 1, max_match=2).token_ids == (5,)
    assert draft([8, 1, 2, 5, 9, 1, 2, 6, 7, 1, 2], 1).token_ids == (6,)


def test_matches_longer_than_looked_for_count_as_equal() -> None:
    text = [7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2, 4, 7, 1, 2]
    assert draft(text, 1).token_ids == (3,)
    assert draft(text, 1, max_match=2).token_ids == (4,)


def test_only_the_latest_voters_vote() -> None:
    text = [1, 2, 5, 9, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2]
    assert draft(text, 1).token_ids == (5,)
    assert draft(text, 1, max_voters=1).token_ids == (6,)


def test_a_loop_yields_a_draft_of_full_length() -> None:
    assert draft([9, 1, 2, 3, 1, 2, 3, 1, 2], 8).token_ids == (3, 1, 2, 3, 1, 2, 3, 1)
    assert draft([4] * 5, 8).token_ids == (4,) * 8


def test_shorter_matches_than_asked_for_are_ignored() -> None:
    assert draft([5, 1, 2, 3, 1, 2], min_match=3) == Draft()
    assert draft([1, 3, 7, 1], min_match=2) == Draft()
    assert draft([1, 3, 7, 1], 1, min_match=1).token_ids == (3,)


def test_no_drafts_allowed_means_none() -> None:
    assert draft([1, 2, 1, 2], 0) == Draft()
    assert draft([1]) == Draft()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 6))
def test_a_draft_follows_some_longest_match(token_ids: list[int], min_match: int, max_drafts: int) -> None:
    found = draft(token_ids, max_drafts, min_match=min_match)
    length, ends = brute_force(token_ids[:-1], token_ids)
    assert len(found.token_ids) == len(found.beliefs) == (max_drafts if length >= min_match else 0)
    assert all(0 < value < 1 for value in found.beliefs)
    if found.token_ids:
        text = [*token_ids, *found.token_ids]
        assert any(text[end : end + max_drafts] == list(found.token_ids) for end in ends)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=15))
def test_drafts_do_not_depend_on_how_the_text_arrived(steps: list[list[int]]) -> None:
    drafter, token_ids = NgramDrafter(), [0]
    for step in steps:
        token_ids += step
        drafter.observe([Verdict(1, token_ids, 1, len(step))])
        assert drafter.propose([request(token_ids)]) == [draft(token_ids)]


def test_sequences_do_not_see_each_other_and_answers_keep_their_order() -> None:
    drafts = NgramDrafter().propose([request([1, 2, 3, 1, 2], 1, 1), request([1, 2], 1, 2), request([4] * 3, 1, 3)])
    assert [found.token_ids for found in drafts] == [(3,), (), (4,)]


def test_a_forgotten_sequence_leaves_nothing() -> None:
    drafter = NgramDrafter()
    for seq_id in range(100):
        drafter.propose([request([1, 2, 1, 2], seq_id=seq_id)])
        drafter.forget(seq_id)
        drafter.forget(seq_id)
        drafter.observe([Verdict(seq_id, [1, 2, 1, 2], 1, 1)])
    assert not drafter._texts


def test_a_voter_once_outvoted_is_out() -> None:
    assert elect([[1, 8, 8], [1, 8, 8], [2, 9, 9], [1, 7, 6]], 4).token_ids == (1, 8, 8)


def test_beliefs_count_those_that_still_have_a_voice() -> None:
    beliefs = elect([[1, 8], [1, 9], [2, 9], [1, 8]], 2).beliefs
    assert beliefs == pytest.approx((2 / 3 * 3 / 4, 3 / 4 * 2 / 3))


def test_belief_grows_with_length_and_agreement_over_a_wide_range() -> None:
    assert all(belief(n, 3, 4) < belief(n + 1, 3, 4) for n in range(1, 32))
    assert all(low < high for low, high in pairwise(belief(5, agreeing, 9) for agreeing in range(1, 10)))
    assert belief(2, 1, 4) < 0.2
    assert belief(40, 16, 16) > 0.97


@pytest.mark.parametrize("options", [{"min_match": 0}, {"min_match": 9, "max_match": 8}, {"max_voters": 0}])
def test_impossible_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="min_match"):
        NgramDrafter(**options)
