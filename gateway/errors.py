"""The gateway's error tree, and the one table from any error to what an OpenAI client reads.

GatewayError
|-- BadRequestError              the request cannot be understood or asks for what does not exist here
|   `-- UnknownModelError        no such model
|-- BodyTooLargeError            the body exceeds http.max_body_bytes
|-- TooManyRequestsError         http.max_concurrent_requests are in flight
|-- UnknownReceiptError          the tenant has no such receipt, or no longer
|-- ModelNotReadyError           the model is still loading
|-- NoRequestLogError            feedback, but nothing is logged here
|-- LogUnavailableError          the request log cannot take an outcome now
|-- RequestTimeoutError          the answer took longer than http.request_timeout_s
|-- InternalError                a bug; the log has the rest
|-- ConfigError                  the configuration cannot be served; one readable line
`-- DeployError                  Ray or Serve could not start the application; one readable line
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engines.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineTimeoutError,
    InvalidRequestError,
    ModelLoadError,
    RemoteServerError,
    UnsupportedParameterError,
)


class GatewayError(Exception):
    """Base of the gateway's own errors. `message` is fit to be shown to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequestError(GatewayError):
    """`param` is the path of the offending field, `code` one of OpenAI's error codes."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModelError(BadRequestError):
    """No model of that name is served here."""

    def __init__(self, model: str) -> None:
        message = f"The model `{model[:100]}` does not exist here; GET /v1/models lists those that do."
        super().__init__(message, param="model")


class BodyTooLargeError(GatewayError):
    """The body exceeds the limit, in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body exceeds the limit of {limit_bytes} bytes.")


class UnknownReceiptError(GatewayError):
    """This tenant has no such receipt, or no longer."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"There is no receipt of a request `{request_id[:100]}` for this tenant: x-request-id names a request, the "
            "header x-outrider-cache-salt its tenant. Old ones are forgotten, and gateways without a shared state know "
            "their own alone."
        )


class TooManyRequestsError(GatewayError):
    """This ingress has as many requests in flight as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The gateway is already serving {limit} requests. Please retry shortly.")
        self.retry_after_s = 1.0


class ModelNotReadyError(GatewayError):
    """The model is configured but its engine has not started yet, or failed to."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"The model `{model}` is not ready: {reason}")
        self.retry_after_s = 5.0


class NoRequestLogError(GatewayError):
    """There is nothing that feedback could be kept with."""

    def __init__(self) -> None:
        super().__init__("This gateway keeps no request log, so there is nothing that feedback could be added to.")


class LogUnavailableError(GatewayError):
    """The outcome was not written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The request log cannot be written now: {reason}.")
        self.retry_after_s = 5.0


class RequestTimeoutError(GatewayError):
    """The whole answer did not fit into the time limit, in seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request was stopped after {limit_s:g} seconds.")


class InternalError(GatewayError):
    """A bug. Its own text may hold anything, a prompt included, so the caller is told none of it."""

    def __init__(self) -> None:
        super().__init__("The gateway failed internally. Please report the x-request-id header of this answer.")


class ConfigError(GatewayError):
    """The configuration cannot be served."""


class DeployError(GatewayError):
    """Ray or Serve could not start the application."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as HTTP and as OpenAI's clients expect it. `retry_after_s` becomes the Retry-After header."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


# First match wins, so subclasses stand above their bases.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (BadRequestError, 400, "invalid_request_error", None),
    (BodyTooLargeError, 413, "invalid_request_error", "request_too_large"),
    (TooManyRequestsError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (ModelNotReadyError, 503, "service_unavailable_error", "model_not_ready"),
    (UnknownReceiptError, 404, "invalid_request_error", "receipt_not_found"),
    (NoRequestLogError, 404, "invalid_request_error", "no_request_log"),
    (LogUnavailableError, 503, "service_unavailable_error", "request_log_unavailable"),
    (RequestTimeoutError, 504, "timeout_error", "request_timeout"),
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (UnsupportedParameterError, 400, "invalid_request_error", "unsupported_parameter"),
    (InvalidRequestError, 400, "invalid_request_error", None),
    (EngineOverloadedError, 429, "rate_limit_error", "engine_overloaded"),
    (EngineDeadError, 503, "service_unavailable_error", "engine_unavailable"),
    (ModelLoadError, 503, "service_unavailable_error", "engine_unavailable"),
    (EngineTimeoutError, 504, "timeout_error", "engine_timeout"),
)
# A peer's statuses that mean the same to our caller. Others are a bad gateway: a refused key is our fault, not theirs.
_PEER_STATUSES = {
    400: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_RETRY_AFTER_S = {429: 1.0, 503: 1.0}


def describe(error: GatewayError | EngineError) -> ErrorAnswer:
    """What the caller is told about `error`."""
    status, kind, code = _peer(error) if isinstance(error, RemoteServerError) else _look_up(error)
    return ErrorAnswer(
        status=status,
        message=error.message,
        type=kind,
        code=getattr(error, "code", None) or code,
        param=getattr(error, "param", None),
        retry_after_s=getattr(error, "retry_after_s", _RETRY_AFTER_S.get(status)),
    )


def _look_up(error: Exception) -> tuple[int, str, str | None]:
    return next((row[1:] for row in _TABLE if isinstance(error, row[0])), (500, "server_error", "internal_error"))


def _peer(error: RemoteServerError) -> tuple[int, str, str | None]:
    status = error.status if error.status in _PEER_STATUSES else 502
    return status, _PEER_STATUSES.get(status, "bad_gateway_error"), "upstream_error"
