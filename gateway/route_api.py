"""Decisions, shown: POST /v1/route makes one without inference, GET /v1/receipts/{id} finds one that was made."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import unquote

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse

from gateway.answers import JsonObject
from gateway.config import HttpConfig
from gateway.door import read_body
from gateway.errors import BadRequestError, UnknownReceiptError
from gateway.generation import engine_requests, prompts_of
from gateway.model_choice import ModelChooser
from gateway.openai import ChatCompletionRequest, CompletionRequest, parse
from gateway.receipt_shelf import ReceiptShelf
from gateway.replica_receipt import SECTION, replica_section

_MAX_TENANT = 512  # cache_salt's own limit


def add_route_routes(app: FastAPI, models: ModelChooser, receipts: ReceiptShelf, limits: HttpConfig) -> None:
    """Both read a tenant's own only: a decision through the salt in its body, a receipt through the header."""

    @app.post("/v1/route")
    async def route(http: Request) -> JSONResponse:
        """Where this request would go now, and why. The body is that of a chat or a text completion."""
        body = await read_body(http, limits.max_body_bytes, limits.body_timeout_s)
        return JSONResponse(await _route(_parsed(body), models, limits))

    @app.get("/v1/receipts/{request_id:path}")
    async def receipt(
        request_id: str, cache_salt: Annotated[str, Header(alias="x-outrider-cache-salt")] = ""
    ) -> JSONResponse:
        """The receipt of a request of this tenant: by its x-request-id, and by its `cache_salt` if it had one, in the
        header, percent-encoded where it is not plain ASCII."""
        tenant = unquote(cache_salt)
        if len(tenant) > _MAX_TENANT:
            raise BadRequestError(f"x-outrider-cache-salt is longer than {_MAX_TENANT} characters.")
        found = await receipts.get(request_id, tenant)
        if found is None:
            raise UnknownReceiptError(request_id)
        return JSONResponse(found.body())


async def _route(
    request: ChatCompletionRequest | CompletionRequest, models: ModelChooser, limits: HttpConfig
) -> JsonObject:
    model, section = await models.explain(request)
    prompts = await prompts_of(request, model)
    asked = engine_requests(request, prompts, None, model.card, limits)
    return {"object": "route", "model": section, SECTION: await replica_section(model.engine, asked)}


def _parsed(body: bytes) -> ChatCompletionRequest | CompletionRequest:
    """What has `messages` is a chat. Raises BadRequestError."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None  # whatever it is, the parser says it better
    if isinstance(document, dict) and "messages" not in document and "prompt" in document:
        return parse(CompletionRequest, body)
    return parse(ChatCompletionRequest, body)
