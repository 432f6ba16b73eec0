"""A listener with routes of the test's own behind the real pipeline, on a real socket.

Callers say who they are in their header, `Bearer client:<merchant id>` or `Bearer internal:<name>`:
what is tested here begins where somebody has been recognised.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from aiohttp import web

from glamd.clock import Clock
from glamd.errors import UnauthenticatedError
from glamd.http.addresses import ClientAddress
from glamd.http.cors import Cors
from glamd.http.identity import Client, Identity, Internal
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import Route, RouteTable, client, internal
from tests.support.http_fakes import MERCHANT, ManualClock, Reply, Wire

EVERYBODY = (client(), internal())
CALLER = f"client:{MERCHANT}"


async def recognise(request: web.BaseRequest) -> Identity:
    """Believe whoever says who they are."""
    kind, _, name = request.headers.get("Authorization", "").removeprefix("Bearer ").partition(":")
    if kind == "client":
        return Client(merchant_id=UUID(name), shop=None, scopes=frozenset())
    if kind == "internal":
        return Internal(name=name, scopes=frozenset())
    raise UnauthenticatedError("A bearer token is needed.")


@asynccontextmanager
async def serving(
    routes: Sequence[Route],
    *,
    limits: HttpLimits | None = None,
    limiter: RateLimiter | None = None,
    cors: Cors | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[int]:
    """The port of a running listener with these routes."""
    limits = limits or HttpLimits(linger_s=0.2)
    pipeline = Pipeline(
        listener="api",
        table=RouteTable(routes),
        authenticate=recognise,
        address=ClientAddress(),
        limits=limits,
        limiter=limiter,
        draining=lambda: False,
        clock=clock or ManualClock(),
        cors=cors,
    )
    listener = Listener(pipeline, name="api", limits=limits, refuse=pipeline.refuse)
    try:
        yield await listener.start_tcp("127.0.0.1", 0, None)
    finally:
        await listener.stop(1.0)


async def post(
    wire: Wire,
    path: str,
    body: object,
    *lines: str,
    caller: str = CALLER,
    method: str = "POST",
) -> Reply:
    """A request with this body, as JSON unless it is bytes already, and its answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        f"{method} {path} HTTP/1.1",
        f"Authorization: Bearer {caller}",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
        *lines,
    ]
    return await wire.ask("\n".join(head), raw)
