"""The rows of data keys: `encryption_keys` of either schema. SQL in, rows out.

What is wrapped stays wrapped in here; opening it is for `keyrings`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, cast

from glamd.db import Database

KeyStatus = Literal["active", "decrypt-only", "retired", "destroyed"]
Schema = Literal["cde", "glam"]
"""Whose data keys: those of card data, or those of the rest, perhaps on another server."""

KEYS_LIMIT: Final = 10_000
"""Key versions read at once; far more than anybody has."""

_KEYS_OF: Final = """
SELECT keyring, version, wrapped_key, provider, kcv, status,
       created_at, activated_at, retired_at, destroyed_at
FROM {schema}.encryption_keys
WHERE $1::text IS NULL OR keyring = $1
ORDER BY keyring, created_at, version
LIMIT $2
"""
_KEYS: Final[dict[Schema, str]] = {
    "cde": _KEYS_OF.format(schema="cde"),
    "glam": _KEYS_OF.format(schema="glam"),
}

_ADD_FIRST_KEY_TO: Final = """
INSERT INTO {schema}.encryption_keys
    (keyring, version, wrapped_key, provider, kcv, status, created_at, activated_at)
VALUES ($1, $2, $3, $4, $5, 'active', $6, $6)
ON CONFLICT DO NOTHING
"""
_ADD_FIRST_KEY: Final[dict[Schema, str]] = {
    "cde": _ADD_FIRST_KEY_TO.format(schema="cde"),
    "glam": _ADD_FIRST_KEY_TO.format(schema="glam"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyVersion:
    """One version of a data key; `wrapped_key` is None once it is destroyed."""

    keyring: str
    version: str
    wrapped_key: bytes | None = field(repr=False)
    provider: str
    kcv: str
    status: KeyStatus
    created_at: datetime
    activated_at: datetime | None
    retired_at: datetime | None
    destroyed_at: datetime | None


async def keys(
    database: Database, schema: Schema, keyring: str | None = None
) -> tuple[KeyVersion, ...]:
    """All versions of a keyring, or of all keyrings of the schema, oldest first."""
    rows = await database.fetch(_KEYS[schema], keyring, KEYS_LIMIT)
    return tuple(
        KeyVersion(
            keyring=row["keyring"],
            version=row["version"],
            wrapped_key=row["wrapped_key"],
            provider=row["provider"],
            kcv=row["kcv"],
            status=cast("KeyStatus", row["status"]),
            created_at=row["created_at"],
            activated_at=row["activated_at"],
            retired_at=row["retired_at"],
            destroyed_at=row["destroyed_at"],
        )
        for row in rows
    )


async def add_first_key(
    database: Database,
    schema: Schema,
    *,
    keyring: str,
    version: str,
    wrapped_key: bytes,
    provider: str,
    kcv: str,
    at: datetime,
) -> None:
    """Make the first version of a keyring, unless another node has: one is active at a time."""
    await database.execute(_ADD_FIRST_KEY[schema], keyring, version, wrapped_key, provider, kcv, at)
