"""What Prometheus may ask about the learned choice of models and the request log."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_NAMESPACE = "outrider"
_DECISION_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1, 0.25, 1.0)


class RouterMetrics:
    """Counters of one ingress process, in its registry. May be used from any thread."""

    def __init__(self, ingress: str, registry: CollectorRegistry) -> None:
        self._ingress = ingress
        self._registry = registry
        self._choices = self._counter("auto_choices", "Models chosen", "model", "mechanism")
        self._decision = Histogram(
            "auto_decision_seconds",
            "Time of a choice",
            ("ingress",),
            _NAMESPACE,
            registry=registry,
            buckets=_DECISION_S,
        )
        self._load_failures = self._counter("router_load_failures", "Routers that could not be loaded")
        self._shadow = self._counter("shadow_choices", "What the shadow would have chosen", "agrees")
        self._records = self._counter("request_log_records", "Records written to the request log")
        self._dropped = self._counter("request_log_dropped", "Records that were not written", "reason")

    def chosen(self, model: str, mechanism: str, seconds: float) -> None:
        self._choices.labels(self._ingress, model, mechanism).inc()
        self._decision.labels(self._ingress).observe(seconds)

    def load_failures_inc(self) -> None:
        self._load_failures.labels(self._ingress).inc()

    def shadow_inc(self, agrees: bool) -> None:
        self._shadow.labels(self._ingress, str(agrees).lower()).inc()

    def records_inc(self, count: int) -> None:
        self._records.labels(self._ingress).inc(count)

    def dropped_inc(self, reason: str, count: int = 1) -> None:
        """`reason`: queue (full), disk (an error of it) or record (one that could not be made)."""
        self._dropped.labels(self._ingress, reason).inc(count)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("ingress", *labels), _NAMESPACE, registry=self._registry)
