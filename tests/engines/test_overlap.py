"""Host and device side by side: what the callers read is what a step at a time would have told them.

The device is a fake one that is busy from a forward until the next step begins: reading its results before fails, and
so does any other way of waiting for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.admission import Limits
from engines.attention import select_backend
from engines.core import CoreSettings, EngineCore
from engines.model_runner import ModelRunner
from engines.tokenizer import Tokenizer
from engines.types import Delta, GenerateRequest, SpeculationParams, TokenPrompt
from tests.engines import tiny_models
from tests.engines.fake_device import FakeDevice, HostWaits, ReadTooEarly
from tests.engines.speculating import ScriptedLength
from tests.engines.speculative_engine import VOCAB, Engine, Oracle, ids, random_request, request, sample_alone
from tests.engines.tokenizers import word_tokenizer

PROMPT = [1, 2, 3]
SHARED = tuple(range(2, 14))  # what many prompts begin with


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def greedy(num_tokens: int = 12) -> list[int]:
    return ids(sample_alone(request(PROMPT, max_tokens=num_tokens)))


def stopping(num_tokens: int, **sampling: Any) -> GenerateRequest:
    """A request whose output ends with the text of so many tokens, long before max_tokens."""
    words = [f" w{token_id}" for token_id in greedy()]
    stop = "".join(words[num_tokens - 2 : num_tokens])
    assert "".join(words).find(stop) == len("".join(words[: num_tokens - 2])), "not before"
    return request(PROMPT, stop=(stop,), **({"max_tokens": 30} | sampling))


class TestOrder:
    def test_the_next_step_is_launched_before_the_text_is_made(self, device: FakeDevice) -> None:
        class Watched(Tokenizer):
            def token_bytes(self, token_id: int) -> bytes:
                made_while_busy.append(device.busy)
                return super().token_bytes(token_id)

        made_while_busy: list[bool] = []
        tokenizer = Watched(word_tokenizer(VOCAB)._hf)
        made_while_busy.clear()
        engine = Engine({}, 0, device=device, tokenizer=tokenizer)
        engine.add(request(PROMPT, max_tokens=5))
        engine.run()
        assert made_while_busy == [True] * 4 + [False], "nothing is left to compute beside the last token's"

    def test_news_come_a_step_later(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.add(request(PROMPT, max_tokens=3))
        counts = []
        while engine.core.has_work:
            engine.step()
            counts.append((engine.runner.num_forwards, len(engine.tokens(0))))
        assert counts == [(1, 0), (2, 1), (3, 2), (3, 3)]

    def test_who_comes_before_the_launch_is_in_the_step(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.add(request(PROMPT))
        engine.step()
        engine.wait()
        engine.add(request([4, 5]))
        engine.step()
        assert engine.runner.batches[-1].q_lens_cpu == (1, 2)

    def test_waiting_twice_is_waiting_once(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.wait()
        engine.add(request(PROMPT, max_tokens=1))
        engine.step()
        engine.wait()
        engine.wait()
        assert engine.core.has_work, "there is news to tell"
        engine.step()
        assert engine.tokens(0) == greedy(1)
        engine.assert_idle()

    def test_reading_a_step_that_is_under_way_would_be_noticed(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.add(request(PROMPT))
        engine.step()
        with device, pytest.raises(ReadTooEarly):
            engine.core.wait()

    def test_on_a_cpu_a_step_tells_its_own_news(self) -> None:
        engine = Engine({}, 0)
        engine.add(request(PROMPT, max_tokens=1))
        engine.step()
        assert engine.tokens(0) == greedy(1)
        assert not engine.core.has_work


class TestReads:
    """One read a step: the sampled tokens, and whatever else is asked for together with them."""

    @pytest.mark.parametrize("length", [0, 3])
    def test_a_step_has_one(self, device: FakeDevice, length: int) -> None:
        generator = random.Random(length)
        engine = Engine({"ngram": Oracle()}, length, device=device, budget=16, num_blocks=24)
        for _ in range(8):
            one = random_request(generator)
            engine.add(replace(one, sampling=one.sampling.model_copy(update={"logprobs": generator.choice([None, 3])})))
        engine.run()
        assert device.num_reads == engine.core.stats().num_steps

    def test_a_round_of_guessing_has_one(self, device: FakeDevice) -> None:
        engine = Engine({}, 3, model=0.0, device=device)
        engine.add(request(PROMPT, max_tokens=9, temperature=1.0, top_p=0.9))
        engine.run()
        assert engine.reader is not None
        assert engine.core.stats().num_accepted_tokens > 0
        assert device.num_reads == engine.core.stats().num_steps + engine.reader.memory.num_forwards

    def test_a_step_that_samples_nothing_is_waited_for_too(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device, budget=16)
        engine.add(request([1] * 40, max_tokens=1))
        engine.run()
        assert engine.runner.num_forwards == 3
        assert device.num_reads == 3, "else the drafters would learn how long a launch takes, not a step"

    def test_a_greedy_step_is_sent_in_one_copy(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        for _ in range(3):
            engine.add(request(PROMPT))
        engine.run()
        assert device.num_sent == engine.core.stats().num_steps

    def test_a_runner_that_waits_would_be_noticed(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        forward = engine.runner.forward
        engine.inner._runner.forward = lambda batch: forward(batch)[: int(batch.kv_lens[0] * 0 + 1)]
        engine.add(request(PROMPT))
        with pytest.raises(HostWaits):
            engine.step()


class TestEnds:
    def test_what_is_computed_beyond_a_stop_string_is_thrown_away(self, device: FakeDevice) -> None:
        engine, beside = Engine({}, 0, device=device), Engine({}, 0)
        for each in (engine, beside):
            each.add(stopping(5))
            each.run()
            each.assert_idle()
        assert engine.answer(0) == beside.answer(0)
        assert (engine.runner.num_forwards, beside.runner.num_forwards) == (6, 5)
        stats = engine.core.stats()
        assert (stats.num_generated_tokens, stats.num_finished) == (5, 1)

    def test_so_are_drafts_and_they_are_not_billed(self, device: FakeDevice) -> None:
        engine, beside = (Engine({"ngram": Oracle()}, 4, device=where) for where in (device, None))
        for each in (engine, beside):
            each.add(stopping(4))
            each.run()
            each.assert_idle()
        assert engine.answer(0) == beside.answer(0)
        usage = engine.answer(0).usage
        assert usage is not None
        assert (usage.completion_tokens, usage.accepted_draft_tokens, usage.rejected_draft_tokens) == (4, 3, 1)

    def test_ids_end_a_sequence_before_the_next_launch(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.add(request(PROMPT, max_tokens=3))
        engine.add(request(PROMPT, stop_token_ids=(greedy()[3],)))
        engine.run()
        wanted = greedy().index(greedy()[3]) + 1
        assert engine.runner.num_forwards == max(3, wanted)
        assert engine.tokens(1) == greedy()[:wanted]

    def test_a_stop_string_frees_the_blocks_while_the_step_is_in_flight(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        engine.add(stopping(2))
        while not any(delta.finish_reason for delta in engine.deltas.get((0, 0), [])):
            engine.step()
        assert engine.core.stats().num_blocks_used == 0
        assert engine.core.has_work, "the step in flight has still to land"
        engine.run()
        engine.assert_idle()

    def test_one_choice_stops_while_another_goes_on(self, device: FakeDevice) -> None:
        outputs = []
        for where in (device, None):
            engine = Engine({}, 0, device=where)
            engine.add(request(PROMPT, n=3, temperature=1.0, stop=("w7",), max_tokens=20))
            engine.run()
            engine.assert_idle()
            outputs.append([engine.answer(0, index) for index in range(3)])
        assert outputs[0] == outputs[1]
        assert len({len(answer.token_ids) for answer in outputs[0]}) > 1


class TestAborts:
    def test_in_flight(self, device: FakeDevice) -> None:
        engine = Engine({"ngram": Oracle()}, 3, device=device)
        keys = [engine.add(request(PROMPT)), engine.add(request([7, 8], max_tokens=20))]
        engine.step()
        engine.step()
        engine.core.abort(keys[0])
        engine.check_books()
        engine.run()
        assert engine.tokens(keys[1]) == ids(sample_alone(request([7, 8], max_tokens=20)))
        assert engine.tokens(keys[0]) == greedy()[: len(engine.tokens(keys[0]))]
        engine.assert_idle()

    def test_of_everything_in_flight(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        key = engine.add(request(PROMPT))
        engine.step()
        engine.core.abort(key)
        assert engine.core.stats().num_blocks_used == 0
        engine.run()
        assert not engine.deltas
        engine.assert_idle()
        assert engine.core.stats().num_aborted == 1

    def test_between_landing_and_telling(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        keys = [engine.add(request(PROMPT, max_tokens=1)), engine.add(request(PROMPT))]
        engine.step()
        engine.wait()
        for key in keys:
            engine.core.abort(key)
        engine.run()
        assert not engine.deltas, "nobody is there to be told"
        engine.assert_idle()
        assert engine.core.stats().num_finished == 0

    def test_while_the_choices_begin(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device)
        key = engine.add(request(PROMPT, n=4))
        engine.step()
        engine.core.abort(key)
        engine.run()
        engine.assert_idle()

    def test_blocks_that_an_aborted_step_still_writes_go_to_a_later_one(self, device: FakeDevice) -> None:
        engine = Engine({}, 0, device=device, num_blocks=3, max_model_len=12)
        engine.add(request([9] * 6, max_tokens=5))
        engine.step()
        engine.core.abort(0)
        key = engine.add(request(PROMPT, max_tokens=8))
        engine.run()
        assert engine.tokens(key) == greedy(8)


def told(engine: Engine, key: int, index: int) -> Delta:
    """All that a caller reads of a choice, less what depends on when it was computed."""
    answer = engine.answer(key, index)
    assert answer.usage is not None
    assert answer.provenance is None or "".join(piece.text for piece in answer.provenance) == answer.text
    usage = replace(answer.usage, cached_tokens=0, accepted_draft_tokens=0, rejected_draft_tokens=0, drafters={})
    return replace(answer, usage=usage, provenance=None, cached_tokens=None)


def prompt_of(one: GenerateRequest) -> tuple[int, ...]:
    assert isinstance(one.prompt, TokenPrompt)
    return one.prompt.token_ids


def any_request(generator: random.Random) -> GenerateRequest:
    """Anything, often with stop strings that occur, several choices, log-probabilities or provenance."""
    one = random_request(generator)
    extra: dict[str, Any] = {"logprobs": generator.choice([None, None, 0, 3])}
    if generator.random() < 0.6:
        words = [f"w{generator.randrange(VOCAB)}" for _ in range(2)]
        extra["stop"] = tuple(generator.choice([(words[0],), (" ".join(words),), (words[0], words[1] + " ")]))
    shared = SHARED[: generator.randint(0, len(SHARED))]
    return replace(
        one,
        prompt=TokenPrompt((*shared, *prompt_of(one)[:4])),
        sampling=one.sampling.model_copy(update=extra),
        n=generator.choice([1, 1, 2, 3]),
        cache_salt=generator.choice(["", "", "x"]),
        priority=generator.randint(-1, 1),
        speculation=SpeculationParams(provenance=generator.random() < 0.2),
    )


def mostly() -> Callable[[], bool]:
    generator = random.Random(1)
    return lambda: generator.random() < 0.7


class Pair:
    """The same requests on an engine that overlaps and on one that does not; both of a random shape."""

    def __init__(self, generator: random.Random) -> None:
        shape: dict[str, Any] = {
            "num_blocks": generator.choice([14, 18, 64]),
            "block_size": generator.choice([3, 4]),
            "budget": generator.choice([6, 16, 64]),
            "max_num_seqs": generator.choice([3, 6]),
            "caching": generator.random() < 0.8,
            "model": generator.choice([None, None, 0.0, 1.5]),
            "max_model_len": 40,
        }
        orders = [generator.randint(0, 5) for _ in range(5)]
        self.engines = [
            Engine({"ngram": Oracle(mostly())}, ScriptedLength(orders), device=where, **shape)
            for where in (FakeDevice(), None)
        ]
        self.wanted: dict[int, GenerateRequest] = {}

    def add(self, one: GenerateRequest) -> None:
        keys = {engine.add(one) for engine in self.engines}
        assert len(keys) == 1
        self.wanted[keys.pop()] = one

    def abort(self, key: int) -> None:
        for engine in self.engines:
            engine.core.abort(key)
        del self.wanted[key]

    def step(self) -> None:
        for engine in self.engines:
            if engine.core.has_work:
                engine.step()

    def land(self) -> None:
        self.engines[0].wait()

    def check(self) -> None:
        overlapped, plain = self.engines
        for engine in self.engines:
            engine.run()
            engine.assert_idle()
        for key, one in self.wanted.items():
            for index in range(one.n):
                assert told(overlapped, key, index) == told(plain, key, index)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), actions=st.lists(st.sampled_from("aaasssssslx"), max_size=30))
def test_whatever_happens_the_callers_read_the_same(seed: int, actions: list[str]) -> None:
    generator = random.Random(seed)
    pair = Pair(generator)
    for action in actions:
        if action == "a":
            pair.add(any_request(generator))
        elif action == "s":
            pair.step()
        elif action == "l":
            pair.land()
        elif pair.wanted:
            pair.abort(generator.choice(sorted(pair.wanted)))
    pair.check()


def test_the_traffic_above_has_everything_in_it() -> None:
    """Stop strings beyond which something was computed, preemption, prefix hits, accepted and rejected drafts."""
    totals = {"stopped": 0, "preemptions": 0, "cached": 0, "accepted": 0, "rejected": 0}
    for seed in range(4):
        generator = random.Random(seed)
        pair = Pair(generator)
        for _ in range(10):
            pair.add(any_request(generator))
            pair.step()
        pair.check()
        overlapped = pair.engines[0]
        stats = overlapped.core.stats()
        reasons = [delta.stop_reason for deltas in overlapped.deltas.values() for delta in deltas]
        totals["stopped"] += sum(isinstance(reason, str) for reason in reasons)
        totals["preemptions"] += stats.num_preemptions
        totals["cached"] += stats.num_cached_tokens
        totals["accepted"] += stats.num_accepted_tokens
        totals["rejected"] += stats.num_drafted_tokens - stats.num_accepted_tokens
    assert all(count > 5 for count in totals.values()), totals


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_given_a_step_without_being_waited_for() -> None:
    where = torch.device("cuda")
    loaded = tiny_models.load("llama")
    loaded = replace(loaded, model=torch.nn.Module.to(loaded.model, where), device=where)
    runner = ModelRunner(loaded, select_backend("triton", where), 32, 16)
    limits = Limits(64, tiny_models.VOCAB_SIZE, 32, 16, 4)
    core: Any = EngineCore(
        CoreSettings("llama", limits, 64, True, 30.0, frozenset(), where),
        runner,
        word_tokenizer(tiny_models.VOCAB_SIZE),
    )
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2}, {"frequency_penalty": 0.5}]
    for key, fields in enumerate(kinds):
        core.add(key, request(PROMPT, **({"temperature": 1.0} | fields)), key)
    for _ in range(3):  # compiles kernels, allocates pinned memory
        core.step()
    core.wait()
    try:
        torch.cuda.set_sync_debug_mode("error")
        core._flight = core._launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while core.has_work:
        core.step()
    assert core.stats().num_finished == len(kinds)
