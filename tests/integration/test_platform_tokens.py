"""The vault of platform tokens on a real PostgreSQL: lost commits, moved rows, races, counters."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.credentials import service
from glamd.credentials.model import PLATFORMS, Accessor, Health, Platform, Reading, Secret
from glamd.credentials.service import PlatformTokens, Renew
from glamd.db import Connection, Database
from glamd.errors import ConflictError, InputError, NotFoundError, UnavailableError
from glamd.keys.keyrings import DataKey, Keyring
from glamd.keys.providers.interface import Providers
from glamd.keys.providers.local import LocalProvider
from tests.support.database_proxy import DatabaseProxy
from tests.support.keys import local_provider
from tests.support.platform_vault import (
    CANARY,
    NOW,
    READER,
    by_platform,
    destroy,
    load_keyring,
    log_of,
    new_token,
    refreshable,
    rotate,
    rows_of,
)
from tests.support.postgres import eventually, execute
from tests.support.settable_clock import SettableClock

OWNER = Accessor(kind="client", name="m", ip="-", request_id="req-2", correlation_id="req-2")
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def kek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key-encryption key of this module's database is."""
    return tmp_path_factory.mktemp("kek")


@pytest.fixture
def provider(kek: Path) -> Providers:
    """The key provider of this module's database."""
    return local_provider(kek)


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, without keys and tokens: much cheaper than one each."""
    await execute(
        module_database_url,
        "DELETE FROM glam.encryption_keys; DELETE FROM glam.platform_tokens;"
        " DELETE FROM glam.token_access_log",
    )
    return module_database_url


@pytest.fixture
def clock() -> SettableClock:
    """A clock that stands at NOW."""
    return SettableClock(NOW)


@pytest.fixture
async def keyring(
    database: Database, provider: Providers, clock: SettableClock
) -> Keyring[DataKey]:
    """The keyring as it is after the start."""
    return await load_keyring(database, provider, clock)


@pytest.fixture
def vault(database: Database, keyring: Keyring[DataKey], clock: SettableClock) -> PlatformTokens:
    """A vault where nothing is renewed."""
    return PlatformTokens(database, keyring=keyring, clock=clock)


@pytest.fixture
def merchant_id() -> UUID:
    """A merchant of the test's own."""
    return uuid4()


Through = tuple[DatabaseProxy, PlatformTokens]


@pytest.fixture
async def through(
    database_url: str, provider: Providers, clock: SettableClock
) -> AsyncIterator[Through]:
    """A vault with one connection, and the proxy that it goes through."""
    async with DatabaseProxy(database_url) as proxy:
        database = await Database.connect(proxy.url, pool_size=1)
        try:
            keyring = await load_keyring(database, provider, clock)
            yield proxy, PlatformTokens(database, keyring=keyring, clock=clock)
        finally:
            await database.close()


async def read(
    vault: PlatformTokens, merchant_id: UUID, platform: Platform | None = None
) -> Reading:
    """All that the reader may see."""
    return await vault.read(merchant_id, platform=platform, accessor=READER)


async def patiently(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again for as long as the answer is to come again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await attempt()
            except UnavailableError:
                await asyncio.sleep(0)


# ---- what must not happen when the database goes away


async def questions_of(proxy: DatabaseProxy, attempt: Callable[[], Awaitable[Any]]) -> int:
    """How many times this asks the database, once its statements are prepared."""
    await attempt()
    before = proxy.questions
    await attempt()
    return proxy.questions - before


async def test_nothing_is_read_when_the_database_is_lost_at_any_step_before_the_commit(
    database: Database, through: Through, merchant_id: UUID
) -> None:
    proxy, vault = through
    await vault.store(new_token(merchant_id), accessor=OWNER)
    questions = await questions_of(proxy, lambda: read(vault, merchant_id))
    for number in range(1, questions + 1):
        await read(vault, merchant_id)  # so that this connection has its statements too
        before = await rows_of(database, merchant_id), await log_of(database, merchant_id)
        proxy.lose_question = number
        with pytest.raises(UnavailableError):
            await read(vault, merchant_id)
        assert (await rows_of(database, merchant_id), await log_of(database, merchant_id)) == before


async def test_a_read_whose_commit_is_not_confirmed_is_not_answered_and_has_its_row(
    database: Database, through: Through, merchant_id: UUID
) -> None:
    proxy, vault = through
    await vault.store(new_token(merchant_id), accessor=OWNER)
    proxy.lose_answer = await questions_of(proxy, lambda: read(vault, merchant_id))
    with pytest.raises(UnavailableError):
        await read(vault, merchant_id)
    (row,) = await rows_of(database, merchant_id)
    assert row["access_count"] == 4
    assert len(await log_of(database, merchant_id)) == 4


async def test_a_store_or_a_delete_that_is_lost_before_its_commit_changes_nothing(
    database: Database, through: Through, merchant_id: UUID
) -> None:
    proxy, vault = through

    async def store() -> None:
        await vault.store(new_token(merchant_id), accessor=OWNER)

    async def delete() -> None:
        await vault.delete(merchant_id, "magento", accessor=OWNER)

    for attempt in (store, delete):
        questions = await questions_of(proxy, attempt)
        for number in range(1, questions + 1):
            await attempt()
            before = await rows_of(database, merchant_id), await log_of(database, merchant_id)
            proxy.lose_question = number
            with pytest.raises(UnavailableError):
                await attempt()
            after = await rows_of(database, merchant_id), await log_of(database, merchant_id)
            assert after == before


async def test_what_keep_refuses_is_not_stored_and_has_no_row(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    seen: list[UUID] = []

    async def keep(connection: Connection, token_id: UUID) -> None:
        found = await connection.fetchval(
            "SELECT token_id FROM glam.platform_tokens WHERE merchant_id = $1", merchant_id
        )
        assert found == token_id
        seen.append(token_id)
        raise ConflictError("another request has taken over")

    with capture_logs() as logs, pytest.raises(ConflictError):
        await vault.store(new_token(merchant_id), accessor=OWNER, keep=keep)
    assert len(seen) == 1
    assert await rows_of(database, merchant_id) == []
    assert await log_of(database, merchant_id) == []
    assert CANARY not in repr(logs)


# ---- what does not open


async def test_a_ciphertext_that_was_moved_to_another_row_does_not_open_there(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    other = uuid4()
    await vault.store(new_token(merchant_id, "shopify"), accessor=OWNER)
    await vault.store(new_token(merchant_id, "magento"), accessor=OWNER)
    await vault.store(new_token(merchant_id, "custom"), accessor=OWNER)
    await vault.store(new_token(other, "shopify"), accessor=OWNER)
    # From another platform of the same merchant, and from the same platform of another merchant.
    for platform, of in (("magento", merchant_id), ("shopify", other)):
        await database.execute(
            "UPDATE glam.platform_tokens t SET ciphertext = o.ciphertext"
            " FROM glam.platform_tokens o WHERE o.merchant_id = $2 AND o.platform = $3"
            " AND t.merchant_id = $1 AND t.platform = 'shopify'",
            merchant_id,
            of,
            platform,
        )
        reading = await read(vault, merchant_id)
        assert reading.undecryptable == ("shopify",)
        assert set(by_platform(reading)) == {"magento", "custom"}
    assert (await read(vault, other)).undecryptable == ()


@pytest.mark.parametrize("column", ["domain", "platform_shop_id"])
async def test_a_row_that_was_made_to_name_another_shop_does_not_open(
    database: Database, vault: PlatformTokens, merchant_id: UUID, column: str
) -> None:
    await vault.store(new_token(merchant_id), accessor=OWNER)
    await database.execute(f"UPDATE glam.platform_tokens SET {column} = 'other.example'")
    assert (await read(vault, merchant_id)).undecryptable == ("shopify",)


@pytest.mark.parametrize(
    "broken",
    [
        "set_byte(ciphertext, 0, get_byte(ciphertext, 0) # 1)",
        "set_byte(ciphertext, length(ciphertext) - 1, get_byte(ciphertext, 20) # 128)",
        "substring(ciphertext FROM 2)",
        "''::bytea",
    ],
)
async def test_a_broken_ciphertext_is_reported_and_the_others_still_answer(
    database: Database, vault: PlatformTokens, merchant_id: UUID, broken: str
) -> None:
    for platform in ("shopify", "squarespace", "bigcommerce"):
        await vault.store(new_token(merchant_id, platform), accessor=OWNER)
    await database.execute(
        f"UPDATE glam.platform_tokens SET ciphertext = {broken} WHERE platform = 'shopify'"
    )
    with capture_logs() as logs:
        reading = await read(vault, merchant_id)
    assert reading.undecryptable == ("shopify",)
    assert set(by_platform(reading)) == {"squarespace", "bigcommerce"}
    reads = [row for row in await log_of(database, merchant_id) if row[0] == "read"]
    assert reads == [
        ("read", "bigcommerce", "platform-connector", True, None),
        ("read", "shopify", "platform-connector", False, "UNDECRYPTABLE"),
        ("read", "squarespace", "platform-connector", True, None),
    ]
    (event,) = [each for each in logs if each["event"] == "platform_token_undecryptable"]
    assert event["platform"] == "shopify"
    assert event["merchant_id"] == str(merchant_id)
    assert all(row["access_count"] == 2 for row in await rows_of(database, merchant_id))


@pytest.mark.parametrize("gone", ["destroyed", "never there"])
async def test_a_token_whose_key_is_gone_is_undecryptable_and_holds_up_nobody(
    database_url: str,
    provider: Providers,
    clock: SettableClock,
    merchant_id: UUID,
    gone: str,
) -> None:
    # One connection: a read that held it while it asks for the key would wait for itself.
    database = await Database.connect(database_url, pool_size=1)
    try:
        old = PlatformTokens(
            database, keyring=await load_keyring(database, provider, clock), clock=clock
        )
        await old.store(new_token(merchant_id, "shopify"), accessor=OWNER)
        await rotate(database, provider, "v2")
        if gone == "destroyed":
            await destroy(database, "v1")
        else:
            await database.execute("DELETE FROM glam.encryption_keys WHERE version = 'v1'")
        vault = PlatformTokens(
            database, keyring=await load_keyring(database, provider, clock), clock=clock
        )
        await vault.store(new_token(merchant_id, "magento"), accessor=OWNER)
        reading = await read(vault, merchant_id)
    finally:
        await database.close()
    assert reading.undecryptable == ("shopify",)
    assert set(by_platform(reading)) == {"magento"}


class Provider(LocalProvider):
    """The same provider, which may be away."""

    is_away = False

    async def unwrap(self, wrapped: bytes, *, context: str) -> bytes:
        """The key, or nothing."""
        if self.is_away:
            raise UnavailableError("The key provider is away.")
        return await super().unwrap(wrapped, context=context)


async def test_a_provider_that_is_away_is_unavailable_and_never_undecryptable(
    database: Database, kek: Path, clock: SettableClock, merchant_id: UUID
) -> None:
    local_provider(kek)  # makes the file that both read
    provider = Provider(kek / "kek")
    providers = Providers(provider)
    here = PlatformTokens(
        database, keyring=await load_keyring(database, providers, clock), clock=clock
    )
    await here.store(new_token(merchant_id, "shopify"), accessor=OWNER)
    await rotate(database, providers, "v2")
    there = PlatformTokens(
        database, keyring=await load_keyring(database, providers, clock), clock=clock
    )
    await there.store(new_token(merchant_id, "magento"), accessor=OWNER)
    before = await rows_of(database, merchant_id), await log_of(database, merchant_id)
    provider.is_away = True
    with pytest.raises(UnavailableError):
        await read(here, merchant_id)
    assert (await rows_of(database, merchant_id), await log_of(database, merchant_id)) == before
    # What needs no new key goes on.
    assert set(by_platform(await read(here, merchant_id, "shopify"))) == {"shopify"}
    provider.is_away = False
    assert set(by_platform(await read(here, merchant_id))) == {"shopify", "magento"}


async def test_tokens_under_older_key_versions_stay_readable(
    database: Database, provider: Providers, clock: SettableClock, merchant_id: UUID
) -> None:
    for number, platform in enumerate(PLATFORMS, start=1):
        if number > 1:
            await rotate(database, provider, f"v{number}")
        node = PlatformTokens(
            database, keyring=await load_keyring(database, provider, clock), clock=clock
        )
        await node.store(new_token(merchant_id, platform), accessor=OWNER)
    versions = [row["key_version"] for row in await rows_of(database, merchant_id)]
    assert len(set(versions)) == len(PLATFORMS)
    reading = await read(node, merchant_id)
    assert set(by_platform(reading)) == set(PLATFORMS)
    assert reading.undecryptable == ()


# ---- two at once


async def test_fifty_concurrent_reads_are_counted_exactly(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    for each in PLATFORMS:
        await vault.store(new_token(merchant_id, each), accessor=OWNER)
    async with asyncio.TaskGroup() as group:
        for number in range(50):
            # All of them and one of them, so that the locks overlap.
            platform: Platform | None = None if number % 2 else "magento"
            group.create_task(patiently(partial(read, vault, merchant_id, platform)))
    counts = {row["platform"]: row["access_count"] for row in await rows_of(database, merchant_id)}
    assert counts == {platform: 1 + 25 + 25 * (platform == "magento") for platform in PLATFORMS}
    logged = await log_of(database, merchant_id)
    assert sum(row[0] == "read" for row in logged) == 25 * 6 + 25


async def test_stores_at_once_leave_one_token_and_answer_one_id(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    async def store(number: int) -> UUID:
        secret = Secret({"access_token": f"{CANARY}-{number}"})
        found: UUID = await patiently(
            lambda: vault.store(new_token(merchant_id, secret=secret), accessor=OWNER)
        )
        return found

    ids = await asyncio.gather(*(store(number) for number in range(12)))
    assert len(set(ids)) == 1
    (row,) = await rows_of(database, merchant_id)
    assert (row["token_id"], row["generation"], row["access_count"]) == (ids[0], 12, 12)
    assert (await read(vault, merchant_id)).undecryptable == ()


async def test_stores_reads_and_deletes_at_once_never_tear_a_token_nor_wait_for_each_other(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    async def store(number: int) -> None:
        platform = PLATFORMS[number % len(PLATFORMS)]
        secret = Secret({"access_token": f"{CANARY}-{number}", "shop": f"shop-{number}"})
        new = new_token(merchant_id, platform, secret=secret, platform_shop_id=f"shop-{number}")
        await vault.store(new, accessor=OWNER)

    async def look(_number: int) -> None:
        reading = await read(vault, merchant_id)
        assert reading.undecryptable == ()
        for token in reading.tokens:
            assert token.secret.data["shop"] == token.connection.platform_shop_id

    async def delete(number: int) -> None:
        await vault.delete(merchant_id, PLATFORMS[number % len(PLATFORMS)], accessor=OWNER)

    async with asyncio.TaskGroup() as group:
        for number in range(24):
            for work in (store, look, delete):
                group.create_task(patiently(partial(work, number)))
    logged = [row[0] for row in await log_of(database, merchant_id)]
    assert logged.count("store") == 24
    assert logged.count("delete") == 24
    rows = await rows_of(database, merchant_id)
    assert len(rows) <= len(PLATFORMS)
    assert len(by_platform(await read(vault, merchant_id))) == len(rows)


async def test_a_read_that_waits_holds_no_lock_that_another_one_wants_first(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    # Stored from the last name to the first, so that the table's own order is the wrong one.
    first, *others = sorted(PLATFORMS)
    for platform in (*reversed(others), first):
        await vault.store(new_token(merchant_id, platform), accessor=OWNER)
    async with database.transaction() as blocker:
        await blocker.execute(
            "SELECT FROM glam.platform_tokens WHERE merchant_id = $1 AND platform = $2 FOR UPDATE",
            merchant_id,
            first,
        )
        reading = asyncio.create_task(read(vault, merchant_id))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname"
        await eventually(partial(database.fetchval, f"{waiting} = current_database()"))
        free = await database.fetch(
            "SELECT platform FROM glam.platform_tokens WHERE merchant_id = $1"
            " ORDER BY platform FOR UPDATE SKIP LOCKED",
            merchant_id,
        )
    assert [row["platform"] for row in free] == others
    assert len((await reading).tokens) == len(PLATFORMS)


# ---- storing


async def test_nothing_of_the_secret_is_readable_in_the_database_or_in_the_logs(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    with capture_logs() as logs:
        await vault.store(new_token(merchant_id), accessor=OWNER)
        await read(vault, merchant_id)
        await vault.delete(merchant_id, "custom", accessor=OWNER)
    events = [each["event"] for each in logs]
    assert events == ["platform_token_stored", "platform_token_read", "platform_token_deleted"]
    for table in ("platform_tokens", "token_access_log"):
        rows = await database.fetch(f"SELECT t::text AS all FROM glam.{table} t")
        dumped = repr([row["all"] for row in rows])
        assert CANARY not in dumped
        assert CANARY.encode().hex() not in dumped
    assert CANARY not in repr(logs)


async def test_storing_again_replaces_the_token_and_forgets_its_refreshes(
    database: Database, vault: PlatformTokens, clock: SettableClock, merchant_id: UUID
) -> None:
    first = await vault.store(refreshable(merchant_id, expires_at=NOW), accessor=OWNER)
    await database.execute(
        "UPDATE glam.platform_tokens SET refresh_claim = $2, refresh_claim_until = $3,"
        " refresh_failures = 4, refresh_error = 'HTTP_500', refresh_not_before = $3,"
        " refreshed_at = $3 WHERE merchant_id = $1",
        merchant_id,
        uuid4(),
        NOW,
    )
    clock.advance(60)
    again = new_token(
        merchant_id,
        token_type="api_key",
        secret=Secret({"key": "another"}),
        platform_shop_id="7",
        domain="other.example",
        scopes=(),
    )
    assert await vault.store(again, accessor=READER) == first
    (row,) = await rows_of(database, merchant_id)
    assert row["generation"] == 2
    assert row["refresh_claim"] is None
    assert row["refresh_claim_until"] is None
    assert row["refresh_failures"] == 0
    assert row["refresh_not_before"] is None
    assert row["refreshed_at"] is None
    assert row["refreshable"] is False
    assert (row["created_at"], row["updated_at"]) == (NOW, NOW + timedelta(minutes=1))
    assert (row["access_count"], row["last_accessed_by"]) == (2, "platform-connector")
    (opened,) = (await read(vault, merchant_id)).tokens
    assert opened.secret.data == {"key": "another"}
    connection = opened.connection
    assert (connection.domain, connection.scopes, connection.expires_at) == (
        "other.example",
        (),
        None,
    )


async def test_a_token_that_was_deleted_and_stored_again_is_another_one(
    vault: PlatformTokens, merchant_id: UUID
) -> None:
    first = await vault.store(new_token(merchant_id), accessor=OWNER)
    await vault.delete(merchant_id, "shopify", accessor=OWNER)
    assert await vault.store(new_token(merchant_id), accessor=OWNER) != first


@pytest.mark.parametrize(
    "at",
    [
        datetime.min.replace(tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
    ],
)
async def test_every_time_that_can_be_said_can_be_stored_and_compared(
    database: Database, vault: PlatformTokens, merchant_id: UUID, at: datetime
) -> None:
    await vault.store(refreshable(merchant_id, expires_at=at), accessor=OWNER)
    assert await database.fetchval(
        "SELECT bool_and(isfinite(expires_at)) FROM glam.platform_tokens"
    )
    (token,) = (await read(vault, merchant_id)).tokens
    assert token.connection.expires_at is not None
    assert abs(token.connection.expires_at - at) <= timedelta(microseconds=1)
    assert token.connection.is_expired(NOW) is (at < NOW)
    for health in ("valid", "expired"):
        found = await vault.connections(merchant_id=merchant_id, health=health)
        assert bool(found) is ((health == "expired") is (at < NOW))


async def test_an_infinity_in_the_table_is_a_time_like_any_other(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    infinities: dict[Platform, str] = {"shopify": "infinity", "magento": "-infinity"}
    for platform, at in infinities.items():
        await vault.store(new_token(merchant_id, platform), accessor=OWNER)
        await database.execute(
            f"UPDATE glam.platform_tokens SET expires_at = '{at}' WHERE platform = '{platform}'"
        )
    found = by_platform(await read(vault, merchant_id))
    expired = {name: token.connection.is_expired(NOW) for name, token in found.items()}
    assert expired == {"shopify": False, "magento": True}


# ---- reading


async def test_a_reader_gets_only_the_merchant_and_the_platform_it_names(
    vault: PlatformTokens, merchant_id: UUID
) -> None:
    other = uuid4()
    for whose in (merchant_id, other):
        for platform in ("shopify", "custom"):
            await vault.store(new_token(whose, platform), accessor=OWNER)
    for whose in (merchant_id, other):
        found = by_platform(await read(vault, whose))
        assert set(found) == {"shopify", "custom"}
        assert {token.secret.data["merchant"] for token in found.values()} == {str(whose)}
    (one,) = (await read(vault, merchant_id, "custom")).tokens
    assert one.secret.data["platform"] == "custom"
    assert (await read(vault, merchant_id, "magento")).tokens == ()


async def test_a_read_that_finds_nothing_has_its_row_too(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    assert await read(vault, merchant_id) == Reading(tokens=(), undecryptable=())
    await read(vault, merchant_id, "magento")
    assert await log_of(database, merchant_id) == [
        ("read", None, "platform-connector", True, None),
        ("read", "magento", "platform-connector", True, None),
    ]


async def test_who_touched_a_token_and_when_is_on_it_and_in_the_log(
    vault: PlatformTokens, clock: SettableClock, merchant_id: UUID
) -> None:
    token_id = await vault.store(new_token(merchant_id), accessor=OWNER)
    clock.advance(5)
    await read(vault, merchant_id)
    connection = await vault.connection(merchant_id, "shopify")
    assert connection.last_accessed_by == "platform-connector"
    assert connection.last_accessed_at == NOW + timedelta(seconds=5)
    assert connection.access_count == 2
    assert connection.updated_at == NOW
    newest, _ = await vault.access_log(merchant_id)
    assert newest.accessor == READER
    assert (newest.action, newest.platform, newest.token_id) == ("read", "shopify", token_id)
    assert (newest.at, newest.error) == (NOW + timedelta(seconds=5), None)


# ---- renewing before a read


def renewing(
    database: Database, keyring: Keyring[DataKey], clock: SettableClock, renew: Renew
) -> PlatformTokens:
    """A vault that asks `renew`."""
    return PlatformTokens(database, keyring=keyring, clock=clock, renew=renew)


async def test_only_what_expires_and_can_be_renewed_is_renewed_before_the_read(
    database: Database,
    keyring: Keyring[DataKey],
    clock: SettableClock,
    vault: PlatformTokens,
    merchant_id: UUID,
) -> None:
    soon, later = NOW + timedelta(seconds=60), NOW + timedelta(seconds=61)
    store = vault.store
    expired = await store(refreshable(merchant_id, "shopify", expires_at=NOW), accessor=OWNER)
    near = await store(refreshable(merchant_id, "magento", expires_at=soon), accessor=OWNER)
    await store(refreshable(merchant_id, "custom", expires_at=later), accessor=OWNER)
    await store(refreshable(merchant_id, "squarespace", expires_at=None), accessor=OWNER)
    await store(new_token(merchant_id, "bigcommerce", expires_at=NOW), accessor=OWNER)
    asked: list[UUID] = []

    async def renew(token_id: UUID) -> bool:
        asked.append(token_id)
        if token_id == expired:
            fresh = refreshable(merchant_id, "shopify", expires_at=later)
            await vault.store(fresh, accessor=OWNER)
        return token_id == expired

    reading = await read(renewing(database, keyring, clock, renew), merchant_id)
    assert set(asked) == {expired, near}
    assert len(asked) == 2
    found = by_platform(reading)
    assert found["shopify"].connection.expires_at == later
    assert found["shopify"].connection.generation == 2
    assert found["bigcommerce"].connection.is_expired(NOW)


@pytest.mark.parametrize(
    "error", [UnavailableError("away"), RuntimeError(CANARY), asyncio.CancelledError()]
)
async def test_a_renewal_that_fails_leaves_the_read_as_it_is(
    database: Database,
    keyring: Keyring[DataKey],
    clock: SettableClock,
    vault: PlatformTokens,
    merchant_id: UUID,
    error: BaseException,
) -> None:
    await vault.store(refreshable(merchant_id, expires_at=NOW), accessor=OWNER)

    async def renew(_token_id: UUID) -> bool:
        raise error

    with capture_logs() as logs:
        (token,) = (await read(renewing(database, keyring, clock, renew), merchant_id)).tokens
    assert token.connection.is_expired(NOW)
    assert "platform_token_renewal_failed" in [each["event"] for each in logs]
    assert CANARY not in repr(logs)


async def test_a_renewal_that_takes_too_long_does_not_hold_the_read(
    database: Database,
    keyring: Keyring[DataKey],
    clock: SettableClock,
    vault: PlatformTokens,
    merchant_id: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await vault.store(refreshable(merchant_id, expires_at=NOW), accessor=OWNER)
    monkeypatch.setattr(service, "RENEW_TIMEOUT_S", 0.05)
    ended = asyncio.Event()

    async def renew(_token_id: UUID) -> bool:
        try:
            return await asyncio.Event().wait()
        finally:
            ended.set()

    (token,) = (await read(renewing(database, keyring, clock, renew), merchant_id)).tokens
    assert token.connection.is_expired(NOW)
    assert ended.is_set()


async def test_a_token_that_another_node_seals_anew_under_a_new_key_meanwhile_is_read(
    database: Database,
    provider: Providers,
    keyring: Keyring[DataKey],
    clock: SettableClock,
    vault: PlatformTokens,
    merchant_id: UUID,
) -> None:
    await vault.store(refreshable(merchant_id, expires_at=NOW), accessor=OWNER)

    async def renew(_token_id: UUID) -> bool:
        await rotate(database, provider, "v2")
        there = PlatformTokens(
            database, keyring=await load_keyring(database, provider, clock), clock=clock
        )
        await there.store(new_token(merchant_id), accessor=OWNER)
        return True

    reading = await read(renewing(database, keyring, clock, renew), merchant_id)
    assert reading.undecryptable == ()
    assert reading.tokens[0].connection.key_version == "v2"
    (row,) = await rows_of(database, merchant_id)
    assert row["access_count"] == 3  # the attempt without the key has left nothing


# ---- deleting


async def test_forgetting_a_merchant_takes_all_of_its_tokens_and_nobody_elses(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    other = uuid4()
    await vault.store(new_token(merchant_id, "shopify"), accessor=OWNER)
    await vault.store(new_token(merchant_id, "magento"), accessor=OWNER)
    await vault.store(new_token(other, "shopify"), accessor=OWNER)
    assert await vault.forget(merchant_id, accessor=OWNER) == 2
    assert await vault.forget(merchant_id, accessor=OWNER) == 0
    assert await rows_of(database, merchant_id) == []
    assert set(by_platform(await read(vault, other))) == {"shopify"}
    told = await database.fetch(
        "SELECT platform FROM glam.token_access_log WHERE merchant_id = $1 AND action = 'delete'",
        merchant_id,
    )
    assert sorted(row["platform"] for row in told) == ["magento", "shopify"]


async def test_deleting_is_repeatable_and_takes_only_what_it_names(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    other = uuid4()
    await vault.store(new_token(merchant_id, "shopify"), accessor=OWNER)
    await vault.store(new_token(merchant_id, "custom"), accessor=OWNER)
    await vault.store(new_token(other, "shopify"), accessor=OWNER)
    assert await vault.delete(merchant_id, "shopify", accessor=OWNER)
    assert not await vault.delete(merchant_id, "shopify", accessor=OWNER)
    assert set(by_platform(await read(vault, merchant_id))) == {"custom"}
    assert set(by_platform(await read(vault, other))) == {"shopify"}
    log = [row for row in await log_of(database, merchant_id) if row[0] == "delete"]
    assert log == [("delete", "shopify", "m", True, None)] * 2


async def test_a_refused_attempt_has_a_row_with_its_code_and_counts_nothing(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    await vault.store(new_token(merchant_id), accessor=OWNER)
    await vault.refused(
        merchant_id, action="read", code="SERVICE_NOT_ALLOWED", accessor=READER, platform="shopify"
    )
    assert (await log_of(database, merchant_id))[-1] == (
        "read",
        "shopify",
        "platform-connector",
        False,
        "SERVICE_NOT_ALLOWED",
    )
    (row,) = await rows_of(database, merchant_id)
    assert row["access_count"] == 1


async def test_metrics_count_what_was_committed_and_nothing_else(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    before = metrics()
    for platform in ("shopify", "custom"):
        await vault.store(new_token(merchant_id, platform), accessor=OWNER)
    await database.execute(
        "UPDATE glam.platform_tokens SET ciphertext = '' WHERE platform = 'custom'"
    )
    await read(vault, merchant_id)
    await read(vault, uuid4())
    await vault.delete(merchant_id, "shopify", accessor=OWNER)
    await vault.refused(merchant_id, action="delete", code="NOT_FOUND", accessor=READER)

    async def keep(_connection: Connection, _token_id: UUID) -> None:
        raise ConflictError("not now")

    with pytest.raises(ConflictError):
        await vault.store(new_token(merchant_id), accessor=OWNER, keep=keep)
    after = metrics()
    assert {name: after[name] - before[name] for name in after} == {
        ("store", "success"): 2,
        ("read", "success"): 2,
        ("read", "undecryptable"): 1,
        ("delete", "success"): 1,
        ("delete", "refused"): 1,
        ("custom", "open"): 1,
        ("shopify", "open"): 0,
    }


def metrics() -> dict[tuple[str, str], float]:
    """The counters of this room."""
    accesses = [
        ("store", "success"),
        ("read", "success"),
        ("read", "undecryptable"),
        ("delete", "success"),
        ("delete", "refused"),
    ]
    found = {
        (action, outcome): REGISTRY.get_sample_value(
            "glamd_credentials_accesses_total", {"action": action, "outcome": outcome}
        )
        for action, outcome in accesses
    }
    for platform in ("custom", "shopify"):
        found[platform, "open"] = REGISTRY.get_sample_value(
            "glamd_credentials_undecryptable_total", {"platform": platform}
        )
    return {name: value or 0.0 for name, value in found.items()}


# ---- for operators


async def ailing(database: Database, merchant_id: UUID, platform: Platform) -> None:
    """Let the last refresh of this token have failed."""
    await database.execute(
        "UPDATE glam.platform_tokens SET refresh_failures = 1, refresh_error = 'HTTP_500'"
        " WHERE merchant_id = $1 AND platform = $2",
        merchant_id,
        platform,
    )


async def test_health_is_the_same_in_sql_as_in_the_model(
    database: Database, vault: PlatformTokens, merchant_id: UUID
) -> None:
    times = {
        "shopify": None,
        "custom": NOW,
        "magento": NOW + timedelta(microseconds=1),
        "squarespace": NOW - timedelta(days=1),
        "bigcommerce": NOW + timedelta(days=1),
        "woocommerce": None,
    }
    for platform in PLATFORMS:
        token = new_token(merchant_id, platform, expires_at=times[platform])
        await vault.store(token, accessor=OWNER)
    for platform in ("squarespace", "bigcommerce", "woocommerce"):
        await ailing(database, merchant_id, platform)
    everything = await vault.connections(merchant_id=merchant_id)
    assert len(everything) == len(PLATFORMS)
    healths: tuple[Health, ...] = ("valid", "expired", "refresh-failing")
    for health in healths:
        found = await vault.connections(merchant_id=merchant_id, health=health)
        assert found == tuple(one for one in everything if one.health(NOW) == health)
        assert found


async def test_pages_of_connections_leave_nothing_out_and_say_nothing_twice(
    vault: PlatformTokens,
) -> None:
    merchants = [uuid4() for _ in range(4)]
    for merchant_id in merchants:
        for platform in PLATFORMS[:5]:
            await vault.store(new_token(merchant_id, platform), accessor=OWNER)
    seen: list[tuple[UUID, Platform]] = []
    after: tuple[UUID, Platform] | None = None
    while found := await vault.connections(limit=3, after=after):
        assert len(found) <= 3
        seen += [(one.merchant_id, one.platform) for one in found]
        after = seen[-1]
    wanted = [(one, platform) for one in sorted(merchants) for platform in sorted(PLATFORMS[:5])]
    assert seen == wanted
    only = await vault.connections(platform="magento", limit=200)
    assert [one.merchant_id for one in only] == sorted(merchants)


@pytest.mark.parametrize("limit", [0, -1, 201, 2**70])
async def test_a_page_has_bounds(vault: PlatformTokens, merchant_id: UUID, limit: int) -> None:
    with pytest.raises(InputError):
        await vault.connections(limit=limit)
    with pytest.raises(InputError):
        await vault.access_log(merchant_id, limit=limit)


async def test_a_connection_that_is_not_there_is_not_found(
    vault: PlatformTokens, merchant_id: UUID
) -> None:
    await vault.store(new_token(merchant_id, "custom"), accessor=OWNER)
    with pytest.raises(NotFoundError) as caught:
        await vault.connection(merchant_id, "shopify")
    assert caught.value.code == "PLATFORM_TOKEN_NOT_FOUND"
    with pytest.raises(NotFoundError):
        await vault.connection(uuid4(), "custom")


async def test_the_access_log_goes_back_page_by_page(
    vault: PlatformTokens, merchant_id: UUID
) -> None:
    for number in range(7):
        accessor = replace(READER, name=f"service-{number}")
        await vault.read(merchant_id, platform=None, accessor=accessor)
    await read(vault, uuid4())
    seen: list[str] = []
    before: int | None = 2**80
    while page := await vault.access_log(merchant_id, limit=3, before=before):
        seen += [access.accessor.name for access in page]
        before = page[-1].access_id
    assert seen == [f"service-{number}" for number in reversed(range(7))]
    assert await vault.access_log(merchant_id, before=-5) == ()
