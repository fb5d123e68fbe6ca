"""From deltas to the bodies of OpenAI's answers, whole and in chunks, for both endpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engines.errors import EngineDeadError
from engines.types import Delta, Piece, TokenLogprob, TopLogprob, Usage

JsonObject = dict[str, object]

# JSON has no -Infinity; this is the value OpenAI uses for "very unlikely".
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Header:
    """What every body of one answer repeats. `created` is in seconds since 1970."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Format(Protocol):
    """One endpoint's way of saying it. Instances serve one answer: chunks depend on the chunks before."""

    def chunks(self, delta: Delta) -> Iterator[JsonObject]:
        """The chunks that tell this delta; none if there is nothing to tell yet."""
        ...

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        """The last chunk, if usage was asked for."""
        ...

    def receipt_chunk(self, receipt: JsonObject) -> JsonObject:
        """The very last, if the receipt was asked for."""
        ...

    def whole(self, choices: Sequence[Delta], usage: JsonObject) -> JsonObject:
        """The answer in one piece; `choices` are the merged deltas of each choice, by index."""
        ...


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self,
        header: Header,
        include_usage: bool = False,
        metadata: dict[str, str] | None = None,
        service_tier: str | None = None,
    ) -> None:
        self._header = header
        self._include_usage = include_usage
        # The tier that served: there is one. Named only to those who asked, as OpenAI does.
        self._tier: JsonObject = {} if service_tier is None else {"service_tier": "default"}
        self._metadata: JsonObject = {} if metadata is None else {"metadata": metadata}
        self._opened: set[int] = set()

    def chunks(self, delta: Delta) -> Iterator[JsonObject]:
        nobody = _provenance(None if delta.provenance is None else ())
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            yield self._chunk([_chat_choice(delta.index, {"role": "assistant", "content": ""}) | nobody])
        # A token without text of its own still has its log-probability and its origin to tell.
        if delta.text or delta.logprobs or delta.provenance:
            choice = _chat_choice(delta.index, {"content": delta.text}, logprobs=delta.logprobs)
            yield self._chunk([choice | _provenance(delta.provenance)])
        if delta.finish_reason is not None:
            yield self._chunk([_chat_choice(delta.index, {}, finish_reason=_finish_reason(delta)) | nobody])

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        return self._chunk([]) | {"usage": usage}

    def receipt_chunk(self, receipt: JsonObject) -> JsonObject:
        return self._chunk([]) | {"receipt": receipt}

    def whole(self, choices: Sequence[Delta], usage: JsonObject) -> JsonObject:
        return (
            _body(self._header, "chat.completion", [self._choice(choice) for choice in choices])
            | {"usage": usage}
            | self._tier
            | self._metadata
        )

    def _choice(self, choice: Delta) -> JsonObject:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": _finish_reason(choice),
        } | _provenance(choice.provenance)

    def _chunk(self, choices: list[JsonObject]) -> JsonObject:
        usage: JsonObject = {"usage": None} if self._include_usage else {}
        return _body(self._header, "chat.completion.chunk", choices) | usage | self._tier


@dataclass(slots=True)
class CompletionFormat:
    """text_completion. `echoes` are the prompts to repeat before the choices, by choice index; empty without `echo`."""

    header: Header
    include_usage: bool = False
    echoes: Sequence[str] = ()
    # Characters of each choice told so far: `text_offset` counts from the choice's beginning.
    _offsets: dict[int, int] = field(default_factory=dict)

    def chunks(self, delta: Delta) -> Iterator[JsonObject]:
        echo = "" if delta.index in self._offsets else self._echo(delta.index)
        if echo or delta.text or delta.logprobs or delta.provenance or delta.finish_reason is not None:
            usage: JsonObject = {"usage": None} if self.include_usage else {}
            yield _body(self.header, "text_completion", [self._choice(delta, echo)]) | usage

    def usage_chunk(self, usage: JsonObject) -> JsonObject:
        return _body(self.header, "text_completion", []) | {"usage": usage}

    def receipt_chunk(self, receipt: JsonObject) -> JsonObject:
        return _body(self.header, "text_completion", []) | {"receipt": receipt}

    def whole(self, choices: Sequence[Delta], usage: JsonObject) -> JsonObject:
        told = [self._choice(choice, self._echo(choice.index)) for choice in choices]
        return _body(self.header, "text_completion", told) | {"usage": usage}

    def _choice(self, delta: Delta, echo: str) -> JsonObject:
        return {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": None if delta.finish_reason is None else _finish_reason(delta),
        } | _provenance(delta.provenance, echo)

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""

    def _logprobs(self, delta: Delta) -> JsonObject | None:
        offset = self._offsets.setdefault(delta.index, 0)
        if delta.logprobs is None:
            return None
        offsets = []
        for entry in delta.logprobs:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[delta.index] = offset
        return {
            "tokens": [entry.token for entry in delta.logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in delta.logprobs],
            # The emitted token is always told, so there may be one more than asked for.
            "top_logprobs": [
                {top.token: _finite(top.logprob) for top in (*entry.top, entry)} for entry in delta.logprobs
            ],
            "text_offset": offsets,
        }


def usage_body(usages: Sequence[Usage], n: int) -> JsonObject:
    """Token counts of a whole answer; `usages` by choice index, `n` choices to a prompt, each prompt counted once."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages[::n])
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages[::n])},
        # OpenAI's names. Whoever drafted them, predictions or others. Local engines do not count rejected tokens
        # as `completion_tokens`; a remote one's counts are its own.
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_draft_tokens for usage in usages),
            "rejected_prediction_tokens": sum(usage.rejected_draft_tokens for usage in usages),
        },
    }


def _body(header: Header, kind: str, choices: list[JsonObject]) -> JsonObject:
    return {
        "id": header.id,
        "object": kind,
        "created": header.created,
        "model": header.model,
        "system_fingerprint": header.system_fingerprint,
        "choices": choices,
    }


def _chat_choice(
    index: int,
    delta: JsonObject,
    logprobs: Sequence[TokenLogprob] | None = None,
    finish_reason: str | None = None,
) -> JsonObject:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _chat_logprobs(logprobs),
        "finish_reason": finish_reason,
    }


def _provenance(pieces: Sequence[Piece] | None, echo: str = "") -> JsonObject:
    """Who found which token, if that was asked for. The texts together are the choice's text, the echo included."""
    if pieces is None:
        return {}
    told = [Piece(echo, "prompt")] * bool(echo) + list(pieces)
    return {"provenance": [{"text": piece.text, "source": piece.source} for piece in told]}


def _finish_reason(delta: Delta) -> str:
    if delta.finish_reason is None or delta.finish_reason == "abort":
        # OpenAI has no word for it, and a cut answer must not look like a finished one.
        raise EngineDeadError("The engine gave the request up before it was finished.")
    return delta.finish_reason


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> JsonObject | None:
    if logprobs is None:
        return None
    content = [_logprob(entry) | {"top_logprobs": [_logprob(top) for top in entry.top]} for entry in logprobs]
    return {"content": content, "refusal": None}


def _logprob(entry: TopLogprob) -> JsonObject:
    data = None if entry.token_bytes is None else list(entry.token_bytes)
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
