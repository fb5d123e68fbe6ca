"""Routes of the learned choice: what became known about an answer, and which router serves."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.config import HttpConfig
from gateway.door import read_body
from gateway.errors import NoRequestLogError
from gateway.model_choice import ModelChooser
from gateway.openai import parse
from gateway.request_log import RequestLog
from gateway.tenant import tenant_of
from gateway.tenant_digest import tenant_digest
from router_models.records import OutcomeRecord

_MAX_BODY_BYTES = 16_384

Score = Annotated[float, Field(ge=0.0, le=1.0)]


class FeedbackRequest(BaseModel):
    """POST /v1/feedback: how good an answer was, in one of three ways."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    request_id: str = Field(min_length=1, max_length=128, description="the answer's x-request-id")
    score: Score | None = Field(default=None, description="0 useless, 1 perfect")
    correct: bool | None = None
    re_ask: Literal[True] | None = Field(default=None, description="the user had to ask again")
    cache_salt: str | None = Field(default=None, max_length=512, description="the request's, where it had one")

    @model_validator(mode="after")
    def _one_outcome(self) -> FeedbackRequest:
        if sum(value is not None for value in (self.score, self.correct, self.re_ask)) != 1:
            raise ValueError("exactly one of `score`, `correct` and `re_ask` is to be given")
        return self

    def outcome(self, key: bytes, time_s: float) -> OutcomeRecord:
        """The record of it, in the name of the tenant that sent it."""
        label: Literal["feedback", "correctness", "re_ask"] = "re_ask"
        value = 0.0
        if self.score is not None:
            label, value = "feedback", self.score
        elif self.correct is not None:
            label, value = "correctness", float(self.correct)
        tenant = tenant_digest(key, tenant_of(self))
        return OutcomeRecord(request_id=self.request_id, time=time_s, label=label, score=value, tenant=tenant)


def add_router_routes(app: FastAPI, chooser: ModelChooser, request_log: RequestLog | None, limits: HttpConfig) -> None:
    """`POST /v1/feedback` and `GET /v1/router`."""

    @app.post("/v1/feedback", openapi_extra=_documented(FeedbackRequest))
    async def feedback(request: Request) -> JSONResponse:
        """Keep an outcome with the request's record, wherever that is by now; answers when it is on disk."""
        body = await read_body(request, min(limits.max_body_bytes, _MAX_BODY_BYTES), limits.body_timeout_s)
        told = parse(FeedbackRequest, body)
        if request_log is None:
            raise NoRequestLogError
        await request_log.write(told.outcome(request_log.key, time.time()))
        return JSONResponse({"object": "feedback", "request_id": told.request_id, "status": "stored"})

    @app.get("/v1/router")
    async def router() -> JSONResponse:
        """The artifact that chooses, and why another one could not be loaded."""
        return JSONResponse({"object": "router", "auto": chooser.status()})


def _documented(request_class: type[BaseModel]) -> dict[str, object]:
    schema = request_class.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
