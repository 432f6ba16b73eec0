"""The route table: one entry says method, path, handler, who may call, and for whose data.

Routing, the authorization check, the published document and the generated tests read the same
entries, so a route cannot be reachable without having said whom it is for. No handler lives here.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote

from glamd.errors import ForbiddenError, NotFoundError
from glamd.http.call import Answer, Call, Raw
from glamd.http.identity import NO_SCOPES, Identity, Kind
from glamd.http.operation import Operation
from glamd.http.problems import MethodNotAllowedError

Handler = Callable[[Call], Awaitable[Answer | Raw]]


Owner = Literal["own", "any", "grant", "nobody's"]
"""Whose data a caller may touch: its own merchant's (another's is not there), any merchant's, that
of the merchants in its grant, or none that is a merchant's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One kind of caller of a route: the scopes it must bring, and whose data it may touch.

    `services`, where it is given, are the only internal services that may come.
    """

    kind: Kind
    owner: Owner
    scopes: frozenset[str] = NO_SCOPES
    services: frozenset[str] | None = None


def client(*scopes: str) -> Access:
    """Storefront back ends with these scopes, for their own merchant."""
    return Access(kind="client", owner="own", scopes=frozenset(scopes))


def internal(*scopes: str, services: Iterable[str] | None = None) -> Access:
    """Internal services with these scopes, for any merchant; only those named, where some are."""
    return Access(
        kind="internal",
        owner="any",
        scopes=frozenset(scopes),
        services=None if services is None else frozenset(services),
    )


WORKER = Access(kind="worker", owner="grant")
DEVICE = Access(kind="device", owner="own")
OPERATOR = Access(kind="operator", owner="any")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route; `path` is a template such as `/api/v1/things/{id}`.

    An empty `access` is a public route: nobody is asked who they are, only large documents are held
    to a rate (`Raw.rationed`), and it answers while the daemon drains. A path parameter called
    `merchant_id` is held to the owner rule here; what names a merchant elsewhere is the handler's.
    `operation` is what the published document says; the admin socket's routes have none.
    """

    method: str
    path: str
    handler: Handler
    access: tuple[Access, ...]
    operation: Operation | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        assert self.path.startswith("/")
        names = tuple(part[1:-1] for part in _segments(self.path) if _is_wild(part))
        object.__setattr__(self, "names", names)

    @property
    def public(self) -> bool:
        """Whether this route is for everybody."""
        return not self.access

    def allow(self, identity: Identity, params: Mapping[str, str]) -> None:
        """Raise unless `identity` may call this route with these path parameters.

        `ForbiddenError` where its kind, its scopes or its service's name does not suffice;
        `NotFoundError` where the path names a merchant that is not its own.
        """
        if self.public:
            return
        for access in self.access:
            if access.kind == identity.kind:
                break
        else:
            raise ForbiddenError("This route is not for this kind of caller.")
        if not access.scopes <= identity.scopes:
            missing = " ".join(sorted(access.scopes - identity.scopes))
            raise ForbiddenError(f"The token lacks the scope {missing}.")
        if access.services is not None and identity.name not in access.services:
            raise ForbiddenError(
                "This service is not among those that may call this route.",
                code="SERVICE_NOT_ALLOWED",
            )
        merchant = params.get("merchant_id", identity.name)
        if access.owner == "own" and merchant.lower() != identity.name:
            raise NotFoundError("There is no such merchant.")


@dataclass(slots=True)
class _Node:
    literal: dict[str, "_Node"] = field(default_factory=dict)
    wild: "_Node | None" = None
    routes: dict[str, Route] = field(default_factory=dict)


class RouteTable:
    """Finds the route of a method and a path; a literal segment goes before a wild one."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        self.routes = tuple(routes)
        for route in self.routes:
            self._add(route)

    def _add(self, route: Route) -> None:
        node = self._root
        for part in _segments(route.path):
            if _is_wild(part):
                node.wild = node.wild or _Node()
                node = node.wild
            else:
                node = node.literal.setdefault(part, _Node())
        assert route.method not in node.routes, f"{route.method} {route.path} stands twice"
        node.routes[route.method] = route

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
        """The route and its decoded path parameters; HEAD is answered as GET is.

        Raises `NotFoundError`, or `MethodNotAllowedError` where only the method is wrong.
        """
        node: _Node | None = self._root
        values: list[str] = []
        for part in _segments(raw_path):
            assert node is not None
            literal = node.literal.get(part)
            if literal is not None:
                node = literal
                continue
            node = node.wild
            if node is None or not part:
                raise NotFoundError("There is nothing at this path.")
            values.append(unquote(part))
        assert node is not None
        if not node.routes:
            raise NotFoundError("There is nothing at this path.")
        route = node.routes.get("GET" if method == "HEAD" else method)
        if route is None:
            allow = set(node.routes) | ({"HEAD"} if "GET" in node.routes else set())
            raise MethodNotAllowedError(tuple(sorted(allow)))
        return route, dict(zip(route.names, values, strict=True))


def _segments(path: str) -> list[str]:
    return path.split("/")[1:]


def _is_wild(part: str) -> bool:
    return part.startswith("{") and part.endswith("}")
