"""The route table: what is found where, and whom a route is for."""

from uuid import uuid4

import pytest

from glamd.errors import ForbiddenError, NotFoundError
from glamd.http.call import Answer, Call
from glamd.http.identity import Client, Internal, Nobody, Worker
from glamd.http.problems import MethodNotAllowedError
from glamd.http.routes import WORKER, Access, Route, RouteTable, client, internal


async def handler(call: Call) -> Answer:
    """Never called here."""
    raise AssertionError(call)


def route(method: str, path: str, *access: Access) -> Route:
    """A route that does nothing."""
    return Route(method=method, path=path, handler=handler, access=access)


TABLE = RouteTable(
    [
        route("GET", "/things"),
        route("POST", "/things"),
        route("GET", "/things/{id}"),
        route("DELETE", "/things/{id}"),
        route("POST", "/things/{id}/parts/{part}"),
        route("GET", "/things/special"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "template", "params"),
    [
        ("GET", "/things", "/things", {}),
        ("HEAD", "/things", "/things", {}),
        ("GET", "/things/7", "/things/{id}", {"id": "7"}),
        ("GET", "/things/special", "/things/special", {}),
        ("GET", "/things/a%2Fb", "/things/{id}", {"id": "a/b"}),
        ("GET", "/things/%2e%2e", "/things/{id}", {"id": ".."}),
        ("GET", "/things/{id}", "/things/{id}", {"id": "{id}"}),
        ("POST", "/things/1/parts/2", "/things/{id}/parts/{part}", {"id": "1", "part": "2"}),
    ],
)
def test_a_path_leads_to_its_route(
    method: str, path: str, template: str, params: dict[str, str]
) -> None:
    found, values = TABLE.find(method, path)
    assert (found.path, values) == (template, params)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "things",
        "/thing",
        "/things/",
        "/things//",
        "/things/1/",
        "/things/1/parts",
        "/things/1/parts/",
        "/things//parts/2",
        "/Things",
        "/things/1/parts/2/3",
    ],
)
def test_what_is_not_in_the_table_is_not_found(path: str) -> None:
    with pytest.raises(NotFoundError):
        TABLE.find("GET", path)


def test_a_wrong_method_names_the_right_ones() -> None:
    with pytest.raises(MethodNotAllowedError) as caught:
        TABLE.find("PUT", "/things")
    assert caught.value.allow == ("GET", "HEAD", "POST")


def test_a_route_that_stands_twice_is_a_programmers_error() -> None:
    with pytest.raises(AssertionError):
        RouteTable([route("GET", "/a/{x}"), route("GET", "/a/{y}")])


MERCHANT = Client(merchant_id=uuid4(), shop=None, scopes=frozenset({"a", "b"}))
SERVICE = Internal(name="s", scopes=frozenset({"read"}))
SETTLER = Worker(name="w", certificate_sha256="0" * 64)


@pytest.mark.parametrize(
    ("access", "identity", "allowed"),
    [
        ((), Nobody(), True),
        ((), SERVICE, True),
        ((client(),), MERCHANT, True),
        ((client("a"),), MERCHANT, True),
        ((client("a", "b"),), MERCHANT, True),
        ((client("a", "c"),), MERCHANT, False),
        ((client(),), SERVICE, False),
        ((client(),), Nobody(), False),
        ((internal("read"),), SERVICE, True),
        ((internal("write"),), SERVICE, False),
        ((client(), internal("read")), SERVICE, True),
        ((client("c"), internal("a")), MERCHANT, False),
        ((WORKER,), SETTLER, True),
        ((WORKER,), SERVICE, False),
        ((client(),), SETTLER, False),
    ],
)
def test_a_route_is_for_those_it_names(
    access: tuple[Access, ...], identity: Client | Internal | Worker | Nobody, allowed: bool
) -> None:
    entry = route("GET", "/x", *access)
    if allowed:
        entry.allow(identity, {})
    else:
        with pytest.raises(ForbiddenError):
            entry.allow(identity, {})
