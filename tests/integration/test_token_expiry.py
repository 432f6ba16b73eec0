"""The end of tokens, told once: not early, not again, not by two nodes, not of those revoked."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.payments import store, tokens
from glamd.payments.tokens import Tokens
from tests.support.proxy import proxied
from tests.support.settable_clock import SettableClock

NOW = datetime.now(UTC)
SUBJECT = "evt.payment.token.expired.v1"


def of(database: Database, *, at: datetime = NOW) -> Tokens:
    return Tokens(database, clock=SettableClock(at))


async def insert(database: Database, count: int, *, ends_in: timedelta) -> UUID:
    """Tokens of a new merchant."""
    merchant_id = uuid4()
    await database.execute(
        "INSERT INTO cde.payment_tokens (token, merchant_id, device_id, brand, bin, last4,"
        " fingerprint, entry_mode, created_at, expires_at)"
        " SELECT 'ptk_' || upper(substr(md5($1::uuid::text || n), 1, 26)), $1::uuid, 'dev_1',"
        " 'visa', '42424242', '4242', '\\x00', 'chip',"
        " $2::timestamptz - interval '1 day', $2"
        " FROM generate_series(1, $3) AS n",
        merchant_id,
        NOW + ends_in,
        count,
    )
    await database.execute(
        "INSERT INTO cde.token_secrets (token, expires_at, card_ciphertext, key_version)"
        " SELECT token, expires_at, '\\x01', 'v1' FROM cde.payment_tokens WHERE merchant_id = $1",
        merchant_id,
    )
    return merchant_id


async def told(database: Database) -> list[dict[str, object]]:
    """The data of what was announced."""
    rows = await database.fetch("SELECT data FROM cde.outbox WHERE subject = $1", SUBJECT)
    return [json.loads(row[0]) if isinstance(row[0], str) else row[0] for row in rows]


async def test_each_end_is_told_once_with_what_the_contract_names(database: Database) -> None:
    merchant_id = await insert(database, 1, ends_in=-timedelta(seconds=1))
    assert await of(database).announce_expired() == 1
    assert await of(database).announce_expired() == 0
    [data] = await told(database)
    token = await database.fetchval("SELECT token FROM cde.payment_tokens")
    assert data == {
        "merchant_id": str(merchant_id),
        "token": token,
        "device_id": "dev_1",
        "brand": "visa",
        "last4": "4242",
    }


async def test_nothing_is_told_of_tokens_that_live_or_were_revoked(database: Database) -> None:
    await insert(database, 3, ends_in=timedelta(minutes=1))
    await insert(database, 3, ends_in=-timedelta(minutes=1))
    await database.execute(
        "UPDATE cde.payment_tokens SET status = 'revoked', revoked_at = now()"
        " WHERE expires_at < $1",
        NOW,
    )
    assert await of(database).announce_expired() == 0
    assert await told(database) == []


@pytest.mark.parametrize("ahead", [timedelta(hours=1), -timedelta(hours=1)])
async def test_a_clock_that_is_wrong_tells_nothing_early(
    database: Database, ahead: timedelta
) -> None:
    await insert(database, 2, ends_in=timedelta(minutes=30))
    assert await of(database, at=NOW + ahead).announce_expired() == 0


async def test_two_nodes_share_the_work_and_tell_each_end_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "EXPIRE_ROWS", 7)
    await insert(database, 100, ends_in=-timedelta(hours=1))
    done = 0
    while found := sum(await asyncio.gather(*(of(database).announce_expired() for _ in range(4)))):
        done += found
    assert done == 100
    assert len({str(data["token"]) for data in await told(database)}) == 100
    assert len(await told(database)) == 100


async def test_a_round_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "EXPIRE_ROWS", 2)
    monkeypatch.setattr(tokens, "EXPIRE_BATCHES", 3)
    await insert(database, 9, ends_in=-timedelta(hours=1))
    assert [await of(database).announce_expired() for _ in range(3)] == [6, 3, 0]


async def test_without_the_database_it_is_told_later(database: Database, database_url: str) -> None:
    await insert(database, 1, ends_in=-timedelta(hours=1))
    async with proxied(database_url) as (proxy, url):
        through = await Database.connect(url, pool_size=1)
        try:
            proxy.cut()
            with pytest.raises(UnavailableError):
                await of(through).announce_expired()
        finally:
            await through.close()
    assert await told(database) == []
    assert await of(database).announce_expired() == 1


async def test_no_plan_of_it_reads_the_tokens_from_end_to_end(database: Database) -> None:
    await insert(database, 20_000, ends_in=timedelta(days=1))
    await insert(database, 30, ends_in=-timedelta(seconds=1))
    async with database.connection() as connection:
        await connection.execute("ANALYZE cde.payment_tokens")
        async with connection.transaction():
            # What PostgreSQL falls back to when it has planned a statement often enough.
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            assert await connection.fetchval(store._EXPIRE, NOW, tokens.EXPIRE_ROWS, "c") == 30
            scanned = await connection.fetchval(
                "SELECT seq_scan FROM pg_stat_xact_user_tables"
                " WHERE relid = 'cde.payment_tokens'::regclass"
            )
    assert scanned == 0
