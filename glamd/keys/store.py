"""The rows of data keys: `encryption_keys` and `reencryptions` of either schema. SQL in, rows out.

What is wrapped stays wrapped in here; opening it is for `keyrings`. Which step is allowed when is
for `lifecycle`, and the rows that the keys have sealed are in the stores of those who own them.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, cast, get_args

from glamd.db import Connection, Database, Row

KeyStatus = Literal["active", "decrypt-only", "retired", "destroyed"]
EndStatus = Literal["retired", "destroyed"]
STATUSES: Final[tuple[KeyStatus, ...]] = get_args(KeyStatus)
Schema = Literal["cde", "glam"]
"""Whose data keys: those of card data, or those of the rest, perhaps on another server."""

KEYS_LIMIT: Final = 10_000
"""Key versions read at once; far more than anybody has."""


def both(sql: str) -> dict[Schema, str]:
    """A statement for either schema."""
    return {"cde": sql.format(schema="cde"), "glam": sql.format(schema="glam")}


_COLUMNS: Final = (
    "keyring, version, wrapped_key, provider, kcv, status,"
    " created_at, activated_at, retired_at, destroyed_at"
)
_KEYS: Final = both(f"""
SELECT {_COLUMNS} FROM {{schema}}.encryption_keys
WHERE $1::text IS NULL OR keyring = $1
ORDER BY keyring, created_at, version
LIMIT $2
""")  # noqa: S608 - our own constants
# Not FOR UPDATE: what is being sealed meanwhile has the row of its key under FOR KEY SHARE, and a
# rotation must not wait for it nor hold it up.
_LOCK_KEYRING: Final = both(f"""
SELECT {_COLUMNS} FROM {{schema}}.encryption_keys WHERE keyring = $1
ORDER BY created_at, version FOR NO KEY UPDATE
""")  # noqa: S608 - our own constants
_LOCK_VERSION: Final = both(f"""
SELECT {_COLUMNS} FROM {{schema}}.encryption_keys WHERE keyring = $1 AND version = $2
FOR UPDATE
""")  # noqa: S608 - our own constants
_ADD_KEY: Final = both(f"""
INSERT INTO {{schema}}.encryption_keys
    (keyring, version, wrapped_key, provider, kcv, status, created_at, activated_at)
VALUES ($1, $2, $3, $4, $5, 'active', $6, $7)
RETURNING {_COLUMNS}
""")  # noqa: S608 - our own constants
_ADD_FIRST_KEY: Final = both("""
INSERT INTO {schema}.encryption_keys
    (keyring, version, wrapped_key, provider, kcv, status, created_at, activated_at)
VALUES ($1, $2, $3, $4, $5, 'active', $6, $6)
ON CONFLICT DO NOTHING
""")
_DEMOTE: Final = both("""
UPDATE {schema}.encryption_keys SET status = 'decrypt-only'
WHERE keyring = $1 AND status = 'active'
""")
_END: Final[dict[EndStatus, dict[Schema, str]]] = {
    "retired": both("""
UPDATE {schema}.encryption_keys SET status = 'retired', retired_at = $3
WHERE keyring = $1 AND version = $2
"""),
    "destroyed": both("""
UPDATE {schema}.encryption_keys
SET status = 'destroyed', destroyed_at = $3, wrapped_key = NULL
WHERE keyring = $1 AND version = $2
"""),
}

_LENGTHEN: Final = "SELECT set_config('statement_timeout', $1, true)"

_PROGRESS_COLUMNS: Final = (
    "target, position, pass AS pass_number, remaining, done, damaged, busy_s, started_at,"
    " finished_at, owner"
)
_BEGIN: Final = both("""
INSERT INTO {schema}.reencryptions AS r (keyring, target, started_at, updated_at)
VALUES ($1, $2, now(), now())
ON CONFLICT (keyring) DO UPDATE
SET target = excluded.target, position = '', pass = 0, remaining = NULL, done = 0, damaged = 0,
    busy_s = 0, started_at = now(), updated_at = now(), finished_at = NULL
WHERE r.target <> excluded.target OR r.finished_at IS NOT NULL
""")
# The lock makes it wait for a rotation that is about to commit, and it then finds no row: what that
# rotation has begun is left alone.
_ACTIVE: Final = both("""
SELECT version FROM {schema}.encryption_keys WHERE keyring = $1 AND status = 'active' FOR SHARE
""")
_PROGRESS: Final = both(f"""
SELECT {_PROGRESS_COLUMNS} FROM {{schema}}.reencryptions WHERE keyring = $1
""")  # noqa: S608 - our own constants
_LEASE: Final = both(f"""
UPDATE {{schema}}.reencryptions SET owner = $2, owner_until = now() + $3::interval
WHERE keyring = $1 AND finished_at IS NULL
  AND (owner IS NULL OR owner = $2 OR owner_until < now())
RETURNING {_PROGRESS_COLUMNS}, now() - started_at >= $4::interval AS is_settled
""")  # noqa: S608 - our own constants
# Whoever's lease has ended, or whose target is not the newest version any more, changes nothing.
_KEEP: Final = both("""
UPDATE {schema}.reencryptions
SET position = $4, pass = $5, remaining = $6, done = done + $7, damaged = $8,
    busy_s = busy_s + $9, updated_at = now(), owner_until = now() + $10::interval,
    finished_at = CASE WHEN $11::boolean THEN now() END
WHERE keyring = $1 AND owner = $2 AND target = $3 AND finished_at IS NULL
RETURNING true
""")
_RELEASE: Final = both("""
UPDATE {schema}.reencryptions SET owner = NULL, owner_until = NULL
WHERE keyring = $1 AND owner = $2
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A version that is wrapped and in no table yet."""

    keyring: str
    version: str
    wrapped_key: bytes = field(repr=False)
    provider: str
    kcv: str


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
class Progress:
    """How far the rows of a keyring have come on their way to `target`.

    `remaining` is None until they are counted; `done` and `busy_s` (seconds of walking, rests
    included) are since the rotation; `damaged` rows do not open and are left as they are.
    """

    target: str
    position: str
    pass_number: int
    remaining: int | None
    done: int
    damaged: int
    busy_s: float
    started_at: datetime
    finished_at: datetime | None
    owner: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a worker has to say of its progress since it last did."""

    position: str
    pass_number: int
    remaining: int | None
    newly_done: int
    damaged: int
    newly_busy_s: float
    is_finished: bool = False


async def keys(
    database: Database, schema: Schema, keyring: str | None = None
) -> tuple[KeyVersion, ...]:
    """All versions of a keyring, or of all keyrings of the schema, oldest first."""
    return tuple(map(_version, await database.fetch(_KEYS[schema], keyring, KEYS_LIMIT)))


async def lock_keyring(
    connection: Connection, schema: Schema, keyring: str
) -> tuple[KeyVersion, ...]:
    """Its versions, which nobody else rotates, retires or destroys until this transaction ends."""
    return tuple(map(_version, await connection.fetch(_LOCK_KEYRING[schema], keyring)))


async def lock_version(
    connection: Connection, schema: Schema, keyring: str, version: str
) -> KeyVersion | None:
    """One version, which nobody seals a row with until this transaction ends."""
    row = await connection.fetchrow(_LOCK_VERSION[schema], keyring, version)
    return None if row is None else _version(row)


async def add_first_key(
    connection: Connection, schema: Schema, key: NewKey, *, at: datetime
) -> bool:
    """Make a keyring's first version; False where another node has: one is active at a time."""
    tag = await connection.execute(_ADD_FIRST_KEY[schema], *_values(key), at)
    return tag == "INSERT 0 1"


async def replace_active(
    connection: Connection, schema: Schema, key: NewKey, *, at: datetime, after: datetime
) -> KeyVersion:
    """Make this version the active one, and the one before it decrypt-only; as it is then.

    `after` is when the newest one before it was made, by whatever clock: versions have the order
    of their times, so that this one's is later.
    """
    created_at = max(at, after + timedelta(microseconds=1))
    await connection.execute(_DEMOTE[schema], key.keyring)
    row = await connection.fetchrow(_ADD_KEY[schema], *_values(key), created_at, at)
    assert row is not None, "what is inserted is returned"
    return _version(row)


async def end(
    connection: Connection,
    schema: Schema,
    keyring: str,
    version: str,
    status: EndStatus,
    *,
    at: datetime,
) -> None:
    """Retired: no row may be sealed with it any more. Destroyed: its wrapped key is erased."""
    await connection.execute(_END[status][schema], keyring, version, at)


async def lengthen(connection: Connection, timeout_s: int) -> None:
    """Let this transaction's statements run for so long."""
    await connection.execute(_LENGTHEN, f"{timeout_s}s")


async def begin_reencryption(
    connection: Connection, schema: Schema, keyring: str, target: str
) -> None:
    """Have all rows sealed with `target`; one that is under way to it is left alone."""
    await connection.execute(_BEGIN[schema], keyring, target)


async def resume_reencryption(connection: Connection, schema: Schema, keyring: str) -> None:
    """Have all rows sealed with the active version, unless a rotation just sees to that."""
    active = await connection.fetchval(_ACTIVE[schema], keyring)
    if active is not None:
        await begin_reencryption(connection, schema, keyring, active)


async def progress(database: Database, schema: Schema, keyring: str) -> Progress | None:
    """How far the keyring's rows have come; None where there was never a rotation."""
    row = await database.fetchrow(_PROGRESS[schema], keyring)
    return None if row is None else _progress(row)


async def lease(
    database: Database,
    schema: Schema,
    keyring: str,
    *,
    owner: str,
    for_s: float,
    settled_after_s: float,
) -> tuple[Progress, bool] | None:
    """Become the one that works on it, and whether all nodes must know of the rotation by now.

    None where there is nothing to do or somebody else does it.
    """
    row = await database.fetchrow(
        _LEASE[schema],
        keyring,
        owner,
        timedelta(seconds=for_s),
        timedelta(seconds=settled_after_s),
    )
    return None if row is None else (_progress(row), row["is_settled"])


async def keep_step(
    database: Database,
    schema: Schema,
    keyring: str,
    step: Step,
    *,
    owner: str,
    target: str,
    for_s: float,
) -> bool:
    """Keep how far it has come, and the lease; False where it is another's or the target's gone."""
    kept = await database.fetchval(
        _KEEP[schema],
        keyring,
        owner,
        target,
        step.position,
        step.pass_number,
        step.remaining,
        step.newly_done,
        step.damaged,
        step.newly_busy_s,
        timedelta(seconds=for_s),
        step.is_finished,
    )
    return kept is not None


async def release(database: Database, schema: Schema, keyring: str, *, owner: str) -> None:
    """Leave it to whoever comes next."""
    await database.execute(_RELEASE[schema], keyring, owner)


def _values(key: NewKey) -> tuple[object, ...]:
    return key.keyring, key.version, key.wrapped_key, key.provider, key.kcv


def _version(row: Row) -> KeyVersion:
    return KeyVersion(
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


def _progress(row: Row) -> Progress:
    return Progress(
        target=row["target"],
        position=row["position"],
        pass_number=row["pass_number"],
        remaining=row["remaining"],
        done=row["done"],
        damaged=row["damaged"],
        busy_s=row["busy_s"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        owner=row["owner"],
    )
