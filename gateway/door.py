"""What happens to every request before and after its route: an id, the configuration's name, a bounded body, a slot."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import BadRequestError, BodyTooLargeError, TooManyRequestsError

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AnswerHeaders:
    """ASGI middleware: every answer names its request and the configuration that produced it.

    `names_requests` is false behind Serve, which puts its x-request-id on requests and answers itself.
    """

    def __init__(self, app: ASGIApp, config_hash: Callable[[], str], names_requests: bool = True) -> None:
        self._app = app
        self._config_hash = config_hash
        self._names_requests = names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if self._names_requests:
                    headers["x-request-id"] = request_id
                headers["x-outrider-config"] = self._config_hash()
            await send(message)

        await self._app(scope, receive, send_named)


class Slots:
    """A counter with a limit; used from one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold one slot. Raises TooManyRequestsError if none is left."""
        if self._taken >= self._limit:
            raise TooManyRequestsError(self._limit)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


async def read_body(request: Request, limit_bytes: int, limit_s: float) -> bytes:
    """The whole body. Raises BodyTooLargeError as soon as it is known to be longer, announced or not; HTTPException 408
    if it is not here after `limit_s` seconds."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal():
        raise BadRequestError("The Content-Length header is not a number.")
    if int(announced) > limit_bytes:
        raise BodyTooLargeError(limit_bytes)
    try:
        async with asyncio.timeout(limit_s):
            return await _read(request, limit_bytes)
    except TimeoutError as error:
        text = f"The request body did not arrive within {limit_s:g} seconds."
        # What is left of the body may still come: it must not be taken for the next request.
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, text, {"connection": "close"}) from error


async def _read(request: Request, limit_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            raise BodyTooLargeError(limit_bytes)
    return bytes(body)
