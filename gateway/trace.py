"""One request's story: what metrics count and the log line tells. Never a prompt, never an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.types import Delta, DraftCounts, Usage
from gateway.metrics import Metrics
from gateway.receipts import Receipt

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# nginx's status for a client that left before its answer; no client ever reads it.
CLIENT_LEFT = 499


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What became of a request. `model` is None where none was chosen; `ttft_s` where nothing was answered.

    `finish_reasons` and `usages` are those of the choices that have finished, by index.
    """

    status: int
    error: str | None
    model: str | None
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None
    e2e_s: float
    finish_reasons: tuple[str, ...]
    usages: tuple[Usage, ...]

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, as the engines found them: choices of one prompt share theirs."""
        return max((usage.cached_tokens for usage in self.usages), default=0)

    @property
    def accepted_draft_tokens(self) -> int:
        return sum(usage.accepted_draft_tokens for usage in self.usages)

    @property
    def rejected_draft_tokens(self) -> int:
        return sum(usage.rejected_draft_tokens for usage in self.usages)

    @property
    def drafters(self) -> dict[str, DraftCounts]:
        """Of all choices, by the drafter whose drafts they were; empty where the engine does not know."""
        found: dict[str, DraftCounts] = {}
        for name, counts in (item for usage in self.usages for item in usage.drafters.items()):
            found[name] = found.get(name, DraftCounts()) + counts
        return found


class Trace:
    """Begins when a request arrives, ends with `finish`. Times are in seconds.

    `receipt` collects what was decided about the request; the tenant is filled in when the request is understood.
    """

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger, request_id: str) -> None:
        self.receipt = Receipt(request_id)
        self._metrics = metrics
        self._log = log
        self._on_finish: list[Callable[[FinishedRequest], None]] = []
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

    def on_finish(self, callback: Callable[[FinishedRequest], None]) -> None:
        """Have `callback` called once, when the request is over, whichever way."""
        self._on_finish.append(callback)

    def finish(self, status: int, error: str | None = None) -> None:
        """Count the request, write its log line, and tell whoever asked to be told; later calls change nothing."""
        if self._finished:
            return
        self._finished = True
        self.summed_up()
        finished = self._finished_request(status, error)
        self._count(finished)
        self._log.info(
            "request",
            status=status,
            error=error,
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            accepted_draft_tokens=finished.accepted_draft_tokens,
            rejected_draft_tokens=finished.rejected_draft_tokens,
            finish_reasons=list(finished.finish_reasons),
            ttft_s=None if finished.ttft_s is None else round(finished.ttft_s, 6),
            e2e_s=round(finished.e2e_s, 6),
        )
        for callback in self._on_finish:
            callback(finished)

    def summed_up(self) -> Receipt:
        """The receipt with what is known so far of tokens, drafts and times."""
        so_far = self._finished_request(0, None)
        self.receipt.add(
            "speculation",
            {
                "accepted_draft_tokens": so_far.accepted_draft_tokens,
                "rejected_draft_tokens": so_far.rejected_draft_tokens,
                "drafters": {
                    name: {"drafted": counts.num_drafted, "accepted": counts.num_accepted}
                    for name, counts in so_far.drafters.items()
                },
            },
        )
        self.receipt.add(
            "usage",
            {
                "prompt_tokens": so_far.prompt_tokens,
                "cached_tokens": so_far.cached_tokens,
                "completion_tokens": so_far.completion_tokens,
                "ttft_s": None if so_far.ttft_s is None else round(so_far.ttft_s, 6),
                "e2e_s": round(so_far.e2e_s, 6),
            },
        )
        return self.receipt

    def _finished_request(self, status: int, error: str | None) -> FinishedRequest:
        return FinishedRequest(
            status=status,
            error=error,
            model=self._model,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            ttft_s=self._ttft_s,
            e2e_s=time.perf_counter() - self._began_s,
            finish_reasons=tuple(self._finish_reasons[index] for index in sorted(self._finish_reasons)),
            usages=tuple(self.usages()),
        )

    def _count(self, finished: FinishedRequest) -> None:
        self._metrics.requests_inc(self._model or "", finished.status)
        if self._model is not None:
            self._metrics.in_flight_add(self._model, -1)
            num_prompt_tokens = finished.prompt_tokens if finished.status == 200 else 0
            self._metrics.tokens_add(self._model, num_prompt_tokens, finished.completion_tokens)
            self._metrics.observe_e2e(self._model, finished.e2e_s)

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
