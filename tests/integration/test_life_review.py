"""What a review of the life of tokens asked: locks in one order, repetition, what stands still."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest

from glamd.clock import SystemClock
from glamd.db import Connection, Database
from glamd.errors import UnavailableError
from glamd.merchants import store as merchants
from glamd.payments.auditing import store as auditing
from glamd.payments.life import store as life_store
from glamd.payments.life.erasure import CardErasure
from tests.support.postgres import eventually, lock_waiters
from tests.support.stored_tokens import put_merchant, token_life

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


async def configure(database: Database, merchant_id: UUID) -> object:
    return await merchants.change_settings(
        database, merchant_id, token_ttl_s=3600, sensitive_data=None
    )


async def request(database: Database, merchant_id: UUID) -> object:
    async with database.transaction() as connection:
        return await life_store.request_erasure(
            connection, merchant_id, now=NOW, correlation_id="c"
        )


@pytest.mark.parametrize("change", [configure, request])
async def test_a_merchants_devices_are_held_in_the_order_in_which_gateways_hold_them(
    database: Database, change: Callable[[Database, UUID], Awaitable[object]]
) -> None:
    merchant_id = await put_merchant(database, devices=2)
    # The first by name is the last in the table: who takes them as they lie there takes it last.
    await database.execute(
        "UPDATE cde.devices SET firmware = '1'"
        " WHERE device_id = (SELECT min(device_id) FROM cde.devices)"
    )

    await database.execute("ANALYZE cde.devices")

    async def hold(connection: Connection, which: str) -> None:
        await connection.execute(
            "SELECT FROM cde.devices"
            f" WHERE device_id = (SELECT {which}(device_id) FROM cde.devices) FOR NO KEY UPDATE"
        )

    async with database.transaction() as gateway:
        await hold(gateway, "min")
        changing = asyncio.create_task(_awaited(change(database, merchant_id)), name="change")
        await eventually(lambda: lock_waiters(database))
        await hold(gateway, "max")
    assert await changing is not None


async def _awaited(work: Awaitable[object]) -> object:
    return await work


async def test_erasing_a_merchant_again_says_again_that_it_is_done(database: Database) -> None:
    merchant_id = await put_merchant(database, devices=1)
    cards = CardErasure(database, clock=SystemClock())
    for _ in range(2):
        await cards.request(merchant_id, correlation_id="c")
        assert (await cards.erase(merchant_id)).done


async def test_a_dump_that_runs_keeps_no_month_of_the_log_from_being_made(
    database: Database,
) -> None:
    async with database.transaction() as dump:
        await dump.execute("LOCK TABLE cde.decrypt_audit_log IN ACCESS SHARE MODE")
        async with database.connection() as connection:
            assert await auditing.make_partition(connection, date(2101, 1, 1))
    parents, children = await database.fetch(
        "SELECT relname, relkind, pg_get_expr(relpartbound, oid), "
        " (SELECT array_agg(made ORDER BY made) FROM pg_constraint,"
        "   LATERAL (SELECT contype::text || conkey::text AS made) AS one"
        "  WHERE conrelid = c.oid AND contype <> 'n')"
        " FROM pg_class c WHERE relname IN ('decrypt_audit_log', 'decrypt_audit_log_2101_01')"
        " ORDER BY relname"
    )
    assert children[2] == "FOR VALUES FROM ('2101-01-01') TO ('2101-02-01')"
    assert parents[3] == children[3], "the log's own checks and key"


async def test_of_an_erased_merchant_no_answer_of_others_is_read_to_find_none(
    database: Database,
) -> None:
    merchant_id = await put_merchant(database, devices=60)
    await database.execute(
        "INSERT INTO cde.token_idempotency_keys"
        " SELECT 'another_' || n % 100, n::text, '', '', now() FROM generate_series(1, 20000) n"
    )
    async with database.connection() as connection:
        await connection.execute("ANALYZE cde.token_idempotency_keys")
        await connection.execute("ANALYZE cde.devices")
        async with connection.transaction():
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.execute(life_store._ERASE_ANSWERS, merchant_id, 500)
            read = await connection.fetchval(
                "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables"
                " WHERE relname = 'token_idempotency_keys'"
            )
    assert read == 0


async def test_a_start_while_the_database_is_dumped_does_not_fail_for_what_is_busy(
    database: Database,
) -> None:
    life = token_life(database, SystemClock())
    yesterday = NOW.date() - DAY
    await database.execute(
        f"CREATE TABLE cde.token_secrets_{yesterday:%Y%m%d} PARTITION OF cde.token_secrets"
        f" FOR VALUES FROM ('{yesterday}Z') TO ('{yesterday + DAY}Z')"
    )
    async with database.transaction() as dump:
        for table in ("token_secrets", "token_secrets_other"):
            await dump.execute(f"LOCK TABLE cde.{table} IN ACCESS SHARE MODE")
        with pytest.raises(UnavailableError):
            await life.tend_partitions()
        await life.begin()
    assert yesterday in await life_store.days(database)
    await life.begin()
    days = await life_store.days(database)
    assert yesterday not in days
    assert NOW.date() + DAY in days
