from __future__ import annotations

import random
import tracemalloc
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafting.protocol import Draft, DraftRequest, Verdict
from drafting.suffix import OutputHistory, SuffixDrafter, belief

SEQ_IDS = count(1)
STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"]), st.lists(st.integers(0, 5), min_size=1, max_size=8)),
    max_size=40,
)


# The tenant is "" where a test counts on a full table: its hash is not salted, so what gets lost does not vary.
def emit(drafter: SuffixDrafter, output: list[int], tenant: str = "", prompt: tuple[int, ...] = (900, 901)) -> None:
    """A whole sequence, a token per step."""
    seq_id, token_ids = next(SEQ_IDS), list(prompt)
    for token_id in output:
        token_ids.append(token_id)
        drafter.observe([Verdict(seq_id, token_ids, len(prompt), 1, tenant=tenant)])
    drafter.forget(seq_id)


def draft(drafter: SuffixDrafter, token_ids: list[int], tenant: str = "", max_drafts: int = 3) -> Draft:
    return drafter.propose([DraftRequest(next(SEQ_IDS), token_ids, 1, max_drafts, tenant=tenant)])[0]


@pytest.fixture
def drafter() -> SuffixDrafter:
    return SuffixDrafter(max_history_tokens=4096)


def test_who_is_no_tenant_teaches_nobody_and_learns_from_nobody(drafter: SuffixDrafter) -> None:
    def step(tenant: str | None) -> Draft:
        drafter.observe([Verdict(next(SEQ_IDS), [9, 1, 2, 3, 4, 5], 1, 5, tenant=tenant)])
        return drafter.propose([DraftRequest(next(SEQ_IDS), [70, 2, 3], 1, 2, tenant=None)])[0]

    assert step(None) == step("") == Draft()
    assert draft(drafter, [70, 2, 3], max_drafts=2).token_ids == (4, 5)
    assert draft(drafter, [70, 2, 3], tenant="other") == Draft()


def test_an_earlier_output_is_followed(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 3, 4, 5])
    assert draft(drafter, [70, 2, 3]).token_ids == (4, 5)
    assert draft(drafter, [70, 2, 3], max_drafts=1).token_ids == (4,)
    assert draft(drafter, [2, 3], max_drafts=0) == Draft()
    assert draft(drafter, [3]) == draft(drafter, [8, 9]) == Draft()


def test_a_running_output_serves_others_and_itself(drafter: SuffixDrafter) -> None:
    drafter.observe([Verdict(-1, [900, 1, 2, 3, 4], 1, 4)])
    assert draft(drafter, [1, 2]).token_ids == (3, 4)
    drafter.observe([Verdict(-1, [900, 1, 2, 3, 4, 1, 2], 1, 2)])
    assert draft(drafter, [900, 1, 2, 3, 4, 1, 2], max_drafts=8).token_ids == (3, 4, 1, 2, 3, 4, 1, 2)


def test_prompts_are_not_learnt_but_lead_up_to_their_output(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2], prompt=tuple(range(100, 140)))
    assert draft(drafter, [101, 102, 103, 104]) == Draft()
    assert draft(drafter, list(range(100, 140))).token_ids == (1, 2)


def test_tenants_do_not_see_each_other(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 3, 4], "a")
    assert draft(drafter, [1, 2], "b") == draft(drafter, [1, 2]) == Draft()
    emit(drafter, [1, 2, 7, 8], "b")
    assert draft(drafter, [1, 2], "a").token_ids == (3, 4)
    assert draft(drafter, [1, 2], "b").token_ids == (7, 8)


def test_equal_hashes_do_not_mix_tenants_or_contexts(drafter: SuffixDrafter) -> None:
    drafter._history._num_sets = 1
    emit(drafter, [1, 2, 3], "a")
    assert draft(drafter, [1, 2], "b") == draft(drafter, [5, 2], "a") == Draft()
    assert draft(drafter, [1, 2], "a").token_ids == (3,)


def test_the_longest_known_context_decides(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 3, 4, 50])
    for _ in range(3):
        emit(drafter, [9, 3, 4, 60])
    assert draft(drafter, [1, 2, 3, 4], max_drafts=1).token_ids == (50,)
    assert draft(drafter, [8, 8, 3, 4], max_drafts=1).token_ids == (60,)


def test_a_draft_may_go_on_in_another_output(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 3, 4])
    emit(drafter, [3, 4, 5, 6])
    assert draft(drafter, [1, 2], max_drafts=8).token_ids == (3, 4, 5, 6)


def test_the_latest_continuation_wins_until_another_was_confirmed(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 30])
    emit(drafter, [1, 2, 40])
    assert draft(drafter, [1, 2], max_drafts=1).token_ids == (40,)
    emit(drafter, [1, 2, 40])
    emit(drafter, [1, 2, 50])
    assert draft(drafter, [1, 2], max_drafts=1).token_ids == (40,)
    emit(drafter, [1, 2, 50])
    assert draft(drafter, [1, 2], max_drafts=1).token_ids == (50,)


def test_belief_grows_with_the_match_and_with_every_confirmation(drafter: SuffixDrafter) -> None:
    emit(drafter, list(range(1, 41)))
    short, long = draft(drafter, [7, 8]), draft(drafter, list(range(1, 33)))
    assert short.beliefs[0] < 0.4 < 0.9 < long.beliefs[0]
    assert all(low < high for low, high in pairwise(short.beliefs))
    emit(drafter, [7, 8, 9])
    assert draft(drafter, [7, 8]).beliefs[0] > short.beliefs[0]
    assert 0.98 < belief(32, 15) < 1


def test_a_sequence_first_seen_late_is_learnt_from_there_and_a_gap_is_made_up(drafter: SuffixDrafter) -> None:
    token_ids = [900, *range(1, 11)]
    drafter.observe([Verdict(-1, token_ids, 1, 2)])
    assert draft(drafter, [3, 4]) == Draft()
    assert draft(drafter, [7, 8]).token_ids == (9, 10)
    drafter.observe([Verdict(-1, [*token_ids, 11, 12, 13, 14], 1, 1)])
    assert draft(drafter, [11, 12]).token_ids == (13, 14)
    drafter.observe([Verdict(-1, [*token_ids, 11, 12, 13, 14], 1, 0)])
    assert draft(drafter, [11, 12]).token_ids == (13, 14)


def test_forgetting_a_sequence_keeps_the_history_and_nothing_else(drafter: SuffixDrafter) -> None:
    emit(drafter, [1, 2, 3])
    drafter.observe([Verdict(-2, [900], 1, 0)])
    drafter.forget(-3)
    assert not drafter._running
    assert draft(drafter, [1, 2]).token_ids == (3,)


def test_outputs_that_serve_outlive_those_that_do_not() -> None:
    drafter = SuffixDrafter(max_history_tokens=1024)
    emit(drafter, list(range(1000, 1020)))
    emit(drafter, list(range(2000, 2020)))
    for start in range(10_000, 11_500, 100):
        emit(drafter, list(range(start, start + 20)), "other")
        draft(drafter, [1000, 1001, 1002])
    # The table may have lost some contexts to newer ones, by chance.
    known = [bool(draft(drafter, [i, i + 1]).token_ids) for i in range(1000, 1018)]
    assert sum(known) > len(known) / 2
    assert not any(draft(drafter, [i, i + 1]).token_ids for i in range(2000, 2018))


def test_a_slot_is_taken_from_a_dropped_output_before_one_that_serves() -> None:
    drafter = SuffixDrafter(max_history_tokens=1024)
    drafter._history._num_sets = 1
    emit(drafter, [1, 2, 3], prompt=())
    emit(drafter, [4, 5, 6], prompt=())
    for _ in range(20):  # outputs too short to be indexed
        assert draft(drafter, [1, 2]).token_ids == (3,)
        emit(drafter, [7, 8], prompt=())
    emit(drafter, [4, 5, 6], prompt=())
    assert draft(drafter, [1, 2]).token_ids == (3,)
    assert draft(drafter, [4, 5]).token_ids == (6,)


def test_an_output_still_being_written_outlives_finished_ones() -> None:
    drafter, token_ids = SuffixDrafter(max_history_tokens=1024), [1, 2, 3]
    drafter.observe([Verdict(-1, token_ids, 0, 3)])
    for token_id in range(4, 60):
        emit(drafter, [7, 8], prompt=())
        token_ids.append(token_id)
        drafter.observe([Verdict(-1, token_ids, 0, 1)])
    assert draft(drafter, [1, 2]).token_ids == (3, 4, 5)


def test_a_long_output_is_kept_in_parts_without_a_gap() -> None:
    drafter = SuffixDrafter(max_history_tokens=1024)
    drafter.observe([Verdict(-1, list(range(300)), 0, 300)])
    assert len(drafter._history._outputs) == 2
    assert all(draft(drafter, [i, i + 1], max_drafts=1).token_ids == (i + 2,) for i in range(250, 260))


def test_an_output_longer_than_the_history_keeps_its_latest_part() -> None:
    drafter = SuffixDrafter(max_history_tokens=1024)
    drafter.observe([Verdict(-1, list(range(5000)), 0, 5000)])
    assert len(drafter._history) <= 1024
    assert draft(drafter, [4900, 4901]).token_ids == (4902, 4903, 4904)
    assert draft(drafter, [10, 11]) == Draft()


def test_a_running_output_that_was_dropped_begins_anew() -> None:
    drafter, token_ids = SuffixDrafter(max_history_tokens=1024), [900, 1, 2, 3]
    drafter.observe([Verdict(-1, token_ids, 1, 3)])
    emit(drafter, list(range(1000, 3000)))
    assert draft(drafter, [1, 2]) == Draft()
    drafter.observe([Verdict(-1, [*token_ids, 4, 5], 1, 2)])
    assert draft(drafter, [2, 3]).token_ids == (4, 5)


@given(STEPS)
def test_every_draft_is_text_of_the_tenant(steps: list[tuple[int, str, list[int]]]) -> None:
    drafter = SuffixDrafter(max_history_tokens=2**16)  # so roomy that no context is lost
    texts: dict[tuple[int, str], list[int]] = {}
    for number, tenant, new in steps:
        text = texts.setdefault((number, tenant), [])
        text += new
        drafter.observe([Verdict(hash((number, tenant)), text, 0, len(new), tenant=tenant)])
        token_ids = draft(drafter, text, tenant, max_drafts=1).token_ids
        trigrams = {tuple(t[i : i + 3]) for (_, owner), t in texts.items() if owner == tenant for i in range(len(t))}
        assert not token_ids or (*text[-2:], *token_ids) in trigrams
        seen_before = len(text) >= 2 and any(len(t) == 3 and t[:2] == tuple(text[-2:]) for t in trigrams)
        assert bool(token_ids) == seen_before


def test_memory_stays_within_the_stated_bytes_for_thousands_of_tenants() -> None:
    max_tokens, rng = 8_000, random.Random(0)
    tracemalloc.start()
    try:
        drafter = SuffixDrafter(max_tokens)
        for user in range(1000):
            emit(drafter, [rng.randrange(8192) for _ in range(rng.randint(1, 20))], f"user {user}")
        for _ in range(30):
            emit(drafter, [rng.randrange(8192) for _ in range(300)])
        assert tracemalloc.get_traced_memory()[0] < 48 * max_tokens
    finally:
        tracemalloc.stop()
    assert max_tokens // 2 < len(drafter._history) <= max_tokens


@pytest.mark.parametrize("max_tokens", [1023, 2**24 + 1])
def test_a_history_has_a_least_and_a_greatest_size(max_tokens: int) -> None:
    with pytest.raises(ValueError, match="a history holds"):
        OutputHistory(max_tokens)
