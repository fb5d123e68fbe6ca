"""Greedy answers of a served model: its own scheduler, sampler and detokenizer, as a request would get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.core import EngineCore
from engines.precision.examples import Example
from engines.types import Delta, GenerateRequest, SamplingParams, TokenPrompt, joined


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, without what ended it."""

    text: str
    token_ids: tuple[int, ...]


def greedy_answers(
    core: EngineCore,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    max_model_len: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer | None]:
    """One for each example, None where the row has no prompt; all of them together in the engine's batches.

    `core` must be idle, and is again afterwards. `progress` is told how many answers are finished. Raises as
    EngineCore.add does.
    """
    news: dict[int, list[Delta]] = {}
    for key, example in enumerate(examples):
        if example.prompt is not None:
            core.add(key, _request(key, example.prompt, min(max_new_tokens, max_model_len - len(example.prompt))), 0.0)
            news[key] = []
    num_finished = 0
    while core.has_work:
        for key, deltas in core.step():
            news[key] += deltas
            num_finished += sum(delta.finish_reason is not None for delta in deltas)
        progress(num_finished)
    return [_answer(news[key]) if key in news else None for key in range(len(examples))]


def _request(key: int, prompt: tuple[int, ...], max_tokens: int) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerateRequest(request_id=f"precision-{key}", prompt=TokenPrompt(prompt), sampling=sampling)


def _answer(deltas: Sequence[Delta]) -> Answer:
    (delta,) = joined(deltas)
    return Answer(delta.text, delta.token_ids)
