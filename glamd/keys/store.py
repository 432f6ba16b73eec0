"""The rows of keys: `encryption_keys` of either schema and `cde.key_sets`. SQL in, rows out.

What is wrapped stays wrapped in here; opening it is for `keyrings` and `service`.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, cast

from glamd.crypto.dukpt import Profile
from glamd.db import Connection, Database, Row

KeyStatus = Literal["active", "decrypt-only", "retired", "destroyed"]
KeySetStatus = Literal["active", "retired"]
Schema = Literal["cde", "glam"]
"""Whose data keys: those of card data, or those of the rest, perhaps on another server."""

KEYS_LIMIT: Final = 10_000
"""Key versions and key sets read at once; far more than anybody has."""

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

_KEY_SET_COLUMNS: Final = """
SELECT key_set, scheme, data_usage, key_type, padding, mac, counter_window,
       wrapped_bdk, provider, kcv, status, created_at
FROM cde.key_sets
"""
_KEY_SET: Final = _KEY_SET_COLUMNS + "WHERE key_set = $1"
_KEY_SETS: Final = _KEY_SET_COLUMNS + "ORDER BY key_set LIMIT $1"

_ADD_KEY_SET: Final = """
INSERT INTO cde.key_sets
    (key_set, scheme, data_usage, key_type, padding, mac, counter_window,
     wrapped_bdk, provider, kcv, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
ON CONFLICT (key_set) DO NOTHING
"""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySet:
    """A base derivation key by its id: how its devices encrypt, never the key in the clear."""

    key_set: str
    profile: Profile
    counter_window: int
    kcv: str
    provider: str
    status: KeySetStatus
    created_at: datetime


@dataclass(frozen=True, slots=True)
class StoredKeySet:
    """A key set with its wrapped key."""

    key_set: KeySet
    wrapped_bdk: bytes = field(repr=False)


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


async def key_set(database: Database, name: str) -> StoredKeySet | None:
    """A key set, or None."""
    row = await database.fetchrow(_KEY_SET, name)
    return None if row is None else _key_set(row)


async def key_sets(database: Database) -> tuple[KeySet, ...]:
    """All key sets by name."""
    rows = await database.fetch(_KEY_SETS, KEYS_LIMIT)
    return tuple(_key_set(row).key_set for row in rows)


async def add_key_set(connection: Connection, made: KeySet, wrapped_bdk: bytes) -> bool:
    """Insert a key set; False when there is one of this name."""
    profile = made.profile
    tag = await connection.execute(
        _ADD_KEY_SET,
        made.key_set,
        profile.scheme,
        profile.data_usage,
        profile.key_type,
        profile.padding,
        profile.mac,
        made.counter_window,
        wrapped_bdk,
        made.provider,
        made.kcv,
        made.created_at,
    )
    return tag == "INSERT 0 1"


def _key_set(row: Row) -> StoredKeySet:
    return StoredKeySet(
        KeySet(
            key_set=row["key_set"],
            profile=Profile(
                scheme=row["scheme"],
                data_usage=row["data_usage"],
                key_type=row["key_type"],
                padding=row["padding"],
                mac=row["mac"],
            ),
            counter_window=row["counter_window"],
            kcv=row["kcv"],
            provider=row["provider"],
            status=cast("KeySetStatus", row["status"]),
            created_at=row["created_at"],
        ),
        row["wrapped_bdk"],
    )
