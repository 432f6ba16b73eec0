"""One request on its way through: what a handler is given, and what it may give back.

Nothing here writes to the network; `middleware` makes the response from an `Answer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web

from glamd.http.bodies import Body, parse_json, read_body
from glamd.http.identity import NOBODY, Client, Identity, Internal, Operator, Worker
from glamd.http.limits import HttpLimits

_Model = TypeVar("_Model", bound=Body)


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
    """A success: `data` is what orjson can write."""

    data: object
    status: int = 200
    pagination: Pagination | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A success that is not JSON in an envelope, such as the metrics page."""

    body: bytes
    content_type: str


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

    async def json(self, model: type[_Model]) -> _Model:
        """The body as `model`; errors as `bodies.read_body` and `bodies.parse_json`."""
        return parse_json(self.request, await read_body(self.request, self.limits), model)

    @property
    def caller(self) -> Client | Internal:
        """The bearer of a token; only for routes whose access names nobody else."""
        assert isinstance(self.identity, Client | Internal)
        return self.identity

    @property
    def worker(self) -> Worker:
        """The worker; only for routes whose access names nobody else."""
        assert isinstance(self.identity, Worker)
        return self.identity

    @property
    def operator(self) -> Operator:
        """The operator; only for routes whose access names nobody else."""
        assert isinstance(self.identity, Operator)
        return self.identity
