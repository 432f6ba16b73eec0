"""Answers and errors with their headers: the one place where a response is made.

Every one of them, whatever its route, carries the ids and the security headers, and where origins
are configured those of CORS.
"""

from collections.abc import Mapping
from typing import Final

import orjson
import structlog

from glamd.clock import Clock
from glamd.errors import GlamError
from glamd.http.call import Answer, Call, Raw
from glamd.http.cors import Cors
from glamd.http.plain import PlainResponse, header_lines
from glamd.http.problems import PROBLEM_TYPE, meta, problem

log = structlog.get_logger()

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Server": "glamd",
    "X-Content-Type-Options": "nosniff",
}
TLS_HEADERS: Final[Mapping[str, str]] = {
    **SECURITY_HEADERS,
    "Strict-Transport-Security": "max-age=31536000",
}
_SECURITY_LINES = header_lines(SECURITY_HEADERS)
_TLS_LINES = header_lines(TLS_HEADERS)


class Responses:
    """Makes the responses of one listener."""

    def __init__(self, *, clock: Clock, envelope: bool, cors: Cors | None) -> None:
        self._clock = clock
        self._envelope = envelope
        self._cors = cors

    def success(self, call: Call, answer: Answer | Raw) -> PlainResponse:
        """A handler's answer, in the envelope where the listener has one."""
        if isinstance(answer, Raw):
            return self._response(call, 200, answer.body, answer.content_type, answer.headers)
        body = self._enveloped(call, answer) if self._envelope else answer.data
        written = orjson.dumps(body, option=orjson.OPT_UTC_Z)
        return self._response(call, answer.status, written, "application/json", answer.headers)

    def problem(self, call: Call, error: GlamError) -> PlainResponse:
        """An error as problem+json; our own faults go into the log and show nothing here."""
        found = problem(
            error,
            request_id=call.request_id,
            correlation_id=call.correlation_id,
            now=self._clock.now(),
        )
        if found.status == 500:
            log.error("http_internal_error", route=call.route, code=error.code, reason=str(error))
        response = self._response(call, found.status, found.body, PROBLEM_TYPE, found.headers)
        if found.code == "BAD_REQUEST":
            # Where such a request ends, and the next begins, is anybody's guess.
            response.force_close()
        return response

    def preflight(self, call: Call, allow: tuple[str, ...]) -> PlainResponse | None:
        """The answer to a browser that asks whether it may ask; None where this is none."""
        headers = None if self._cors is None else self._cors.preflight(call.request, allow)
        if headers is None:
            return None
        return self._response(call, 204, b"", "", headers)

    def _enveloped(self, call: Call, answer: Answer) -> dict[str, object]:
        body: dict[str, object] = {"data": answer.data}
        if answer.pagination is not None:
            body["pagination"] = answer.pagination.as_json()
        body["meta"] = meta(
            request_id=call.request_id,
            correlation_id=call.correlation_id,
            now=self._clock.now(),
        )
        return body

    def _response(
        self, call: Call, status: int, body: bytes, content_type: str, headers: Mapping[str, str]
    ) -> PlainResponse:
        tls = call.request.protocol.ssl_context is not None
        extra = headers
        if self._cors is not None:
            extra = {**self._cors.headers(call.request), **headers}
        lines = _TLS_LINES if tls else _SECURITY_LINES
        if extra:
            lines = _overlaid(TLS_HEADERS if tls else SECURITY_HEADERS, extra)
        if content_type:
            lines += f"Content-Type: {content_type}\r\n"
        # An id has its form, by which it is a line's rest and nothing more.
        lines += f"X-Request-ID: {call.request_id}\r\nX-Correlation-ID: {call.correlation_id}\r\n"
        return PlainResponse(status=status, lines=lines, body=body)


def _overlaid(base: Mapping[str, str], extra: Mapping[str, str]) -> str:
    names = {name.lower() for name in extra}
    kept = {name: value for name, value in base.items() if name.lower() not in names}
    return header_lines({**kept, **extra})
