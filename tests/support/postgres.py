"""A PostgreSQL for the tests, and fresh databases on it: the user's own server or the embedded one.

With `DATABASE_URL` the tests use that server, whose login must be an administrator's; they create
and drop their own databases and touch no other. Without it, one embedded server serves the session.
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
from glamd.db import Database, driver_url
from glamd.embedded.postgres import EmbeddedPostgres

T = TypeVar("T")

DAEMON_LOGIN = "glamd_daemon_of_the_tests"
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
        self.data: Path | None = None
        """Its files, where the server is the embedded one."""
        self._admin_url: str | None = None
        if url is None:
            self._embedded = EmbeddedPostgres(state_dir)
            urls = self._run(self._embedded.start())
            url, self._admin_url = urls.app, urls.admin
            self.data = state_dir / "postgres" / "data"
        self.url = driver_url(url)

    async def checkpoint(self) -> None:
        """Have everything written to the files that is committed; the embedded server only."""
        assert self._admin_url is not None
        await execute(self._admin_url, "CHECKPOINT")

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

    def daemon_url(self, url: str) -> str:
        """The same database as a login that is a member of `glamd_daemon` and no more.

        Made by an administrator; on the user's own server, DATABASE_URL's login has to be one.
        """
        password = secrets.token_hex(16)
        self.execute(
            self._admin_url or self.url,
            f"DO $$ BEGIN CREATE ROLE {DAEMON_LOGIN} NOLOGIN; "
            f"EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;"
            f"ALTER ROLE {DAEMON_LOGIN} LOGIN PASSWORD '{password}';"
            f"GRANT glamd_daemon TO {DAEMON_LOGIN}",
        )
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{DAEMON_LOGIN}:{password}@{place}"))

    def drop_database(self, url: str) -> None:
        """Drop a database, with the sessions that are still on it.

        By an administrator: nobody else may end an autovacuum worker that is at work in it.
        """
        self.execute(
            self._admin_url or self.url,
            f'DROP DATABASE IF EXISTS "{database_name(url)}" WITH (FORCE)',
        )

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


async def lock_waiters(database: Database) -> int:
    """How many statements of this database wait for another transaction."""
    count: int = await database.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return count


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
