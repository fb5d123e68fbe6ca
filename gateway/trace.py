"""One request's story: what metrics count and the log line tells. Never a prompt, never an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from engines.types import Delta, Usage
from gateway.metrics import Metrics

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# nginx's status for a client that left before its answer; no client ever reads it.
CLIENT_LEFT = 499


class Trace:
    """Begins when a request arrives, ends with `finish`. Times are in seconds."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._metrics = metrics
        self._log = log
        self._model: str | None = None
        self._began_s = self._last_s = time.perf_counter()
        self._ttft_s: float | None = None
        self._finish_reasons: dict[int, str] = {}
        self._usages: dict[int, Usage] = {}
        self._num_prompt_tokens = 0
        self._num_tokens = 0
        self._finished = False

    def serve(self, model: str, stream: bool, user: str | None, metadata: Mapping[str, str] | None) -> None:
        """The request is understood and its model known."""
        self._model = model
        self._log = self._log.bind(model=model, stream=stream, user=user, metadata=metadata)
        self._metrics.in_flight_add(model, 1)

    def prompt_tokens(self, num_tokens: int) -> None:
        """What the gateway itself counted, until the engine's own count arrives."""
        self._num_prompt_tokens = num_tokens

    def usages(self) -> list[Usage]:
        """Of the choices that have finished, by index."""
        return [self._usages[index] for index in sorted(self._usages)]

    async def observe(self, items: AsyncGenerator[tuple[Delta, ...], None]) -> AsyncGenerator[tuple[Delta, ...], None]:
        """The same items, noted as they pass. Closes them when closed."""
        async with aclosing(items):
            async for item in items:
                self._note(item)
                yield item

    def finish(self, status: int, error: str | None = None) -> None:
        """Count the request and write its log line; later calls change nothing."""
        if self._finished:
            return
        self._finished = True
        elapsed_s = time.perf_counter() - self._began_s
        self._metrics.requests_inc(self._model or "", status)
        if self._model is not None:
            self._metrics.in_flight_add(self._model, -1)
            self._metrics.tokens_add(self._model, self._num_prompt_tokens if status == 200 else 0, self._num_tokens)
            self._metrics.observe_e2e(self._model, elapsed_s)
        self._log.info(
            "request",
            status=status,
            error=error,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in self._usages.values()),
            rejected_draft_tokens=sum(usage.rejected_draft_tokens for usage in self._usages.values()),
            finish_reasons=[self._finish_reasons[index] for index in sorted(self._finish_reasons)],
            ttft_s=None if self._ttft_s is None else round(self._ttft_s, 6),
            e2e_s=round(elapsed_s, 6),
        )

    def _note(self, item: tuple[Delta, ...]) -> None:
        assert self._model is not None
        now_s = time.perf_counter()
        if self._ttft_s is None:
            self._ttft_s = now_s - self._began_s
            self._metrics.observe_ttft(self._model, self._ttft_s)
        else:
            self._metrics.observe_itl(self._model, now_s - self._last_s)
        self._last_s = now_s
        for delta in item:
            self._num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._finish_reasons[delta.index] = delta.finish_reason
            if delta.usage is not None:
                self._usages[delta.index] = delta.usage
