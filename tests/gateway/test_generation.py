"""Several prompts' streams as one."""

import asyncio
from contextlib import aclosing

import pytest

from engines.errors import EngineDeadError
from engines.types import Delta, GenerateRequest, SamplingParams, TokenPrompt
from gateway.generation import merged
from tests.gateway.fakes import ScriptedEngine, text


def _requests(count: int, n: int = 1) -> list[GenerateRequest]:
    return [GenerateRequest(str(i), TokenPrompt((i,)), SamplingParams(max_tokens=9), n) for i in range(count)]


async def test_choices_are_numbered_across_prompts() -> None:
    engine = ScriptedEngine((Delta(0, "a"), Delta(1, "b")))
    items = [item async for item in merged(engine.generate, _requests(3, n=2))]
    assert sorted(delta.index for item in items for delta in item) == [0, 1, 2, 3, 4, 5]


async def test_order_within_a_choice_is_kept() -> None:
    items = [item async for item in merged(ScriptedEngine(*text(*"abcdef")).generate, _requests(4))]
    for index in range(4):
        assert "".join(delta.text for item in items for delta in item if delta.index == index) == "abcdef"


async def test_the_first_error_ends_all_streams() -> None:
    class OneFails(ScriptedEngine):
        def generate(self, request: GenerateRequest):  # type: ignore[no-untyped-def]
            self.script = (EngineDeadError("gone"),) if request.request_id == "1" else ((Delta(0, "a"),), None)
            return super().generate(request)

    engine = ScriptedEngine((Delta(0, "a"),), EngineDeadError("gone"))
    with pytest.raises(EngineDeadError):
        [item async for item in merged(engine.generate, _requests(3))]
    assert engine.num_active == 0
    assert engine.num_closed == 3


async def test_closing_early_closes_all_streams() -> None:
    engine = ScriptedEngine((Delta(0, "a"),), None)
    async with aclosing(merged(engine.generate, _requests(3))) as items:
        await anext(items)
        while engine.num_active < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert (engine.num_active, engine.num_closed) == (0, 3)


async def test_a_slow_reader_holds_the_streams_back() -> None:
    engine = ScriptedEngine(*(((Delta(0, str(i)),)) for i in range(100)))
    async with aclosing(merged(engine.generate, _requests(2))) as items:
        await anext(items)
        for _ in range(50):
            await asyncio.sleep(0)
        # The queue holds one item per stream, and each pump one more.
        assert items.ag_frame.f_locals["queue"].qsize() == 2
