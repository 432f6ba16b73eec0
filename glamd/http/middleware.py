"""What happens to every request of a listener, in this order, whatever its route.

Ids are given out, the route is found, the caller is recognised, a draining daemon says so, bodies
that would be refused are refused by their headers, the caller is held to its rate and checked
against the route's access; then the handler runs. Every outcome, errors that nobody foresaw
included, leaves as an envelope or a problem answer with the same headers, one access-log event and
its metrics.

No route stands here and no way of recognising a caller; both are given to the `Pipeline`.
"""

import re
import uuid
from collections.abc import Awaitable, Callable

import orjson
import structlog
from aiohttp import web
from prometheus_client import Counter, Histogram

from glamd.clock import Clock
from glamd.errors import (
    GlamError,
    InputError,
    InternalError,
    NotFoundError,
    RateLimitedError,
    UnauthenticatedError,
    UnavailableError,
)
from glamd.http.addresses import ClientAddress
from glamd.http.bodies import ClientGoneError, SlowBodyError, refuse_early
from glamd.http.call import Answer, Call, Raw
from glamd.http.connections import GuardedHandler
from glamd.http.identity import Client, Identity
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.problems import PROBLEM_TYPE, MethodNotAllowedError, meta, problem
from glamd.http.routes import Route, RouteTable
from glamd.payments import card_numbers

log = structlog.get_logger()

REQUESTS = Counter(
    "glamd_http_requests_total",
    "Requests answered.",
    ["listener", "method", "route", "status"],
)
DURATION = Histogram(
    "glamd_http_request_duration_seconds",
    "From the complete head to the answer, its writing not counted.",
    ["listener", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
DRAIN_RETRY_AFTER_S = 5

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

_SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Server": "glamd",
    "X-Content-Type-Options": "nosniff",
}
_TLS_HEADER = {"Strict-Transport-Security": "max-age=31536000"}

Authenticate = Callable[[web.BaseRequest], Awaitable[Identity]]
Refused = Callable[[Call, GlamError], Awaitable[None]]


class Pipeline:
    """One listener's middleware stack, as the dispatch function of its server."""

    def __init__(
        self,
        *,
        listener: str,
        table: RouteTable,
        authenticate: Authenticate,
        address: ClientAddress,
        limits: HttpLimits,
        limiter: RateLimiter | None,
        draining: Callable[[], bool],
        clock: Clock,
        envelope: bool = True,
        refused: Refused | None = None,
    ) -> None:
        """`envelope` False answers a success with its bare data, as the admin socket does.

        `refused` is told when a caller was recognised and kept from the handler; what it raises is
        answered instead.
        """
        self._listener = listener
        self._table = table
        self._authenticate = authenticate
        self._address = address
        self._limits = limits
        self._limiter = limiter
        self._draining = draining
        self._clock = clock
        self._envelope = envelope
        self._refused = refused

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; no exception but a cancellation leaves this."""
        started_s = self._clock.monotonic_s()
        handler = request.protocol
        assert isinstance(handler, GuardedHandler)
        handler.request_started()
        call = self._open(request)
        status, response = await self._answer(call, handler)
        self._close(call, status, started_s)
        return response

    def refuse(self, request: web.BaseRequest, status: int) -> web.Response:
        """The answer for what never became a request: broken HTTP, or our own failure."""
        call = self._open(request, parsed=False)
        error: GlamError = InternalError("the dispatch failed")
        if status < 500:
            error = InputError("The request is not valid HTTP.", code="BAD_REQUEST")
        _, response = self._problem(call, error)
        self._close(call, response.status, self._clock.monotonic_s())
        return response

    def _open(self, request: web.BaseRequest, *, parsed: bool = True) -> Call:
        headers = request.headers if parsed else {}
        request_id = _valid_id(headers.get("X-Request-ID")) or uuid.uuid4().hex
        correlation_id = _valid_id(headers.get("X-Correlation-ID")) or request_id
        # aiohttp runs each request in a task of its own, so this reaches no other request.
        structlog.contextvars.bind_contextvars(request_id=request_id, correlation_id=correlation_id)
        return Call(
            request=request,
            request_id=request_id,
            correlation_id=correlation_id,
            ip=self._address.of(request, headers=parsed),
            limits=self._limits,
        )

    async def _answer(self, call: Call, handler: GuardedHandler) -> tuple[int, web.Response]:
        try:
            return self._success(call, await self._handle(call))
        except SlowBodyError:
            handler.cut("slow_body")
            return 408, web.Response(status=408)
        except ClientGoneError:
            return 499, web.Response(status=400)
        except GlamError as error:
            return self._problem(call, error)
        except Exception as error:
            log.exception("http_unexpected_error", route=call.route, error=type(error).__name__)
            return self._problem(call, InternalError("unexpected"))

    async def _handle(self, call: Call) -> Answer | Raw:
        request = call.request
        try:
            route, call.params = self._table.find(request.method, request.rel_url.raw_path)
        except (NotFoundError, MethodNotAllowedError):
            self._limit(f"ip:{call.ip}")
            raise
        call.route = route.path
        if route.public:
            return await route.handler(call)
        try:
            call.identity = await self._authenticate(request)
        except UnauthenticatedError:
            # Whoever guesses is held to a rate too, by the only thing known of them.
            self._limit(f"ip:{call.ip}")
            raise
        self._remember(call.identity)
        try:
            self._admit(call, route)
        except GlamError as error:
            if self._refused is not None:
                await self._refused(call, error)
            raise
        return await route.handler(call)

    def _admit(self, call: Call, route: Route) -> None:
        if self._draining():
            raise UnavailableError(
                "The daemon is stopping; ask another one.", retry_after_s=DRAIN_RETRY_AFTER_S
            )
        refuse_early(call.request, self._limits)
        # A worker's rate is in its grant, where it is counted and audited.
        if call.identity.kind != "worker":
            self._limit(f"{call.identity.kind}:{call.identity.name}")
        route.allow(call.identity, call.params)

    def _remember(self, identity: Identity) -> None:
        if isinstance(identity, Client):
            structlog.contextvars.bind_contextvars(merchant_id=identity.name)

    def _limit(self, caller: str) -> None:
        if self._limiter is None:
            return
        wait_s = self._limiter.take(caller)
        if wait_s:
            raise RateLimitedError("Too many requests.", retry_after_s=wait_s)

    def _success(self, call: Call, answer: Answer | Raw) -> tuple[int, web.Response]:
        if isinstance(answer, Raw):
            return 200, self._response(call, 200, answer.body, answer.content_type)
        body = self._enveloped(call, answer) if self._envelope else answer.data
        written = orjson.dumps(body, option=orjson.OPT_UTC_Z)
        return answer.status, self._response(call, answer.status, written, "application/json")

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

    def _problem(self, call: Call, error: GlamError) -> tuple[int, web.Response]:
        found = problem(
            error,
            request_id=call.request_id,
            correlation_id=call.correlation_id,
            now=self._clock.now(),
        )
        if found.status == 500:
            log.error("http_internal_error", route=call.route, code=error.code, reason=str(error))
        response = self._response(call, found.status, found.body, PROBLEM_TYPE)
        response.headers.update(found.headers)
        return found.status, response

    def _response(self, call: Call, status: int, body: bytes, content_type: str) -> web.Response:
        response = web.Response(status=status, body=body, headers=_SECURITY_HEADERS)
        response.headers["Content-Type"] = content_type
        response.headers["X-Request-ID"] = call.request_id
        response.headers["X-Correlation-ID"] = call.correlation_id
        if call.request.protocol.ssl_context is not None:
            response.headers.update(_TLS_HEADER)
        return response

    def _close(self, call: Call, status: int, started_s: float) -> None:
        method = call.request.method if call.request.method in METHODS else "OTHER"
        duration_s = max(0.0, self._clock.monotonic_s() - started_s)
        REQUESTS.labels(self._listener, method, call.route, str(status)).inc()
        DURATION.labels(self._listener, call.route).observe(duration_s)
        # Probes ask every few seconds; they are worth a line only when something is wrong.
        quiet = call.identity.kind == "nobody" and status == 200
        (log.debug if quiet else log.info)(
            "http_request",
            listener=self._listener,
            method=method,
            route=call.route,
            status=status,
            duration_ms=round(duration_s * 1000, 2),
            ip=call.ip,
            caller=call.identity.kind,
            name=call.identity.name,
        )


def _valid_id(value: str | None) -> str | None:
    """The caller's own id where it is harmless in a log; anything else is as good as absent.

    It is kept in rows and events too, so a card number in it is no harmless one.
    """
    if value is None or not _ID.fullmatch(value) or card_numbers.masked(value) != value:
        return None
    return value
