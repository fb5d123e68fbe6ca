"""From a parsed request to the engine's requests, and their streams as one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from engines.errors import ContextLengthError
from engines.types import Delta, GenerateRequest, ModelCard, Prompt, TextPrompt, TokenPrompt
from gateway.config import HttpConfig
from gateway.errors import BadRequestError
from gateway.fleet import ServedModel
from gateway.openai import ChatCompletionRequest, CompletionRequest

Items = AsyncGenerator[tuple[Delta, ...], None]

# What a request may produce where no one knows the model's context: the engine or its peer will end it earlier.
_UNKNOWN_CONTEXT_TOKENS = 2**16


async def prompts_of(request: ChatCompletionRequest | CompletionRequest, model: ServedModel) -> list[Prompt]:
    """The request's prompts as this model's engine takes them. Raises BadRequestError."""
    if isinstance(request, ChatCompletionRequest):
        return [await model.prompts.chat(request.messages)]
    return [await model.prompts.text(prompt) for prompt in request.prompts()]


async def prediction_of(
    request: ChatCompletionRequest | CompletionRequest, model: ServedModel
) -> TokenPrompt | TextPrompt | None:
    """The request's prediction as this model's engine takes it. It is no part of any prompt."""
    return await model.prompts.prediction(request.predicted_text, model.card.max_model_len)


def engine_requests(
    request: ChatCompletionRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    prediction: TokenPrompt | TextPrompt | None,
    card: ModelCard,
    limits: HttpConfig,
) -> list[GenerateRequest]:
    """One engine request per prompt, all with the same prediction. Raises BadRequestError, ContextLengthError: what
    can be told before asking the engine."""
    _check_counts(request, len(prompts), card, limits)
    prefix = uuid.uuid4().hex
    return [
        GenerateRequest(
            request_id=f"{prefix}-{i}",
            prompt=prompt,
            sampling=request.sampling(_max_tokens(request, prompt, card)),
            n=request.num_choices,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            user=request.end_user,
            speculation=request.drafting(),
            prediction=prediction,
            session=request.prompt_cache_key,
        )
        for i, prompt in enumerate(prompts)
    ]


def merged(generate: Callable[[GenerateRequest], Items], requests: Sequence[GenerateRequest]) -> Items:
    """The deltas that `generate` yields for each request as one stream; choice j of prompt i has index i * n + j.

    Closing it closes all streams. The first error ends it.
    """
    if len(requests) == 1:
        return generate(requests[0])
    return _merge([_shifted(generate(request), i * request.n) for i, request in enumerate(requests)])


async def _shifted(items: Items, offset: int) -> Items:
    async with aclosing(items):
        async for item in items:
            yield tuple(replace(delta, index=delta.index + offset) for delta in item)


async def _merge(streams: Sequence[Items]) -> Items:
    # Bounded: a slow reader must slow the streams down, so that engines merge what is unread.
    queue: asyncio.Queue[tuple[Delta, ...] | Exception | None] = asyncio.Queue(maxsize=len(streams))
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        open_streams = len(streams)
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: Items, queue: asyncio.Queue[tuple[Delta, ...] | Exception | None]) -> None:
    async with aclosing(stream):
        try:
            async for item in stream:
                await queue.put(item)
        except Exception as error:  # noqa: BLE001  # handed to the reader, who raises it
            await queue.put(error)
        else:
            await queue.put(None)


def _check_counts(
    request: ChatCompletionRequest | CompletionRequest, num_prompts: int, card: ModelCard, limits: HttpConfig
) -> None:
    max_n = min(limits.max_n, card.max_num_choices)
    if request.num_choices > max_n:
        raise BadRequestError(f"Invalid value for `n`: at most {max_n} choices are allowed.", param="n")
    if num_prompts > limits.max_prompts:
        message = f"Invalid value for `prompt`: at most {limits.max_prompts} prompts are allowed in one request."
        raise BadRequestError(message, param="prompt")


def _max_tokens(request: ChatCompletionRequest | CompletionRequest, prompt: Prompt, card: ModelCard) -> int:
    wanted = request.wanted_tokens()
    if not isinstance(prompt, TokenPrompt) or card.max_model_len is None:
        return _UNKNOWN_CONTEXT_TOKENS if wanted is None else wanted
    num_prompt_tokens = len(prompt.token_ids)
    room = card.max_model_len - num_prompt_tokens
    asked = max(1, room) if wanted is None else wanted
    if asked > room:
        error = ContextLengthError(num_prompt_tokens, asked, card.max_model_len)
        error.param = request.prompt_field
        raise error
    return asked
