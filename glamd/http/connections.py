"""What every connection is held to, whatever is asked over it: deadlines, and errors below HTTP.

aiohttp alone lets a silent connection live as long as an idle one, takes headers and bodies at any
pace, waits for a reader that does not read, and answers broken HTTP with text that quotes it. The
handler here puts a timer on each of these. No route, no identity, no log of requests.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import Counter, Gauge

from glamd.http.identity import Identity
from glamd.http.limits import HttpLimits

log = structlog.get_logger()

OPEN = Gauge("glamd_http_connections", "Connections open now.", ["listener"])
CUT = Counter(
    "glamd_http_connections_cut_total",
    "Connections closed by us before their time.",
    ["listener", "reason"],
)

Dispatch = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refuse = Callable[[web.BaseRequest, int], web.Response]

# Requests are logged as structured events by the middleware; aiohttp's own access log is off.
_SILENT = logging.getLogger("glamd.http.silent")
_SILENT.disabled = True


class GuardedHandler(web.RequestHandler):
    """One connection with its deadlines; `identity` is who the connection itself says it is."""

    __slots__ = ("_deadline", "_guard", "_in_request", "identity")

    def __init__(self, server: "GuardedServer", loop: asyncio.AbstractEventLoop) -> None:
        limits = server.limits
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=limits.keepalive_s,
            access_log=_SILENT,
            max_line_size=limits.line_bytes,
            max_field_size=limits.header_bytes,
            max_headers=limits.headers,
            lingering_time=limits.linger_s,
            # A compressed body is refused, so nothing is ever inflated.
            auto_decompress=False,
        )
        self._guard = server
        self._deadline: asyncio.TimerHandle | None = None
        self._in_request = False
        self.identity: Identity | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for the first request, or refuse where there are too many of us."""
        super().connection_made(transport)
        OPEN.labels(self._guard.name).inc()
        if len(self._guard.connections) > self._guard.limits.connections:
            self._cut("too_many")
        else:
            self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the clock."""
        OPEN.labels(self._guard.name).dec()
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Start the clock at the first byte of a further request.

        A part of a next head that came in one piece with the request before it starts no clock;
        the connection then costs what an idle one does, and the keep-alive timer ends it.
        """
        if data and not self._in_request and self._deadline is None:
            self._expect_head()
        super().data_received(data)

    def request_started(self) -> None:
        """The head is complete; the body's time is kept by whoever reads the body."""
        self._in_request = True
        self._expect_nothing()

    def cut(self, reason: str) -> None:
        """Close at once, unsent answers and all."""
        self._cut(reason)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer to a client that must take it in time."""
        if not request.content.is_eof():
            # The rest of an unread body is not worth a further request's wait.
            resp.force_close()
        try:
            async with asyncio.timeout(self._guard.limits.write_timeout_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            self._cut("slow_reader")
            return resp, True
        finally:
            self._in_request = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never became a request, without quoting it."""
        del message
        if status >= 500:
            log.error("http_handler_failed", listener=self._guard.name, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is already on its way")
        response = self._guard.refuse(request, status)
        response.force_close()
        return response

    def _expect_head(self) -> None:
        limits = self._guard.limits
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(limits.head_timeout_s, self._cut, "slow_head")

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self, reason: str) -> None:
        if self.transport is not None:
            CUT.labels(self._guard.name, reason).inc()
            self.transport.abort()


class GuardedServer(web.Server):
    """The protocol factory of one listener; every connection it makes is a `GuardedHandler`."""

    def __init__(
        self, dispatch: Dispatch, *, name: str, limits: HttpLimits, refuse: Refuse
    ) -> None:
        super().__init__(dispatch)
        self.name = name
        self.limits = limits
        self.refuse = refuse

    def __call__(self) -> GuardedHandler:
        """A handler for one new connection."""
        return GuardedHandler(self, asyncio.get_running_loop())
