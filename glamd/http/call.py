"""One request on its way through: what a handler is given, and what it may give back.

Nothing here writes to the network; `middleware` makes the response from an `Answer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web

from glamd.http.bodies import Body, parse_json, read_body
from glamd.http.identity import NOBODY, Client, Identity, Internal, Operator
from glamd.http.limits import HttpLimits
from glamd.http.queries import Query, parse_query

_Body = TypeVar("_Body", bound=Body)
_Query = TypeVar("_Query", bound=Query)

NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pagination:
    """Where a page stands in its list; `page` is None where a cursor led to it."""

    page: int | None
    limit: int
    total: int
    next_cursor: str | None

    def as_json(self) -> dict[str, object]:
        """The `pagination` object of the envelope."""
        pages = -(-self.total // self.limit)
        return {
            "page": self.page,
            "limit": self.limit,
            "total": self.total,
            "pages": pages,
            "has_next": self.next_cursor is not None,
            "has_previous": self.page is None or self.page > 1,
            "next_cursor": self.next_cursor,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A success: `data` is what orjson can write; `headers` are laid over those of every answer."""

    data: object = field(repr=False)
    """Not in the repr: it may be what opens a shop, in the clear."""

    status: int = 200
    pagination: Pagination | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A success that is not JSON in an envelope, such as the metrics page.

    `headers` are laid over those of every answer, such as a document's own
    `Content-Security-Policy`. `rationed` holds whoever asks for it to the rate of their address,
    also where nobody has to say who they are.
    """

    body: bytes = field(repr=False)
    content_type: str
    rationed: bool = False
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)


@dataclass(slots=True, kw_only=True)
class Call:
    """One request: its ids, where it came from, who made it, and its path parameters."""

    request: web.BaseRequest
    request_id: str
    correlation_id: str
    ip: str
    limits: HttpLimits
    identity: Identity = NOBODY
    params: Mapping[str, str] = field(default_factory=dict)
    route: str = "unmatched"
    raw: bytes = field(default=b"", repr=False)
    """The body's bytes once `json` has read them: what an idempotency key is held to."""

    async def json(self, model: type[_Body]) -> _Body:
        """The body as `model`; errors as `bodies.read_body` and `bodies.parse_json`."""
        self.raw = await read_body(self.request, self.limits)
        return parse_json(self.request, self.raw, model)

    def query(self, model: type[_Query]) -> _Query:
        """The query as `model`; errors as `queries.parse_query`."""
        return parse_query(self.request, model)

    @property
    def caller(self) -> Client | Internal:
        """The bearer of a token; only for routes whose access names nobody else."""
        assert isinstance(self.identity, Client | Internal)
        return self.identity

    @property
    def operator(self) -> Operator:
        """The operator; only for routes whose access names nobody else."""
        assert isinstance(self.identity, Operator)
        return self.identity
