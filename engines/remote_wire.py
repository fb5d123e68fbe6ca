"""OpenAI's wire format, inwards: a stream of chunks as deltas.

Where the format is silent or servers differ:

- `usage` counts all choices together, draft tokens as well. For n > 1 the sum over our choices is exact; it is divided
  in proportion to the tokens (with logprobs) or chunks that each choice received. Where a server sends no usage the
  counts are 0: not told, rather than guessed.
- finish_reason "content_filter" is reported as "abort", since the server, not the model, ended the output. Anything
  else that was not asked for (tool calls) raises RemoteServerError.
- Reasoning that a server sends apart from the content is not part of the completion's text.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from pydantic import BaseModel, Field

from engines.errors import EngineDeadError, RemoteServerError
from engines.remote_errors import event_error
from engines.types import Delta, FinishReason, GenerateRequest, TokenLogprob, TopLogprob, Usage

_BAD_GATEWAY = HTTPStatus.BAD_GATEWAY.value  # the status of an answer that makes no sense
_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",  # TGI
    "stop_sequence": "stop",  # TGI
    "length": "length",
    "abort": "abort",  # vLLM
    "content_filter": "abort",
}


class _ChatCandidate(BaseModel):
    token: str
    logprob: float
    utf8: list[Annotated[int, Field(ge=0, le=255)]] | None = Field(default=None, alias="bytes")

    def candidate(self) -> TopLogprob:
        return TopLogprob(self.token, self.logprob, None, None if self.utf8 is None else bytes(self.utf8))


class _ChatToken(_ChatCandidate):
    top_logprobs: list[_ChatCandidate] | None = None


class _Logprobs(BaseModel):
    """Chat answers have `content`; completions have the parallel lists, without bytes."""

    content: list[_ChatToken] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None

    def entries(self, num_top: int) -> tuple[TokenLogprob, ...]:
        """In our form, with the `num_top` best: some servers add the emitted token to them.

        Raises ValueError if the lists differ in length.
        """
        tokens = self.tokens or []
        tops = self.top_logprobs or [None] * len(tokens)
        told = [
            (TopLogprob(token, logprob), [TopLogprob(other, value) for other, value in (top or {}).items()])
            for token, logprob, top in zip(tokens, self.token_logprobs or [], tops, strict=True)
        ]
        told += [(c.candidate(), [top.candidate() for top in c.top_logprobs or ()]) for c in self.content or ()]
        return tuple(_entry(own, top, num_top) for own, top in told)


def _entry(own: TopLogprob, top: list[TopLogprob], num_top: int) -> TokenLogprob:
    best = sorted(top, key=lambda candidate: -candidate.logprob)[:num_top]
    return TokenLogprob(own.token, own.logprob, own.token_id, own.token_bytes, tuple(best))


class _Message(BaseModel):
    content: str | None = None


class _WireChoice(BaseModel):
    index: int = 0
    text: str | None = None  # of a completion
    delta: _Message | None = None  # of a chat
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # vLLM

    @property
    def new_text(self) -> str:
        return self.text or (self.delta.content if self.delta is not None else None) or ""


class _CachedTokens(BaseModel):
    cached_tokens: int | None = None


class _DraftTokens(BaseModel):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class _WireUsage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None
    completion_tokens_details: _DraftTokens | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None) or 0

    @property
    def draft_tokens(self) -> tuple[int, int]:
        """Accepted and rejected."""
        told = self.completion_tokens_details or _DraftTokens()
        return told.accepted_prediction_tokens or 0, told.rejected_prediction_tokens or 0


class _Chunk(BaseModel):
    choices: list[_WireChoice] = Field(default_factory=list)
    usage: _WireUsage | None = None
    error: object = None
    # An error event of vLLM before 0.10 is flat.
    kind: str | None = Field(default=None, alias="object")
    message: object = None
    code: object = None

    def check(self) -> None:
        """Raise what an error event says."""
        if self.error is not None:
            raise event_error(self.error)
        if self.kind == "error":
            raise event_error({"message": self.message, "code": self.code})


class ChunkReader:
    """Makes deltas of one stream's chunks. How a choice ended is kept for `finish`: usage comes after all of them."""

    def __init__(self, request: GenerateRequest) -> None:
        self._num_top = request.sampling.logprobs
        self._usage: _WireUsage | None = None
        self._ends: dict[int, tuple[FinishReason, str | int | None]] = {}
        self._weights = [0] * request.n  # by choice: tokens where log-probabilities tell them apart, else chunks
        self._has_logprobs = False

    @property
    def has_usage(self) -> bool:
        return self._usage is not None

    def read(self, data: str) -> tuple[Delta, ...]:
        """The news in one event's data. Raises RemoteServerError for what is no chunk, and what an error event says."""
        try:
            chunk = _Chunk.model_validate_json(data)
            chunk.check()
            deltas = [self._delta(choice) for choice in chunk.choices]
        except ValueError as error:  # pydantic's ValidationError is one
            raise RemoteServerError(f"The server sent no valid chunk: {data[:200]!r}", _BAD_GATEWAY) from error
        self._usage = chunk.usage or self._usage
        return tuple(delta for delta in deltas if delta.text or delta.logprobs)

    def finish(self) -> tuple[Delta, ...]:
        """The last delta of each choice. Raises EngineDeadError if the stream broke off before they all ended."""
        if len(self._ends) < len(self._weights):
            raise EngineDeadError("The server's stream broke off before the completion ended.")
        if self._num_top is not None and any(self._weights) and not self._has_logprobs:
            raise RemoteServerError("The server sent none of the log-probabilities asked for.", _BAD_GATEWAY)
        usage = self._usage or _WireUsage()
        return tuple(
            Delta(index, finish_reason=reason, stop_reason=stop_reason, usage=self._share(usage, index))
            for index, (reason, stop_reason) in sorted(self._ends.items())
        )

    def _delta(self, choice: _WireChoice) -> Delta:
        if not 0 <= choice.index < len(self._weights):
            raise ValueError(f"{choice.index} is no index of {len(self._weights)} choices")
        if choice.finish_reason is not None:
            self._ends[choice.index] = (_finish_reason(choice.finish_reason), choice.stop_reason)
        logprobs = None
        if self._num_top is not None and choice.logprobs is not None:
            logprobs = choice.logprobs.entries(self._num_top)
            self._has_logprobs |= bool(logprobs)
        self._weights[choice.index] += len(logprobs) if logprobs is not None else bool(choice.new_text)
        return Delta(choice.index, choice.new_text, logprobs=logprobs)

    def _share(self, usage: _WireUsage, index: int) -> Usage:
        """The rounding errors of running sums cancel out, so the shares add up to the whole."""
        weights = self._weights if any(self._weights) else [1] * len(self._weights)

        def share(count: int) -> int:
            until, after = (count * sum(weights[:i]) // sum(weights) for i in (index, index + 1))
            return after - until

        accepted, rejected = map(share, usage.draft_tokens)
        return Usage(usage.prompt_tokens, share(usage.completion_tokens), usage.cached_tokens, accepted, rejected)


def _finish_reason(told: str) -> FinishReason:
    reason = _FINISH_REASONS.get(told)
    if reason is None:
        raise RemoteServerError(f"The server ended the completion with finish_reason {told!r}.", _BAD_GATEWAY)
    return reason
