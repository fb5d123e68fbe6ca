"""Any OpenAI-compatible server as an engine: vLLM, TGI, TensorRT-LLM, llama.cpp, a hosted API.

generate() -- POST, stream --> server
           <-- mailbox <-- pump task: events -> chunks -> deltas

Nothing is retried here: who calls knows better what else could serve. The key leaves this file as a header only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from http import HTTPStatus

import httpx
from httpx_sse import EventSource, SSEError

from engines.config import RemoteEngineConfig
from engines.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    ModelLoadError,
    RemoteServerError,
)
from engines.mailbox import Mailbox
from engines.remote_card import NO_MODEL_LIST, find_model, make_card
from engines.remote_errors import status_error, transport_error
from engines.remote_request import request_body
from engines.remote_wire import ChunkReader
from engines.types import Delta, EngineStats, GenerateRequest, ModelCard, TokenPrompt

_log = logging.getLogger(__name__)

_MAX_ERROR_BODY_BYTES = 64 << 10
_MAX_END_S = 0.2  # from [DONE] to the end of the answer
_SPARE_CONNECTIONS = 2  # a health check must not wait for a stream to end


class RemoteEngine:
    """The Engine protocol over HTTP. `transport` replaces the network, in tests."""

    def __init__(self, config: RemoteEngineConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config = config
        self._transport = transport
        self._where = _without_secrets(config.base_url)
        self._starting = asyncio.Lock()
        self._client: httpx.AsyncClient | None = None
        self._key: str | None = None
        self._card: ModelCard | None = None
        self._dead: EngineDeadError | None = None
        self._mailboxes: dict[asyncio.Task[None], Mailbox] = {}
        self._warned_of_usage = False
        self._num_running = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._num_accepted_tokens = 0
        self._num_drafted_tokens = 0
        self._num_finished = 0
        self._num_aborted = 0

    async def start(self) -> ModelCard:
        """Read the key, see whether the server has the model. Raises ModelLoadError; EngineDeadError if unreachable."""
        self._check_open()
        async with self._starting:
            if self._card is None:
                self._key = _read_key(self._config)
                self._client = self._make_client()
                try:
                    self._card = make_card(
                        self._config, find_model(*await self._get_models(), self._config.model, self._where)
                    )
                except BaseException:
                    await self._client.aclose()
                    raise
        return self._card

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Delta, ...], None]:
        """See Engine.generate. Closing it closes the HTTP stream."""
        path, body = self._admit(request)
        mailbox = Mailbox(request.n)
        pump = asyncio.create_task(self._pump(path, body, ChunkReader(request), mailbox))
        self._mailboxes[pump] = mailbox
        self._num_running += request.n
        try:
            while not mailbox.is_finished:
                yield await mailbox.get()
        finally:
            del self._mailboxes[pump]
            self._num_running -= request.n
            self._num_finished += mailbox.is_finished
            self._num_aborted += not mailbox.is_finished
            pump.cancel()
            await asyncio.wait([pump])

    async def stats(self) -> EngineStats:
        """See Engine.stats. What this engine itself has under way and has been told; the server's load is unknown."""
        return EngineStats(
            num_running=self._num_running,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    async def check_health(self) -> None:
        """See Engine.check_health. The server must answer within `connect_timeout_s`; being busy is no ill health."""
        self._started()
        status, body = await self._get_models()
        if status in {401, 403} or (status >= 500 and status not in NO_MODEL_LIST):
            raise EngineDeadError(f"{self._where} answered {status}: {body[:200]}")

    async def close(self) -> None:
        """See Engine.close."""
        if self._dead is None:
            self._dead = EngineDeadError("The engine was closed.")
        for pump, mailbox in self._mailboxes.items():
            mailbox.fail(self._dead)
            pump.cancel()
        if self._client is not None:
            await self._client.aclose()

    def _check_open(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead.message) from self._dead

    def _started(self) -> tuple[httpx.AsyncClient, ModelCard]:
        self._check_open()
        if self._client is None or self._card is None:
            raise EngineDeadError("The engine has not been started.")
        return self._client, self._card

    def _make_client(self) -> httpx.AsyncClient:
        config = self._config
        return httpx.AsyncClient(
            base_url=config.base_url.rstrip("/") + "/",
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"},
            timeout=httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=config.max_connections + _SPARE_CONNECTIONS),
            transport=self._transport,
        )

    async def _get_models(self) -> tuple[int, str]:
        """Status, and body as one line. Raises EngineDeadError, EngineTimeoutError."""
        assert self._client is not None
        try:
            response = await self._client.get("models", timeout=self._config.connect_timeout_s)
        except httpx.HTTPError as error:
            translated = transport_error(error, self._where)
            if isinstance(translated, EngineTimeoutError):
                raise translated from error
            raise EngineDeadError(translated.message) from error
        return response.status_code, self._redact(" ".join(response.text.split()))

    def _admit(self, request: GenerateRequest) -> tuple[str, dict[str, object]]:
        _, card = self._started()
        if not 1 <= request.n <= card.max_num_choices:
            raise InvalidRequestError(f"n is {request.n}; it must be between 1 and {card.max_num_choices}.", "n")
        answer = request_body(request, self._config.model, self._config.accepts_token_ids)
        _check_length(request, card.max_model_len)
        if len(self._mailboxes) >= self._config.max_connections:
            raise EngineOverloadedError(f"All {self._config.max_connections} connections to {self._where} are in use.")
        return answer

    async def _pump(self, path: str, body: dict[str, object], reader: ChunkReader, mailbox: Mailbox) -> None:
        """Move the server's news to the mailbox, and in the end what went wrong."""
        try:
            async with self._post(path, body) as events:
                async for data in events:
                    mailbox.put(reader.read(data))
            last = reader.finish()
            self._count(last, reader.has_usage)
            mailbox.put(last)
        except EngineError as error:
            mailbox.fail(self._redacted(error))
        except Exception as error:  # noqa: BLE001 - the task's border: its reader must not wait for ever
            _log.exception("a stream from %s has crashed", self._where)
            crash = EngineDeadError(f"Reading the stream has crashed: {type(error).__name__}.")
            crash.__cause__ = error
            mailbox.fail(crash)

    @asynccontextmanager
    async def _post(self, path: str, body: dict[str, object]) -> AsyncIterator[AsyncIterator[str]]:
        """The data of the answer's events; foreign errors are translated, wherever in the exchange they occur."""
        client, _ = self._started()
        headers = {"Accept": "text/event-stream"}
        try:
            async with client.stream("POST", path, json=body, headers=headers) as response:
                if response.status_code != HTTPStatus.OK:
                    raise status_error(response.status_code, await _error_body(response), response.headers)
                async with aclosing(_event_data(response)) as events:
                    yield events
        except SSEError as error:
            raise RemoteServerError(f"{self._where} does not stream: {error}", HTTPStatus.BAD_GATEWAY) from error
        except httpx.HTTPError as error:
            raise transport_error(error, self._where) from error

    def _count(self, last: tuple[Delta, ...], has_usage: bool) -> None:
        usages = [delta.usage for delta in last if delta.usage is not None]
        self._num_prompt_tokens += usages[0].prompt_tokens
        self._num_cached_tokens += usages[0].cached_tokens
        self._num_generated_tokens += sum(usage.completion_tokens for usage in usages)
        num_accepted = sum(usage.accepted_draft_tokens for usage in usages)
        self._num_accepted_tokens += num_accepted
        self._num_drafted_tokens += num_accepted + sum(usage.rejected_draft_tokens for usage in usages)
        if not has_usage and not self._warned_of_usage:
            self._warned_of_usage = True
            _log.warning("%s does not tell usage; token counts are reported as 0", self._where)

    def _redact(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "[key]")

    def _redacted(self, error: EngineError) -> EngineError:
        """Servers quote what they were sent, the key included."""
        error.message = self._redact(error.message)
        error.args = (error.message,)
        return error


def _without_secrets(base_url: str) -> str:
    try:
        return str(httpx.URL(base_url).copy_with(userinfo=b"", query=None))
    except httpx.InvalidURL as error:
        raise ModelLoadError(f"base_url is no valid URL: {error}") from error


def _read_key(config: RemoteEngineConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ModelLoadError(f"The environment variable {config.api_key_env}, which should hold the key, is not set.")
    if not (key.isascii() and key.isprintable()):
        raise ModelLoadError(f"The key in {config.api_key_env} has characters that no HTTP header can have.")
    return key


def _check_length(request: GenerateRequest, max_model_len: int | None) -> None:
    """Where the prompt's length is known here, the server need not be asked."""
    if max_model_len is None or not isinstance(request.prompt, TokenPrompt):
        return
    num_prompt_tokens, max_tokens = len(request.prompt.token_ids), request.sampling.max_tokens
    if num_prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthError(num_prompt_tokens, max_tokens, max_model_len)


async def _error_body(response: httpx.Response) -> str:
    """The beginning of an error answer, as text: enough for a message, whatever the server sends."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) >= _MAX_ERROR_BODY_BYTES:
            break
    return body[:_MAX_ERROR_BODY_BYTES].decode(errors="replace")


async def _event_data(response: httpx.Response) -> AsyncGenerator[str, None]:
    """Data of the events up to [DONE]; comments and empty events are keep-alives."""
    async with aclosing(EventSource(response).aiter_sse()) as events:
        async for event in events:
            if event.data == "[DONE]":
                break
            if event.data:
                yield event.data
        # Only a connection whose answer was read to its end is used again.
        with suppress(TimeoutError):
            async with asyncio.timeout(_MAX_END_S):
                async for _ in events:
                    pass
