"""What is taken by ids, and what is told once there is text."""

from __future__ import annotations

from typing import Any

from engines.drawn import SampledToken, TokenLogprobIds
from engines.output import Taken, take, tell
from engines.requests import Requests
from engines.sequence import Sequence
from engines.types import Delta, DraftCounts, GenerateRequest, Piece, SamplingParams, SpeculationParams, TokenPrompt
from tests.engines.tokenizers import word_tokenizer

EOS = 0
TOKENIZER = word_tokenizer(10)
PROMPT = (3, 4, 5)


def make(provenance: bool = False, **sampling: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 8} | sampling))
    speculation = SpeculationParams(provenance=provenance)
    request = GenerateRequest("r", TokenPrompt(PROMPT), params, speculation=speculation)
    return Requests("model", frozenset({EOS}), TOKENIZER).open(0, request, PROMPT, (0.0, 0))


def sampled(*token_ids: int) -> list[SampledToken]:
    return [SampledToken(token_id) for token_id in token_ids]


def news(sequence: Sequence, *token_ids: int, num_accepted: int = 0) -> Delta:
    """Taken, made part of the sequence, told."""
    taken = take(sequence, sampled(*token_ids), "ngram", num_accepted)
    sequence.token_ids.extend(taken.token_ids)
    return tell(taken, TOKENIZER)


class TestTake:
    def test_all_goes_on(self) -> None:
        taken = take(make(), sampled(1, 2))
        assert (taken.token_ids, taken.finish) == ([1, 2], None)

    def test_max_tokens(self) -> None:
        sequence = make(max_tokens=3)
        sequence.token_ids.append(1)
        taken = take(sequence, sampled(1, 2, 3))
        assert (taken.token_ids, taken.finish) == ([1, 2], "length")

    def test_a_stop_id_is_taken_and_nothing_behind_it(self) -> None:
        taken = take(make(stop_token_ids=(7,)), sampled(1, 7, 2, EOS))
        assert (taken.token_ids, taken.finish) == ([1, 7], "stop")

    def test_a_stop_id_at_the_very_end(self) -> None:
        taken = take(make(max_tokens=2), sampled(1, EOS, 2))
        assert (taken.token_ids, taken.finish) == ([1, EOS], "stop")

    def test_a_stop_id_beyond_the_end_does_not_count(self) -> None:
        taken = take(make(max_tokens=1), sampled(1, EOS))
        assert (taken.token_ids, taken.finish) == ([1], "length")


class TestTell:
    def test_text_comes_with_its_tokens_and_usage_at_the_end(self) -> None:
        sequence = make(max_tokens=3)
        sequence.num_cached_tokens = 2
        first, last = news(sequence, 1, 2), news(sequence, 6)
        assert (first.text, first.token_ids, first.finish_reason, first.usage) == (" w1 w2", (1, 2), None, None)
        assert (last.text, last.finish_reason, last.stop_reason) == (" w6", "length", None)
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (3, 3, 2)

    def test_the_first_news_say_what_was_cached(self) -> None:
        sequence = make()
        sequence.num_cached_tokens = 2
        assert [news(sequence, 1).cached_tokens, news(sequence, 2, 3).cached_tokens] == [2, None]

    def test_a_stop_id_has_no_text_and_is_named_if_it_was_asked_for(self) -> None:
        asked, eos = news(make(stop_token_ids=(7,)), 1, 7), news(make(), 1, EOS)
        assert (asked.text, asked.token_ids, asked.stop_reason) == (" w1", (1, 7), 7)
        assert (eos.text, eos.finish_reason, eos.stop_reason) == (" w1", "stop", None)

    def test_beyond_a_stop_string_nothing_is_billed(self) -> None:
        sequence = make(stop=("w2",))
        sequence.drafts = {"ngram": DraftCounts(4, 3), "model": DraftCounts(5, 1)}
        delta = news(sequence, 1, 2, 6, 7, num_accepted=3)
        assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == (" w1 ", (1, 2), "stop", "w2")
        assert delta.usage is not None
        assert (delta.usage.completion_tokens, delta.usage.accepted_draft_tokens) == (2, 3)
        assert delta.usage.rejected_draft_tokens == 6
        cut = DraftCounts(4, 2)  # the third was right, but nobody sees it
        assert delta.usage.drafters == {"ngram": cut, "model": DraftCounts(5, 1)}

    def test_a_stop_string_before_a_stop_id_comes_first(self) -> None:
        delta = news(make(stop=("w2",), stop_token_ids=(7,)), 1, 2, 7)
        assert (delta.token_ids, delta.stop_reason) == ((1, 2), "w2")

    def test_at_an_end_by_length_what_was_held_back_is_told(self) -> None:
        delta = news(make(stop=("w2 w3",), max_tokens=2), 1, 2)
        assert (delta.text, delta.finish_reason) == (" w1 w2", "length")

    def test_provenance_has_a_piece_for_each_token(self) -> None:
        delta = news(make(provenance=True), 1, 2, 6, num_accepted=2)
        assert delta.provenance == (Piece(" w1", "ngram"), Piece(" w2", "ngram"), Piece(" w6", "target"))

    def test_logprobs_have_an_entry_for_each_token_kept(self) -> None:
        sequence = make(stop=("w2",), logprobs=1)
        token = SampledToken(2, TokenLogprobIds(-0.5, (6,), (-0.25,)))
        sequence.token_ids += [2, 2]
        delta = tell(Taken(sequence, [token, token]), TOKENIZER)
        assert delta.logprobs is not None
        assert [(entry.token_id, entry.logprob, entry.top[0].token_id) for entry in delta.logprobs] == [(2, -0.5, 6)]
