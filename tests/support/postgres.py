"""A PostgreSQL for the tests, and fresh databases on it: the user's own server or the embedded one.

With `DATABASE_URL` the tests use that server, whose login must be allowed to create databases; they
create and drop their own and touch no other. Without it, one embedded server serves the session.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from glamd.admin import migrate
from glamd.db import driver_url
from glamd.embedded.postgres import EmbeddedPostgres

T = TypeVar("T")

TIMEOUT_S = 30.0
POLL_S = 0.02


class PostgresServer:
    """A server on which tests make databases; synchronous, so that any kind of test may use it.

    Its coroutines run on a loop of its own, which stands still between the calls.
    """

    def __init__(self, runner: asyncio.Runner, *, url: str | None, state_dir: Path) -> None:
        self._runner = runner
        self._template: str | None = None
        self._embedded: EmbeddedPostgres | None = None
        if url is None:
            self._embedded = EmbeddedPostgres(state_dir)
            url = self._run(self._embedded.start()).app
        self.url = driver_url(url)

    def create_database(self, *, migrated: bool) -> str:
        """Create a database, with the newest schema or empty, and return its URL."""
        name = f"glamd_test_{secrets.token_hex(6)}"
        clause = ""
        if migrated:
            if self._template is None:
                self._template = self.create_database(migrated=False)
                self._run(migrate.upgrade(self._template))
            clause = f'TEMPLATE "{database_name(self._template)}"'
        self.execute(self.url, f'CREATE DATABASE "{name}" {clause}')
        return with_database(self.url, name)

    def drop_database(self, url: str) -> None:
        """Drop a database, with the sessions that are still on it."""
        self.execute(self.url, f'DROP DATABASE IF EXISTS "{database_name(url)}" WITH (FORCE)')

    def stop(self) -> None:
        """Drop what was made for all tests, and stop the server if it is ours."""
        if self._embedded is not None:
            self._run(self._embedded.stop())
        elif self._template is not None:
            self.drop_database(self._template)

    def execute(self, url: str, statements: str) -> None:
        """Run SQL on a database of this server; only from synchronous fixtures and tests."""
        self._run(execute(url, statements))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(coroutine, TIMEOUT_S))


async def execute(url: str, statements: str) -> None:
    """Run SQL on a connection of its own."""
    connection = await asyncpg.connect(url, timeout=TIMEOUT_S, command_timeout=TIMEOUT_S)
    try:
        await connection.execute(statements)
    finally:
        await connection.close(timeout=TIMEOUT_S)


def with_database(url: str, name: str) -> str:
    """The same server's URL with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def database_name(url: str) -> str:
    """The database that a URL names."""
    return urlsplit(url).path.removeprefix("/")


async def eventually(
    attempt: Callable[[], Awaitable[T]],
    *,
    errors: tuple[type[Exception], ...] = (),
    timeout_s: float = 10.0,
) -> T:
    """Try again until the attempt is true and raises none of `errors`; at most for so long."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(*errors):
                if result := await attempt():
                    return result
            await asyncio.sleep(POLL_S)
