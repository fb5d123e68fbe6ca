"""What Prometheus may ask: requests, times, tokens, and the engines' own numbers (engine_metrics.py).

Counters are those of this ingress process. Behind several ingress replicas every scrape meets one of them, so each
labels its series with its own name; rates stay right per series.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from engines.types import EngineStats
from gateway.engine_metrics import EngineCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_NAMESPACE = "outrider"
_LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 600.0)
_GAP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 10.0)


class Metrics:
    """One registry per application, so that several can live in one process."""

    def __init__(self, ingress: str) -> None:
        self._ingress = ingress
        self._registry = CollectorRegistry(auto_describe=False)
        model = ("ingress", "model")
        self._requests = self._counter("requests", "Requests answered", (*model, "status"))
        self._in_flight = Gauge(
            "requests_in_flight", "Requests in progress", model, _NAMESPACE, registry=self._registry
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests", model)
        self._completion_tokens = self._counter("completion_tokens", "Tokens sent to clients", model)
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first item", _LATENCY_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between streamed items", _GAP_S)
        self._e2e = self._histogram("request_seconds", "Arrival to last item", _LATENCY_S)

    @property
    def ingress(self) -> str:
        return self._ingress

    @property
    def registry(self) -> CollectorRegistry:
        """For other parts of the same process."""
        return self._registry

    def requests_inc(self, model: str, status: int) -> None:
        self._requests.labels(self._ingress, model, str(status)).inc()

    def in_flight_add(self, model: str, change: int) -> None:
        self._in_flight.labels(self._ingress, model).inc(change)

    def tokens_add(self, model: str, prompt: int, completion: int) -> None:
        self._prompt_tokens.labels(self._ingress, model).inc(prompt)
        self._completion_tokens.labels(self._ingress, model).inc(completion)

    def observe_ttft(self, model: str, seconds: float) -> None:
        self._ttft.labels(self._ingress, model).observe(seconds)

    def observe_itl(self, model: str, seconds: float) -> None:
        self._itl.labels(self._ingress, model).observe(seconds)

    def observe_e2e(self, model: str, seconds: float) -> None:
        self._e2e.labels(self._ingress, model).observe(seconds)

    def exposition(self, engines: Mapping[str, EngineStats]) -> bytes:
        """Prometheus' text format: our counters, and these engines' numbers."""
        return generate_latest(self._registry) + generate_latest(EngineCollector(engines))

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, _NAMESPACE, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("ingress", "model"), _NAMESPACE, registry=self._registry, buckets=buckets)
