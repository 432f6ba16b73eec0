"""What keeps the access log small, on a real PostgreSQL: a bound on refusals, and its purge.

What each access writes is tried where the access is.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prometheus_client import REGISTRY

from glamd.credentials import service
from glamd.credentials.model import Accessor
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.errors import UnavailableError
from tests.support.database_proxy import DatabaseProxy
from tests.support.keys import local_provider
from tests.support.platform_vault import NOW, READER, load_keyring, log_of
from tests.support.postgres import execute
from tests.support.settable_clock import SettableClock

VICTIM = UUID(int=7)
FLOOD = 200


@pytest.fixture(scope="module")
def kek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key-encryption key of this module's database is."""
    return tmp_path_factory.mktemp("kek")


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, with an empty access log."""
    await execute(module_database_url, "TRUNCATE glam.token_access_log")
    return module_database_url


@pytest.fixture
def clock() -> SettableClock:
    """A clock that stands at NOW."""
    return SettableClock(NOW)


@pytest.fixture
async def vault(database: Database, kek: Path, clock: SettableClock) -> PlatformTokens:
    """A vault where nothing is renewed."""
    keyring = await load_keyring(database, local_provider(kek), clock)
    return PlatformTokens(database, keyring=keyring, clock=clock)


@pytest.fixture
async def behind_proxy(
    database_url: str, kek: Path, clock: SettableClock
) -> AsyncIterator[tuple[DatabaseProxy, PlatformTokens]]:
    """A vault, and the proxy that it goes through."""
    async with DatabaseProxy(database_url) as proxy:
        database = await Database.connect(proxy.url, pool_size=1)
        keyring = await load_keyring(database, local_provider(kek), clock)
        yield proxy, PlatformTokens(database, keyring=keyring, clock=clock)
        await database.close()


async def refuse(vault: PlatformTokens, merchant_id: UUID = VICTIM) -> None:
    """A client is refused another merchant's token."""
    await vault.refused(merchant_id, action="delete", code="NOT_FOUND", accessor=READER)


def refused() -> float:
    """How many refusals the metric has."""
    labels = {"action": "delete", "outcome": "refused"}
    return REGISTRY.get_sample_value("glamd_credentials_accesses_total", labels) or 0.0


async def test_a_flood_of_refused_attempts_writes_one_row_a_minute_and_counts_all(
    vault: PlatformTokens, database: Database, clock: SettableClock
) -> None:
    before = refused()
    await asyncio.gather(*(refuse(vault) for _ in range(FLOOD)))
    row = ("delete", None, "platform-connector", False, "NOT_FOUND")
    assert await log_of(database, VICTIM) == [row]
    clock.advance(60)
    await refuse(vault)
    assert await log_of(database, VICTIM) == [row, row]
    assert refused() == before + FLOOD + 1


async def test_a_refusal_whose_row_was_not_written_has_one_the_next_time(
    behind_proxy: tuple[DatabaseProxy, PlatformTokens], database: Database
) -> None:
    proxy, vault = behind_proxy
    proxy.is_down = True
    proxy.cut()
    with pytest.raises(UnavailableError):
        await refuse(vault)
    proxy.is_down = False
    async with asyncio.timeout(10):
        while not await log_of(database, VICTIM):
            try:
                await refuse(vault)
            except UnavailableError:
                await asyncio.sleep(0)
    assert len(await log_of(database, VICTIM)) == 1


async def fill(database: Database, *, rows: int, days: int) -> None:
    """Rows of the access log that are so many days old."""
    await database.execute(
        "INSERT INTO glam.token_access_log (at, merchant_id, action, actor_kind, actor, success,"
        " request_id, correlation_id, ip)"
        " SELECT $1, $2, 'read', 'internal', 'catalog-service', true, 'r', 'c', '-'"
        " FROM generate_series(1, $3)",
        NOW - timedelta(days=days),
        VICTIM,
        rows,
    )


async def count(database: Database) -> int:
    """How many rows the access log has."""
    return int(await database.fetchval("SELECT count(*) FROM glam.token_access_log"))


async def test_rows_are_kept_for_400_days_and_then_purged(
    vault: PlatformTokens, database: Database, clock: SettableClock
) -> None:
    await fill(database, rows=3, days=400)
    await fill(database, rows=2, days=401)
    await fill(database, rows=4, days=0)
    assert await vault.purge() == 2
    assert await vault.purge() == 0
    clock.advance(1)
    assert await vault.purge() == 3
    assert await count(database) == 4


async def test_a_purge_has_a_bound_and_the_next_one_goes_on(
    vault: PlatformTokens, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PURGE_ROWS", 10)
    monkeypatch.setattr(service, "PURGE_BATCHES", 3)
    await fill(database, rows=35, days=500)
    assert [await vault.purge() for _ in range(3)] == [30, 5, 0]


async def test_nodes_that_purge_at_once_delete_each_row_once_and_do_not_wait(
    vault: PlatformTokens, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PURGE_ROWS", 10)
    await fill(database, rows=100, days=500)
    assert sum(await asyncio.gather(*(vault.purge() for _ in range(3)))) <= 100
    await vault.purge()
    assert await count(database) == 0


async def test_another_callers_refusal_is_not_hidden_by_a_flood(
    vault: PlatformTokens, database: Database
) -> None:
    for _ in range(FLOOD):
        await refuse(vault, uuid4())
    other = Accessor(kind="client", name="x", ip="-", request_id="r", correlation_id="c")
    await vault.refused(VICTIM, action="read", code="FORBIDDEN", accessor=other)
    assert await log_of(database, VICTIM) == [("read", None, "x", False, "FORBIDDEN")]
    assert await count(database) <= 61
