"""The servers that `bench.http` asks: ours and bare aiohttp; `http_fastapi` has the third.

Each listens on a free port of loopback, says how to ask it, and serves until its process ends. All
of them run on uvloop and write their access lines, if any, to /dev/null.
"""

import asyncio
import importlib
import signal
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO
from uuid import UUID, uuid4

import jwt
import orjson
import uvloop
from aiohttp import web

from glamd import logs
from glamd.actor import System
from glamd.admin import migrate
from glamd.clock import Clock, SystemClock
from glamd.db import Database
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import NotFoundError
from glamd.http.addresses import ClientAddress
from glamd.http.auth import Authenticator
from glamd.http.credits import CreditRoutes
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import RouteTable
from glamd.ledger.model import Command, Operation
from glamd.ledger.service import Ledger
from glamd.lifetime import spare_the_collector
from glamd.merchants.store import Merchant

PATH: Final = "/api/credits"
SECRET: Final = "a-secret-of-the-benchmark-32-bytes!!"
MERCHANT: Final = "6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c"
DATA: Final[dict[str, object]] = {
    "balance": 9_412,
    "total_granted": 12_000,
    "total_consumed": 2_588,
    "platform_name": "shopify",
    "shop_domain": "shop.example",
}


def announce(port: int) -> None:
    """Say where to ask, and with which token."""
    claims = {
        "merchant_id": MERCHANT,
        "shop": "shop.example",
        "scope": "bff:call",
        "aud": "glamd",
        "exp": int(time.time()) + 3600,
    }
    print(port, PATH, jwt.encode(claims, SECRET, algorithm="HS256"), flush=True)


def serve(kind: str) -> None:
    """Serve until the process is ended."""
    if kind.startswith("fastapi"):
        # Not into the others' processes: what it imports would lie in their caches too.
        importlib.import_module("bench.http_fastapi").serve(cached=kind == "fastapi-cached")
    else:
        uvloop.run({"glamd": _glamd, "aiohttp": _aiohttp}[kind]())


def nowhere() -> TextIO:
    """Where access lines go."""
    return Path("/dev/null").open("w", encoding="utf-8")


# ---- ours


async def _glamd() -> None:
    """The real route over the real ledger and PostgreSQL, behind the pipeline of every route."""
    logs.configure("info", "json", nowhere())
    clock = SystemClock()
    limits = HttpLimits()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    async def nobody(_domain: str) -> Merchant:
        raise NotFoundError("There is no such merchant.")

    revoked: frozenset[str | None] = frozenset({"another"})
    async with AsyncExitStack() as stack:
        pipeline = Pipeline(
            listener="api",
            table=RouteTable(CreditRoutes(await _ledger(stack, clock)).routes()),
            authenticate=Authenticator(
                client_secrets=[SECRET],
                internal_secrets=[],
                require_audience=True,
                merchant_by_domain=nobody,
                clock=clock,
                is_revoked=lambda *, jti, kid: jti in revoked or kid in revoked,
            ),
            address=ClientAddress(),
            limits=limits,
            limiter=RateLimiter(rate_per_s=1e6, burst=1_000_000, clock=clock),
            draining=lambda: False,
            clock=clock,
        )
        listener = Listener(pipeline, name="api", limits=limits, refuse=pipeline.refuse)
        port = await listener.start_tcp("127.0.0.1", 0, None)
        stack.push_async_callback(listener.stop, 1.0)
        spare_the_collector()
        announce(port)
        await stopped.wait()


async def _ledger(stack: AsyncExitStack, clock: Clock) -> Ledger:
    """A ledger with the merchant's account, which holds what `DATA` says."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="glamd-bench-"))
    server = EmbeddedPostgres(Path(folder))
    urls = await server.start()
    stack.push_async_callback(server.stop)
    await migrate.upgrade(urls.app)
    database = await Database.connect(urls.app)
    stack.push_async_callback(database.close)
    system = System(clock=clock)
    ledger = Ledger(database, system=system, clock=clock)
    await ledger.start()
    stack.push_async_callback(ledger.stop, 1.0)
    stack.push_async_callback(system.drain, 1.0)
    async with database.transaction() as connection:
        await ledger.open_account(
            connection,
            merchant_id=UUID(MERCHANT),
            platform_name="shopify",
            platform_id="1",
            platform_domain="shop.example",
        )
    moves: tuple[tuple[Operation, int], ...] = (("credit", 12_000), ("debit", 2_588))
    for operation, amount in moves:
        await ledger.apply(
            Command(
                merchant_id=UUID(MERCHANT),
                operation=operation,
                amount=amount,
                reference_type="bench",
                reference_id=operation,
                correlation_id="bench",
            )
        )
    return ledger


# ---- bare aiohttp


async def _aiohttp() -> None:
    ids = {"request_id": uuid4().hex, "correlation_id": uuid4().hex}
    meta = {**ids, "timestamp": datetime.now(UTC)}
    body = orjson.dumps({"data": DATA, "meta": meta}, option=orjson.OPT_UTC_Z)

    async def credit(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get(PATH, credit)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    await web.SockSite(runner, listening).start()
    announce(listening.getsockname()[1])
    await asyncio.Event().wait()
