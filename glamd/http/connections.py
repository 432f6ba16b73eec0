"""What every connection is held to, whatever is asked over it: deadlines, and errors below HTTP.

aiohttp alone lets a silent connection live as long as an idle one, takes headers and bodies at any
pace, waits for a reader that does not read, lets one client hold all connections there may be, and
answers broken HTTP with text that quotes it. The handler here puts a timer on each of these, and in
a listener that is full whoever idles makes room. No route, no identity, no log of requests.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
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
Refuse = Callable[[web.BaseRequest, int, str], web.StreamResponse]
"""The answer for what never became a request, by its status and, below 500, its code."""

_TOO_MANY = "Too many headers received"  # aiohttp's words for it

# Requests are logged as structured events by the middleware; aiohttp's own access log is off.
_SILENT = logging.getLogger("glamd.http.silent")
_SILENT.disabled = True


class GuardedHandler(web.RequestHandler):
    """One connection with its deadlines; `identity` is who the connection itself says it is."""

    __slots__ = (
        "_guard",
        "_head_deadline",
        "_in_request",
        "_unsent_since_s",
        "_write_deadline",
        "identity",
    )

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
        self._head_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._unsent_since_s: float | None = None
        self._in_request = False
        self.identity: Identity | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for the first request, or refuse where there is no room for us."""
        super().connection_made(transport)
        assert self.transport is not None
        # All that the kernel does not take at once counts as unsent, however little it is.
        self.transport.set_write_buffer_limits(high=1)
        OPEN.labels(self._guard.name).inc()
        if self._guard.admit(self):
            self._expect_head()
        else:
            self.cut("too_many")

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the clocks."""
        OPEN.labels(self._guard.name).dec()
        self._guard.forget(self)
        self._expect_no_head()
        self._expect_no_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Start the clock where what came is a part of a head; most heads come whole.

        A part of a next head that came in one piece with the request before it starts no clock;
        the connection then costs what an idle one does, and the keep-alive timer ends it.
        """
        self._guard.idle.pop(self, None)
        super().data_received(data)
        if (
            data
            and self._head_deadline is None
            and not self._in_request
            and not self._messages
            and self.transport is not None
        ):
            self._expect_head()

    def request_started(self) -> None:
        """The head is complete; the body's time is kept by whoever reads the body."""
        self._in_request = True
        self._expect_no_head()

    def pause_writing(self) -> None:
        """Something is unsent: start the clock for the client to take it."""
        super().pause_writing()
        if self.transport is not None:
            now_s, limits = self._loop.time(), self._guard.limits
            if self._unsent_since_s is None:
                self._unsent_since_s = now_s
            end_s = self._unsent_since_s + limits.answer_timeout_s
            # The transport's own, since a handler that is closing knows it no longer.
            self._write_deadline = self._loop.call_at(
                min(now_s + limits.write_timeout_s, end_s),
                self._cut,
                self.transport,
                "slow_reader",
            )

    def resume_writing(self) -> None:
        """The client has taken it."""
        self._expect_no_reader()
        super().resume_writing()

    def force_close(self) -> None:
        """Close, in order where that is possible; what is closing makes no room for others."""
        self._guard.idle.pop(self, None)
        super().force_close()

    def cut(self, reason: str) -> None:
        """Close at once, unsent answers and all."""
        if self.transport is not None:
            self._cut(self.transport, reason)

    def _cut(self, transport: asyncio.Transport, reason: str) -> None:
        CUT.labels(self._guard.name, reason).inc()
        self._guard.forget(self)
        transport.abort()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer; `pause_writing` has the clock for a client that does not take it."""
        # The rest of an unread body is not worth a further request's wait; and what follows a wish
        # for another protocol, which nobody here speaks, the parser may have thrown away.
        if not request.content.is_eof() or hdrs.UPGRADE in request.headers:
            resp.force_close()
        try:
            outcome = await super().finish_response(request, resp, start_time)
        finally:
            self._in_request = False
            self._unsent_since_s = None
        if resp.keep_alive and not self._messages and self.transport is not None:
            self._guard.idle[self] = None
        return outcome

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
        response = self._guard.refuse(request, *_refusal(status, exc, self._guard.limits))
        response.force_close()
        return response

    def _expect_head(self) -> None:
        self._head_deadline = self._loop.call_later(
            self._guard.limits.head_timeout_s, self.cut, "slow_head"
        )

    def _expect_no_head(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _expect_no_reader(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None


class GuardedServer(web.Server):
    """The protocol factory of one listener; every connection it makes is a `GuardedHandler`."""

    def __init__(
        self, dispatch: Dispatch, *, name: str, limits: HttpLimits, refuse: Refuse
    ) -> None:
        super().__init__(dispatch)
        self.name = name
        self.limits = limits
        self.refuse = refuse
        self.idle: OrderedDict[GuardedHandler, None] = OrderedDict()
        """Connections between two requests, the one that has been so for longest first."""
        # With the transports, which a handler that is closing knows no longer.
        self._open: dict[GuardedHandler, asyncio.Transport] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def admit(self, handler: GuardedHandler) -> bool:
        """Whether there is room for one more; where there is none, the longest idle makes it.

        Idle connections cost a client nothing, so that one address could otherwise hold all there
        are. How many an address may have is no rule here: behind a load balancer all are of one.
        """
        if len(self._open) >= self.limits.connections:
            if not self.idle:
                return False
            longest, _ = self.idle.popitem(last=False)
            longest.cut("idle")
        assert handler.transport is not None
        self._open[handler] = handler.transport
        self._empty.clear()
        return True

    def forget(self, handler: GuardedHandler) -> None:
        """It is closed, or about to be."""
        self._open.pop(handler, None)
        self.idle.pop(handler, None)
        if not self._open:
            self._empty.set()

    async def part(self, timeout_s: float) -> None:
        """After `shutdown`: let what is written get out, then cut those who do not hang up.

        With TLS a connection is closed only when both sides have said so.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        for transport in self._open.values():
            CUT.labels(self.name, "stopping").inc()
            transport.abort()

    def __call__(self) -> GuardedHandler:
        """A handler for one new connection."""
        return GuardedHandler(self, asyncio.get_running_loop())


def _refusal(status: int, exc: BaseException | None, limits: HttpLimits) -> tuple[int, str]:
    """What the parser refused, by status and code; its text quotes the request and is not used."""
    if status >= 500:
        return status, ""
    if isinstance(exc, LineTooLong):
        # The error says which of the two limits it was, and nothing else that would tell.
        if exc.args[1] == limits.line_bytes:
            return 414, "URI_TOO_LONG"
        return 431, "HEADERS_TOO_LARGE"
    if isinstance(exc, BadHttpMessage) and exc.args[:1] == (_TOO_MANY,):
        return 431, "HEADERS_TOO_LARGE"
    return 400, "BAD_REQUEST"
