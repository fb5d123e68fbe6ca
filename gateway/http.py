"""The FastAPI application: routes, and errors as OpenAI's clients expect them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from engines.errors import EngineError
from engines.protocol import Engine
from engines.types import EngineStats
from gateway.answers import JsonObject
from gateway.auto_config import AUTO
from gateway.config import GatewayConfig
from gateway.door import AnswerHeaders
from gateway.errors import ErrorAnswer, GatewayError, describe
from gateway.fleet import Fleet, ServedModel
from gateway.ingress import Ingress
from gateway.log import make_logger
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.model_choice import ModelChooser
from gateway.openai import ChatCompletionRequest, CompletionRequest
from gateway.receipt_shelf import ReceiptShelf, Shared
from gateway.receipts import ReceiptStore
from gateway.request_log import RequestLog
from gateway.route_api import add_route_routes
from gateway.router_api import add_router_routes
from gateway.router_metrics import RouterMetrics
from gateway.routing_metrics import RoutingCollector

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def make_app(
    config: GatewayConfig,
    engines: Mapping[str, Engine],
    name: str = "ingress",
    names_requests: bool = True,
    shared_receipts: Shared | None = None,
    startup_wait_s: float = 0.0,
    on_started: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application over these engines, by model name; they are started and closed with it.

    `name` tells this process apart from its replicas in metrics. `names_requests`: whether to put x-request-id on
    answers. `shared_receipts` is where other gateways' receipts are found. Startup waits for the models
    for `startup_wait_s`; `on_started` is called when everything is loaded. The fleet is `app.state.fleet`.
    """
    fleet = Fleet(config, engines)
    metrics = Metrics(name)
    log = make_logger(config.log_level)
    router_metrics = RouterMetrics(metrics.ingress, metrics.registry)
    request_log = None if config.request_log is None else RequestLog(config.request_log, router_metrics, log)
    chooser = ModelChooser(config, fleet, router_metrics, log, request_log)
    receipts = ReceiptShelf(ReceiptStore(), shared_receipts)
    metrics.registry.register(RoutingCollector(name, engines))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        fleet.start()
        if request_log is not None:
            request_log.start()
        await chooser.start()
        await fleet.wait(startup_wait_s)
        on_started()
        yield
        await chooser.close()
        await fleet.close()
        await receipts.close()
        if request_log is not None:
            await asyncio.to_thread(request_log.close)

    app = FastAPI(title="Outrider", lifespan=lifespan)
    app.state.fleet = fleet
    app.add_middleware(AnswerHeaders, config_hash=lambda: fleet.config_hash, names_requests=names_requests)
    app.add_exception_handler(GatewayError, _answer_error)
    app.add_exception_handler(EngineError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    _add_generation_routes(app, Ingress(config.http, fleet, chooser, receipts, metrics, log))
    _add_model_routes(app, fleet, chooser)
    add_router_routes(app, chooser, request_log, config.http)
    add_route_routes(app, chooser, receipts, config.http)
    _add_operator_routes(app, fleet, metrics, config.http.health_timeout_s, log)
    return app


def _add_generation_routes(app: FastAPI, ingress: Ingress) -> None:
    # The handlers parse the body themselves: strictly, in bounded memory, and with OpenAI's words for what is wrong.
    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        return await ingress.serve(request, ChatCompletionRequest)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await ingress.serve(request, CompletionRequest)


def _add_model_routes(app: FastAPI, fleet: Fleet, chooser: ModelChooser) -> None:
    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The models that can be asked now."""
        auto = chooser.entry()
        data = [_model_entry(model, fleet) for model in fleet.ready()] + ([auto] if auto is not None else [])
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> JSONResponse:
        auto = chooser.entry() if model == AUTO else None
        return JSONResponse(_model_entry(fleet.get(model), fleet) if auto is None else auto)


def _add_operator_routes(
    app: FastAPI, fleet: Fleet, metrics: Metrics, timeout_s: float, log: FilteringBoundLogger
) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """This process is alive."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """All engines can serve; 503 names those that cannot, and why."""
        troubles = await fleet.troubles(timeout_s)
        if troubles:
            return JSONResponse({"status": "not ready", "models": troubles}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus' text format. An engine that does not answer is left out, and logged."""
        models = fleet.ready()
        found = await asyncio.gather(*(_stats(model, timeout_s, log) for model in models))
        stats = {model.name: snapshot for model, snapshot in zip(models, found, strict=True) if snapshot is not None}
        return Response(metrics.exposition(stats), headers={"content-type": CONTENT_TYPE})


async def _stats(model: ServedModel, timeout_s: float, log: FilteringBoundLogger) -> EngineStats | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await model.engine.stats()
    except (EngineError, TimeoutError) as error:
        log.warning("no engine stats", model=model.name, error=str(error))
        return None


def _model_entry(model: ServedModel, fleet: Fleet) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "outrider",
        "max_model_len": model.card.max_model_len,
        "fingerprint": model.card.fingerprint,
        "config": fleet.config_hash,
        "details": model.card.details,
    }


def _documented(request_class: type[BaseModel]) -> dict[str, object]:
    schema = request_class.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError | EngineError)
    answer = describe(error)
    return JSONResponse(answer.body(), answer.status, answer.headers())


async def _answer_http_error(_: Request, error: Exception) -> Response:
    """HTTP's own refusals: unknown path, wrong method, slow body."""
    assert isinstance(error, HTTPException)
    answer = ErrorAnswer(error.status_code, str(error.detail), "invalid_request_error")
    return JSONResponse(answer.body(), answer.status, error.headers)
