"""The rows of key sets (`cde.key_sets`): a base derivation key each. SQL in, rows out.

What is wrapped stays wrapped in here; deriving from it is for `service` and the key providers.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, NamedTuple, cast

from glamd.crypto.dukpt import Profile
from glamd.db import Connection, Database, Row
from glamd.keys.providers.interface import KeptBdk

KeySetStatus = Literal["active", "retired"]

KEY_SETS_LIMIT: Final = 10_000
"""Key sets read at once; far more than anybody has."""

_KEY_SET_COLUMNS: Final = """
SELECT key_set, scheme, data_usage, key_type, padding, mac, counter_window,
       reader, wrapped_bdk, hsm_label, provider, kcv, status, created_at, retired_at
FROM cde.key_sets
"""
_KEY_SET: Final = _KEY_SET_COLUMNS + "WHERE key_set = $1"
_KEY_SETS: Final = _KEY_SET_COLUMNS + "ORDER BY key_set LIMIT $1"
_DEVICES: Final = """
SELECT key_set, count(*) AS devices FROM cde.devices WHERE status <> 'revoked' GROUP BY key_set
"""
# What this does to devices is found by their gateways, which follow `retired_at`.
_RETIRE: Final = """
UPDATE cde.key_sets SET status = 'retired', retired_at = clock_timestamp()
WHERE key_set = $1 AND status = 'active'
"""

_ADD_KEY_SET: Final = """
INSERT INTO cde.key_sets
    (key_set, scheme, data_usage, key_type, padding, mac, counter_window,
     reader, wrapped_bdk, hsm_label, provider, kcv, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
ON CONFLICT (key_set) DO NOTHING
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySet:
    """A base derivation key by its id: how its devices encrypt, never the key in the clear.

    `reader` names what its readers put around the ciphertext; `hsm_label` the object that the key
    is inside an HSM.
    """

    key_set: str
    profile: Profile
    reader: str
    counter_window: int
    kcv: str
    provider: str
    hsm_label: str | None
    status: KeySetStatus
    created_at: datetime
    retired_at: datetime | None


class ListedKeySet(NamedTuple):
    """A key set, and how many devices that are not revoked have a key of it."""

    key_set: KeySet
    devices: int


@dataclass(frozen=True, slots=True)
class StoredKeySet:
    """A key set with its key as its provider keeps it."""

    key_set: KeySet
    bdk: KeptBdk = field(repr=False)


async def key_set(database: Database, name: str) -> StoredKeySet | None:
    """A key set, or None."""
    row = await database.fetchrow(_KEY_SET, name)
    return None if row is None else _key_set(row)


async def key_sets(database: Database) -> tuple[ListedKeySet, ...]:
    """All key sets by name, with the number of their devices."""
    rows = await database.fetch(_KEY_SETS, KEY_SETS_LIMIT)
    devices = {row["key_set"]: row["devices"] for row in await database.fetch(_DEVICES)}
    found = (_key_set(row).key_set for row in rows)
    return tuple(ListedKeySet(one, devices.get(one.key_set, 0)) for one in found)


async def add_key_set(connection: Connection, made: KeySet, bdk: KeptBdk) -> bool:
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
        made.reader,
        bdk.wrapped,
        bdk.hsm_label,
        made.provider,
        made.kcv,
        made.created_at,
    )
    return tag == "INSERT 0 1"


async def retire_key_set(connection: Connection, name: str) -> None:
    """Retire a key set for good; one that is not active stays as it is."""
    await connection.execute(_RETIRE, name)


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
            reader=row["reader"],
            provider=row["provider"],
            hsm_label=row["hsm_label"],
            status=cast("KeySetStatus", row["status"]),
            created_at=row["created_at"],
            retired_at=row["retired_at"],
        ),
        KeptBdk(wrapped=row["wrapped_bdk"], hsm_label=row["hsm_label"]),
    )
