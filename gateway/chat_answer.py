"""What a server says in a conversation: text as it comes, how many tokens, who drafted them, what went wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

JsonObject = dict[str, Any]  # the protocol's own objects, as json reads them
STRANGE = "The answer is not one of OpenAI's API. Is this the address of a gateway?"


class ChatError(Exception):
    """The gateway could not be asked; `message` says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Span:
    """Some text, and who found it: "target", or a drafter's name; None: the server does not tell."""

    text: str
    source: str | None = None

    @property
    def is_drafted(self) -> bool:
        return self.source not in (None, "target")


@dataclass(slots=True)
class Answer:
    """What came back, as far as it came. `elapsed_s` counts from the first text.

    `num_drafted` tokens were a drafter's, accepted; None: the server does not tell.
    """

    text: str = ""
    num_tokens: int = 0
    num_drafted: int | None = None
    elapsed_s: float = 0.0
    was_stopped: bool = False

    def summary(self) -> str:
        """Tokens, their rate, and the share of them that was drafted, as far as they are known."""
        parts = [f"{self.num_tokens} tokens"]
        if self.elapsed_s > 0:
            parts.append(f"{self.num_tokens / self.elapsed_s:.1f} tokens/s")
        if self.num_drafted is not None and self.num_tokens:
            parts.append(f"{self.num_drafted / self.num_tokens:.0%} drafted")
        return ", ".join([*parts, *["stopped"] * self.was_stopped])


def spans_of(response: httpx.Response, answer: Answer) -> Iterator[Span]:
    """The streamed answer's text, with `answer` kept up to date. Raises ChatError for anything that is no answer."""
    began_s: float | None = None
    for chunk in _chunks(response):
        try:
            spans = _spans(chunk)
            _count(spans, chunk.get("usage"), answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ChatError(STRANGE) from error
        text = "".join(span.text for span in spans)
        if text:
            began_s = time.perf_counter() if began_s is None else began_s
        if began_s is not None:
            answer.elapsed_s = time.perf_counter() - began_s
        answer.text += text
        yield from (span for span in spans if span.text)


def object_of(text: str) -> JsonObject:
    """A JSON object. Raises ChatError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ChatError(STRANGE) from error
    if not isinstance(value, dict):
        raise ChatError(STRANGE)
    return value


def raise_for_error(response: httpx.Response) -> None:
    """Raises ChatError with the server's own words, where it has any."""
    if response.is_success:
        return
    response.read()
    try:
        message = _message_of(object_of(response.text))
    except ChatError:
        message = f"The gateway answered {response.status_code}."
    raise ChatError(message)


def _count(spans: Sequence[Span], usage: JsonObject | None, answer: Answer) -> None:
    """Until the usage arrives, spans count as tokens. Told spans are tokens, some of them without text of their own."""
    answer.num_tokens += len(spans)
    if any(span.source is not None for span in spans):
        answer.num_drafted = (answer.num_drafted or 0) + sum(span.is_drafted for span in spans)
    if usage:
        answer.num_tokens = int(usage.get("completion_tokens") or answer.num_tokens)
        accepted = (usage.get("completion_tokens_details") or {}).get("accepted_prediction_tokens")
        if answer.num_drafted is None and accepted is not None:
            answer.num_drafted = int(accepted)


def _chunks(response: httpx.Response) -> Iterator[JsonObject]:
    """The events' objects. Raises ChatError at an error event, and if the answer has no events at all."""
    num_events = 0
    for line in response.iter_lines():
        if not line.startswith("data: "):
            continue
        num_events += 1
        if line != "data: [DONE]":
            chunk = object_of(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatError(_message_of(chunk))
            yield chunk
    if not num_events:
        raise ChatError(STRANGE)


def _message_of(body: JsonObject) -> str:
    try:
        return str(body["error"]["message"])
    except (LookupError, TypeError) as error:
        raise ChatError(STRANGE) from error


def _spans(chunk: JsonObject) -> list[Span]:
    """The chunk's text, token by token where the server tells who found them."""
    choices = chunk.get("choices")
    if not choices:
        return []
    text = str(choices[0]["delta"].get("content") or "")
    told = _told(choices[0].get("provenance"))
    # Another server may mean something else by that name.
    if told and "".join(span.text for span in told) == text:
        return told
    return [Span(text)] if text else []


def _told(provenance: Any) -> list[Span]:
    try:
        return [Span(str(piece["text"]), str(piece["source"])) for piece in provenance or ()]
    except (LookupError, TypeError):
        return []
