"""What every test may ask for: a fresh migrated database, uvloop, and loud skips.

`database_url` (or `database`, connected) is a test's own and is gone after it; a test module that
only reads may share one through `module_database_url`. Fixtures of one room stand in that room's
own conftest, not here.
"""

import asyncio
import os
import signal
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import uvloop

from glamd.db import Database
from tests.support.nats import NatsServer
from tests.support.postgres import PostgresServer

IN_CI = os.environ.get("CI") == "true"

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if IN_CI else "default")

# A shell that starts this in the background has SIGINT ignored, which every process that a test
# starts would inherit, and Ctrl-C is part of what they are asked to understand.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], AbstractEventLoop]]:
    """Run every asynchronous test on uvloop, as the daemon runs."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The session's server: DATABASE_URL's, or an embedded one."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = PostgresServer(
            runner,
            url=os.environ.get("DATABASE_URL"),
            state_dir=tmp_path_factory.mktemp("server"),
        )
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """The session's NATS server with JetStream."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = NatsServer(runner, tmp_path_factory.mktemp("bus"))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh database with the newest schema."""
    url = postgres_server.create_database(migrated=True)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def daemon_url(postgres_server: PostgresServer, database_url: str) -> str:
    """The same database, as a login that has the daemon's role and owns nothing."""
    return postgres_server.daemon_url(database_url)


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh database with nothing in it."""
    url = postgres_server.create_database(migrated=False)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def module_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a database with the newest schema that the tests of one module share."""
    url = postgres_server.create_database(migrated=True)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A fresh database with the newest schema, connected."""
    connected = await Database.connect(database_url, pool_size=4)
    yield connected
    await connected.close()


@pytest.fixture(scope="session")
def debian_program() -> Callable[[str, str], Path]:
    """Find a Debian package's program; without it the test is skipped, in CI it fails.

    `debian_program(path, package)`; for tests that carry the `debian` marker.
    """

    def find(path: str, package: str) -> Path:
        program = Path(path)
        if not program.exists():
            message = f"{path} is missing: install the Debian package {package}"
            if IN_CI:
                pytest.fail(message)
            pytest.skip(message)
        return program

    return find
