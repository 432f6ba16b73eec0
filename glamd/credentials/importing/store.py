"""The rows that an import brings, and the one that says how far it has come.

What writes runs in the transaction that it is given, of which locking the progress is the first
step: two imports take turns, and what one has brought the other finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import orjson

from glamd.credentials.importing.older import OlderToken
from glamd.credentials.model import Accessor, Platform
from glamd.credentials.store import finite
from glamd.db import Connection, Database

_BEGIN: Final = """
INSERT INTO glam.imports (name, position, counts, started_at, updated_at)
VALUES ($1, '', '{}', $2, $2)
ON CONFLICT (name) DO NOTHING
"""

_PROGRESS: Final = """
SELECT position, counts, started_at, updated_at FROM glam.imports WHERE name = $1
"""
_LOCKED_PROGRESS: Final = _PROGRESS + " FOR UPDATE"

_SET_PROGRESS: Final = """
UPDATE glam.imports SET position = $2, counts = $3, started_at = $4, updated_at = $5
WHERE name = $1
"""

# A token that was deleted here after the older service last wrote it must not come back.
_STANDINGS: Final = """
SELECT CASE
         WHEN same.merchant_id = row.merchant_id AND same.platform = row.platform THEN 'already'
         WHEN same.token_id IS NOT NULL THEN 'id-taken'
         WHEN other.token_id IS NOT NULL THEN 'superseded'
         WHEN EXISTS (
           SELECT FROM glam.token_access_log log
           WHERE log.merchant_id = row.merchant_id AND log.platform = row.platform
             AND log.action = 'delete' AND log.success AND log.at >= row.updated_at
         ) THEN 'superseded'
         ELSE 'new'
       END
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::timestamptz[])
     WITH ORDINALITY AS row (token_id, merchant_id, platform, updated_at, number)
LEFT JOIN glam.platform_tokens same ON same.token_id = row.token_id
LEFT JOIN glam.platform_tokens other
       ON other.merchant_id = row.merchant_id AND other.platform = row.platform
ORDER BY row.number
"""

_ADD: Final = """
INSERT INTO glam.platform_tokens
       (token_id, merchant_id, platform, platform_shop_id, domain, token_type, scopes,
        ciphertext, key_version, expires_at, refreshable, created_at, updated_at,
        last_accessed_by, last_accessed_at, access_count)
SELECT token_id, merchant_id, platform, platform_shop_id, domain, token_type,
       ARRAY(SELECT scope FROM jsonb_array_elements_text(scopes::jsonb)
             WITH ORDINALITY AS listed (scope, number) ORDER BY number),
       ciphertext, key_version, expires_at, refreshable, created_at, updated_at,
       last_accessed_by, last_accessed_at, access_count
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
            $8::bytea[], $9::text[], $10::timestamptz[], $11::boolean[], $12::timestamptz[],
            $13::timestamptz[], $14::text[], $15::timestamptz[], $16::bigint[])
     AS row (token_id, merchant_id, platform, platform_shop_id, domain, token_type, scopes,
             ciphertext, key_version, expires_at, refreshable, created_at, updated_at,
             last_accessed_by, last_accessed_at, access_count)
ON CONFLICT DO NOTHING
RETURNING token_id
"""

_LOG: Final = """
INSERT INTO glam.token_access_log
       (at, merchant_id, platform, token_id, action, actor_kind, actor, success, error,
        request_id, correlation_id, ip)
SELECT $1, merchant_id, platform, token_id, 'import', $6, $7, error IS NULL, error, $8, $9, $10
FROM unnest($2::uuid[], $3::text[], $4::uuid[], $5::text[])
     AS row (merchant_id, platform, token_id, error)
"""

Standing = Literal["new", "already", "superseded", "id-taken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """How far an import has come: the id of the last row, "" before the first, and counts."""

    position: str
    counts: dict[str, int]
    started_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class SealedToken:
    """An older token with its secret under a key of ours."""

    older: OlderToken
    ciphertext: bytes
    key_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """What the access log says about one row; `error` is a code, None where all went well."""

    merchant_id: UUID
    platform: Platform | None
    token_id: UUID | None
    error: str | None


async def progress(database: Database | Connection, name: str) -> ProgressRow | None:
    """How far the import has come, None where there was none yet."""
    row = await database.fetchrow(_PROGRESS, name)
    return None if row is None else ProgressRow(**dict(row))


async def lock_progress(connection: Connection, name: str, *, at: datetime) -> ProgressRow:
    """The same, made where there was none, and nobody else's until the transaction ends."""
    await connection.execute(_BEGIN, name, at)
    row = await connection.fetchrow(_LOCKED_PROGRESS, name)
    assert row is not None
    return ProgressRow(**dict(row))


async def set_progress(connection: Connection, name: str, progress: ProgressRow) -> None:
    """Write it; the row is locked."""
    await connection.execute(
        _SET_PROGRESS,
        name,
        progress.position,
        progress.counts,
        progress.started_at,
        progress.updated_at,
    )


async def standings(connection: Connection, tokens: Sequence[OlderToken]) -> list[Standing]:
    """How each of these stands to what is kept here, in their order."""
    rows = await connection.fetch(
        _STANDINGS,
        [older.token_id for older in tokens],
        [older.token.merchant_id for older in tokens],
        [older.token.platform for older in tokens],
        [finite(older.updated_at) for older in tokens],
    )
    return [row[0] for row in rows]


async def add(connection: Connection, tokens: Sequence[SealedToken]) -> frozenset[UUID]:
    """Insert these; the ids of those that were, since somebody may have come in between."""
    olders = [sealed.older for sealed in tokens]
    rows = await connection.fetch(
        _ADD,
        [older.token_id for older in olders],
        [older.token.merchant_id for older in olders],
        [older.token.platform for older in olders],
        [older.token.platform_shop_id for older in olders],
        [older.token.domain for older in olders],
        [older.token.token_type for older in olders],
        # An array of arrays would have to be a rectangle.
        [orjson.dumps(older.token.scopes).decode() for older in olders],
        [sealed.ciphertext for sealed in tokens],
        [sealed.key_version for sealed in tokens],
        [finite(older.token.expires_at) for older in olders],
        [older.token.refreshable for older in olders],
        [finite(older.created_at) for older in olders],
        [finite(older.updated_at) for older in olders],
        [older.last_accessed_by for older in olders],
        [finite(older.last_accessed_at) for older in olders],
        [older.access_count for older in olders],
    )
    return frozenset(row["token_id"] for row in rows)


async def log_imports(
    connection: Connection, entries: Sequence[LogEntry], *, at: datetime, accessor: Accessor
) -> None:
    """Write a row of the access log for each of these."""
    await connection.execute(
        _LOG,
        at,
        [entry.merchant_id for entry in entries],
        [entry.platform for entry in entries],
        [entry.token_id for entry in entries],
        [entry.error for entry in entries],
        accessor.kind,
        accessor.name,
        accessor.request_id,
        accessor.correlation_id,
        accessor.ip,
    )
