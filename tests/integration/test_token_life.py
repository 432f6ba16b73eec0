"""What becomes of tokens after their end: partitions, old rows, two nodes at once, wrong clocks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta

import asyncpg
import pytest

from glamd.db import Database
from glamd.errors import GlamError, InternalError, UnavailableError
from glamd.payments import store
from glamd.payments.life import service
from glamd.payments.life import store as life_store
from glamd.payments.life.service import TokenLife
from glamd.payments.tokens import Tokens
from tests.support.proxy import proxied
from tests.support.settable_clock import SettableClock
from tests.support.stored_tokens import put_merchant, put_token, token_life

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def life(database: Database, *, at: datetime = NOW, **periods: timedelta) -> TokenLife:
    return token_life(database, SettableClock(at), **periods)


async def today(database: Database) -> date:
    return (await life_store.today_and_longest_ttl(database))[0]


def name_of(day: date) -> str:
    return f"token_secrets_{day:%Y%m%d}"


async def make_past_partition(database: Database, day: date) -> None:
    """A day that is over, which the function would not make."""
    await database.execute(
        f"CREATE TABLE cde.{name_of(day)} PARTITION OF cde.token_secrets"
        f" FOR VALUES FROM ('{day}Z') TO ('{day + DAY}Z')"
    )


async def partition_of(database: Database, token: str) -> str:
    found: str = await database.fetchval(
        "SELECT c.relname::text FROM cde.token_secrets s JOIN pg_class c ON c.oid = s.tableoid"
        " WHERE s.token = $1",
        token,
    )
    return found


async def queue(database: Database) -> set[str]:
    return {one.partition for one in await life_store.dirty(database)}


async def shredded_ago(database: Database, age: timedelta) -> None:
    await database.execute("UPDATE cde.shred_queue SET since = now() - $1::interval", age)


@asynccontextmanager
async def reading(url: str, table: str) -> AsyncIterator[None]:
    """Somebody who reads a table in a long transaction, as a dump does."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("BEGIN")
        await connection.fetch(f"SELECT FROM cde.{table}")
        yield
    finally:
        await connection.close()


# ---- partitions


async def test_days_are_made_ahead_as_far_as_tokens_may_live_and_only_once(
    database: Database,
) -> None:
    first = await today(database)
    await asyncio.gather(*(life(database).tend_partitions() for _ in range(4)))
    assert await life_store.days(database) == tuple(first + n * DAY for n in range(5))
    merchant_id = await put_merchant(database)
    ten_days = timedelta(days=10).total_seconds()
    await database.execute(
        "UPDATE cde.merchants SET token_ttl_s = $2 WHERE merchant_id = $1", merchant_id, ten_days
    )
    await life(database).tend_partitions()
    assert (await life_store.days(database))[-1] == first + 13 * DAY
    await life(database, default_ttl=365 * DAY).tend_partitions()
    assert (await life_store.days(database))[-1] == first + service.DAYS_AHEAD_LIMIT * DAY


async def test_a_token_of_a_day_that_is_not_made_is_kept_elsewhere_and_moves_in_later(
    database: Database,
) -> None:
    token = await put_token(database, await put_merchant(database), expires_at=NOW + DAY)
    assert await partition_of(database, token) == "token_secrets_other"
    await life(database).tend_partitions()
    assert await partition_of(database, token) == name_of((NOW + DAY).date())
    async with database.connection() as connection:
        (found,) = await store.sealed(connection, [token])
    assert found is not None
    assert found.ciphertext == b"sealed"
    # What it left behind there is bytes like any others.
    assert await queue(database) == {"token_secrets_other"}


async def test_a_day_is_dropped_when_it_is_over_by_both_clocks_and_nothing_in_it_lives(
    database: Database,
) -> None:
    yesterday = await today(database) - DAY
    await make_past_partition(database, yesterday)
    ends = datetime(yesterday.year, yesterday.month, yesterday.day, 23, tzinfo=UTC)
    await put_token(database, await put_merchant(database), expires_at=ends)
    assert await life(database).tend_partitions() == ()
    assert await life(database, at=NOW + 9 * DAY).tend_partitions() == ()
    assert yesterday in await life_store.days(database)
    await Tokens(database, clock=SettableClock(NOW)).announce_expired()
    assert await queue(database) == {name_of(yesterday)}
    assert await life(database, at=NOW - 3 * DAY).tend_partitions() == (), "its clock is behind"
    assert await life(database, at=NOW + 9 * DAY).tend_partitions() == (name_of(yesterday),)
    assert (await life_store.days(database))[0] == yesterday + DAY
    assert await queue(database) == set()


async def test_four_nodes_drop_a_day_once(database: Database) -> None:
    yesterday = await today(database) - DAY
    await life(database).tend_partitions()
    await make_past_partition(database, yesterday)
    dropped = await asyncio.gather(
        *(life(database).tend_partitions() for _ in range(4)), return_exceptions=True
    )
    assert sum(one == (name_of(yesterday),) for one in dropped) == 1
    assert all(one == () or isinstance(one, UnavailableError | tuple) for one in dropped)
    assert yesterday not in await life_store.days(database)


@pytest.mark.parametrize(
    "call",
    [
        "make_secrets_partition(NULL)",
        "make_secrets_partition('2020-01-01')",
        "make_secrets_partition('infinity')",
        "make_secrets_partition('4000-01-01')",
        "rewrite_secrets_partition(NULL)",
        "rewrite_secrets_partition('payment_tokens')",
        "rewrite_secrets_partition('token_secrets_other; DROP TABLE cde.merchants')",
        "rewrite_secrets_partition('token_secrets')",
    ],
)
async def test_the_functions_check_what_they_are_given(database: Database, call: str) -> None:
    with pytest.raises(InternalError):
        await database.fetchval(f"SELECT cde.{call}")


async def test_today_is_never_dropped(database: Database) -> None:
    await life(database).tend_partitions()
    day = await today(database)
    for each in (day, day + DAY, None):
        outcome = await database.fetchval("SELECT cde.drop_secrets_partition($1)", each)
        assert outcome == "not-over"
    same_name = (
        "SELECT cde.drop_secrets_partition((to_char($1::date, 'YYYY-MM-DD') || ' BC')::date)"
    )
    assert await database.fetchval(same_name, day) == "not-over"
    assert day in await life_store.days(database)


async def test_the_functions_run_as_their_owner_and_for_nobody_uninvited(
    database: Database,
) -> None:
    rows = await database.fetch(
        "SELECT proname::text, prosecdef, proconfig, has_function_privilege('public', oid,"
        " 'EXECUTE') AS anybody FROM pg_proc"
        " WHERE pronamespace = 'cde'::regnamespace AND proname LIKE '%secrets_partition'"
    )
    assert len(rows) == 3
    for row in rows:
        assert row["prosecdef"]
        assert "search_path=pg_catalog, pg_temp" in row["proconfig"]
        assert not row["anybody"]


# ---- shredding


async def test_a_dump_that_runs_makes_shredding_wait_and_is_not_waited_for_long(
    database: Database, database_url: str
) -> None:
    await life(database).tend_partitions()
    token = await put_token(database, await put_merchant(database), expires_at=NOW + DAY)
    tokens = Tokens(database, clock=SettableClock(NOW))
    partition = name_of((NOW + DAY).date())
    async with reading(database_url, partition):
        await tokens.revoke(token, merchant_id=None, correlation_id="c")
        purged = await asyncio.wait_for(life(database).purge_now(), 5.0)
        assert (purged.rewritten, purged.waiting) == ((), (partition,))
        await shredded_ago(database, 20 * timedelta(hours=1))
        with pytest.raises(UnavailableError):
            await life(database, shred_within=timedelta(hours=1)).shred()
    assert await queue(database) == {partition}
    assert (await life(database).purge_now()).rewritten == (partition,)
    assert await queue(database) == set()


async def test_a_partition_is_written_anew_only_where_its_drop_would_come_too_late(
    database: Database,
) -> None:
    await life(database).tend_partitions()
    day = await today(database)
    for partition in (name_of(day), name_of(day + 2 * DAY), "token_secrets_other"):
        await database.execute("INSERT INTO cde.shred_queue VALUES ($1, now())", partition)
    assert await life(database).shred() == (), "there is time yet"
    await shredded_ago(database, timedelta(hours=19))
    late = {name_of(day + 2 * DAY), "token_secrets_other"}
    # Nineteen hours ago and a day on is past this midnight in some hours only.
    ends_in = datetime.combine(day + DAY, datetime.min.time(), UTC) - datetime.now(UTC)
    if ends_in > timedelta(hours=5):
        late.add(name_of(day))
    assert set(await life(database).shred()) == late
    await shredded_ago(database, timedelta(hours=25))
    assert await life(database).shred() == (() if name_of(day) in late else (name_of(day),))


async def test_what_is_put_in_and_taken_out_while_a_partition_is_written_anew_is_not_lost(
    database: Database,
) -> None:
    await life(database).tend_partitions()
    merchant_id = await put_merchant(database)
    tokens = Tokens(database, clock=SettableClock(NOW))
    ends = NOW + DAY
    old = [await put_token(database, merchant_id, expires_at=ends) for _ in range(40)]
    await tokens.revoke(old.pop(), merchant_id=None, correlation_id="c")

    async def write() -> list[str]:
        return [await put_token(database, merchant_id, expires_at=ends) for _ in range(40)]

    async def revoke() -> None:
        for token in old[:20]:
            await tokens.revoke(token, merchant_id=None, correlation_id="c")

    async def rewrite() -> None:
        for _ in range(10):
            await life(database).purge_now()

    new, _, _ = await asyncio.gather(write(), revoke(), rewrite())
    rows = await database.fetch("SELECT token FROM cde.token_secrets")
    assert {row[0] for row in rows} == {*new, *old[20:]}
    await life(database).purge_now()
    assert await queue(database) == set()


async def test_two_nodes_write_a_partition_anew_once(database: Database) -> None:
    await life(database).tend_partitions()
    token = await put_token(database, await put_merchant(database), expires_at=NOW + DAY)
    await Tokens(database, clock=SettableClock(NOW)).revoke(
        token, merchant_id=None, correlation_id="c"
    )
    done = await asyncio.gather(*(life(database).purge_now() for _ in range(3)))
    assert sum(len(one.rewritten) for one in done) == 1


# ---- what is left of them


async def test_metadata_goes_when_its_time_is_over_by_both_clocks_and_totals_stay_right(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ROWS", 7)
    merchant_id = await put_merchant(database, devices=1)
    [device_id] = [row[0] for row in await database.fetch("SELECT device_id FROM cde.devices")]
    tokens = Tokens(database, clock=SettableClock(NOW))
    for _ in range(20):
        await put_token(database, merchant_id, expires_at=NOW - 10 * DAY, device_id=device_id)
    await tokens.announce_expired()
    late = await put_token(database, merchant_id, expires_at=NOW + 9 * DAY, device_id=device_id)
    await tokens.revoke(late, merchant_id=None, correlation_id="c")
    living = await put_token(database, merchant_id, expires_at=NOW + DAY, device_id=device_id)
    assert await store.total(database, merchant_id) == 22
    assert await life(database, keep_metadata=11 * DAY).purge_metadata() == 0
    ahead = life(database, at=NOW + 99 * DAY, keep_metadata=11 * DAY)
    assert await ahead.purge_metadata() == 0
    behind = life(database, at=NOW - 99 * DAY, keep_metadata=9 * DAY)
    assert await behind.purge_metadata() == 0
    done = await asyncio.gather(
        *(life(database, keep_metadata=9 * DAY).purge_metadata() for _ in range(3))
    )
    while some := await life(database, keep_metadata=9 * DAY).purge_metadata():
        done.append(some)
    assert sum(done) == 20
    page = await tokens.page(merchant_id, limit=50, page=None, cursor=None)
    assert {item.token for item in page.items} == {late, living}
    assert page.total == 2


async def test_metadata_of_a_token_whose_end_was_not_told_yet_stays(database: Database) -> None:
    await put_token(database, await put_merchant(database), expires_at=NOW - 10 * DAY)
    assert await life(database, keep_metadata=DAY).purge_metadata() == 0
    assert await Tokens(database, clock=SettableClock(NOW)).announce_expired() == 1
    assert await life(database, keep_metadata=DAY).purge_metadata() == 1


async def answers(database: Database, count: int, *, ends: datetime) -> None:
    await database.execute(
        "INSERT INTO cde.token_idempotency_keys (scope, key, content_hash, answer, expires_at)"
        " SELECT 'd', gen_random_uuid()::text, '', '', $2 FROM generate_series(1, $1)",
        count,
        ends,
    )


async def test_answers_go_when_their_day_is_over_and_in_bounded_rounds(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ROWS", 3)
    await answers(database, 10, ends=NOW - timedelta(seconds=1))
    await answers(database, 4, ends=NOW + timedelta(hours=1))
    assert await life(database).purge_answers(rounds=2) == 6
    assert await life(database, at=NOW + DAY).purge_answers() == 4
    assert await database.fetchval("SELECT count(*) FROM cde.token_idempotency_keys") == 4


async def test_no_purge_reads_a_table_from_end_to_end(database: Database) -> None:
    merchant_id = await put_merchant(database)
    await answers(database, 20_000, ends=NOW + DAY)
    await answers(database, 30, ends=NOW - DAY)
    await database.execute(
        "INSERT INTO cde.payment_tokens (token, merchant_id, device_id, brand, bin, last4,"
        " fingerprint, entry_mode, created_at, expires_at, expired_at)"
        " SELECT 'ptk_' || upper(substr(md5(n::text), 1, 26)), $1, 'd', 'visa', '424242', '4242',"
        " '\\x00', 'chip', $2, $2::timestamptz - n * interval '1 minute', $2"
        " FROM generate_series(1, 20000) n",
        merchant_id,
        NOW,
    )
    async with database.connection() as connection:
        await connection.execute("ANALYZE cde.payment_tokens")
        await connection.execute("ANALYZE cde.token_idempotency_keys")
        async with connection.transaction():
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.execute(life_store._PURGE_ANSWERS, NOW, 1000)
            deleted = await connection.fetchval(
                life_store._PURGE_METADATA, NOW, timedelta(minutes=19_990, seconds=30), 1000
            )
            assert deleted == 10
            rows = await connection.fetch(
                "SELECT relname::text, seq_scan FROM pg_stat_xact_user_tables"
                " WHERE relname IN ('payment_tokens', 'token_idempotency_keys')"
            )
    assert {tuple(row) for row in rows} == {("payment_tokens", 0), ("token_idempotency_keys", 0)}


# ---- ends


async def test_the_end_of_a_token_takes_its_secret_and_says_that_nothing_sensitive_is_left(
    database: Database,
) -> None:
    token = await put_token(
        database, await put_merchant(database), expires_at=NOW - DAY, sensitive=b"track"
    )
    tokens = Tokens(database, clock=SettableClock(NOW))
    shown = await tokens.show(token, merchant_id=None)
    assert (shown.status, shown.has_sensitive_data) == ("expired", False)
    assert await tokens.announce_expired() == 1
    assert await database.fetchval("SELECT count(*) FROM cde.token_secrets") == 0
    assert await database.fetchval("SELECT has_sensitive_data FROM cde.payment_tokens") is False


async def test_authorizing_erases_the_sensitive_part_alone_again_and_again(
    database: Database,
) -> None:
    token = await put_token(
        database, await put_merchant(database), expires_at=NOW + DAY, sensitive=b"track"
    )
    for at in (NOW, NOW + timedelta(hours=1)):
        found = await store.authorize(database, token, at)
        assert found is not None
        assert not found.has_sensitive_data
    row = await database.fetchrow(
        "SELECT card_ciphertext, sensitive_ciphertext, authorized_at"
        " FROM cde.token_secrets JOIN cde.payment_tokens USING (token)"
    )
    assert tuple(row or ()) == (b"sealed", None, NOW)
    assert await store.authorize(database, token, NOW + DAY) is None, "it has ended"
    assert await store.authorize(database, "ptk_0", NOW) is None


async def test_without_the_database_everything_is_done_at_its_next_turn(
    database: Database, database_url: str
) -> None:
    await answers(database, 1, ends=NOW - DAY)
    async with proxied(database_url) as (proxy, url):
        through = await Database.connect(url, pool_size=1)
        try:
            proxy.cut()
            for work in (
                life(through).purge_answers,
                life(through).purge_metadata,
                life(through).tend_partitions,
                life(through).shred,
                life(through).purge_now,
            ):
                with pytest.raises(GlamError) as caught:
                    await work()
                assert isinstance(caught.value, UnavailableError)
        finally:
            await through.close()
    assert (await life(database).purge_now()).answers == 1
