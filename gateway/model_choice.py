"""Which model serves a request: the one it names, or for `auto` the one that the learned router chooses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gateway.auto.choice import Choice
from gateway.auto.chooser import AutoChooser
from gateway.auto.fleet_health import FleetHealth
from gateway.auto.prompt import GenerationRequest
from gateway.auto.router_watch import RouterWatch
from gateway.auto_config import AUTO
from gateway.config import GatewayConfig
from gateway.errors import BadRequestError
from gateway.fleet import Fleet, ServedModel
from gateway.receipts import JsonObject, Receipt
from gateway.request_log import RequestLog
from gateway.request_record import RecordMaker, ServedRequest
from gateway.router_metrics import RouterMetrics
from gateway.trace import FinishedRequest, Trace

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class ModelChooser:
    """Chooses models for one ingress process, and has the request log tell what came of it."""

    def __init__(
        self,
        config: GatewayConfig,
        fleet: Fleet,
        metrics: RouterMetrics,
        log: FilteringBoundLogger,
        request_log: RequestLog | None = None,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._request_log = request_log
        self._records: RecordMaker | None = None
        self._watch: RouterWatch | None = None
        self._auto: AutoChooser | None = None
        if config.auto is not None:
            replicas = {model.name: model.num_replicas for model in config.models}
            limits = {c.model: config.auto.saturated_waiting * replicas[c.model] for c in config.auto.candidates}
            health = FleetHealth(fleet, limits, config.auto.health_period_s, config.http.health_timeout_s)
            self._watch = RouterWatch(config.auto, metrics, log)
            self._auto = AutoChooser(config.auto, fleet, health, self._watch, metrics, log)

    async def start(self) -> None:
        """Load the router, if there is to be one. Must run in the event loop that will serve, after the log's start."""
        if self._request_log is not None:
            log = self._request_log
            self._records = RecordMaker(self._config, log.config, log.key, self._metrics)
        if self._auto is not None:
            await self._auto.start()

    async def close(self) -> None:
        if self._auto is not None:
            await self._auto.close()

    async def choose(self, request: GenerationRequest, trace: Trace) -> ServedModel:
        """The model that serves this request. Writes the receipt's section "model".

        Raises UnknownModelError, ModelNotReadyError, and BadRequestError for what has no meaning with a named model.
        """
        choice, auto = None, self._chooser(request)
        if auto is not None:
            choice = await auto.choose(request)
            trace.on_finish(partial(_answered, auto, choice))
        model = self._named(request) if choice is None else choice.model
        trace.receipt.add("model", self._receipt(model, choice))
        trace.on_finish(partial(self._to_log, request, choice, trace.receipt))
        return model

    async def explain(self, request: GenerationRequest) -> tuple[ServedModel, JsonObject]:
        """The model that would serve this request now, and the receipt's section; nothing is remembered or logged."""
        auto = self._chooser(request)
        if auto is not None:
            choice = await auto.explain(request)
            return choice.model, self._receipt(choice.model, choice)
        model = self._named(request)
        return model, self._receipt(model, None)

    def entry(self) -> JsonObject | None:
        """What /v1/models lists of `auto`; None where there is none, or none of its candidates is ready."""
        auto = self._config.auto
        ready = {model.name: model for model in self._fleet.ready()}
        models = [ready[c.model] for c in auto.candidates if c.model in ready] if auto is not None else []
        if not models:
            return None
        windows = [model.card.max_model_len for model in models]
        known = [window for window in windows if window is not None]
        return {
            "id": AUTO,
            "object": "model",
            "created": max(model.created for model in models),
            "owned_by": "outrider",
            "max_model_len": max(known) if len(known) == len(windows) else None,
            "config": self._fleet.config_hash,
            "details": {"candidates": ", ".join(model.name for model in models)},
        }

    def status(self) -> JsonObject | None:
        """The router that serves, for an operator; None where nothing is chosen automatically."""
        return None if self._watch is None else self._watch.status()

    def _chooser(self, request: GenerationRequest) -> AutoChooser | None:
        return self._auto if request.model == AUTO else None

    def _named(self, request: GenerationRequest) -> ServedModel:
        if request.quality is not None:
            raise BadRequestError('`quality` has a meaning only with `model` "auto".', param="quality")
        return self._fleet.get(request.model)

    def _receipt(self, model: ServedModel, choice: Choice | None) -> JsonObject:
        if choice is None or self._config.auto is None:
            return {"asked": model.name, "chosen": model.name, "reason": "named"}
        return choice.receipt(self._config.auto)

    def _to_log(
        self, request: GenerationRequest, choice: Choice | None, receipt: Receipt, finished: FinishedRequest
    ) -> None:
        if self._request_log is None or self._records is None:
            return
        served = ServedRequest(receipt.request_id, receipt.created_s, request, choice, finished)
        shadow = None if self._watch is None else self._watch.shadow
        self._request_log.put(partial(self._records.make, served, shadow))


def _answered(auto: AutoChooser, choice: Choice, finished: FinishedRequest) -> None:
    if finished.status == 200:
        auto.answered(choice, finished.prompt_tokens + finished.completion_tokens)
