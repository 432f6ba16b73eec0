"""The SQL of payment tokens: the group commit, the stored answers, the metadata.

No rule is decided here: a statement either applies on the version it was given or it does not, and
says so. The audit log has its SQL in `audit`, the devices theirs in `device_gateway.store`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.db import Connection, Database, Row
from glamd.payments import card_numbers
from glamd.payments.model import IDEMPOTENCY_TTL, PaymentToken, SealedToken, Spend

# One statement is one transaction and one round trip. `locked` takes the counters in their order,
# so that two gateways never wait for one another in a circle; it is counted only to be run first.
# `moved` holds the spends that applied: their counters stood at the version the decision was made
# on, their device and its key set are active, their key version seals, and their id was not
# answered yet. As every answer of a device is stored together with a new version, an id that
# another gateway stored after our snapshot shows as a version that moved. The look-ups are scalar
# subqueries, which are never made into a join: a join would be planned on what the tables held when
# the statement was prepared, which is nothing, and read the whole of them at each commit.
_COMMIT_SPENDS: Final = """
WITH locked AS (
    SELECT FROM cde.device_counters WHERE counter_id = ANY ($1) ORDER BY counter_id FOR UPDATE
), input AS (
    SELECT * FROM unnest(
        $1::bigint[], $2::bigint[], $3::bigint[], $4::bytea[], $5::text[], $6::text[], $7::bytea[],
        $8::bytea[], $9::timestamptz[], $10::text[], $11::text[], $12::text[], $13::text[],
        $14::smallint[], $15::smallint[], $16::bytea[], $17::text[], $18::bytea[], $19::bytea[],
        $20::text[], $21::timestamptz[], $22::text[]
    ) AS i (
        counter_id, version, highest, seen, device_id, key, content_hash,
        answer, at, token, brand, bin, last4,
        exp_month, exp_year, fingerprint, entry_mode, card_ciphertext, sensitive_ciphertext,
        key_version, expires_at, correlation_id
    )
), usable AS (
    SELECT version FROM cde.encryption_keys
    WHERE keyring = 'payment-tokens' AND version = ANY ($20)
      AND status IN ('active', 'decrypt-only')
    FOR KEY SHARE
), moved AS (
    UPDATE cde.device_counters c
    SET highest = i.highest, seen = i.seen, version = c.version + 1,
        token_count = c.token_count + (i.token IS NOT NULL)::int
    FROM input i
    WHERE (SELECT count(*) FROM locked) >= 0
      AND c.counter_id = i.counter_id AND c.version = i.version
      AND (SELECT d.status FROM cde.devices d
           WHERE d.device_id = i.device_id AND d.counter_id = i.counter_id
             AND (SELECT k.status FROM cde.key_sets k WHERE k.key_set = d.key_set) = 'active'
          ) = 'active'
      AND (i.token IS NULL OR i.key_version IN (SELECT u.version FROM usable u))
      AND NOT coalesce((
          SELECT k.expires_at > i.at FROM cde.token_idempotency_keys k
          WHERE k.scope = i.device_id AND k.key = i.key), false)
    RETURNING c.merchant_id, i.*
), answered AS (
    INSERT INTO cde.token_idempotency_keys AS k (scope, key, content_hash, answer, expires_at)
    SELECT device_id, key, content_hash, answer, at + $23::interval FROM moved
    ON CONFLICT (scope, key) DO UPDATE
    SET content_hash = EXCLUDED.content_hash, answer = EXCLUDED.answer,
        expires_at = EXCLUDED.expires_at
), issued AS (
    INSERT INTO cde.payment_tokens (
        token, merchant_id, device_id, brand, bin, last4, exp_month, exp_year, fingerprint,
        entry_mode, has_sensitive_data, created_at, expires_at)
    SELECT token, merchant_id, device_id, brand, bin, last4, exp_month, exp_year, fingerprint,
           entry_mode, sensitive_ciphertext IS NOT NULL, at, expires_at
    FROM moved WHERE token IS NOT NULL
), kept AS (
    INSERT INTO cde.token_secrets (
        token, expires_at, card_ciphertext, sensitive_ciphertext, key_version)
    SELECT token, expires_at, card_ciphertext, sensitive_ciphertext, key_version
    FROM moved WHERE token IS NOT NULL
), announced AS (
    INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data, created_at)
    SELECT 'evt.payment.token.created.v1', merchant_id, correlation_id,
           jsonb_build_object('merchant_id', merchant_id, 'token', token, 'device_id', device_id,
                              'brand', brand, 'last4', last4), at
    FROM moved WHERE token IS NOT NULL
)
SELECT counter_id FROM moved
"""

_NO_TOKEN: Final = (None,) * 13

_STORED_ANSWER: Final = """
SELECT content_hash, answer FROM cde.token_idempotency_keys
WHERE scope = $1 AND key = $2 AND expires_at > $3
"""

_TOKEN_COLUMNS: Final = """
    token, merchant_id, device_id, brand, bin, last4, exp_month, exp_year, fingerprint, entry_mode,
    status, has_sensitive_data, created_at, expires_at
"""
_TOKEN: Final = f"SELECT {_TOKEN_COLUMNS} FROM cde.payment_tokens WHERE token = $1"  # noqa: S608 - our own constants
_PAGE_AFTER: Final = f"""
SELECT {_TOKEN_COLUMNS} FROM cde.payment_tokens
WHERE merchant_id = $1 AND (created_at, token) < ($2, $3)
ORDER BY created_at DESC, token DESC LIMIT $4
"""  # noqa: S608 - our own constants
_PAGE_AT: Final = f"""
SELECT {_TOKEN_COLUMNS} FROM cde.payment_tokens
WHERE merchant_id = $1
ORDER BY created_at DESC, token DESC LIMIT $2 OFFSET $3
"""  # noqa: S608 - our own constants
_TOTAL: Final = """
SELECT greatest(0,
    (SELECT coalesce(sum(token_count), 0) FROM cde.device_counters WHERE merchant_id = $1)
    - coalesce((SELECT purged_token_count FROM cde.merchants WHERE merchant_id = $1), 0))::bigint
"""
NOTE_SHREDDED: Final = """
    INSERT INTO cde.shred_queue (partition, since)
    SELECT DISTINCT c.relname::text, clock_timestamp()
    FROM gone g JOIN pg_catalog.pg_class c ON c.oid = g.tableoid
    ORDER BY 1
    ON CONFLICT (partition) DO NOTHING
"""
"""Whatever takes a ciphertext away notes where, in the same statement: its bytes are still there.

`gone` has the partitions as `tableoid`; in the order of their names, so that no two wait for one
another.
"""

_REVOKE: Final = f"""
WITH gone AS (
    DELETE FROM cde.token_secrets WHERE token = $1 RETURNING tableoid
), noted AS ({NOTE_SHREDDED})
UPDATE cde.payment_tokens
SET status = 'revoked', revoked_at = $2, has_sensitive_data = false
WHERE token = $1 AND status = 'active'
RETURNING {_TOKEN_COLUMNS}
"""  # noqa: S608 - our own constants
_AUTHORIZE: Final = f"""
WITH gone AS (
    UPDATE cde.token_secrets SET sensitive_ciphertext = NULL
    WHERE token = $1 AND sensitive_ciphertext IS NOT NULL
    RETURNING tableoid
), noted AS ({NOTE_SHREDDED})
UPDATE cde.payment_tokens
SET authorized_at = coalesce(authorized_at, $2), has_sensitive_data = false
WHERE token = $1 AND status = 'active' AND expires_at > $2
RETURNING {_TOKEN_COLUMNS}
"""  # noqa: S608 - our own constants
# The earlier of both clocks decides, so that a node whose clock is ahead announces nothing early.
# By an array of tokens and not by a join: a plan that is kept for any LIMIT takes a tenth of what
# is due for granted, and reads the whole table to find it.
_EXPIRE: Final = f"""
WITH due AS (
    SELECT token FROM cde.payment_tokens
    WHERE status = 'active' AND expired_at IS NULL AND expires_at <= least($1, now())
    ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
), over AS (
    UPDATE cde.payment_tokens SET expired_at = $1, has_sensitive_data = false
    WHERE token = ANY (ARRAY(SELECT token FROM due))
    RETURNING token, merchant_id, device_id, brand, last4
), gone AS (
    DELETE FROM cde.token_secrets WHERE token = ANY (ARRAY(SELECT token FROM over))
    RETURNING tableoid
), noted AS ({NOTE_SHREDDED}), announced AS (
    INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
    SELECT 'evt.payment.token.expired.v1', merchant_id, $3,
           jsonb_build_object('merchant_id', merchant_id, 'token', token, 'device_id', device_id,
                              'brand', brand, 'last4', last4)
    FROM over
)
SELECT count(*) FROM over
"""  # noqa: S608 - our own constants
# By lateral look-ups, each of which knows its partition when it comes to it: a join would be
# planned on what the tables held when the statement was prepared.
_SEALED: Final = """
SELECT t.token, t.merchant_id, t.status, t.expires_at, coalesce(s.card_ciphertext, ''),
       s.sensitive_ciphertext, coalesce(s.key_version, '')
FROM unnest($1::text[]) AS wanted (token)
CROSS JOIN LATERAL (
    SELECT token, merchant_id, status, expires_at FROM cde.payment_tokens
    WHERE token = wanted.token OFFSET 0
) t
LEFT JOIN LATERAL (
    SELECT card_ciphertext, sensitive_ciphertext, key_version FROM cde.token_secrets
    WHERE token = t.token AND expires_at = t.expires_at OFFSET 0
) s ON true
"""


async def commit_spends(connection: Connection, spends: Sequence[Spend]) -> list[bool]:
    """Apply the spends whose version still holds; True for each that was applied.

    Of two spends of one counter in a batch only the first can hold, so the others are not sent.
    """
    firsts: dict[int, Spend] = {}
    for spend in spends:
        firsts.setdefault(spend.counter_id, spend)
    rows = [_columns(firsts[counter_id]) for counter_id in sorted(firsts)]
    moved = await connection.fetch(_COMMIT_SPENDS, *zip(*rows, strict=True), IDEMPOTENCY_TTL)
    applied = {row[0] for row in moved}
    return [spend.counter_id in applied and firsts[spend.counter_id] is spend for spend in spends]


def _columns(spend: Spend) -> tuple[object, ...]:
    head = (
        spend.counter_id,
        spend.counter_version,
        spend.window.highest,
        spend.window.seen_bytes(),
        spend.device_id,
        spend.request_id,
        spend.content_hash,
        spend.answer,
        spend.at,
    )
    issued = spend.issued
    if issued is None:
        return head + _NO_TOKEN
    card = issued.card
    return (
        *head,
        issued.token,
        card.brand,
        card.bin,
        card.last4,
        card.exp_month,
        card.exp_year,
        card.fingerprint,
        issued.entry_mode,
        card.ciphertext,
        card.sensitive_ciphertext,
        card.key_version,
        issued.expires_at,
        # Devices choose their ids, and an event goes out to others.
        card_numbers.masked(spend.request_id),
    )


async def stored_answer(
    database: Database, scope: str, request_id: str, now: datetime
) -> tuple[bytes, bytes] | None:
    """The content hash and the answer that this id has, or None."""
    row = await database.fetchrow(_STORED_ANSWER, scope, request_id, now)
    return None if row is None else (row["content_hash"], row["answer"])


async def token(database: Database, name: str, now: datetime) -> PaymentToken | None:
    """One token's metadata."""
    row = await database.fetchrow(_TOKEN, name)
    return None if row is None else _payment_token(row, now)


async def tokens_after(
    database: Database, merchant_id: UUID, *, after: tuple[datetime, str], limit: int, now: datetime
) -> list[PaymentToken]:
    """The merchant's tokens behind `after` (created_at, token), newest first."""
    rows = await database.fetch(_PAGE_AFTER, merchant_id, *after, limit)
    return [_payment_token(row, now) for row in rows]


async def tokens_at(
    database: Database, merchant_id: UUID, *, offset: int, limit: int, now: datetime
) -> list[PaymentToken]:
    """The merchant's tokens from `offset` on, newest first; costs as much as it skips."""
    rows = await database.fetch(_PAGE_AT, merchant_id, limit, offset)
    return [_payment_token(row, now) for row in rows]


async def total(database: Database, merchant_id: UUID) -> int:
    """How many tokens the merchant has: those its devices were given, less those deleted since."""
    value: int = await database.fetchval(_TOTAL, merchant_id)
    return value


async def revoke(connection: Connection, name: str, now: datetime) -> PaymentToken | None:
    """Shred the token's ciphertext; None where it was not active."""
    row = await connection.fetchrow(_REVOKE, name, now)
    return None if row is None else _payment_token(row, now)


async def authorize(database: Database, name: str, now: datetime) -> PaymentToken | None:
    """Shred what is sensitive of the token; None where it does not live any more."""
    row = await database.fetchrow(_AUTHORIZE, name, now)
    return None if row is None else _payment_token(row, now)


async def expire(database: Database, *, now: datetime, limit: int, correlation_id: str) -> int:
    """Shred tokens that are over and announce their end, each once; how many, at most `limit`."""
    value: int = await database.fetchval(_EXPIRE, now, limit, correlation_id)
    return value


async def sealed(connection: Connection, names: Sequence[str]) -> list[SealedToken | None]:
    """Each token's owner, status, end and ciphertexts, in the order asked for; None for unknown."""
    rows = await connection.fetch(_SEALED, list(set(names)))
    found = {row[0]: SealedToken(*tuple(row)[1:]) for row in rows}
    return [found.get(name) for name in names]


def _payment_token(row: Row, now: datetime) -> PaymentToken:
    expired = row["status"] == "active" and row["expires_at"] <= now
    return PaymentToken(
        token=row["token"],
        merchant_id=row["merchant_id"],
        device_id=row["device_id"],
        brand=row["brand"],
        bin=row["bin"],
        last4=row["last4"],
        exp_month=row["exp_month"],
        exp_year=row["exp_year"],
        fingerprint=row["fingerprint"].hex(),
        entry_mode=row["entry_mode"],
        status="expired" if expired else row["status"],
        has_sensitive_data=row["has_sensitive_data"] and not expired,
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )
