"""A conversation with a running gateway, or any server like it, over nothing but its public API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import httpx

from gateway.chat_answer import STRANGE, Answer, ChatError, JsonObject, Span, object_of, raise_for_error, spans_of

_REFUSED = frozenset({400, 422})  # what servers answer to a field that they do not know


class Chat:
    """Keeps the turns and asks for the next. Raises ChatError if the gateway cannot be reached or serves no model.

    `asks_provenance`: whether the server is asked who found which token. The field is this gateway's own, so a server
    that turns out to refuse it is asked no more.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        temperature: float = 0.7,
        max_tokens: int | None = None,
        asks_provenance: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        # Long silences are the model's, a dead peer shows when connecting.
        timeout = httpx.Timeout(600.0, connect=5.0)
        try:
            self._client = httpx.Client(base_url=_root(url), timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise ChatError(f"{url!r} is no address: {error}") from error
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        self.asks_provenance = asks_provenance
        self.messages: list[dict[str, str]] = []
        self.model = model or self._first_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, question: str, answer: Answer) -> Iterator[Span]:
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

    def _stream(self, answer: Answer) -> Iterator[Span]:
        if self.asks_provenance:
            with self._post({"speculation": {"provenance": True}}) as response:
                if response.status_code not in _REFUSED:
                    raise_for_error(response)
                    yield from spans_of(response, answer)
                    return
        with self._post({}) as response:
            raise_for_error(response)
            # Only now it is known that nothing else was wrong with the request.
            self.asks_provenance = False
            yield from spans_of(response, answer)

    @contextlib.contextmanager
    def _post(self, more: JsonObject) -> Iterator[httpx.Response]:
        body = {"model": self.model, "messages": self.messages, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        body |= {key: value for key, value in self._options.items() if value is not None}
        with (
            self._reaching(),
            self._client.stream("POST", "/v1/chat/completions", json=body | more) as response,
        ):
            yield response

    def _first_model(self) -> str:
        with self._reaching():
            response = self._client.get("/v1/models")
            raise_for_error(response)
        models = object_of(response.text).get("data")
        if not models:
            raise ChatError("The gateway has no model ready yet.")
        try:
            return str(models[0]["id"])
        except (LookupError, TypeError) as error:
            raise ChatError(STRANGE) from error

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise ChatError(f"The gateway at {self._client.base_url} cannot be reached: {error}") from error


def _root(url: str) -> str:
    """The address without the /v1 that OpenAI's clients want in theirs."""
    return url.rstrip("/").removesuffix("/v1")
