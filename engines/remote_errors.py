"""What goes wrong at a remote server, in the words of engines/errors.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx

from engines.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    RemoteServerError,
)

_MAX_MESSAGE_CHARS = 1000
_DEFAULT_RETRY_AFTER_S = 1.0
_CONTEXT_LENGTH = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)


def transport_error(error: httpx.HTTPError, where: str) -> EngineError:
    """For an exchange that came to no answer. Connecting in vain, however it failed, means a dead peer."""
    reason = f"{where}: {type(error).__name__}: {error}".rstrip(": ")
    match error:
        case httpx.PoolTimeout():
            return EngineOverloadedError(f"All connections are in use to {reason}")
        case httpx.ConnectTimeout():
            return EngineDeadError(f"Cannot reach {reason}")
        case httpx.TimeoutException():
            return EngineTimeoutError(f"No answer in time from {reason}")
        case httpx.TransportError():
            return EngineDeadError(f"Cannot reach, or lost, {reason}")
        case _:
            return RemoteServerError(f"No understandable answer from {reason}", HTTPStatus.BAD_GATEWAY)


def status_error(status: int, body: str, headers: Mapping[str, str]) -> EngineError:
    """For an answer with an HTTP error `status`, or an error event that names one."""
    message, param = _told(body)
    message = message or f"The server answered {status}."
    match status:
        case 400 | 413 | 422:
            if param is None and _CONTEXT_LENGTH.search(message):
                param = "messages"
            return InvalidRequestError(message, param)
        case 408 | 504:
            return EngineTimeoutError(message)
        case 429:
            return EngineOverloadedError(message, _retry_after_s(headers.get("retry-after")))
        case 502 | 503:
            return EngineDeadError(message)
        case _:
            return RemoteServerError(message, status)


def event_error(error: object) -> EngineError:
    """For an error inside a stream. Servers put a status in `code` or `http_status_code`, if anywhere."""
    codes = [error.get("code"), error.get("http_status_code")] if isinstance(error, dict) else []
    status = next((code for code in codes if type(code) is int and 400 <= code < 600), 500)
    return status_error(status, json.dumps({"error": error}), {})


def _told(body: str) -> tuple[str, str | None]:
    """Message and parameter of an error body: OpenAI's {"error": {...}}, vLLM's flat one, TGI's strings, or text."""
    try:
        content = json.loads(body)
    except ValueError:
        return body.strip()[:_MAX_MESSAGE_CHARS], None
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return str(error)[:_MAX_MESSAGE_CHARS], None
    message = error.get("message") or error.get("detail") or json.dumps(error)
    param = error.get("param")
    return str(message)[:_MAX_MESSAGE_CHARS], param if isinstance(param, str) and param else None


def _retry_after_s(value: str | None) -> float:
    """Seconds of a Retry-After header, which has seconds or an HTTP date; one second if it has neither."""
    if value is None:
        return _DEFAULT_RETRY_AFTER_S
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return _DEFAULT_RETRY_AFTER_S
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
