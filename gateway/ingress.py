"""One generation request's way through the gateway: admit, parse, build the prompt, ask the engine, answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engines.errors import EngineError
from engines.types import Delta, Prompt, TokenPrompt, joined
from gateway.answers import ChatFormat, CompletionFormat, Format, Header, usage_body
from gateway.config import HttpConfig
from gateway.disconnect import cancelled_on_disconnect
from gateway.door import Slots, read_body
from gateway.errors import GatewayError, InternalError, RequestTimeoutError, describe
from gateway.fleet import Fleet, ServedModel
from gateway.generation import Items, engine_requests, merged, prediction_of, prompts_of
from gateway.metrics import Metrics
from gateway.model_choice import ModelChooser
from gateway.openai import ChatCompletionRequest, CompletionRequest, parse
from gateway.receipt_shelf import ReceiptShelf
from gateway.replica_receipt import generating
from gateway.sse import DONE, EventStream, error_event, event
from gateway.tenant import tenant_of
from gateway.trace import CLIENT_LEFT, Trace

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

GenerationRequest = ChatCompletionRequest | CompletionRequest


class Ingress:
    """Serves chat and text completions from one fleet."""

    def __init__(
        self,
        limits: HttpConfig,
        fleet: Fleet,
        models: ModelChooser,
        receipts: ReceiptShelf,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._limits = limits
        self._fleet = fleet
        self._models = models
        self._receipts = receipts
        self._metrics = metrics
        self._log = log
        self._slots = Slots(limits.max_concurrent_requests)

    async def serve(self, http: Request, request_class: type[GenerationRequest]) -> Response:
        """The answer to a POST. Raises GatewayError, EngineError, or HTTPException 408 for a body that is too slow."""
        request_id = http.state.request_id
        log = self._log.bind(request_id=request_id, config=self._fleet.config_hash)
        trace = Trace(self._metrics, log, request_id)
        # Whatever is taken is given back, in reverse order; a stream takes it all along.
        async with AsyncExitStack() as resources:
            resources.callback(trace.finish, CLIENT_LEFT)
            try:
                body = await read_body(http, self._limits.max_body_bytes, self._limits.body_timeout_s)
                # Not before: a client that sends slowly must not keep the others out.
                resources.enter_context(self._slots.take())
                request = parse(request_class, body)
                async with cancelled_on_disconnect(http.receive) as client:
                    answer = await self._answer(request, trace, resources)
                if not client.happened:
                    if isinstance(answer, EventStream):
                        # Only here, after the last await: whatever cancels before closes the resources.
                        answer.hold(resources.pop_all())
                    return answer
            except ClientDisconnect:
                pass
            except HTTPException as error:
                trace.finish(error.status_code, error.detail)
                raise
            except Exception as error:  # the border: what is not ours is a bug, logged and told as such
                known = self._known(error)
                trace.finish(describe(known).status, known.message)
                raise known from error
        return Response(status_code=CLIENT_LEFT)

    async def _answer(self, request: GenerationRequest, trace: Trace, resources: AsyncExitStack) -> Response:
        trace.receipt.tenant = tenant_of(request)
        model = await self._models.choose(request, trace)
        trace.on_finish(lambda _: self._receipts.keep(trace.receipt))
        trace.serve(model.name, bool(request.stream), request.end_user, getattr(request, "metadata", None))
        prompts = await prompts_of(request, model)
        trace.prompt_tokens(sum(len(prompt.token_ids) for prompt in prompts if isinstance(prompt, TokenPrompt)))
        prediction = await prediction_of(request, model)
        asked = engine_requests(request, prompts, prediction, model.card, self._limits)
        answers = merged(generating(model.engine, trace.receipt), asked)
        items = trace.observe(_within(answers, self._limits.request_timeout_s))
        resources.push_async_callback(items.aclose)
        form = self._format(request, model, prompts)
        if request.stream:
            # Errors before the first item still have a status of their own.
            first = await anext(items)
            return EventStream(self._events(first, items, form, request, trace))
        choices = joined([delta async for item in items for delta in item])
        body = form.whole(choices, usage_body(trace.usages(), request.num_choices))
        if request.receipt:
            body["receipt"] = trace.summed_up().body()
        trace.finish(200)
        return JSONResponse(body)

    async def _events(
        self, first: tuple[Delta, ...], items: Items, form: Format, request: GenerationRequest, trace: Trace
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield _encoded(first, form)
            async for item in items:
                yield _encoded(item, form)
            usage = usage_body(trace.usages(), request.num_choices)
            last = event(form.usage_chunk(usage)) if request.include_usage else b""
            if request.receipt:
                last += event(form.receipt_chunk(trace.summed_up().body()))
            yield last + DONE
            trace.finish(200)
        except Exception as error:  # noqa: BLE001  # the border: the status is sent, so the error is an event
            answer = describe(self._known(error))
            trace.finish(answer.status, answer.message)
            yield error_event(answer) + DONE

    def _format(self, request: GenerationRequest, model: ServedModel, prompts: Sequence[Prompt]) -> Format:
        prefix = "chatcmpl" if isinstance(request, ChatCompletionRequest) else "cmpl"
        header = Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model.name, self._fleet.config_hash)
        if isinstance(request, ChatCompletionRequest):
            return ChatFormat(header, request.include_usage, request.metadata, request.service_tier)
        texts = [model.prompts.text_of(prompt) for prompt in prompts] if request.echo else []
        echoes = [text for text in texts for _ in range(request.num_choices)]
        return CompletionFormat(header, request.include_usage, echoes)

    def _known(self, error: Exception) -> GatewayError | EngineError:
        if isinstance(error, GatewayError | EngineError):
            return error
        self._log.error("internal error", exc_info=error)
        return InternalError()


def _encoded(item: tuple[Delta, ...], form: Format) -> bytes:
    """All events of one engine step as one write; empty if there is nothing to tell."""
    return b"".join(event(chunk) for delta in item for chunk in form.chunks(delta))


async def _within(items: Items, limit_s: float) -> Items:
    """The same items, all of them within `limit_s` seconds from now. Raises RequestTimeoutError."""
    deadline = asyncio.get_running_loop().time() + limit_s
    async with aclosing(items):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(items, None)
            except TimeoutError as error:
                raise RequestTimeoutError(limit_s) from error
            if item is None:
                return
            yield item
