"""The rows whose keys are wrapped: data keys of both schemas, and base derivation keys.

SQL in, rows out. A row is changed only while it still holds what was read from it, so that neither
two rewraps nor a rewrap and a destruction get into each other's way.
"""

from dataclasses import dataclass, field
from typing import Final

from glamd.db import Connection, Database
from glamd.keys import store as key_store
from glamd.keys.providers.interface import KeptBdk
from glamd.keys.store import Schema

ROWS_LIMIT: Final = 10_000
"""Key sets read at once; far more than anybody has."""

_REWRAP: Final = key_store.both("""
UPDATE {schema}.encryption_keys SET wrapped_key = $4, provider = $5
WHERE keyring = $1 AND version = $2 AND wrapped_key = $3
""")
_BDKS: Final = """
SELECT key_set, scheme, wrapped_bdk, hsm_label, provider, kcv
FROM cde.key_sets ORDER BY key_set LIMIT $1
"""
_REWRAP_BDK: Final = """
UPDATE cde.key_sets SET wrapped_bdk = $3, hsm_label = $4, provider = $5
WHERE key_set = $1 AND wrapped_bdk = $2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A version of a data key that is not destroyed."""

    schema: Schema
    keyring: str
    version: str
    wrapped: bytes = field(repr=False)
    provider: str
    kcv: str

    @property
    def name(self) -> str:
        """What it was wrapped under, and is audited as."""
        return f"{self.keyring}:{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBdk:
    """A base derivation key as its provider keeps it."""

    key_set: str
    scheme: str
    kept: KeptBdk
    provider: str
    kcv: str

    @property
    def name(self) -> str:
        """What it was wrapped under, and is audited as."""
        return f"bdk:{self.key_set}"


async def data_keys(database: Database, schema: Schema) -> tuple[WrappedKey, ...]:
    """Every version of every keyring of a schema that is not destroyed."""
    return tuple(
        WrappedKey(
            schema=schema,
            keyring=one.keyring,
            version=one.version,
            wrapped=one.wrapped_key,
            provider=one.provider,
            kcv=one.kcv,
        )
        for one in await key_store.keys(database, schema)
        if one.wrapped_key is not None
    )


async def bdks(database: Database) -> tuple[HeldBdk, ...]:
    """The base derivation key of every key set, retired ones too."""
    rows = await database.fetch(_BDKS, ROWS_LIMIT)
    return tuple(
        HeldBdk(
            key_set=row["key_set"],
            scheme=row["scheme"],
            kept=KeptBdk(wrapped=row["wrapped_bdk"], hsm_label=row["hsm_label"]),
            provider=row["provider"],
            kcv=row["kcv"],
        )
        for row in rows
    )


async def rewrap(connection: Connection, key: WrappedKey, wrapped: bytes, provider: str) -> bool:
    """Replace what a data key is wrapped as; False where the row is not as it was read."""
    tag = await connection.execute(
        _REWRAP[key.schema], key.keyring, key.version, key.wrapped, wrapped, provider
    )
    return tag == "UPDATE 1"


async def rewrap_bdk(connection: Connection, key: HeldBdk, kept: KeptBdk, provider: str) -> bool:
    """Replace how a wrapped BDK is kept; False where the row is not as it was read."""
    tag = await connection.execute(
        _REWRAP_BDK, key.key_set, key.kept.wrapped, kept.wrapped, kept.hsm_label, provider
    )
    return tag == "UPDATE 1"
