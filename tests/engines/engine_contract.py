"""What every engine promises (engines/protocol.py), as tests: subclass EngineContract in a test module."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from engines.errors import EngineDeadError, InvalidRequestError
from engines.protocol import Engine
from engines.types import Delta, EngineStats, GenerateRequest, Prompt, SamplingParams

EngineFactory = Callable[[], Engine]


@dataclass
class Completion:
    """One choice, put together from its deltas."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    deltas: list[Delta] = field(default_factory=list)

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


@dataclass
class Outcome:
    """All that one request yielded."""

    items: list[tuple[Delta, ...]]
    choices: dict[int, Completion]

    @classmethod
    def of(cls, items: list[tuple[Delta, ...]]) -> Outcome:
        choices: dict[int, Completion] = {}
        for delta in (delta for item in items for delta in item):
            choice = choices.setdefault(delta.index, Completion())
            choice.text += delta.text
            choice.token_ids += delta.token_ids
            choice.deltas.append(delta)
        return cls(items, choices)


async def collect(engine: Engine, request: GenerateRequest) -> Outcome:
    return Outcome.of([item async for item in engine.generate(request)])


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - engines announce their state to nobody
            await asyncio.sleep(0.005)


def is_idle(stats: EngineStats) -> bool:
    return stats.num_running == 0 and stats.num_waiting == 0 and stats.num_blocks_used == 0


class EngineContract:
    """A subclass gives the fixture `engine_factory` and, where they differ, the attributes.

    Outputs must not depend on other requests, so requests here are greedy. Prompts are short texts; `long_tokens` must
    fit the context window and take the engine much longer than a few event loop turns.
    """

    tells_token_ids = True  # False: a remote server that sends text only
    tells_stop_reason = True
    long_tokens = 200

    @pytest.fixture
    def engine_factory(self) -> EngineFactory:
        raise NotImplementedError

    def make_prompt(self, engine_text: str) -> Prompt:
        raise NotImplementedError

    @pytest.fixture
    async def engine(self, engine_factory: EngineFactory) -> AsyncIterator[Engine]:
        engine = engine_factory()
        await engine.start()
        yield engine
        await engine.close()

    def request(self, text: str = "def outrider(x):", n: int = 1, **sampling: Any) -> GenerateRequest:
        params = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True} | sampling
        return GenerateRequest(f"request-{text[:8]}", self.make_prompt(text), SamplingParams(**params), n=n)

    def long_request(self, n: int = 1) -> GenerateRequest:
        return self.request(max_tokens=self.long_tokens, n=n)

    async def test_start_again_returns_the_same_card(self, engine: Engine) -> None:
        card = await engine.start()
        assert card == await engine.start()
        assert self.request().prompt.kind in card.prompt_kinds
        assert card.fingerprint

    async def test_equal_configurations_have_equal_fingerprints(self, engine_factory: EngineFactory) -> None:
        first, second = engine_factory(), engine_factory()
        assert (await first.start()).fingerprint == (await second.start()).fingerprint
        await first.close()
        await second.close()

    async def test_each_choice_ends_with_one_delta_that_tells_why_and_how_much(self, engine: Engine) -> None:
        outcome = await collect(engine, self.request(n=2))
        assert sorted(outcome.choices) == [0, 1]
        for choice in outcome.choices.values():
            assert [delta.finish_reason for delta in choice.deltas].count(None) == len(choice.deltas) - 1
            assert [delta.usage for delta in choice.deltas].count(None) == len(choice.deltas) - 1
            assert choice.last.finish_reason is not None
            assert choice.last.usage is not None

    async def test_max_tokens_ends_with_length_after_that_many_tokens(self, engine: Engine) -> None:
        choice = (await collect(engine, self.request(max_tokens=7))).choices[0]
        assert choice.last.finish_reason == "length"
        assert choice.last.stop_reason is None
        assert choice.last.usage is not None
        assert choice.last.usage.completion_tokens == 7
        assert choice.last.usage.prompt_tokens > 0
        assert len(choice.token_ids) == (7 if self.tells_token_ids else 0)

    async def test_an_item_has_at_most_one_delta_per_choice(self, engine: Engine) -> None:
        outcome = await collect(engine, self.request(n=3, max_tokens=24))
        for item in outcome.items:
            assert item
            assert len({delta.index for delta in item}) == len(item)

    async def test_choices_run_side_by_side(self, engine: Engine) -> None:
        outcome = await collect(engine, self.long_request(n=2))
        seen = [{delta.index for delta in item} for item in outcome.items]
        first_end = next(i for i, item in enumerate(outcome.items) if any(delta.finish_reason for delta in item))
        assert set().union(*seen[: first_end + 1]) == {0, 1}
        assert outcome.choices[0].text == outcome.choices[1].text

    async def test_a_greedy_request_gives_the_same_text_again(self, engine: Engine) -> None:
        first, second = [await collect(engine, self.request()) for _ in range(2)]
        assert first.choices[0].text == second.choices[0].text != ""

    async def test_a_slow_reader_gets_fewer_and_larger_items(self, engine: Engine) -> None:
        expected = (await collect(engine, self.long_request())).choices[0].text
        stream = engine.generate(self.long_request())
        items = [await anext(stream)]
        await asyncio.sleep(0.1)
        items += [item async for item in stream]
        assert len(items) < self.long_tokens
        assert Outcome.of(items).choices[0].text == expected
        assert max(len(delta.text) for item in items[1:2] for delta in item) > 1

    async def test_a_stop_string_ends_the_text_and_is_not_in_it(self, engine: Engine) -> None:
        full = (await collect(engine, self.request(max_tokens=24))).choices[0].text
        pieces = [full[i : i + 3] for i in range(len(full) // 2, len(full) - 3)]
        stop = next(piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" not in piece)
        choice = (await collect(engine, self.request(max_tokens=24, stop=(stop,)))).choices[0]
        assert choice.text == full[: full.index(stop)]
        assert choice.last.finish_reason == "stop"
        assert choice.last.stop_reason == (stop if self.tells_stop_reason else None)

    async def test_the_beginning_of_a_stop_string_is_not_lost(self, engine: Engine) -> None:
        full = (await collect(engine, self.request(max_tokens=24))).choices[0].text
        choice = (await collect(engine, self.request(max_tokens=24, stop=(full[-2:] + "\x00never",)))).choices[0]
        assert choice.text == full
        assert choice.last.finish_reason == "length"

    async def test_there_is_a_logprob_for_each_token(self, engine: Engine) -> None:
        choice = (await collect(engine, self.request(logprobs=2, max_tokens=9))).choices[0]
        entries = [entry for delta in choice.deltas for entry in delta.logprobs or ()]
        assert len(entries) == 9
        for entry in entries:
            assert entry.logprob <= 0.0
            assert len(entry.top) == 2
            assert entry.top[0].logprob >= entry.top[1].logprob
        if self.tells_token_ids:
            assert tuple(entry.token_id for entry in entries) == choice.token_ids
            for delta in choice.deltas:
                assert len(delta.logprobs or ()) == len(delta.token_ids)

    async def test_no_logprobs_unless_asked_for(self, engine: Engine) -> None:
        choice = (await collect(engine, self.request())).choices[0]
        assert all(delta.logprobs is None for delta in choice.deltas)

    async def test_zero_logprobs_tell_the_emitted_tokens_only(self, engine: Engine) -> None:
        choice = (await collect(engine, self.request(logprobs=0, max_tokens=5))).choices[0]
        entries = [entry for delta in choice.deltas for entry in delta.logprobs or ()]
        assert [entry.top for entry in entries] == [()] * 5

    async def test_closing_the_stream_frees_what_it_held(self, engine: Engine) -> None:
        async with aclosing(engine.generate(self.long_request(n=2))) as stream:
            await anext(stream)
            assert (await engine.stats()).num_running + (await engine.stats()).num_waiting > 0
        await self._becomes_idle(engine)
        assert (await engine.stats()).num_aborted == 1

    async def test_cancelling_the_reader_frees_what_it_held(self, engine: Engine) -> None:
        reader = asyncio.create_task(collect(engine, self.long_request()))

        async def is_running() -> bool:
            return not is_idle(await engine.stats())

        await eventually(is_running)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await self._becomes_idle(engine)

    async def test_finished_requests_are_counted_and_hold_nothing(self, engine: Engine) -> None:
        await collect(engine, self.request(max_tokens=5))
        await self._becomes_idle(engine)
        stats = await engine.stats()
        assert (stats.num_finished, stats.num_aborted, stats.num_generated_tokens) == (1, 0, 5)
        assert stats.num_prompt_tokens > 0

    async def test_concurrent_requests_do_not_mix(self, engine: Engine) -> None:
        requests = [self.request(text, n=1 + i % 2) for i, text in enumerate(["alpha ", "import os", "class C:", "zz"])]
        alone = [await collect(engine, request) for request in requests]
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        for one, other in zip(alone, together, strict=True):
            assert {i: c.text for i, c in one.choices.items()} == {i: c.text for i, c in other.choices.items()}

    async def test_more_than_the_context_window_is_refused_at_the_first_item(self, engine: Engine) -> None:
        max_model_len = (await engine.start()).max_model_len
        assert max_model_len is not None
        with pytest.raises(InvalidRequestError, match=str(max_model_len)):
            await anext(engine.generate(self.request(max_tokens=max_model_len)))
        assert is_idle(await engine.stats())

    async def test_no_choices_at_all_is_refused(self, engine: Engine) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            await anext(engine.generate(self.request(n=0)))
        assert refused.value.param == "n"

    async def test_too_many_choices_are_refused(self, engine: Engine) -> None:
        card = await engine.start()
        with pytest.raises(InvalidRequestError) as refused:
            await anext(engine.generate(self.request(n=card.max_num_choices + 1)))
        assert refused.value.param == "n"

    async def test_closing_the_engine_ends_running_streams(self, engine: Engine) -> None:
        stream = engine.generate(self.long_request())
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineDeadError):
            [item async for item in stream]

    async def test_closing_twice_is_fine_and_nothing_is_served_after(self, engine: Engine) -> None:
        await engine.check_health()
        await engine.close()
        await engine.close()
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        with pytest.raises(EngineDeadError):
            await anext(engine.generate(self.request()))

    async def test_an_engine_never_started_serves_nothing(self, engine_factory: EngineFactory) -> None:
        engine = engine_factory()
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        await engine.close()

    async def test_requests_deltas_and_cards_survive_pickling(self, engine: Engine) -> None:
        request = self.request(logprobs=1)
        assert pickle.loads(pickle.dumps(request)) == request
        outcome = await collect(engine, request)
        assert pickle.loads(pickle.dumps(outcome.items)) == outcome.items
        card = await engine.start()
        assert pickle.loads(pickle.dumps(card)) == card

    async def _becomes_idle(self, engine: Engine) -> None:
        async def idle() -> bool:
            return is_idle(await engine.stats())

        await eventually(idle)
