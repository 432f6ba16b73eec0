"""The routes about money on real sockets: an api listener with some of them, and glamctl to others.

The pipeline, who is recognised and what is answered are the daemon's; what stands behind the routes
is the test's own.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result
from pydantic import TypeAdapter

from glamd.admin.cli_billing import billing
from glamd.admin.cli_common import RootGroup, Session
from glamd.admin.cli_events import events
from glamd.admin.cli_ledger import ledger
from glamd.admin.peers import Operators, PeerIdentity
from glamd.http.addresses import ClientAddress
from glamd.http.limits import HttpLimits
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import Route, RouteTable
from tests.support.http_fakes import Reply, Wire
from tests.support.http_world import World


@asynccontextmanager
async def api(world: World, routes: Sequence[Route]) -> AsyncIterator[int]:
    """The port of an api listener with these routes."""
    pipeline = Pipeline(
        listener="api",
        table=RouteTable(routes),
        authenticate=world.authenticator(),
        address=ClientAddress(),
        limits=world.limits,
        limiter=world.limiter(),
        draining=lambda: world.draining,
        clock=world.clock,
    )
    listener = Listener(pipeline, name="api", limits=world.limits, refuse=pipeline.refuse)
    try:
        yield await listener.start_tcp("127.0.0.1", 0, None)
    finally:
        await listener.stop(1.0)


async def ask(
    wire: Wire,
    method: str,
    path: str,
    token: str | None = None,
    sent: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One request; what is sent is JSON unless it is bytes already."""
    lines = [f"{method} {path} HTTP/1.1"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    raw = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    if sent is None:
        raw = b""
    else:
        lines.append(f"Content-Length: {len(raw)}")
        if not isinstance(sent, bytes):
            lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return await wire.ask("\n".join(lines), raw)


def refusal(reply: Reply) -> tuple[int, str, list[str]]:
    """Status, code and fields of a problem answer."""
    return (
        reply.status,
        reply.json["code"],
        [each["field"] for each in reply.json.get("errors", [])],
    )


def examples_fit(routes: Sequence[Route]) -> None:
    """Assert that what the document shows of these routes is what they take and answer."""
    for route in routes:
        told = route.operation
        assert told is not None
        answer: Any = told.answer
        TypeAdapter(answer).validate_json(json.dumps(told.example), strict=True)
        if told.body is not None:
            told.body.model_validate_json(json.dumps(told.body_example))


@dataclass(frozen=True, slots=True)
class Admin:
    """An admin socket, and glamctl to it."""

    path: Path

    @asynccontextmanager
    async def serving(self, world: World, routes: Sequence[Route]) -> AsyncIterator[None]:
        """The socket with these routes."""
        limits = HttpLimits()
        pipeline = Pipeline(
            listener="admin",
            table=RouteTable(routes),
            authenticate=PeerIdentity(Operators()),
            address=ClientAddress(),
            limits=limits,
            limiter=None,
            draining=lambda: False,
            clock=world.clock,
            envelope=False,
        )
        listener = Listener(pipeline, name="admin", limits=limits, refuse=pipeline.refuse)
        await listener.start_unix(self.path, mode=0o660, gid=None)
        try:
            yield
        finally:
            await listener.stop(1.0)

    async def run(self, *args: object) -> Result:
        """Run glamctl, in a thread for it blocks."""
        words = [str(arg) for arg in args]
        session = Session(socket=self.path)
        return await asyncio.to_thread(CliRunner().invoke, _glamctl, words, obj=session)

    async def done(self, *args: object) -> str:
        """The output of a command that was done."""
        result = await self.run(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def told(self, *args: object) -> Any:
        """The same, as a program reads it."""
        return json.loads(await self.done(*args, "--json"))

    async def failed(self, status: int, *args: object) -> str:
        """The one line of a command that was not done."""
        result = await self.run(*args)
        assert result.exit_code == status, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        return result.stderr.rstrip("\n")


@click.group("glamctl", cls=RootGroup)
def _glamctl() -> None:
    """glamctl, as far as it is about money."""


for _command in (ledger, billing, events):
    _glamctl.add_command(_command)
