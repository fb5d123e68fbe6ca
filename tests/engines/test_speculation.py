"""Speculation changes nothing but the speed: every drafter, length and schedule yields the plain output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from drafting.draft_length import AdaptiveLength, LengthPolicy, Market, Option, Order
from drafting.ngram import NgramDrafter
from drafting.prediction import PredictionDrafter
from drafting.protocol import Drafter, Source
from drafting.suffix import SuffixDrafter
from engines.types import DrafterChoice, GenerateRequest, SpeculationParams, TokenPrompt
from tests.engines.speculating import ScriptedLength
from tests.engines.speculative_engine import VOCAB, Engine, Oracle, ids, random_request, request, sample_alone

Kind = tuple[Callable[[], dict[Source, Drafter]], float | None]


def _everything() -> dict[Source, Drafter]:
    return {"prediction": PredictionDrafter(), "ngram": NgramDrafter(), "suffix": SuffixDrafter(1024)}


def _unreliable() -> dict[Source, Drafter]:
    return {"ngram": Oracle(iter(random.Random(1).choices([True, False], [4, 1], k=100_000)).__next__)}


class BargainLength(AdaptiveLength):
    """Buys as AdaptiveLength does, at prices that do not depend on this machine: drafts cost next to nothing."""

    def order(self, options: Sequence[Option], market: Market) -> list[Order]:
        return super().order(options, _bargain(market))

    def keep(self, survivals: Sequence[Sequence[float]], market: Market) -> list[int]:
        return super().keep(survivals, _bargain(market))


def _bargain(market: Market) -> Market:
    prices = 1 + 0.02 * np.arange(len(market.verify_s), dtype=np.float64)
    return replace(market, verify_s=prices, draft_s=lambda depth, num_seqs: 0.05 * depth)


# Lookups, and how far the draft model's logits are off the target's.
DRAFTERS: dict[str, Kind] = {
    "always right": (lambda: {"ngram": Oracle()}, None),
    "always wrong": (lambda: {"ngram": Oracle(lambda: False)}, None),
    "now and then wrong": (_unreliable, None),
    "ngram": (lambda: {"ngram": NgramDrafter(1)}, None),
    "suffix": (lambda: {"suffix": SuffixDrafter(1024)}, None),
    "prediction": (lambda: {"prediction": PredictionDrafter()}, None),
    "the target as draft model": (dict, 0.0),
    "draft model": (dict, 1.5),
    "auto": (_everything, 1.5),
}
LENGTHS: dict[str, Callable[[], LengthPolicy | int]] = {
    "0": lambda: 0,
    "1": lambda: 1,
    "4": lambda: 4,
    "8": lambda: 8,
    "adaptive": AdaptiveLength,
    "adaptive at a low price": BargainLength,
    "any": lambda: ScriptedLength((3, 0, 7, 1, 0, 0, 5, 2), (64, 2, 0, 64, 5), (True, False, True)),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"budget": 19},
    "preempting": {"num_blocks": 17},
    "chunked and preempting": {"budget": 17, "num_blocks": 18},
    "long blocks": {"block_size": 16, "num_blocks": 24, "budget": 40},
    "single slots": {"block_size": 1, "num_blocks": 600, "budget": 64},
}
BATCHES = (1, 5, 16)


def make_requests(count: int, seed: int) -> list[GenerateRequest]:
    """Greedy and sampled ones; each comes twice, and finds its prompt in the cache if that still is there."""
    generator = random.Random(seed)
    requests = [random_request(generator) for _ in range(count // 2)]
    return [_with_prediction(one, generator) for one in requests for _ in range(2)]


def make_wish(generator: random.Random) -> SpeculationParams:
    choices: list[DrafterChoice] = ["auto", "auto", "auto", "none", "ngram", "suffix", "model", "model"]
    return SpeculationParams(
        drafter=generator.choice(choices), max_draft_tokens=generator.choice([None, None, 0, 2, 100])
    )


def _with_prediction(plain: GenerateRequest, generator: random.Random) -> GenerateRequest:
    """Its true output, with an edit, as the client's prediction."""
    predicted = ids(sample_alone(plain))
    predicted.insert(generator.randrange(len(predicted) + 1), generator.randrange(VOCAB))
    return replace(plain, prediction=TokenPrompt(tuple(predicted)))


def serve(engine: Engine, requests: list[GenerateRequest], batch: int, seed: int) -> set[int]:
    """Let at most `batch` requests be under way, with staggered arrivals; the keys of those cancelled on the way."""
    generator, cancelled = random.Random(seed), set[int]()
    pending = list(reversed(requests))
    while pending or engine.core.has_work:
        under_way = engine.core.stats().num_running + engine.core.stats().num_waiting
        if pending and under_way < batch and (generator.random() < 0.6 or not under_way):
            key = engine.add(pending.pop())
            if generator.random() < 0.15:
                cancelled.add(key)
            continue
        engine.step()
        for key in cancelled:
            if generator.random() < 0.3:
                engine.core.abort(key)
    return cancelled


def check(drafter: str, length: str, schedule: str, batch: int, wishes: bool = False) -> Engine:
    """Serve requests, with wishes as to how, and compare each with what it yields alone."""
    lookups, model = DRAFTERS[drafter]
    engine = Engine(lookups(), LENGTHS[length](), model=model, **SCHEDULES[schedule])
    requests = make_requests(max(12, batch * 2), seed=batch)
    if wishes:
        requests = [replace(one, speculation=make_wish(random.Random(key))) for key, one in enumerate(requests)]
    cancelled = serve(engine, requests, batch, seed=len(schedule))
    for key, one in enumerate(requests):
        expected = ids(sample_alone(one))
        said = engine.tokens(key)
        assert said == (expected[: len(said)] if key in cancelled else expected)
    engine.assert_idle()
    return engine


# Every drafter with every length; schedules and batch sizes take turns.
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_any_drafter_at_any_length_yields_the_plain_output(drafter: str, length: str) -> None:
    turn = list(DRAFTERS).index(drafter) * (len(LENGTHS) + 1) + list(LENGTHS).index(length)
    engine = check(drafter, length, list(SCHEDULES)[turn % len(SCHEDULES)], BATCHES[turn // 2 % 3])
    stats = engine.core.stats()
    if length in ("4", "8"):
        assert stats.num_drafted_tokens > 0
        assert stats.num_accepted_tokens > 0 or drafter in ("always wrong", "ngram")
        assert stats.num_accepted_tokens == 0 or drafter != "always wrong"
    if length == "0":
        assert stats.num_drafted_tokens == 0
    if drafter in ("always right", "the target as draft model"):
        assert stats.num_accepted_tokens == stats.num_drafted_tokens


# Every schedule with every batch size; lengths vary from step to step.
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_schedule_yields_the_plain_output(schedule: str, batch: int) -> None:
    engine = check("auto", "any", schedule, batch, wishes=True)
    stats = engine.core.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_drafted_tokens
    assert stats.num_cached_tokens > 0 or schedule == "long blocks"
    assert (stats.num_preemptions > 0) == ("preempting" in schedule and batch > 1)
    assert {"prediction", "model"} <= stats.drafters.keys()


@pytest.mark.parametrize("num_choices", [2, 5])
@pytest.mark.parametrize("drafter", ["ngram", "the target as draft model", "auto"])
def test_choices_are_what_they_are_without_speculation(drafter: str, num_choices: int) -> None:
    lookups, model = DRAFTERS[drafter]
    outputs = []
    for length in (0, 5):
        engine = Engine(lookups(), length, model=model, num_blocks=40)
        for prompt in ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]):
            engine.add(request(prompt, n=num_choices, temperature=1.0, seed=9))
        engine.run()
        engine.assert_idle()
        outputs.append({place: engine.tokens(*place) for place in engine.deltas})
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0].values()}) == 2 * num_choices
    assert engine.core.stats().num_drafted_tokens > 0


def test_speculation_saves_steps() -> None:
    steps = []
    for length in (0, 4):
        engine = Engine({}, length, model=0.0)
        engine.add(request([1, 2, 3], max_tokens=21))
        engine.run()
        steps.append(engine.core.stats().num_steps)
    assert steps == [21, 5]
