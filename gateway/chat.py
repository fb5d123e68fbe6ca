"""A conversation with a running gateway, from the terminal, over nothing but its public API."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from rich.console import Console

JsonObject = dict[str, Any]  # the protocol's own objects, as json reads them
_STRANGE = "The answer is not one of OpenAI's API. Is this the address of a gateway?"


class ChatError(Exception):
    """The gateway could not be asked; `message` says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(slots=True)
class Answer:
    """What came back, as far as it came. `elapsed_s` counts from the first text."""

    text: str = ""
    num_tokens: int = 0
    elapsed_s: float = 0.0
    was_stopped: bool = False

    def speed(self) -> str:
        rate = f", {self.num_tokens / self.elapsed_s:.1f} tokens/s" if self.elapsed_s > 0 else ""
        return f"{self.num_tokens} tokens{rate}{', stopped' if self.was_stopped else ''}"


class Chat:
    """Keeps the turns and asks for the next. Raises ChatError if the gateway cannot be reached or serves no model."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        temperature: float = 0.7,
        max_tokens: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        # Long silences are the model's, a dead peer shows when connecting.
        timeout = httpx.Timeout(600.0, connect=5.0)
        try:
            self._client = httpx.Client(base_url=_root(url), timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise ChatError(f"{url!r} is no address: {error}") from error
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        self.messages: list[dict[str, str]] = []
        self.model = model or self._first_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(self, console: Console, system: str | None = None) -> None:
        """Read questions and print answers until the end of input."""
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        console.print(f"Talking to {self.model}. Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
        while True:
            try:
                question = console.input("[bold cyan]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if question:
                self._turn(console, question)

    def _turn(self, console: Console, question: str) -> None:
        answer = Answer()
        try:
            for text in self.ask(question, answer):
                console.print(text, end="", markup=False, highlight=False)
        except ChatError as error:
            console.print(error.message, style="red", markup=False)
            return
        console.print(f"\n({answer.speed()})", style="dim", markup=False)

    def ask(self, question: str, answer: Answer) -> Iterator[str]:
        """The answer's text as it comes, gathered in `answer`; both turns are remembered. KeyboardInterrupt ends it.

        Raises ChatError, and then remembers neither.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            try:
                yield from self._stream(answer)
            except KeyboardInterrupt:
                # Leaving the stream closes the connection, at which the gateway aborts the request.
                answer.was_stopped = True
        except ChatError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})

    def _stream(self, answer: Answer) -> Iterator[str]:
        body = {"model": self.model, "messages": self.messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        body |= {key: value for key, value in self._options.items() if value is not None}
        with (
            self._reaching(),
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            _raise_for_error(response)
            yield from _gathered(_chunks(response), answer)

    def _first_model(self) -> str:
        with self._reaching():
            response = self._client.get("/v1/models")
            _raise_for_error(response)
        models = _object(response.text).get("data")
        if not models:
            raise ChatError("The gateway has no model ready yet.")
        try:
            return str(models[0]["id"])
        except (LookupError, TypeError) as error:
            raise ChatError(_STRANGE) from error

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise ChatError(f"The gateway at {self._client.base_url} cannot be reached: {error}") from error


def _root(url: str) -> str:
    """The address without the /v1 that OpenAI's clients want in theirs."""
    return url.rstrip("/").removesuffix("/v1")


def _object(text: str) -> JsonObject:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ChatError(_STRANGE) from error
    if not isinstance(value, dict):
        raise ChatError(_STRANGE)
    return value


def _gathered(chunks: Iterator[JsonObject], answer: Answer) -> Iterator[str]:
    """The chunks' texts, with `answer` kept up to date; a chunk counts as a token until the usage arrives."""
    began_s: float | None = None
    for chunk in chunks:
        text = _text_of(chunk)
        if text:
            began_s = time.perf_counter() if began_s is None else began_s
            answer.num_tokens += 1
        if began_s is not None:
            answer.elapsed_s = time.perf_counter() - began_s
        answer.num_tokens = _completion_tokens(chunk) or answer.num_tokens
        answer.text += text
        if text:
            yield text


def _chunks(response: httpx.Response) -> Iterator[JsonObject]:
    """The events' objects. Raises ChatError at an error event, and if the answer has no events at all."""
    num_events = 0
    for line in response.iter_lines():
        if not line.startswith("data: "):
            continue
        num_events += 1
        if line != "data: [DONE]":
            chunk = _object(line.removeprefix("data: "))
            if "error" in chunk:
                raise ChatError(_message_of(chunk))
            yield chunk
    if not num_events:
        raise ChatError(_STRANGE)


def _message_of(body: JsonObject) -> str:
    try:
        return str(body["error"]["message"])
    except (LookupError, TypeError) as error:
        raise ChatError(_STRANGE) from error


def _text_of(chunk: JsonObject) -> str:
    choices = chunk.get("choices")
    try:
        return str(choices[0]["delta"].get("content") or "") if choices else ""
    except (LookupError, TypeError, AttributeError) as error:
        raise ChatError(_STRANGE) from error


def _completion_tokens(chunk: JsonObject) -> int | None:
    usage = chunk.get("usage")
    return usage["completion_tokens"] if usage else None


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = _message_of(_object(response.text))
    except ChatError:
        message = f"The gateway answered {response.status_code}."
    raise ChatError(message)
