"""What happens to every request of a listener, in this order, whatever its route.

Ids are given out, the route is found, the caller is recognised, a draining daemon says so, bodies
that would be refused are refused by their headers, the caller is held to its rate and checked
against the route's access; then the handler runs, for so long as a handler may. Every outcome,
errors that nobody foresaw included, leaves as an envelope or a problem answer with the same
headers, one access-log event and its metrics.

No route stands here and no way of recognising a caller; both are given to the `Pipeline`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol, runtime_checkable

import structlog
from aiohttp import HttpVersion10, web

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
from glamd.http.access import AccessLog, bind_ids, bind_merchant, fresh_ids, valid_id
from glamd.http.addresses import ClientAddress
from glamd.http.bodies import ClientGoneError, SlowBodyError, refuse_early
from glamd.http.call import Answer, Call, Raw
from glamd.http.connections import GuardedHandler
from glamd.http.cors import Cors
from glamd.http.deadlines import Deadlines
from glamd.http.identity import Client, Identity
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.problems import MethodNotAllowedError
from glamd.http.responses import Responses
from glamd.http.routes import Route, RouteTable

log = structlog.get_logger()

DRAIN_RETRY_AFTER_S: Final = 5

Authenticate = Callable[[web.BaseRequest], Awaitable[Identity]]
Refused = Callable[[Call, GlamError], Awaitable[None]]


@runtime_checkable
class Remembering(Protocol):
    """An `Authenticate` that finds whom it believed before at once, and others at a price."""

    def __call__(self, request: web.BaseRequest) -> Awaitable[Identity]:
        """The caller, whatever it takes."""

    def cached(self, request: web.BaseRequest) -> Identity | None:
        """The caller, if they are remembered; never raises."""


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
        cors: Cors | None = None,
    ) -> None:
        """`envelope` False answers a success with its bare data, as the admin socket does.

        Where `authenticate` is `Remembering`, it is asked for what it does not remember only while
        the caller's address is within its rate: whoever guesses pays for the guesses.

        `refused` is told when a caller was kept from the handler, as nobody where it was not
        recognised; what it raises is answered instead. Without `cors` no answer says a word to
        browsers.
        """
        self._table = table
        self._authenticate = authenticate
        self._remembering = authenticate if isinstance(authenticate, Remembering) else None
        self._address = address
        self._limits = limits
        self._limiter = limiter
        self._draining = draining
        self._clock = clock
        self._refused = refused
        self._responses = Responses(clock=clock, envelope=envelope, cors=cors)
        self._access = AccessLog(listener)
        self._deadlines = Deadlines(limits.handler_timeout_s)
        self._ids = fresh_ids()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; no exception but a cancellation leaves this."""
        started_s = self._clock.monotonic_s()
        handler = request.protocol
        assert isinstance(handler, GuardedHandler)
        handler.request_started()
        call = self._open(request, request.headers)
        status, response = await self._in_time(call, handler)
        self._close(call, status, started_s)
        return response

    def refuse(self, request: web.BaseRequest, status: int, code: str) -> web.StreamResponse:
        """The answer for what never became a request: broken HTTP, or our own failure."""
        call = self._open(request, None)
        error: GlamError = InternalError("the dispatch failed")
        if status < 500:
            error = InputError("The request is not valid HTTP.", code=code)
        response = self._responses.problem(call, error)
        self._close(call, response.status, self._clock.monotonic_s())
        return response

    def _open(self, request: web.BaseRequest, headers: Mapping[str, str] | None) -> Call:
        request_id = correlation_id = None
        if headers is not None:
            request_id = valid_id(headers.get("X-Request-ID"))
            correlation_id = valid_id(headers.get("X-Correlation-ID"))
        request_id = request_id or next(self._ids)
        correlation_id = correlation_id or request_id
        bind_ids(request_id, correlation_id)
        return Call(
            request=request,
            request_id=request_id,
            correlation_id=correlation_id,
            ip=self._address.of(request, headers=headers is not None),
            limits=self._limits,
        )

    async def _in_time(self, call: Call, handler: GuardedHandler) -> tuple[int, web.StreamResponse]:
        """The outcome, or 503 where it does not come; a cancellation by others goes through."""
        task = self._deadlines.begin(asyncio.get_running_loop())
        try:
            outcome = await self._outcome(call, handler)
        except asyncio.CancelledError:
            if not self._deadlines.end(task) or task.uncancel():
                raise
            log.warning("http_handler_too_slow", route=call.route)
            response = self._responses.problem(call, UnavailableError("It took too long."))
            return response.status, response
        if self._deadlines.end(task):
            task.uncancel()
        return outcome

    async def _outcome(self, call: Call, handler: GuardedHandler) -> tuple[int, web.StreamResponse]:
        try:
            response: web.StreamResponse = self._responses.success(call, await self._handle(call))
        except SlowBodyError:
            handler.cut("slow_body")
            return 408, web.Response(status=408)
        except ClientGoneError:
            return 499, web.Response(status=400)
        except MethodNotAllowedError as error:
            response = self._responses.preflight(call, error.allow) or self._responses.problem(
                call, error
            )
        except GlamError as error:
            response = self._responses.problem(call, error)
        except Exception as error:
            log.exception("http_unexpected_error", route=call.route, error=type(error).__name__)
            response = self._responses.problem(call, InternalError("unexpected"))
        return response.status, response

    async def _handle(self, call: Call) -> Answer | Raw:
        request = call.request
        if request.version < HttpVersion10:
            raise InputError("HTTP/0.9 is not spoken here.", code="BAD_REQUEST")
        try:
            route, call.params = self._table.find(request.method, request.rel_url.raw_path)
        except (NotFoundError, MethodNotAllowedError):
            self._limit(f"ip:{call.ip}")
            raise
        call.route = route.path
        if route.public:
            refuse_early(request, self._limits)
            answer = await route.handler(call)
            if isinstance(answer, Raw) and answer.rationed:
                self._limit(f"ip:{call.ip}")
            return answer
        known = None if self._remembering is None else self._remembering.cached(request)
        try:
            call.identity = known or await self._recognised(call)
            if isinstance(call.identity, Client):
                bind_merchant(call.identity.name)
            self._admit(call, route)
        except GlamError as error:
            if self._refused is not None:
                await self._refused(call, error)
            raise
        return await route.handler(call)

    async def _recognised(self, call: Call) -> Identity:
        """Who the caller is; whoever guesses is held to the rate of their address, which is all
        that is known of them.
        """
        if self._remembering is not None and self._limiter is not None:
            _refuse_for(self._limiter.peek(f"ip:{call.ip}"))
        try:
            return await self._authenticate(call.request)
        except UnauthenticatedError:
            self._limit(f"ip:{call.ip}")
            raise

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

    def _limit(self, caller: str) -> None:
        if self._limiter is not None:
            _refuse_for(self._limiter.take(caller))

    def _close(self, call: Call, status: int, started_s: float) -> None:
        duration_s = max(0.0, self._clock.monotonic_s() - started_s)
        self._access.note(call, status=status, duration_s=duration_s)


def _refuse_for(wait_s: int) -> None:
    if wait_s:
        raise RateLimitedError("Too many requests.", retry_after_s=wait_s)
