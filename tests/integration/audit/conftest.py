"""Fixtures of the audit log: its database, the daemon's login, who has every right, and a clock."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from glamd.db import Database
from glamd.keys.keyrings import Keyring, Keyrings, MacKey
from glamd.payments.audit import Audit
from tests.support.audit_log import PARTITIONS, running
from tests.support.keys import load_keyrings
from tests.support.settable_clock import SettableClock


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests of a module, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("DELETE FROM cde.audit_heads; DELETE FROM cde.encryption_keys")
    for row in await connection.fetch(PARTITIONS):
        await connection.execute(f"DROP TABLE {row['name']}")
    await connection.close()
    return module_database_url


@pytest.fixture
async def database(daemon_url: str) -> AsyncIterator[Database]:
    """The daemon's connections: as a login that may add to the log, read it, and no more."""
    connected = await Database.connect(daemon_url, pool_size=4)
    yield connected
    await connected.close()


@pytest.fixture
def clock() -> SettableClock:
    """A clock that stands in the middle of November."""
    return SettableClock(datetime(2025, 11, 12, 10, 30, tzinfo=UTC))


@pytest.fixture
async def by_hand(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A session of somebody with every right; closed in any case, or uvloop hangs at its end."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def keyrings(database: Database, tmp_path: Path, clock: SettableClock) -> Keyrings:
    """The keys of this test's database."""
    return await load_keyrings(database, tmp_path, clock)


@pytest.fixture
def keyring(keyrings: Keyrings) -> Keyring[MacKey]:
    """The key that rows are chained with."""
    return keyrings.audit


@pytest.fixture
async def audit(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> AsyncIterator[Audit]:
    """The log, open for rows."""
    async with running(database, keyring, clock) as made:
        yield made


@pytest.fixture
async def elsewhere(database_url: str) -> AsyncIterator[Database]:
    """The same database as another node is connected to it."""
    connected = await Database.connect(database_url, pool_size=2)
    yield connected
    await connected.close()
