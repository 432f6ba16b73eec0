"""The rows of platform tokens and of their access log. SQL in, rows out; ciphertexts stay shut.

Statements here run in the transaction of whoever calls them. The refresh's and the import's own
statements stand in their rooms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from glamd.credentials.model import (
    Access,
    Accessor,
    Action,
    Health,
    NewToken,
    Platform,
    ShopConnection,
)
from glamd.db import Connection, Database, Row

COLUMNS: Final = (
    "token_id, merchant_id, platform, platform_shop_id, domain, token_type, scopes, key_version,"
    " expires_at, refreshable, generation, refresh_failures, refresh_error, refresh_not_before,"
    " refreshed_at, created_at, updated_at, last_accessed_by, last_accessed_at, access_count"
)
"""Every column of `glam.platform_tokens` that `connection_of` reads: all but the secret's."""

# The id stays through a replacement, and so does what was counted. The generation moves on, by
# which a refresh that is under way with the former secret finds out that it came too late.
_PUT: Final = """
INSERT INTO glam.platform_tokens AS t
    (token_id, merchant_id, platform, platform_shop_id, domain, token_type, scopes, ciphertext,
     key_version, expires_at, refreshable, created_at, updated_at, last_accessed_by,
     last_accessed_at, access_count)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12, $13, $12, 1)
ON CONFLICT (merchant_id, platform) DO UPDATE SET
    platform_shop_id = excluded.platform_shop_id,
    domain = excluded.domain,
    token_type = excluded.token_type,
    scopes = excluded.scopes,
    ciphertext = excluded.ciphertext,
    key_version = excluded.key_version,
    expires_at = excluded.expires_at,
    refreshable = excluded.refreshable,
    generation = t.generation + 1,
    refresh_claim = NULL,
    refresh_claim_until = NULL,
    refresh_failures = 0,
    refresh_error = NULL,
    refresh_not_before = NULL,
    refreshed_at = NULL,
    older_updated_at = NULL,
    updated_at = excluded.updated_at,
    last_accessed_by = excluded.last_accessed_by,
    last_accessed_at = excluded.last_accessed_at,
    access_count = t.access_count + 1
RETURNING token_id
"""

_LOOK: Final = """
SELECT token_id, key_version, refreshable, expires_at FROM glam.platform_tokens
WHERE merchant_id = $1 AND ($2::text IS NULL OR platform = $2)
"""

# The rows are locked in the order of their names before any is written, so that two readers of
# one merchant wait for each other and never both.
_TOUCH: Final = f"""
WITH locked AS (
    SELECT token_id AS id FROM glam.platform_tokens
    WHERE merchant_id = $1 AND ($2::text IS NULL OR platform = $2)
    ORDER BY platform
    FOR UPDATE
)
UPDATE glam.platform_tokens
SET last_accessed_by = $3, last_accessed_at = $4, access_count = access_count + 1
FROM locked
WHERE token_id = locked.id
RETURNING {COLUMNS}, ciphertext
"""  # noqa: S608 - our own constant

_DELETE: Final = """
DELETE FROM glam.platform_tokens WHERE merchant_id = $1 AND platform = $2 RETURNING token_id
"""

_FORGET: Final = """
DELETE FROM glam.platform_tokens WHERE merchant_id = $1 RETURNING platform, token_id
"""

_LOG: Final = """
INSERT INTO glam.token_access_log
    (at, merchant_id, action, actor_kind, actor, request_id, correlation_id, ip,
     platform, token_id, error, success)
SELECT $1, $2, $3, $4, $5, $6, $7, $8, e.platform, e.token_id, e.error, e.error IS NULL
FROM unnest($9::text[], $10::uuid[], $11::text[]) WITH ORDINALITY
     AS e (platform, token_id, error, place)
ORDER BY e.place
"""

_CONNECTION: Final = f"""
SELECT {COLUMNS} FROM glam.platform_tokens WHERE merchant_id = $1 AND platform = $2
"""  # noqa: S608 - our own constant

# `ShopConnection.health` in SQL; a test holds the two to each other.
_CONNECTIONS: Final = f"""
SELECT {COLUMNS} FROM glam.platform_tokens
WHERE ($1::uuid IS NULL OR merchant_id = $1)
  AND ($2::text IS NULL OR platform = $2)
  AND ($3::text IS NULL OR $3 = CASE WHEN refresh_failures > 0 THEN 'refresh-failing'
                                     WHEN expires_at <= $4 THEN 'expired'
                                     ELSE 'valid' END)
  AND ($5::uuid IS NULL OR (merchant_id, platform) > ($5, $6::text))
ORDER BY merchant_id, platform
LIMIT $7
"""  # noqa: S608 - our own constant

_ACCESSES: Final = """
SELECT id, at, merchant_id, platform, token_id, action, actor_kind, actor, error, request_id,
       correlation_id, ip
FROM glam.token_access_log
WHERE merchant_id = $1 AND ($2::bigint IS NULL OR id < $2)
ORDER BY id DESC
LIMIT $3
"""

_PURGE: Final = """
DELETE FROM glam.token_access_log
WHERE id = ANY (ARRAY(SELECT id FROM glam.token_access_log WHERE at < $1
                      ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED))
"""

_MICROSECOND: Final = timedelta(microseconds=1)
_FIRST: Final = datetime.min.replace(tzinfo=UTC) + _MICROSECOND
_LAST: Final = datetime.max.replace(tzinfo=UTC) - _MICROSECOND


@dataclass(frozen=True, slots=True)
class SealedToken:
    """A row with its secret, still sealed."""

    connection: ShopConnection
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLook:
    """What decides, before a token is read, which keys are needed and whether it is renewed."""

    token_id: UUID
    key_version: str
    refreshable: bool
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """What an access-log row says of the token; `error` is a stable code, None for success."""

    platform: Platform | None
    token_id: UUID | None
    error: str | None = None


async def put(
    connection: Connection,
    new: NewToken,
    *,
    token_id: UUID,
    ciphertext: bytes,
    key_version: str,
    by: str,
    at: datetime,
) -> UUID:
    """Insert the token, or replace the merchant's one of this platform; the id that it has now."""
    stored: UUID = await connection.fetchval(
        _PUT,
        token_id,
        new.merchant_id,
        new.platform,
        new.platform_shop_id,
        new.domain,
        new.token_type,
        list(new.scopes),
        ciphertext,
        key_version,
        finite(new.expires_at),
        new.refreshable,
        at,
        by,
    )
    return stored


async def look(
    database: Database, merchant_id: UUID, platform: Platform | None
) -> tuple[TokenLook, ...]:
    """The merchant's tokens, of one platform or of all, without a lock and without a secret."""
    rows = await database.fetch(_LOOK, merchant_id, platform)
    return tuple(
        TokenLook(
            token_id=row["token_id"],
            key_version=row["key_version"],
            refreshable=row["refreshable"],
            expires_at=_aware(row["expires_at"]),
        )
        for row in rows
    )


async def touch(
    connection: Connection,
    merchant_id: UUID,
    platform: Platform | None,
    *,
    by: str,
    at: datetime,
) -> tuple[SealedToken, ...]:
    """Lock the merchant's tokens, count an access of each, and return them by platform."""
    rows = await connection.fetch(_TOUCH, merchant_id, platform, by, at)
    sealed = (SealedToken(connection_of(row), row["ciphertext"]) for row in rows)
    return tuple(sorted(sealed, key=lambda token: token.connection.platform))


async def remove(connection: Connection, merchant_id: UUID, platform: Platform) -> UUID | None:
    """Delete the token; the id that it had, or None where there was none."""
    found: UUID | None = await connection.fetchval(_DELETE, merchant_id, platform)
    return found


async def forget(connection: Connection, merchant_id: UUID) -> list[Touched]:
    """Delete all of the merchant's tokens; which they were."""
    rows = await connection.fetch(_FORGET, merchant_id)
    return [Touched(platform=row["platform"], token_id=row["token_id"], error=None) for row in rows]


async def log_access(
    connection: Connection,
    *,
    at: datetime,
    merchant_id: UUID,
    platform: Platform | None,
    token_id: UUID | None,
    action: Action,
    accessor: Accessor,
    error: str | None,
) -> None:
    """One row of the access log, in the transaction of what it is about."""
    touched = Touched(platform=platform, token_id=token_id, error=error)
    await log_accesses(
        connection,
        (touched,),
        at=at,
        merchant_id=merchant_id,
        action=action,
        accessor=accessor,
    )


async def log_accesses(
    connection: Connection,
    touched: Sequence[Touched],
    *,
    at: datetime,
    merchant_id: UUID,
    action: Action,
    accessor: Accessor,
) -> None:
    """A row for each token that one request touched."""
    await connection.execute(
        _LOG,
        at,
        merchant_id,
        action,
        accessor.kind,
        accessor.name,
        accessor.request_id,
        accessor.correlation_id,
        accessor.ip,
        [one.platform for one in touched],
        [one.token_id for one in touched],
        [one.error for one in touched],
    )


async def connection_by_platform(
    database: Database, merchant_id: UUID, platform: Platform
) -> ShopConnection | None:
    """A merchant's connection with a platform, or None."""
    row = await database.fetchrow(_CONNECTION, merchant_id, platform)
    return None if row is None else connection_of(row)


async def connections(
    database: Database,
    *,
    merchant_id: UUID | None,
    platform: Platform | None,
    health: Health | None,
    now: datetime,
    after: tuple[UUID, Platform] | None,
    limit: int,
) -> tuple[ShopConnection, ...]:
    """The next `limit` connections by merchant and platform that fit what is not None."""
    after_merchant, after_platform = after if after is not None else (None, None)
    rows = await database.fetch(
        _CONNECTIONS, merchant_id, platform, health, now, after_merchant, after_platform, limit
    )
    return tuple(connection_of(row) for row in rows)


async def accesses(
    database: Database, merchant_id: UUID, *, before: int | None, limit: int
) -> tuple[Access, ...]:
    """The newest `limit` rows of a merchant's access log that are older than row `before`."""
    rows = await database.fetch(_ACCESSES, merchant_id, before, limit)
    return tuple(
        Access(
            access_id=row["id"],
            at=row["at"],
            merchant_id=row["merchant_id"],
            platform=row["platform"],
            token_id=row["token_id"],
            action=row["action"],
            accessor=Accessor(
                kind=row["actor_kind"],
                name=row["actor"],
                ip=row["ip"],
                request_id=row["request_id"],
                correlation_id=row["correlation_id"],
            ),
            error=row["error"],
        )
        for row in rows
    )


async def purge_accesses(database: Database, *, before: datetime, limit: int) -> int:
    """Delete up to `limit` rows of the access log from before then, the oldest first; how many."""
    tag = await database.execute(_PURGE, before, limit)
    return int(tag.rpartition(" ")[2])


def connection_of(row: Row) -> ShopConnection:
    """The connection in a row that has COLUMNS."""
    return ShopConnection(
        token_id=row["token_id"],
        merchant_id=row["merchant_id"],
        platform=row["platform"],
        platform_shop_id=row["platform_shop_id"],
        domain=row["domain"],
        token_type=row["token_type"],
        scopes=tuple(row["scopes"]),
        key_version=row["key_version"],
        expires_at=_aware(row["expires_at"]),
        refreshable=row["refreshable"],
        generation=row["generation"],
        refresh_failures=row["refresh_failures"],
        refresh_error=row["refresh_error"],
        refresh_not_before=row["refresh_not_before"],
        refreshed_at=row["refreshed_at"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        last_accessed_by=row["last_accessed_by"],
        last_accessed_at=row["last_accessed_at"],
        access_count=row["access_count"],
    )


def finite(at: datetime | None) -> datetime | None:
    """A time as it can be stored.

    The driver writes the first and the last microsecond of the calendar, which some languages give
    to what never was and what never ends, as infinities, and reads those back without an offset.
    """
    return None if at is None else min(max(at, _FIRST), _LAST)


def _aware(at: datetime | None) -> datetime | None:
    """An infinity that came into the table by another way is a time like any other here."""
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)
