"""One line of the request log, made when the request is over, in the log's own thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gateway.auto.choice import Choice
from gateway.auto.prompt import GenerationRequest, turns_of
from gateway.config import GatewayConfig
from gateway.openai import ChatCompletionRequest
from gateway.redaction import redact
from gateway.request_log_config import PromptLogging, RequestLogConfig
from gateway.router_metrics import RouterMetrics
from gateway.tenant import tenant_of
from gateway.tenant_digest import keyed_digest, tenant_digest
from gateway.trace import CLIENT_LEFT, FinishedRequest
from router_models.policy import decide
from router_models.policy_config import BoundGoal
from router_models.prompt import Turn
from router_models.records import LoggedDecision, LoggedDrafter, LoggedPrompt, LoggedTurn, LoggedUse, RequestRecord

if TYPE_CHECKING:
    from gateway.auto.router_watch import Active
    from router_models.scorer import Score


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A request and what was decided about it. `choice` is None where it named its model."""

    request_id: str
    time_s: float
    request: GenerationRequest
    choice: Choice | None
    finished: FinishedRequest


class RecordMaker:
    """Makes records as this gateway's operator wants them. Used from one thread."""

    def __init__(self, config: GatewayConfig, log: RequestLogConfig, key: bytes, metrics: RouterMetrics) -> None:
        self._config = config
        self._log = log
        self._key = key
        self._metrics = metrics

    def make(self, served: ServedRequest, shadow: Active | None = None) -> RequestRecord:
        """The record of a finished request; `shadow` says what it would have decided."""
        request, choice = served.request, served.choice
        score = None if choice is None else choice.score
        return RequestRecord(
            request_id=served.request_id,
            time=served.time_s,
            tenant=tenant_digest(self._key, tenant_of(request)),
            source=self._log.source,
            subset=self._subset(request),
            prompt=logged_prompt(turns_of(request), self._log.prompt, self._key),
            features=None if score is None else _features(score),
            max_tokens=request.wanted_tokens(),
            decision=None if choice is None else choice.logged(self._policy_version),
            shadow=None if choice is None or shadow is None else self._shadow(choice, shadow),
            use=None if served.finished.model is None else self._use(served.finished),
        )

    @property
    def _policy_version(self) -> str:
        return "" if self._config.auto is None else self._config.auto.policy.version

    def _subset(self, request: GenerationRequest) -> str:
        if self._log.subset_key is None or not isinstance(request, ChatCompletionRequest):
            return ""
        return (request.metadata or {}).get(self._log.subset_key, "")

    def _shadow(self, choice: Choice, shadow: Active) -> LoggedDecision | None:
        """The decision on the same candidates by the shadow's probabilities and its own threshold."""
        if self._config.auto is None or choice.score is None:
            return None
        score = shadow.router.score_again(choice.prompt, choice.score.features)
        if not isinstance(self._config.auto.policy.goal, BoundGoal):
            score = score.adapted(shadow.drift.share)
        candidates = tuple(
            replace(candidate, prob_right=prob_right)
            for candidate, prob_right in zip(choice.candidates, score.prob_right, strict=True)
        )
        situation = replace(
            choice.situation, need=score.need, threshold=shadow.threshold.value(), abstains=score.abstains
        )
        decision = decide(self._config.auto.policy, candidates, situation, draw=0.0)
        shadow.observe(score, situation, decision)
        self._metrics.shadow_inc(decision.model == choice.decision.preferred)
        return replace(
            choice,
            candidates=candidates,
            situation=situation,
            decision=decision,
            mechanism=decision.mechanism,
            score=score,
            artifact=shadow.router.version,
            feature_version=shadow.router.feature_version,
        ).logged(self._policy_version)

    def _use(self, finished: FinishedRequest) -> LoggedUse:
        assert finished.model is not None
        entry = None if self._config.auto is None else self._config.auto.candidate(finished.model)
        return LoggedUse(
            model=finished.model,
            input_tokens=finished.prompt_tokens,
            output_tokens=finished.completion_tokens,
            ttft_s=finished.ttft_s,
            tpot_s=_tpot_s(finished),
            cost_usd=0.0 if entry is None else entry.cost_usd(finished.prompt_tokens, finished.completion_tokens),
            finish_reason=_finish_reason(finished),
            num_drafted=finished.accepted_draft_tokens + finished.rejected_draft_tokens,
            num_accepted=finished.accepted_draft_tokens,
            drafters={
                name: LoggedDrafter(num_drafted=counts.num_drafted, num_accepted=counts.num_accepted)
                for name, counts in finished.drafters.items()
            },
        )


def logged_prompt(turns: Sequence[Turn] | None, kind: PromptLogging, key: bytes) -> LoggedPrompt | None:
    """As much of a conversation as the log may keep."""
    if turns is None or kind == "off":
        return None
    if kind == "hashed":
        return LoggedPrompt(kind="hashed", sha256=keyed_digest(key, repr([(turn.role, turn.text) for turn in turns])))
    texts = [redact(turn.text) if kind == "redacted" else turn.text for turn in turns]
    kept = tuple(LoggedTurn(role=turn.role, text=text) for turn, text in zip(turns, texts, strict=True))
    return LoggedPrompt(kind=kind, turns=kept)


def _features(score: Score) -> dict[str, float]:
    from router_models.structure import FEATURE_NAMES

    values = [round(float(value), 5) for value in score.features.structure[0]]
    return dict(zip(FEATURE_NAMES, values, strict=True))


def _tpot_s(finished: FinishedRequest) -> float | None:
    if finished.ttft_s is None or finished.completion_tokens < 2:
        return None
    return max(0.0, finished.e2e_s - finished.ttft_s) / (finished.completion_tokens - 1)


def _finish_reason(finished: FinishedRequest) -> str | None:
    if finished.status == CLIENT_LEFT:
        return "abort"
    if finished.status != 200:
        return "error"
    return finished.finish_reasons[0] if finished.finish_reasons else None
