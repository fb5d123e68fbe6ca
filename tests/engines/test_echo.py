from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.byte_tokenizer import EOS_TOKEN_ID, byte_tokenizer
from engines.config import EchoEngineConfig
from engines.echo import IMPOSSIBLE_LOGPROB, EchoEngine
from engines.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidRequestError,
    ModelLoadError,
    UnsupportedParameterError,
)
from engines.types import GenerateRequest, Piece, SamplingParams, SpeculationParams, TextPrompt, TokenPrompt
from tests.engines.engine_contract import Completion, EngineContract, EngineFactory, collect


class TestEchoEngine(EngineContract):
    @pytest.fixture
    def engine_factory(self) -> EngineFactory:
        return lambda: EchoEngine(EchoEngineConfig(token_delay_s=0.0005))

    def make_prompt(self, engine_text: str) -> TokenPrompt:
        return TokenPrompt(tuple(engine_text.encode()))


def request(token_ids: bytes | list[int], n: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest("r", TokenPrompt(tuple(token_ids)), SamplingParams(**{"max_tokens": 10} | sampling), n=n)


async def started(**config: Any) -> EchoEngine:
    engine = EchoEngine(EchoEngineConfig(**config))
    await engine.start()
    return engine


async def complete(token_ids: bytes | list[int], **sampling: Any) -> Completion:
    return (await collect(await started(), request(token_ids, **sampling))).choices[0]


async def refusal(token_ids: bytes | list[int], **sampling: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        await complete(token_ids, **sampling)
    return refused.value


async def test_the_prompt_is_repeated_until_max_tokens() -> None:
    choice = await complete(b"abc", max_tokens=8)
    assert choice.text == "abcabcab"
    assert choice.token_ids == tuple(b"abcabcab")


async def test_no_character_is_ever_split() -> None:
    choice = await complete("é🙂".encode(), max_tokens=12)
    assert choice.text == "é🙂é🙂"
    assert all("\N{REPLACEMENT CHARACTER}" not in delta.text for delta in choice.deltas)


async def test_a_character_cut_by_max_tokens_reads_as_replaced() -> None:
    assert (await complete("🙂".encode(), max_tokens=6)).text == "🙂\N{REPLACEMENT CHARACTER}"


async def test_eos_in_the_prompt_ends_the_output_without_text() -> None:
    choice = await complete([*b"hi", EOS_TOKEN_ID])
    assert (choice.text, choice.token_ids) == ("hi", (*b"hi", EOS_TOKEN_ID))
    assert (choice.last.finish_reason, choice.last.stop_reason) == ("stop", None)


async def test_eos_is_a_token_like_others_if_ignored() -> None:
    choice = await complete([*b"hi", EOS_TOKEN_ID], ignore_eos=True, max_tokens=4)
    assert choice.token_ids == (*b"hi", EOS_TOKEN_ID, *b"h")
    assert choice.last.finish_reason == "length"


async def test_a_stop_token_id_ends_the_output_and_is_told() -> None:
    choice = await complete(b"abc", stop_token_ids=(ord("b"),))
    assert (choice.text, choice.last.finish_reason, choice.last.stop_reason) == ("a", "stop", ord("b"))
    assert choice.last.usage is not None
    assert choice.last.usage.completion_tokens == 2


async def test_what_could_be_a_stop_string_is_shown_once_the_output_ends() -> None:
    assert (await complete(b"abc", stop=("cabx",), max_tokens=5)).text == "abcab"


async def test_ending_tokens_are_passed_over_until_min_tokens_are_out() -> None:
    choice = await complete([*b"ab", EOS_TOKEN_ID], min_tokens=4)
    assert choice.token_ids == (*b"abab", EOS_TOKEN_ID)


async def test_banned_tokens_are_passed_over() -> None:
    assert (await complete(b"abc", logit_bias={ord("b"): -100.0}, max_tokens=4)).text == "acac"


async def test_a_finite_bias_leaves_a_point_mass_as_it_is() -> None:
    assert (await complete(b"abc", logit_bias={ord("b"): -99.0}, max_tokens=3, temperature=2.0)).text == "abc"


async def test_a_forced_token_is_unsupported() -> None:
    refused = await refusal(b"abc", logit_bias={ord("z"): 100.0})
    assert isinstance(refused, UnsupportedParameterError)
    assert refused.param == "logit_bias"


@pytest.mark.parametrize(
    ("token_ids", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([EOS_TOKEN_ID + 1], {}, "prompt"),
        ([97], {"logit_bias": {97: -100.0}}, "logit_bias"),
        ([97], {"logit_bias": {999: 1.0}}, "logit_bias"),
        ([97], {"stop_token_ids": (97,), "min_tokens": 1}, "min_tokens"),
    ],
)
async def test_what_cannot_be_echoed_is_refused_by_name(
    token_ids: list[int], sampling: dict[str, Any], param: str
) -> None:
    assert (await refusal(token_ids, **sampling)).param == param


async def test_other_prompts_than_token_ids_are_unsupported() -> None:
    engine = await started()
    with pytest.raises(UnsupportedParameterError):
        await anext(engine.generate(GenerateRequest("r", TextPrompt("hi"), SamplingParams(max_tokens=1))))


@pytest.mark.parametrize("drafter", ["auto", "none"])
async def test_without_a_drafter_nothing_is_drafted_and_that_is_what_was_asked(drafter: Any) -> None:
    speculation = SpeculationParams(drafter=drafter, max_draft_tokens=4)
    outcome = await collect(await started(), replace(request(b"abc"), speculation=speculation))
    usage = outcome.choices[0].last.usage
    assert outcome.choices[0].text == "abcabcabca"
    assert usage is not None
    assert (usage.accepted_draft_tokens, usage.rejected_draft_tokens) == (0, 0)


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "model", "prediction"])
async def test_a_drafter_that_is_not_there_is_unsupported(drafter: Any) -> None:
    engine = await started()
    with pytest.raises(UnsupportedParameterError, match=drafter) as refused:
        await anext(engine.generate(replace(request(b"abc"), speculation=SpeculationParams(drafter=drafter))))
    assert refused.value.param == "speculation.drafter"


async def test_a_prediction_is_unsupported() -> None:
    engine = await started()
    with pytest.raises(UnsupportedParameterError) as refused:
        await anext(engine.generate(replace(request(b"abc"), prediction=TokenPrompt((97,)))))
    assert refused.value.param == "prediction"
    assert (await engine.stats()).num_prompt_tokens == 0


@pytest.mark.parametrize(
    ("token_ids", "sampling", "texts"),
    [
        (b"ab", {"max_tokens": 3}, ["a", "b", "a"]),
        # A character's text comes with its last byte, what may be a stop string once it is none.
        ("é".encode(), {"max_tokens": 3}, ["", "é", "\N{REPLACEMENT CHARACTER}"]),
        (b"abc", {"stop": ("bx",), "max_tokens": 5}, ["a", "", "bc", "a", "b"]),
        (b"abc", {"stop": ("bc",)}, ["a", "", ""]),
        ([*b"a", EOS_TOKEN_ID], {}, ["a", ""]),
    ],
)
async def test_every_token_is_the_targets_own(token_ids: Any, sampling: dict[str, Any], texts: list[str]) -> None:
    asked = replace(request(token_ids, **sampling), speculation=SpeculationParams(provenance=True))
    choice = (await collect(await started(), asked)).choices[0]
    told = [piece for delta in choice.deltas for piece in delta.provenance or ()]
    assert told == [Piece(text, "target") for text in texts]
    assert len(told) == len(choice.token_ids)
    for delta in choice.deltas:
        assert "".join(piece.text for piece in delta.provenance or ()) == delta.text


async def test_provenance_is_told_to_those_who_ask() -> None:
    assert all(delta.provenance is None for delta in (await complete(b"abc")).deltas)


async def test_the_context_window_is_kept_with_numbers_told() -> None:
    engine = await started(max_model_len=8)
    assert (await collect(engine, request(b"abcd", max_tokens=4))).choices[0].text == "abcd"
    with pytest.raises(ContextLengthError) as refused:
        await anext(engine.generate(request(b"abcd", max_tokens=5)))
    assert (refused.value.prompt_tokens, refused.value.max_tokens, refused.value.max_model_len) == (4, 5, 8)


async def test_more_sequences_than_the_bound_are_refused_until_one_ends() -> None:
    engine = await started(max_num_seqs=2, token_delay_s=0.01)
    running = engine.generate(request(b"ab", n=2, max_tokens=1000))
    await anext(running)
    with pytest.raises(EngineOverloadedError) as refused:
        await anext(engine.generate(request(b"ab")))
    assert refused.value.retry_after_s > 0
    await running.aclose()
    assert (await collect(engine, request(b"ab", max_tokens=2))).choices[0].text == "ab"


async def test_a_token_takes_its_time() -> None:
    engine = await started(token_delay_s=0.02)
    started_s = asyncio.get_running_loop().time()
    await collect(engine, request(b"ab", max_tokens=3))
    assert asyncio.get_running_loop().time() - started_s >= 0.06


async def test_logprobs_show_one_certain_and_otherwise_impossible_tokens() -> None:
    choice = await complete(b"a", logprobs=3, max_tokens=1)
    (entry,) = choice.last.logprobs or ()
    assert (entry.token, entry.logprob, entry.token_bytes) == ("a", 0.0, b"a")
    assert [top.token for top in entry.top] == ["a", "b", "c"]
    assert [top.logprob for top in entry.top] == [0.0, IMPOSSIBLE_LOGPROB, IMPOSSIBLE_LOGPROB]


async def test_a_crash_ends_the_stream_with_its_reason() -> None:
    engine = await started()
    stream = engine.generate(request(b"ab", max_tokens=1000))
    await anext(stream)
    engine._die("A test has killed it.")
    with pytest.raises(EngineDeadError, match="killed"):
        [item async for item in stream]
    with pytest.raises(EngineDeadError, match="killed"):
        await engine.start()


async def test_a_broken_producer_does_not_leave_its_reader_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await started()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("engines.echo._Choice.step", broken)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: oops"):
        await collect(engine, request(b"ab"))


async def test_a_tokenizer_folder_gives_its_tokens(tmp_path: Path) -> None:
    byte_tokenizer()._hf.save_pretrained(tmp_path)
    engine = await started(model=str(tmp_path))
    assert (await engine.start()).vocab_size == 257
    assert (await collect(engine, request("é".encode(), max_tokens=4))).choices[0].text == "éé"


async def test_a_missing_tokenizer_folder_is_a_readable_error() -> None:
    with pytest.raises(ModelLoadError, match="no/such/folder"):
        await started(model="no/such/folder")
