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
INSERT INTO glam.imports (name, source, position, counts, started_at, updated_at)
VALUES ($1, '', '', '{}', $2, $2)
ON CONFLICT (name) DO NOTHING
"""

_PROGRESS: Final = """
SELECT source, position, counts, started_at, updated_at FROM glam.imports WHERE name = $1
"""
_LOCKED_PROGRESS: Final = _PROGRESS + " FOR UPDATE"

_SET_PROGRESS: Final = """
UPDATE glam.imports
SET source = $2, position = $3, counts = $4, started_at = $5, updated_at = $6
WHERE name = $1
"""

# In the order in which readers lock. What is stored or renewed meanwhile waits.
_LOCK: Final = """
SELECT 1 FROM glam.platform_tokens
JOIN unnest($1::uuid[], $2::text[]) AS row (merchant_id, platform) USING (merchant_id, platform)
ORDER BY merchant_id, platform
FOR UPDATE OF platform_tokens
"""

# A token that was deleted here after the older service last wrote it must not come back. One whose
# secret came from the older service, and is still that one, follows what was written there since.
_STANDINGS: Final = """
SELECT CASE
         WHEN same.merchant_id <> row.merchant_id OR same.platform <> row.platform THEN 'id-taken'
         WHEN kept.older_updated_at < row.updated_at THEN 'changed'
         WHEN same.older_updated_at IS NOT NULL THEN 'already'
         WHEN kept.token_id IS NOT NULL THEN 'superseded'
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
LEFT JOIN glam.platform_tokens kept
       ON kept.merchant_id = row.merchant_id AND kept.platform = row.platform
ORDER BY row.number
"""

_ROWS: Final = """
WITH row AS MATERIALIZED (
    SELECT token_id, merchant_id, platform, platform_shop_id, domain, token_type,
           ARRAY(SELECT scope FROM jsonb_array_elements_text(listed::jsonb)
                 WITH ORDINALITY AS one (scope, number) ORDER BY number) AS scopes,
           ciphertext, key_version, expires_at, refreshable,
           CASE WHEN refreshable THEN $17::timestamptz END AS refresh_not_before,
           created_at, updated_at, last_accessed_by, last_accessed_at, access_count
    FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
                $7::text[], $8::bytea[], $9::text[], $10::timestamptz[], $11::boolean[],
                $12::timestamptz[], $13::timestamptz[], $14::text[], $15::timestamptz[],
                $16::bigint[])
         AS given (token_id, merchant_id, platform, platform_shop_id, domain, token_type, listed,
                   ciphertext, key_version, expires_at, refreshable, created_at, updated_at,
                   last_accessed_by, last_accessed_at, access_count)
)
"""

_ADD: Final = f"""
{_ROWS}
INSERT INTO glam.platform_tokens
       (token_id, merchant_id, platform, platform_shop_id, domain, token_type, scopes,
        ciphertext, key_version, expires_at, refreshable, refresh_not_before, created_at,
        updated_at, last_accessed_by, last_accessed_at, access_count, older_updated_at)
SELECT row.*, row.updated_at FROM row
ON CONFLICT DO NOTHING
RETURNING token_id
"""  # noqa: S608 - our own constant

# The generation moves on, as at every replacement of a secret; what was counted stays.
_CHANGE: Final = f"""
{_ROWS}
UPDATE glam.platform_tokens kept
SET token_id = row.token_id, platform_shop_id = row.platform_shop_id, domain = row.domain,
    token_type = row.token_type, scopes = row.scopes, ciphertext = row.ciphertext,
    key_version = row.key_version, expires_at = row.expires_at, refreshable = row.refreshable,
    generation = kept.generation + 1, refresh_claim = NULL, refresh_claim_until = NULL,
    refresh_failures = 0, refresh_error = NULL, refresh_not_before = row.refresh_not_before,
    refreshed_at = NULL, created_at = row.created_at, updated_at = row.updated_at,
    older_updated_at = row.updated_at
FROM row
WHERE kept.merchant_id = row.merchant_id AND kept.platform = row.platform
RETURNING kept.token_id
"""  # noqa: S608 - our own constant

# A pause after a failure stays: it is about something else.
_HOLD: Final = """
UPDATE glam.platform_tokens SET refresh_not_before = $2
WHERE token_id = ANY ($1) AND older_updated_at IS NOT NULL AND refreshable
  AND refresh_failures = 0 AND refresh_not_before IS DISTINCT FROM $2
"""

_LOG: Final = """
INSERT INTO glam.token_access_log
       (at, merchant_id, platform, token_id, action, actor_kind, actor, success, error,
        request_id, correlation_id, ip)
SELECT $1, merchant_id, platform, token_id, 'import', $6, $7, error IS NULL, error, $8, $9, $10
FROM unnest($2::uuid[], $3::text[], $4::uuid[], $5::text[])
     AS row (merchant_id, platform, token_id, error)
"""

Standing = Literal["new", "changed", "already", "superseded", "id-taken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """How far an import has come: the id of the last row, "" before the first, and counts.

    `source` is a fingerprint of what the rows come from, "" where nobody said.
    """

    source: str
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
        progress.source,
        progress.position,
        progress.counts,
        progress.started_at,
        progress.updated_at,
    )


async def lock(connection: Connection, tokens: Sequence[OlderToken]) -> None:
    """Let nobody else change what is kept here for these until the transaction ends."""
    await connection.fetch(
        _LOCK,
        [older.token.merchant_id for older in tokens],
        [older.token.platform for older in tokens],
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


async def add(
    connection: Connection, tokens: Sequence[SealedToken], *, not_before: datetime | None
) -> frozenset[UUID]:
    """Insert these, none to be renewed before then; the ids of those that were.

    Somebody may have come in between, for what is not there cannot be locked.
    """
    return await _write(connection, _ADD, tokens, not_before)


async def change(
    connection: Connection, tokens: Sequence[SealedToken], *, not_before: datetime | None
) -> frozenset[UUID]:
    """Put these, which are locked, in place of what an import brought before; as `add`."""
    return await _write(connection, _CHANGE, tokens, not_before)


async def hold(connection: Connection, ids: Sequence[UUID], *, not_before: datetime | None) -> None:
    """Have none of these renewed before then, as far as they are as an import brought them."""
    await connection.execute(_HOLD, ids, not_before)


async def _write(
    connection: Connection,
    sql: str,
    tokens: Sequence[SealedToken],
    not_before: datetime | None,
) -> frozenset[UUID]:
    olders = [sealed.older for sealed in tokens]
    rows = await connection.fetch(
        sql,
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
        not_before,
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
