"""What goes wrong in speculative engines, each a test named after its symptom."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from drafting.draft_length import AdaptiveLength, Market, Option, Order
from drafting.prediction import PredictionDrafter
from engines.batch import RaggedBatch
from engines.block_hash import extend_hashes, root_hash
from engines.types import Delta, DraftCounts, GenerateRequest, SpeculationParams, TokenPrompt
from tests.engines.speculating import ScriptedLength
from tests.engines.speculative_engine import EOS, VOCAB, Engine, Oracle, ids, request, sample_alone

PROMPT = [1, 2, 3]
SAMPLED: dict[str, Any] = {"temperature": 1.0}


def serve(one: GenerateRequest, length: int = 4, **shape: Any) -> Engine:
    """An engine with a drafter that is always right, after it has served this request."""
    engine = Engine({"ngram": Oracle()}, length, **shape)
    engine.add(one)
    engine.run()
    engine.assert_idle()
    return engine


def answer(one: GenerateRequest, length: int = 4) -> Delta:
    return serve(one, length).answer(0)


def greedy(num_tokens: int = 12, prompt: list[int] = PROMPT) -> list[int]:
    return ids(sample_alone(request(prompt, max_tokens=num_tokens)))


def verify_lengths(engine: Engine) -> list[int]:
    """Drafts in each forward of a single sequence's decoding."""
    return [batch.q_lens_cpu[0] - 1 for batch in engine.runner.batches[1:]]


class TestIdentity:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            SAMPLED,
            SAMPLED | {"top_p": 0.8},
            SAMPLED | {"top_k": 5, "min_p": 0.05},
            SAMPLED | {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
            {"frequency_penalty": 2.0},
            SAMPLED | {"ignore_eos": False, "min_tokens": 20, "stop_token_ids": (4, 5)},
            SAMPLED | {"logit_bias": {3: 5.0, 4: -100.0}},
            {"temperature": 0.3, "logprobs": 4},
        ],
        ids=lambda fields: "+".join(fields) or "greedy",
    )
    def test_a_draft_model_equal_to_the_target_is_rejected(self, fields: dict[str, Any]) -> None:
        engine = Engine({}, 5, model=0.0)
        one = request(PROMPT, **({"max_tokens": 24, "seed": 3} | fields))
        engine.add(one)
        engine.run()
        assert engine.tokens(0) == ids(sample_alone(one))
        stats = engine.core.stats()
        assert stats.num_accepted_tokens == stats.num_drafted_tokens == 19, "four runs of 5, the last cut to fit"

    @pytest.mark.parametrize("fields", [{"temperature": 1e-9}, {"top_k": 1}, {"top_p": 0.0}])
    def test_almost_greedy_differs_from_greedy(self, fields: dict[str, Any]) -> None:
        engine = serve(request(PROMPT, **(SAMPLED | fields)))
        assert engine.tokens(0) == greedy()
        assert engine.core.stats().num_accepted_tokens > 0

    def test_a_seeded_output_depends_on_neighbours_arrival_length_or_preemption(self) -> None:
        one = request(PROMPT, max_tokens=20, seed=77, **SAMPLED)
        generator, outputs, num_preemptions = random.Random(2), set(), 0
        for length in (0, 1, 3, 7):
            for crowd in (0, 3, 9):
                engine = Engine({}, length, model=1.0, num_blocks=12, max_num_seqs=6, budget=16)
                for key in range(crowd):
                    engine.add(request([5, key], max_tokens=generator.randint(4, 20), seed=key, **SAMPLED))
                for _ in range(generator.randrange(8)):
                    if engine.core.has_work:
                        engine.step()
                key = engine.add(one)
                engine.run()
                outputs.add(tuple(engine.tokens(key)))
                num_preemptions += engine.core.stats().num_preemptions
        assert outputs == {tuple(ids(sample_alone(one)))}
        assert num_preemptions > 0

    def test_positions_come_from_the_place_in_the_batch(self) -> None:
        engine = Engine({}, 4, model=1.0)
        keys = {engine.add(request([key] * (key + 1), max_tokens=15, seed=key)): key for key in range(1, 5)}
        while engine.core.has_work:
            running = {sequence.seq_id: sequence.num_computed_tokens for sequence in engine.inner._scheduler.running}
            engine.step()
            batch = engine.runner.batches[-1]
            ends = batch.cu_seqlens_q.tolist()
            if len(running) == len(keys):
                assert [int(batch.positions[end]) for end in ends[: len(running)]] == list(running.values())
            for start, end in itertools.pairwise(ends):
                positions = batch.positions[start:end].tolist()
                assert positions == list(range(positions[0], positions[0] + len(positions)))


class TestEnds:
    @pytest.mark.parametrize("place", range(1, 6))
    def test_tokens_after_a_stop_id_inside_a_run_come_out(self, place: int) -> None:
        output = greedy()
        stop = output[place]
        kept = output[: output.index(stop) + 1]
        engine = serve(request(PROMPT, stop_token_ids=(stop,)), length=8)
        delta = engine.answer(0)
        assert (list(delta.token_ids), delta.finish_reason, delta.stop_reason) == (kept, "stop", stop)
        assert delta.text == "".join(f" w{token}" for token in kept[:-1])
        assert delta.usage is not None
        assert delta.usage.completion_tokens == len(kept)

    def test_tokens_after_eos_inside_a_run_come_out(self) -> None:
        one = next(
            one
            for seed in range(100)
            if ids(sample_alone(one := request(PROMPT, seed=seed, ignore_eos=False, **SAMPLED)))[3:] == [EOS]
        )
        engine = serve(one, length=8)
        delta = engine.answer(0)
        assert list(delta.token_ids) == ids(sample_alone(one))
        assert (delta.finish_reason, delta.stop_reason) == ("stop", None)
        assert engine.core.stats().num_generated_tokens == 4
        assert verify_lengths(engine) == [8], "the end fell into a verified run"

    @pytest.mark.parametrize("min_tokens", range(2, 10))
    def test_eos_comes_out_before_min_tokens_inside_a_run_or_not_right_after(self, min_tokens: int) -> None:
        lengths = set()
        for seed in range(12):
            one = request(PROMPT, seed=seed, ignore_eos=False, min_tokens=min_tokens, logit_bias={EOS: 6.0}, **SAMPLED)
            engine = serve(one, length=5)
            assert engine.tokens(0) == ids(sample_alone(one))
            lengths.add(len(engine.tokens(0)))
            assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens
        assert min(lengths) == min_tokens + 1, "the first place where it may stand"

    @pytest.mark.parametrize("max_tokens", range(1, 12))
    def test_a_run_goes_past_max_tokens_or_the_context(self, max_tokens: int) -> None:
        engine = serve(request(PROMPT, max_tokens=max_tokens), max_model_len=len(PROMPT) + max_tokens, length=5)
        delta = engine.answer(0)
        assert (list(delta.token_ids), delta.finish_reason) == (greedy(max_tokens), "length")
        assert max(int(batch.positions.max()) for batch in engine.runner.batches) <= len(PROMPT) + max_tokens - 2
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens

    def test_adaptive_length_drafts_past_max_tokens(self) -> None:
        class Eager(AdaptiveLength):
            def order(self, options: Sequence[Option], market: Market) -> list[Order]:
                free = np.ones_like(market.verify_s)
                return super().order(options, replace(market, verify_s=free, draft_s=lambda *_: 0.0))

            def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
                return [len(one) for one in survivals]

        engine = Engine({}, Eager(), model=0.0, max_draft_tokens=16)
        for key in range(6):
            engine.add(request([key, 1], max_tokens=3 + 5 * key))
        engine.run()
        for key in range(6):
            max_tokens = 3 + 5 * key
            assert engine.tokens(key) == greedy(max_tokens, [key, 1])
            usage = engine.answer(key).usage
            assert usage is not None
            assert usage.accepted_draft_tokens + usage.rejected_draft_tokens <= max_tokens - 2
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_a_stop_string_in_the_middle_of_a_run_lets_more_through(self) -> None:
        output = greedy()
        stop = f"w{output[3]} "
        at = next(i for i in range(12) if f"w{output[i]} " == stop)
        plain, drafted = (answer(request(PROMPT, stop=(stop,)), length) for length in (0, 8))
        assert replace(drafted, usage=None) == replace(plain, usage=None)
        assert list(drafted.token_ids) == output[: at + 2]
        assert drafted.text == "".join(f" w{token}" for token in output[:at]) + " "
        assert drafted.usage is not None
        assert drafted.usage.completion_tokens == at + 2

    def test_a_stop_string_across_two_accepted_tokens_is_missed(self) -> None:
        output = greedy()
        for first in range(1, 8):
            stop = f"{output[first]} w{output[first + 1]}"
            plain, drafted = (answer(request(PROMPT, stop=(stop,)), length) for length in (0, 5))
            assert replace(drafted, usage=None) == replace(plain, usage=None)
            assert (drafted.stop_reason, drafted.finish_reason) == (stop, "stop")
            assert stop not in drafted.text

    @pytest.mark.parametrize(("place", "length"), [(2, 8), (3, 8), (5, 3), (1, 1)])
    def test_drafts_that_were_cut_away_are_billed_as_accepted(self, place: int, length: int) -> None:
        output = greedy()
        one = request(PROMPT, stop_token_ids=(output[place],))
        engine = serve(one, length)
        usage = engine.answer(0).usage
        assert usage is not None
        num_tokens, num_drafted = len(ids(sample_alone(one))), engine.core.stats().num_drafted_tokens
        assert usage.completion_tokens == num_tokens
        assert usage.accepted_draft_tokens + usage.rejected_draft_tokens == num_drafted
        # All drafts were right, so what is in the output is the target's own (the first, and one a step) or accepted.
        lengths = verify_lengths(engine)
        own = sum(1 + sum(n + 1 for n in lengths[:i]) < num_tokens - n for i, n in enumerate(lengths))
        assert usage.accepted_draft_tokens == num_tokens - 1 - own

    def test_usage_of_a_whole_output_is_off(self) -> None:
        engine = Engine({"ngram": Oracle(iter([True, True, False, True] * 100).__next__)}, 4)
        engine.add(request(PROMPT, max_tokens=20))
        engine.run()
        usage, stats = engine.answer(0).usage, engine.core.stats()
        assert usage is not None
        assert usage.accepted_draft_tokens == stats.num_accepted_tokens > 0
        assert usage.rejected_draft_tokens == stats.num_drafted_tokens - stats.num_accepted_tokens > 0
        assert usage.drafters == {"ngram": DraftCounts(stats.num_drafted_tokens, stats.num_accepted_tokens)}
        assert stats.num_accepted_tokens + stats.num_steps == 20, "each step emits one token of the target's own"


class TestParameters:
    @pytest.mark.parametrize("fields", [{}, SAMPLED])
    def test_one_penalty_vector_serves_all_positions_of_a_run(self, fields: dict[str, Any]) -> None:
        penalties = {"frequency_penalty": 2.0, "presence_penalty": 1.0, "repetition_penalty": 1.5}
        one = request([1], max_tokens=24, **(fields | penalties))
        engine = serve(one, length=6)
        assert engine.tokens(0) == ids(sample_alone(one))
        assert engine.tokens(0) != ids(sample_alone(request([1], max_tokens=24, **fields)))
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 12

    @pytest.mark.parametrize("fields", [{}, SAMPLED, SAMPLED | {"frequency_penalty": 1.0, "top_k": 4}])
    @pytest.mark.parametrize("script", [(4,), (0, 3, 1)])
    def test_logprobs_are_zero_shifted_or_too_many(self, fields: dict[str, Any], script: tuple[int, ...]) -> None:
        one = request(PROMPT, max_tokens=20, logprobs=5, **fields)
        is_right = iter(random.Random(4).choices([True, False], [3, 1], k=1000)).__next__
        engine = Engine({"ngram": Oracle(is_right)}, ScriptedLength(script))
        engine.add(one)
        engine.run()
        delta = engine.answer(0)
        assert delta.logprobs is not None
        for entry, token in zip(delta.logprobs, sample_alone(one), strict=True):
            assert token.logprob is not None
            assert (entry.token_id, entry.logprob) == (token.token_id, token.logprob.logprob), "to the bit"
            assert tuple(top.token_id for top in entry.top) == token.logprob.top_ids
            assert tuple(top.logprob for top in entry.top) == token.logprob.top_logprobs
        for part in engine.deltas[0, 0]:
            assert part.logprobs is not None
            assert [entry.token_id for entry in part.logprobs] == list(part.token_ids)
        assert 0 < engine.core.stats().num_accepted_tokens < engine.core.stats().num_drafted_tokens

    @pytest.mark.parametrize("ends", [{}, {"stop_token_ids": (greedy()[6],)}, {"stop": (f"w{greedy()[6]} w",)}])
    def test_logprobs_of_a_run_that_was_cut_are_those_of_its_end(self, ends: dict[str, Any]) -> None:
        one = request(PROMPT, max_tokens=10, logprobs=2, **ends)
        expected = sample_alone(request(PROMPT, max_tokens=10, logprobs=2))
        delta = answer(one, length=8)
        assert delta.logprobs is not None
        assert len(delta.logprobs) == len(delta.token_ids)
        for entry, token in zip(delta.logprobs, expected, strict=False):
            assert token.logprob is not None
            assert (entry.token_id, entry.logprob) == (token.token_id, token.logprob.logprob)

    @pytest.mark.parametrize("stop", [(), (f"w{greedy()[6]} w",), (f"{greedy()[4]} w{greedy()[5]}",)])
    def test_provenance_is_off_by_one_or_loses_text(self, stop: tuple[str, ...]) -> None:
        one = replace(request(PROMPT, max_tokens=20, stop=stop), speculation=SpeculationParams(provenance=True))
        is_right = iter(random.Random(1).choices([True, False], [3, 1], k=1000)).__next__
        drafter = Oracle(is_right)
        engine = Engine({"suffix": drafter}, 4)
        engine.add(one)
        engine.run()
        said = 0
        for delta in engine.deltas[0, 0]:
            assert delta.provenance is not None
            assert "".join(piece.text for piece in delta.provenance) == delta.text
            verdict = next((v for v in drafter.verdicts if len(v.token_ids) - v.num_new == len(PROMPT) + said), None)
            accepted = min(verdict.num_accepted, len(delta.token_ids)) if verdict else 0
            expected = ["suffix"] * accepted + ["target"] * (len(delta.token_ids) - accepted)
            assert [piece.source for piece in delta.provenance] == expected
            said += len(delta.token_ids)
        assert said == len(engine.tokens(0))
        assert (engine.answer(0).finish_reason == "stop") == bool(stop)

    def test_a_request_that_wants_no_drafts_is_drafted_for(self) -> None:
        engine = Engine({"ngram": Oracle()}, 4)
        wishes = [SpeculationParams(drafter="none"), SpeculationParams(max_draft_tokens=0), SpeculationParams()]
        for wish in wishes:
            engine.add(replace(request(PROMPT), speculation=wish))
        engine.run()
        drafted = [delta.usage.accepted_draft_tokens for key in range(3) if (delta := engine.answer(key)).usage]
        assert drafted[:2] == [0, 0]
        assert drafted[2] > 0

    @pytest.mark.parametrize("most", [1, 2, 5])
    def test_more_is_drafted_than_the_request_allows(self, most: int) -> None:
        engine = Engine({"ngram": Oracle()}, 8)
        engine.add(replace(request(PROMPT, max_tokens=20), speculation=SpeculationParams(max_draft_tokens=most)))
        engine.run()
        assert max(verify_lengths(engine)) == most

    def test_a_request_gets_another_drafter_than_the_one_it_names(self) -> None:
        engine = Engine({"ngram": Oracle(lambda: False), "prediction": PredictionDrafter()}, 4, model=0.0)
        one = replace(request(PROMPT), prediction=TokenPrompt(tuple(greedy())))
        for drafter in ("ngram", "prediction", "model"):
            engine.add(replace(one, speculation=SpeculationParams(drafter=drafter)))
            before = dict(engine.core.stats().drafters)
            engine.run()
            after = engine.core.stats().drafters
            assert [name for name in after if after[name] != before.get(name)] == [drafter]


class TestMemory:
    """The draft model's: `readings` say what it read, and WitnessReader compares its memory with the tokens."""

    def starts(self, engine: Engine) -> list[tuple[int, int]]:
        assert engine.reader is not None
        return [(reading.start, reading.num_tokens) for reading in engine.reader.readings]

    def test_a_token_is_never_read_after_full_acceptance(self) -> None:
        engine = Engine({}, 3, model=0.0)
        engine.add(request(PROMPT, max_tokens=13))
        engine.run()
        # Prompt and first token, then two guesses; the third guess and the bonus token are unread: lag 2.
        assert self.starts(engine) == [(0, 4), (4, 1), (5, 1), (6, 2), (8, 1), (9, 1), (10, 2), (12, 1), (13, 1)]

    def test_everything_is_read_again_after_a_rejection(self) -> None:
        engine = Engine({}, 3, model=6.0)
        engine.add(request(PROMPT, max_tokens=30, seed=1, temperature=1.0))
        engine.run()
        assert {num_tokens for _, num_tokens in self.starts(engine)[1:]} <= {1, 2}
        assert engine.core.stats().num_accepted_tokens < engine.core.stats().num_drafted_tokens / 2

    def test_tokens_of_a_stretch_without_drafts_are_never_read(self) -> None:
        engine = Engine({}, ScriptedLength([2, 2, 0, 0, 0, 0, 0, 0, 0]), model=0.0)
        engine.add(request(PROMPT, max_tokens=40))
        engine.run()
        assert max(num_tokens for _, num_tokens in self.starts(engine)[1:]) > 2, "a stretch was caught up on"
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_memory_of_before_a_preemption_is_believed_after_it(self) -> None:
        engine = Engine({}, 3, model=0.0, num_blocks=11, caching=False)
        for key in range(4):
            engine.add(request([key, 1, 2, 3, 4], max_tokens=14))
        engine.run()
        stats = engine.core.stats()
        assert stats.num_preemptions > 0
        assert stats.num_accepted_tokens == stats.num_drafted_tokens > 0
        assert all(engine.tokens(key) == greedy(14, [key, 1, 2, 3, 4]) for key in range(4))

    def test_a_prefix_hit_that_the_draft_model_never_read_is_believed(self) -> None:
        prompt = list(range(1, 12))
        engine = Engine({}, 3, model=0.0)
        engine.add(replace(request(prompt), speculation=SpeculationParams(drafter="none")))
        engine.run()
        assert self.starts(engine) == []
        engine.add(request(prompt))
        engine.run()
        assert engine.core.stats().num_cached_tokens == 8
        assert self.starts(engine)[0] == (0, 12)
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_a_prefix_hit_that_the_draft_model_did_read_is_read_again(self) -> None:
        prompt = list(range(1, 12))
        engine = Engine({}, 3, model=0.0)
        for _ in range(2):
            before = len(self.starts(engine))
            engine.add(request(prompt, max_tokens=6))
            engine.run()
        assert self.starts(engine)[before] == (8, 4)
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_a_reused_block_still_counts_as_read(self) -> None:
        engine = Engine({}, 2, model=0.0, num_blocks=6)
        for turn in range(4):
            prompt = [turn + 1] * 9
            engine.add(request(prompt, max_tokens=10))
            engine.run()
            wish = SpeculationParams(drafter="none")
            engine.add(replace(request([turn, 9] * 5, max_tokens=10), speculation=wish))
            engine.run()
            engine.add(request([turn, 9] * 5, max_tokens=10))
            engine.run()
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    @pytest.mark.parametrize("prompt_length", [3, 4, 5, 6, 7, 8])
    def test_choices_write_drafts_into_the_block_they_share(self, prompt_length: int) -> None:
        engine = Engine({}, 5, model=1.0, num_blocks=64)
        one = request(list(range(1, prompt_length + 1)), n=4, max_tokens=14, seed=3, **SAMPLED)
        engine.add(one)
        plain = Engine({}, 0)
        plain.add(one)
        for either in (engine, plain):
            either.run()
        assert [engine.tokens(0, index) for index in range(4)] == [plain.tokens(0, index) for index in range(4)]
        assert 0 < engine.core.stats().num_accepted_tokens < engine.core.stats().num_drafted_tokens

    def test_copies_of_a_shared_block_leave_the_draft_models_part_behind(self) -> None:
        engine = Engine({}, 3, model=0.0)
        prompt = list(range(1, 11))
        engine.add(request(prompt, max_tokens=5))  # so that the draft model has read two blocks of the prompt
        engine.run()
        engine.add(request(prompt, n=3, max_tokens=14, seed=3, **SAMPLED))
        engine.run()
        assert engine.reader is not None
        assert engine.reader.memory.copies == engine.runner.copies != []
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_a_draft_model_reads_past_its_last_position(self) -> None:
        engine = Engine({}, 4, model=0.0, max_position=16)
        for length in (3, 10, 20):
            engine.add(request([7] * length, max_tokens=20))
        engine.run()
        assert all(engine.tokens(key) == greedy(20, [7] * n) for key, n in enumerate((3, 10, 20)))
        usages = [engine.answer(key).usage for key in range(3)]
        drafted = [one.accepted_draft_tokens for one in usages if one]
        assert drafted[0] > drafted[1] > drafted[2] == 0

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_draft_model_that_overflows_stops_the_engine(self, value: float) -> None:
        engine = Engine({}, 4, model=0.0)
        assert engine.reader is not None
        forward = engine.reader.memory.forward

        def overflowing(batch: RaggedBatch) -> torch.Tensor:
            return torch.full_like(forward(batch), value)

        engine.reader.memory.forward = overflowing  # type: ignore[method-assign]
        engine.add(request(PROMPT))
        engine.add(request(PROMPT, seed=1, **SAMPLED))
        engine.run()
        assert engine.tokens(0) == greedy()
        assert engine.core.stats().num_drafted_tokens > 0

    def test_padding_of_the_draft_models_vocabulary_is_drafted(self) -> None:
        engine = Engine({}, 4, model=0.0, padding=5)
        engine.add(request(PROMPT))
        engine.add(request(PROMPT, seed=1, **SAMPLED))
        engine.run()
        assert engine.tokens(0) == greedy()
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0


class TestBlocks:
    @pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("length", [1, 3, 4, 7])
    def test_a_run_across_block_boundaries_lands_in_the_wrong_block(self, block_size: int, length: int) -> None:
        for prompt_length in range(1, 2 * block_size + 1):
            prompt = [token % VOCAB for token in range(1, 1 + prompt_length)]
            shape: dict[str, Any] = {"block_size": block_size, "num_blocks": 64, "model": 1.0}
            engine = Engine({"ngram": Oracle()}, length, **shape)
            engine.add(request(prompt, max_tokens=2 * length + 2))
            engine.run()
            assert engine.tokens(0) == greedy(2 * length + 2, prompt)

    def test_the_last_block_exactly_full_overflows(self) -> None:
        engine = serve(request([1] * 5, max_tokens=11), length=4, num_blocks=4, max_model_len=16)
        assert engine.tokens(0) == greedy(11, [1] * 5)
        assert engine.core.stats().num_accepted_tokens == engine.core.stats().num_drafted_tokens > 0

    def test_drafts_without_blocks_fail(self) -> None:
        drafter = Oracle()
        engine = Engine({"ngram": drafter}, 8, num_blocks=9)
        for key in range(4):
            engine.add(request([key, 1, 2], max_tokens=13))
        engine.run()
        assert all(engine.tokens(key) == greedy(13, [key, 1, 2]) for key in range(4))
        wanted = sum(one.max_drafts > 0 for one in drafter.asked)
        assert 0 < len(drafter.verdicts) < wanted, "some were granted, others were not"

    def test_drafts_take_the_budget_of_known_tokens(self) -> None:
        engine = Engine({"ngram": Oracle()}, 8, budget=9, max_num_seqs=4)
        for key in range(4):
            engine.add(request([key] * 10, max_tokens=12))
        engine.run()
        assert all(sum(batch.q_lens_cpu) <= 9 for batch in engine.runner.batches)
        assert all(engine.tokens(key) == greedy(12, [key] * 10) for key in range(4))
        assert engine.core.stats().num_drafted_tokens > 0

    def test_drafting_starts_before_the_prompt_is_read(self) -> None:
        drafter = Oracle()
        engine = Engine({"ngram": drafter}, 4, budget=5, max_num_seqs=4)
        for key in range(3):
            engine.add(request([key] * 17, max_tokens=6))
        engine.run()
        assert drafter.asked
        assert all(len(one.token_ids) > one.num_prompt_tokens for one in drafter.asked)
        assert [engine.tokens(key) for key in range(3)] == [greedy(6, [key] * 17) for key in range(3)]


class TestPrefixCache:
    @pytest.mark.parametrize("block_size", [1, 2, 4])
    def test_unverified_or_cut_tokens_are_found_in_the_prefix_cache(self, block_size: int) -> None:
        generator = random.Random(block_size)
        drafter = Oracle(lambda: generator.random() < 0.7)
        engine = Engine({"ngram": drafter}, 6, block_size=block_size, num_blocks=400)
        for key in range(12):
            stop = (generator.randrange(VOCAB),) if key % 2 else ()
            prompt = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 9))]
            engine.add(request(prompt, max_tokens=18, seed=key, stop_token_ids=stop, **SAMPLED))
        known: list[list[int]] = []
        while engine.core.has_work:
            running = {sequence.seq_id: sequence for sequence in engine.inner._scheduler.running}
            engine.step()
            running |= {sequence.seq_id: sequence for sequence in engine.inner._scheduler.running}
            known += [list(sequence.token_ids) for sequence in running.values()]
            self._replay(engine, known, block_size)
        engine.assert_idle()

    def _replay(self, engine: Engine, known: list[list[int]], block_size: int) -> None:
        """Every hash in the pool is that of verified tokens, and its block holds those tokens."""
        pool, found = engine.inner._pool, dict[bytes, list[int]]()
        for token_ids in known:
            hashes: list[Any] = []
            extend_hashes(hashes, root_hash("context", salt=""), token_ids, block_size)
            for i, one in enumerate(hashes):
                found[one] = token_ids[i * block_size : (i + 1) * block_size]
        for block_hash, block in pool._by_hash.items():
            assert engine.runner.slots[block].tolist() == found[block_hash]


class TestCancelling:
    @pytest.mark.parametrize("num_steps", range(1, 6))
    def test_a_cancelled_sequence_leaves_drafts_or_blocks_behind(self, num_steps: int) -> None:
        drafter = Oracle()
        engine = Engine({"ngram": drafter}, 4, model=1.0)
        engine.add(request(PROMPT, n=3, max_tokens=30, seed=1, **SAMPLED))
        engine.add(request([4, 5], max_tokens=30))
        for _ in range(num_steps):
            engine.step()
        engine.core.abort(0)
        engine.check_books()
        engine.run()
        assert engine.tokens(1) == greedy(30, [4, 5])
        assert not drafter.live
        engine.assert_idle()

    @pytest.mark.parametrize("method", ["propose", "observe", "forget"])
    def test_a_drafter_that_fails_ends_speculation_and_nothing_else(
        self, method: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*args: object) -> None:
            raise RuntimeError("broken drafter")

        oracle = Oracle()
        engine = Engine({"ngram": oracle}, 4)
        plain = Engine({}, 0)
        wanted = [request(PROMPT), request(PROMPT[:-1])]
        keys = [(engine.add(one), plain.add(one)) for one in wanted]
        for _ in range(2):
            engine.step()
        setattr(oracle, method, fail)
        engine.run()
        plain.run()
        assert [engine.tokens(key) for key, _ in keys] == [plain.tokens(key) for _, key in keys]
        stats = engine.core.stats()
        assert (stats.num_running, stats.num_blocks_used, stats.num_speculation_failures) == (0, 0, 1)
        assert "broken drafter" in caplog.text
        if method != "forget":
            engine.assert_idle()

    def test_a_preempted_and_cancelled_sequence_is_remembered(self) -> None:
        engine = Engine({}, 3, model=1.0, num_blocks=9)
        keys = [engine.add(request([key, 1, 2, 3, 4], max_tokens=12)) for key in range(4)]
        while not engine.core.stats().num_preemptions:
            engine.step()
        for key in keys:
            engine.core.abort(key)
        engine.assert_idle()
