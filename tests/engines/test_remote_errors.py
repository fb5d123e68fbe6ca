from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from engines.errors import (
    EngineDeadError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    RemoteServerError,
)
from engines.remote_errors import status_error, transport_error


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *[(status, InvalidRequestError) for status in (400, 413, 422)],
        *[(status, RemoteServerError) for status in (302, 401, 403, 404, 409, 424, 500, 501, 529)],
        *[(status, EngineTimeoutError) for status in (408, 504)],
        *[(status, EngineDeadError) for status in (502, 503)],
        (429, EngineOverloadedError),
    ],
)
def test_each_status_has_its_error(status: int, expected: type[Exception]) -> None:
    error = status_error(status, json.dumps({"error": {"message": "why"}}), {})
    assert type(error) is expected
    assert error.message == "why"
    assert not isinstance(error, RemoteServerError) or error.status == status


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ('{"error": {"message": "bad top_k", "param": "top_k"}}', "bad top_k", "top_k"),
        ('{"object": "error", "message": "bad", "param": null, "code": 400}', "bad", None),
        ('{"error": "Input validation error", "error_type": "validation"}', "Input validation error", None),
        ('{"detail": "nope"}', "nope", None),
        ('{"error": {"code": 7}}', '{"code": 7}', None),
        ("<html>sorry</html>", "<html>sorry</html>", None),
        ('["odd"]', "['odd']", None),
        ("", "The server answered 400.", None),
    ],
)
def test_message_and_parameter_are_found_in_all_dialects(body: str, message: str, param: str | None) -> None:
    error = status_error(400, body, {})
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.param) == (message, param)


def test_a_context_overflow_keeps_its_message_and_blames_the_prompt() -> None:
    message = "This model's maximum context length is 16 tokens. However, you requested 20 tokens."
    error = status_error(400, json.dumps({"error": {"message": message}}), {})
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.param) == (message, "messages")


def test_long_messages_are_cut() -> None:
    assert len(status_error(500, "x" * 100_000, {}).message) == 1000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 1.0), ("7", 7.0), ("0.5", 0.5), ("soon", 1.0), ("-3", 1.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after_is_read(header: str | None, seconds: float) -> None:
    error = status_error(429, "", httpx.Headers({} if header is None else {"Retry-After": header}))
    assert isinstance(error, EngineOverloadedError)
    assert error.retry_after_s == seconds


def test_retry_after_may_be_a_date_to_come() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    error = status_error(429, "", httpx.Headers({"Retry-After": date}))
    assert isinstance(error, EngineOverloadedError)
    assert 25 < error.retry_after_s <= 30


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx.ConnectError("refused"), EngineDeadError),
        (httpx.ConnectTimeout("slow"), EngineDeadError),
        (httpx.ReadError("reset"), EngineDeadError),
        (httpx.RemoteProtocolError("incomplete"), EngineDeadError),
        (httpx.ReadTimeout("silent"), EngineTimeoutError),
        (httpx.WriteTimeout("stuck"), EngineTimeoutError),
        (httpx.PoolTimeout("full"), EngineOverloadedError),
        (httpx.DecodingError("bad gzip"), RemoteServerError),
    ],
)
def test_each_transport_error_has_its_own(error: httpx.HTTPError, expected: type[Exception]) -> None:
    translated = transport_error(error, "http://peer")
    assert type(translated) is expected
    assert "http://peer" in translated.message
    assert str(error) in translated.message
