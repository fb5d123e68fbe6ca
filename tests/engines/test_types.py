"""Deltas joined, statistics added, speculation's ranges."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engines.types import (
    Delta,
    DrafterStats,
    EngineStats,
    GenerateRequest,
    Piece,
    SamplingParams,
    SpeculationParams,
    TokenLogprob,
    TokenPrompt,
    Usage,
    joined,
)


def delta(*pieces: Piece, index: int = 0, **more: Any) -> Delta:
    return Delta(
        index,
        "".join(piece.text for piece in pieces),
        tuple(range(len(pieces))),
        logprobs=tuple(TokenLogprob(piece.text, -1.0) for piece in pieces),
        provenance=pieces,
        **more,
    )


A, B, C = Piece("a", "ngram"), Piece("", "model"), Piece("c", "target")


def test_joined_deltas_keep_every_token_in_order() -> None:
    (whole,) = joined([delta(A), delta(B), delta(C, finish_reason="stop", usage=Usage(1, 3))])
    assert whole == Delta(
        0,
        "ac",
        (0, 0, 0),
        logprobs=tuple(TokenLogprob(text, -1.0) for text in ("a", "", "c")),
        provenance=(A, B, C),
        finish_reason="stop",
        usage=Usage(1, 3),
    )


def test_choices_are_joined_apart_and_ordered() -> None:
    first, second = joined([delta(C, index=1), delta(A, index=0), delta(B, index=1)])
    assert (first.index, first.provenance) == (0, (A,))
    assert (second.index, second.text, second.provenance) == (1, "c", (C, B))


def test_what_no_delta_has_the_joined_one_has_not() -> None:
    (plain,) = joined([Delta(0, "a"), Delta(0, "b")])
    assert (plain.text, plain.logprobs, plain.provenance) == ("ab", None, None)
    (mixed,) = joined([Delta(0, ""), delta(A)])
    assert mixed.provenance == (A,)


def test_nothing_joined_is_nothing() -> None:
    assert joined([]) == ()


counts = st.integers(0, 100)
drafter_stats = st.builds(DrafterStats, counts, counts, counts, st.lists(counts, max_size=4).map(tuple))
engine_stats = st.builds(
    EngineStats,
    **dict.fromkeys(("num_running", "num_steps", "num_drafted_tokens", "num_accepted_tokens"), counts),
    step_time_s=counts.map(float),
    speculation_time_s=counts.map(float),
    drafters=st.dictionaries(st.sampled_from(["ngram", "model", "suffix"]), drafter_stats),
)


def plain(stats: EngineStats) -> dict[str, float]:
    return {item.name: getattr(stats, item.name) for item in fields(stats) if item.name != "drafters"}


@given(engine_stats, engine_stats, engine_stats)
def test_stats_add_up_in_any_order_from_nothing(a: EngineStats, b: EngineStats, c: EngineStats) -> None:
    assert sum([a, b, c], EngineStats()) == c + (b + a)
    assert EngineStats() + a == a


@given(engine_stats, engine_stats)
def test_every_number_is_added(a: EngineStats, b: EngineStats) -> None:
    total = a + b
    assert plain(total) == {name: value + plain(b)[name] for name, value in plain(a).items()}
    assert set(total.drafters) == set(a.drafters) | set(b.drafters)
    for name, stats in total.drafters.items():
        parts = [one.drafters.get(name, DrafterStats()) for one in (a, b)]
        assert stats.num_drafts == sum(part.num_drafts for part in parts)
        assert sum(stats.accepted_at) == sum(sum(part.accepted_at) for part in parts)


def test_positions_of_unequal_length_are_added_one_by_one() -> None:
    total = DrafterStats(1, 2, 2, (1, 1)) + DrafterStats(2, 9, 4, (2, 1, 1))
    assert total == DrafterStats(3, 11, 6, (3, 2, 1))


def test_adding_changes_neither() -> None:
    a, b = EngineStats(drafters={"ngram": DrafterStats(1)}), EngineStats(drafters={"ngram": DrafterStats(2)})
    assert (a + b).drafters["ngram"].num_drafts == 3
    assert (a.drafters["ngram"].num_drafts, b.drafters["ngram"].num_drafts) == (1, 2)


@pytest.mark.parametrize(
    "wrong",
    [{"drafter": "magic"}, {"drafter": None}, {"max_draft_tokens": -1}, {"max_draft_tokens": 1.5}, {"draft": "ngram"}],
)
def test_speculation_out_of_its_ranges_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpeculationParams(**wrong)


def test_requests_travel_with_their_speculation() -> None:
    request = GenerateRequest(
        "r",
        TokenPrompt((1,)),
        SamplingParams(max_tokens=1),
        speculation=SpeculationParams(drafter="prediction", max_draft_tokens=0, provenance=True),
        prediction=TokenPrompt((2, 3)),
    )
    assert pickle.loads(pickle.dumps(request)) == request
    assert (
        pickle.loads(pickle.dumps(EngineStats(drafters={"ngram": DrafterStats(1)}))).drafters["ngram"].num_drafts == 1
    )


def test_joined_deltas_keep_what_the_first_said_of_the_cache() -> None:
    (whole,) = joined([Delta(0, "a", cached_tokens=16), Delta(0, "b")])
    assert whole.cached_tokens == 16
    assert joined([Delta(0, "a"), Delta(0, "b")])[0].cached_tokens is None
