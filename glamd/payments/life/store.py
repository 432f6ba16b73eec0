"""The SQL of what becomes of tokens that ended: partitions, shredding, old rows, a merchant's all.

Whatever is over is over by both clocks, the node's and the database's, so that a node whose clock
is ahead deletes nothing early. Partitions are changed by functions of the schema alone, since the
daemon's login owns nothing (migration 0004).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final
from uuid import UUID

from glamd.db import Connection, Database
from glamd.payments.store import NOTE_SHREDDED

# By their addresses, which a plan for any LIMIT still reads by the index. A key that is written
# again meanwhile has another one, and stays.
_PURGE_ANSWERS: Final = """
DELETE FROM cde.token_idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM cde.token_idempotency_keys WHERE expires_at <= least($1, now())
    ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))
"""

# What is deleted is counted at its merchant, so that what lists give as their total stays right.
_COUNTED: Final = """
    UPDATE cde.merchants m SET purged_token_count = m.purged_token_count + g.rows
    FROM (SELECT merchant_id, count(*) AS rows FROM deleted GROUP BY merchant_id) g
    WHERE m.merchant_id = g.merchant_id AND (SELECT count(*) FROM owners) >= 0
"""
_OWNERS: Final = """
    SELECT FROM cde.merchants WHERE merchant_id IN (SELECT merchant_id FROM deleted)
    ORDER BY merchant_id FOR NO KEY UPDATE
"""
_PURGE_METADATA: Final = f"""
WITH due AS (
    SELECT token FROM cde.payment_tokens
    WHERE (status = 'revoked' OR expired_at IS NOT NULL)
      AND coalesce(revoked_at, expires_at) <= least($1, now()) - $2::interval
    ORDER BY coalesce(revoked_at, expires_at) LIMIT $3 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM cde.payment_tokens WHERE token = ANY (ARRAY(SELECT token FROM due))
    RETURNING merchant_id
), owners AS ({_OWNERS}), counted AS ({_COUNTED})
SELECT count(*) FROM deleted
"""  # noqa: S608 - our own constants

_TODAY_AND_LONGEST: Final = """
SELECT (now() AT TIME ZONE 'UTC')::date AS today,
       (SELECT max(token_ttl_s) FROM cde.merchants) AS longest_ttl_s
"""
_PARTITIONS: Final = """
SELECT to_date(right(c.relname, 8), 'YYYYMMDD') AS day
FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'cde.token_secrets'::regclass AND c.relname ~ '^token_secrets_[0-9]{8}$'
ORDER BY 1
"""
_MAKE: Final = "SELECT cde.make_secrets_partition($1)"
_DROP: Final = "SELECT cde.drop_secrets_partition($1)"
_REWRITE: Final = "SELECT cde.rewrite_secrets_partition($1)"
_DIRTY: Final = """
SELECT partition, since, clock_timestamp() - since AS age FROM cde.shred_queue ORDER BY since
"""

# In the order in which everybody takes them. Whoever enrols a device holds its merchant: the device
# is in before the request goes on, or is refused. A commit that is under way holds its device's
# counters: it is done before these statements go on, or finds the version moved and decides again,
# on a device that is revoked.
_LOCK_MERCHANT: Final = """
SELECT FROM cde.merchants WHERE merchant_id = $1 FOR NO KEY UPDATE
"""
_LOCK_DEVICES: Final = """
SELECT FROM cde.devices WHERE merchant_id = $1 ORDER BY device_id FOR NO KEY UPDATE
"""
_LOCK_COUNTERS: Final = """
SELECT FROM cde.device_counters WHERE merchant_id = $1 ORDER BY counter_id FOR UPDATE
"""
_REQUEST: Final = """
WITH fenced AS (
    UPDATE cde.device_counters SET version = version + 1 WHERE merchant_id = $1
), stopped AS (
    UPDATE cde.devices SET status = 'revoked', changed_at = clock_timestamp()
    WHERE merchant_id = $1 AND status <> 'revoked'
    RETURNING merchant_id, device_id
), told AS (
    INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
    SELECT 'evt.device.revoked.v1', merchant_id, $3,
           jsonb_build_object('merchant_id', merchant_id, 'device_id', device_id, 'at', $4::text)
    FROM stopped ORDER BY device_id
)
UPDATE cde.merchants SET erase_requested_at = coalesce(erase_requested_at, $2)
WHERE merchant_id = $1
RETURNING (SELECT count(*) FROM stopped)
"""
_TO_ERASE: Final = """
SELECT merchant_id FROM cde.merchants
WHERE erase_requested_at IS NOT NULL AND erased_at IS NULL
ORDER BY erase_requested_at LIMIT $1
"""
_ERASE_TOKENS: Final = f"""
WITH due AS (
    SELECT token FROM cde.payment_tokens WHERE merchant_id = $1
    ORDER BY created_at, token LIMIT $2 FOR UPDATE SKIP LOCKED
), deleted AS (
    DELETE FROM cde.payment_tokens WHERE token = ANY (ARRAY(SELECT token FROM due))
    RETURNING token, merchant_id, device_id, brand, last4,
              status = 'active' AND expired_at IS NULL AS lived
), gone AS (
    DELETE FROM cde.token_secrets WHERE token = ANY (ARRAY(SELECT token FROM deleted))
    RETURNING tableoid
), noted AS ({NOTE_SHREDDED}), told AS (
    INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
    SELECT 'evt.payment.token.revoked.v1', merchant_id, $3,
           jsonb_build_object('merchant_id', merchant_id, 'token', token, 'device_id', device_id,
                              'brand', brand, 'last4', last4)
    FROM deleted WHERE lived
), owners AS ({_OWNERS}), counted AS ({_COUNTED})
SELECT count(*) FROM deleted
"""  # noqa: S608 - our own constants
# A look-up for each device: a join, planned for any LIMIT, reads everybody's answers to find none.
_ERASE_ANSWERS: Final = """
DELETE FROM cde.token_idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT k.ctid FROM cde.devices d CROSS JOIN LATERAL (
        SELECT ctid FROM cde.token_idempotency_keys WHERE scope = d.device_id OFFSET 0
    ) k
    WHERE d.merchant_id = $1 LIMIT $2))
"""
_ERASED: Final = """
UPDATE cde.merchants m SET erased_at = $2
WHERE merchant_id = $1 AND erase_requested_at IS NOT NULL AND erased_at IS NULL
  AND NOT EXISTS (SELECT FROM cde.payment_tokens t WHERE t.merchant_id = m.merchant_id)
"""
_IS_ERASED: Final = "SELECT erased_at IS NOT NULL FROM cde.merchants WHERE merchant_id = $1"


@dataclass(frozen=True, slots=True)
class Dirty:
    """A partition with bytes of rows that are gone, and for how long it has had some."""

    partition: str
    since: datetime
    age: timedelta


async def purge_answers(database: Database, *, now: datetime, limit: int) -> int:
    """Delete stored answers whose day is over; how many, at most `limit`."""
    return _count(await database.execute(_PURGE_ANSWERS, now, limit))


async def purge_metadata(database: Database, *, now: datetime, keep: timedelta, limit: int) -> int:
    """Delete tokens that ended longer than `keep` ago; how many, at most `limit`."""
    value: int = await database.fetchval(_PURGE_METADATA, now, keep, limit)
    return value


async def today_and_longest_ttl(database: Database) -> tuple[date, timedelta | None]:
    """The database's day in UTC, and the longest time that a merchant has set for its tokens."""
    row = await database.fetchrow(_TODAY_AND_LONGEST)
    assert row is not None
    ttl_s = row["longest_ttl_s"]
    return row["today"], None if ttl_s is None else timedelta(seconds=ttl_s)


async def days(database: Database) -> tuple[date, ...]:
    """The days that have a partition, in order."""
    return tuple(row["day"] for row in await database.fetch(_PARTITIONS))


async def make(connection: Connection, day: date, *, timeout_s: float) -> bool:
    """Make the partition of a day; False where it is there. UnavailableError where it is busy."""
    async with _with_time(connection, timeout_s):
        made: bool = await connection.fetchval(_MAKE, day, timeout_s=timeout_s)
    return made


async def drop(connection: Connection, day: date, *, timeout_s: float) -> str:
    """Drop the partition of a day: `dropped`, `not-over`, `has-rows` or `absent`."""
    async with _with_time(connection, timeout_s):
        outcome: str = await connection.fetchval(_DROP, day, timeout_s=timeout_s)
    return outcome


async def rewrite(connection: Connection, partition: str, *, timeout_s: float) -> int | None:
    """Write a partition anew; how many rows it has, or None where nothing was to be shredded."""
    async with _with_time(connection, timeout_s):
        kept: int | None = await connection.fetchval(_REWRITE, partition, timeout_s=timeout_s)
    return kept


async def dirty(database: Database) -> tuple[Dirty, ...]:
    """The partitions that hold bytes of rows which are gone, the longest first."""
    return tuple(Dirty(*row) for row in await database.fetch(_DIRTY))


async def request_erasure(
    connection: Connection, merchant_id: UUID, *, now: datetime, correlation_id: str
) -> int | None:
    """Revoke the merchant's devices for good and note the request; how many, None: no merchant."""
    for lock in (_LOCK_MERCHANT, _LOCK_DEVICES, _LOCK_COUNTERS):
        await connection.execute(lock, merchant_id)
    stopped: int | None = await connection.fetchval(
        _REQUEST, merchant_id, now, correlation_id, now.isoformat()
    )
    return stopped


async def to_erase(database: Database, *, limit: int) -> tuple[UUID, ...]:
    """The merchants whose erasure was requested and is not done, in the order of the requests."""
    return tuple(row["merchant_id"] for row in await database.fetch(_TO_ERASE, limit))


async def erase_tokens(
    database: Database, merchant_id: UUID, *, limit: int, correlation_id: str
) -> int:
    """Delete some of the merchant's tokens, telling of those that lived; at most `limit`."""
    value: int = await database.fetchval(_ERASE_TOKENS, merchant_id, limit, correlation_id)
    return value


async def erase_answers(database: Database, merchant_id: UUID, *, limit: int) -> int:
    """Delete some of the answers that the merchant's devices got; at most `limit`."""
    return _count(await database.execute(_ERASE_ANSWERS, merchant_id, limit))


async def erased(database: Database, merchant_id: UUID, now: datetime) -> bool:
    """Note that the erasure is done; False where a token is left or it was noted before."""
    return _count(await database.execute(_ERASED, merchant_id, now)) == 1


async def is_erased(database: Database, merchant_id: UUID) -> bool:
    """Whether it is noted that the erasure is done."""
    return bool(await database.fetchval(_IS_ERASED, merchant_id))


@asynccontextmanager
async def _with_time(connection: Connection, timeout_s: float) -> AsyncIterator[None]:
    """A transaction whose statements may take longer than the pool's others."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL statement_timeout = {round(timeout_s * 1000)}")
        yield


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
