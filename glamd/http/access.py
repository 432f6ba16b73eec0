"""What is left of a request once it is answered: its metrics and one access-log event.

The event names the route, never the path, and carries ids, no payload. The request's ids are bound
to its task, so that every other event of the request has them too.
"""

import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

import structlog
from prometheus_client import Counter, Histogram

from glamd.http.call import Call
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

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_ID_CHARS: Final = 32
_SEPARATORS: Final = str.maketrans("._:/+=", "------")
"""What else a card number may be written with; the search for one knows blanks and hyphens."""
_IDS_AT_ONCE: Final = 256
# A redactor takes a long number for a card now and then; among letters there is none.
_LETTERS = str.maketrans("0123456789", "ghijklmnop")


class AccessLog:
    """Counts and logs the requests of one listener."""

    def __init__(self, listener: str) -> None:
        self._listener = listener
        # Looking a label set up costs as much as counting does. What may stand in these is bounded:
        # METHODS, the routes of the table, the statuses that we answer.
        self._counters: dict[tuple[str, str, int], Counter] = {}
        self._durations: dict[str, Histogram] = {}

    def note(self, call: Call, *, status: int, duration_s: float) -> None:
        """Count and log one request."""
        method = call.request.method if call.request.method in METHODS else "OTHER"
        route = call.route
        counter = self._counters.get((method, route, status))
        if counter is None:
            counter = REQUESTS.labels(self._listener, method, route, str(status))
            self._counters[method, route, status] = counter
        counter.inc()
        duration = self._durations.get(route)
        if duration is None:
            duration = self._durations[route] = DURATION.labels(self._listener, route)
        duration.observe(duration_s)
        # Probes ask every few seconds; they are worth a line only when something is wrong.
        quiet = call.identity.kind == "nobody" and status == 200
        (log.debug if quiet else log.info)(
            "http_request",
            listener=self._listener,
            method=method,
            route=route,
            status=status,
            duration_ms=round(duration_s * 1000, 2),
            ip=call.ip,
            caller=call.identity.kind,
            name=call.identity.name,
        )


def _bound(name: str) -> ContextVar[str]:
    """structlog's variable of this name; setting it is a tenth of what binding by name costs."""
    tokens = structlog.contextvars.bind_contextvars(**{name: ""})
    structlog.contextvars.reset_contextvars(**tokens)
    return tokens[name].var


_REQUEST_ID = _bound("request_id")
_CORRELATION_ID = _bound("correlation_id")
_MERCHANT_ID = _bound("merchant_id")


def bind_ids(request_id: str, correlation_id: str) -> None:
    """From now on these are in every event of the current task and of no other.

    aiohttp runs each request in a task of its own.
    """
    _REQUEST_ID.set(request_id)
    _CORRELATION_ID.set(correlation_id)


def bind_merchant(merchant_id: str) -> None:
    """As `bind_ids`, once it is known who asks."""
    _MERCHANT_ID.set(merchant_id)


def valid_id(value: str | None) -> str | None:
    """The caller's own id where it is harmless in a log; anything else is as good as absent.

    It is kept in rows and events too, so a card number in it is no harmless one.
    """
    if value is None or not _ID.fullmatch(value):
        return None
    spaced = value.translate(_SEPARATORS)
    return value if card_numbers.masked(spaced) == spaced else None


def fresh_ids() -> Iterator[str]:
    """Request ids without end: 128 random bits each, as 32 letters.

    They are drawn by the hundred, since asking the system for randomness is most of their price.
    """
    while True:
        letters = os.urandom(_IDS_AT_ONCE * _ID_CHARS // 2).hex().translate(_LETTERS)
        for at in range(0, len(letters), _ID_CHARS):
            yield letters[at : at + _ID_CHARS]
