"""Errors as RFC 9457 problem answers; the only place where an error becomes an HTTP status.

What is not meant for callers (tracebacks, driver texts, our own faults) never gets into a body:
a 500 always says the same sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus

import orjson

from glamd.errors import (
    ConflictError,
    FieldError,
    ForbiddenError,
    GlamError,
    GoneError,
    InputError,
    InternalError,
    NotFoundError,
    RateLimitedError,
    TransientError,
    UnauthenticatedError,
    UnavailableError,
)
from glamd.idempotency import InProgressError

PROBLEM_TYPE = "application/problem+json"
INTERNAL_MESSAGE = "Something went wrong on our side; the request id helps to find it."

# The first class that fits wins, so a class stands before its parents.
_STATUS_BY_CLASS: tuple[tuple[type[GlamError], int], ...] = (
    (UnauthenticatedError, 401),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (ConflictError, 409),
    (GoneError, 410),
    (InputError, 422),
    (RateLimitedError, 429),
    (UnavailableError, 503),
    (InternalError, 500),
    (TransientError, 503),
)

# Codes whose status says more than their class does.
_STATUS_BY_CODE = {
    "BAD_REQUEST": 400,
    "INSUFFICIENT_CREDITS": 402,
    "MALFORMED_JSON": 400,
    "METHOD_NOT_ALLOWED": 405,
    "BODY_TOO_LARGE": 413,
    "URI_TOO_LONG": 414,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "HEADERS_TOO_LARGE": 431,
    "PLATFORM_ERROR": 502,
}


class MethodNotAllowedError(InputError):
    """The path exists, the method does not; `allow` lists those that do."""

    default_code = "METHOD_NOT_ALLOWED"

    def __init__(self, allow: tuple[str, ...]) -> None:
        super().__init__("This path does not take this method.")
        self.allow = allow


class RepeatedError(GlamError):
    """An error that was answered before and is answered again as it was, under these headers."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        fields: Sequence[FieldError],
        status: int,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(message, code=code, fields=fields)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An error as it goes out: status, body bytes, and the headers that belong to it."""

    status: int
    code: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def status_of(error: GlamError) -> int:
    """The HTTP status of an error; 500 for every class that is no caller's business."""
    if isinstance(error, RepeatedError):
        return error.status
    by_code = _STATUS_BY_CODE.get(error.code)
    if by_code is not None:
        return by_code
    return next((status for kind, status in _STATUS_BY_CLASS if isinstance(error, kind)), 500)


def meta(*, request_id: str, correlation_id: str, now: datetime) -> dict[str, object]:
    """The `meta` object of every answer."""
    return {"request_id": request_id, "correlation_id": correlation_id, "timestamp": now}


def problem(error: GlamError, *, request_id: str, correlation_id: str, now: datetime) -> Problem:
    """Make the answer for an error: problem+json with the older clients' `error` twin in it."""
    status = status_of(error)
    hidden = status == HTTPStatus.INTERNAL_SERVER_ERROR
    code = "INTERNAL_ERROR" if hidden else error.code
    detail = INTERNAL_MESSAGE if hidden else error.message
    errors = [] if hidden else [{"field": e.field, "message": e.message} for e in error.fields]
    body: dict[str, object] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if errors:
        body["errors"] = errors
    members = {} if hidden else error.members
    body |= members
    body["error"] = {"code": code, "message": detail, "details": errors, **members}
    body["meta"] = meta(request_id=request_id, correlation_id=correlation_id, now=now)
    return Problem(
        status=status,
        code=code,
        body=orjson.dumps(body, option=orjson.OPT_UTC_Z),
        headers=_headers(error, status),
    )


def _headers(error: GlamError, status: int) -> dict[str, str]:
    headers: dict[str, str] = {}
    if status in (429, 503):
        after_s = error.retry_after_s if isinstance(error, TransientError) else 1
        headers["Retry-After"] = str(max(1, after_s))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="glamd"'
    if isinstance(error, InProgressError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, MethodNotAllowedError):
        headers["Allow"] = ", ".join(error.allow)
    if isinstance(error, RepeatedError):
        headers.update(error.headers)
    return headers
