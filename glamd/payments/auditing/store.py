"""The SQL of the audit log: the writer's statements, months, pages, heads, rights. Rows come out.

The writer runs its statements itself, on a connection whose transaction it holds. No MAC is made or
checked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final, Literal, cast

from glamd.db import Connection, Database, Row
from glamd.payments.audit_chain import Head
from glamd.payments.audit_walk import StoredHead, StoredRow

MONTHS_LIMIT: Final = 2400
"""Months read at once: two hundred years."""

SINCE_2000_US: Final = 946_684_800_000_000
"""From 1970, where we count from, to 2000, where PostgreSQL does."""

NO_TIME_US: Final = 0
"""Stands in for a time that 64 bits since 1970 do not hold, such as infinity: no row has it."""

Dropped = Literal["dropped", "too-young", "not-there", "not-the-oldest", "the-newest"]

ADVISORY_LOCK: Final = "SELECT pg_advisory_xact_lock(7262617564697401)"
"""Taken by whoever makes or drops a month (the database's functions do) or reads the head in order
to go on from it."""

LOCK_HEAD: Final = """
SELECT seq FROM cde.audit_heads ORDER BY month DESC LIMIT 1 FOR UPDATE
"""
END: Final = """
SELECT n.month, h.seq, h.mac, h.key_version, coalesce(l.seq, 0) AS last_seq, l.mac AS last_mac,
       (SELECT mac FROM cde.decrypt_audit_log WHERE month = $1 AND seq = $2) AS known_mac
FROM (SELECT greatest($1::date, (SELECT max(month) FROM cde.audit_heads),
                      (SELECT max(month) FROM cde.decrypt_audit_log)) AS month) n
LEFT JOIN cde.audit_heads h ON h.month = n.month
LEFT JOIN LATERAL (
    SELECT seq, mac FROM cde.decrypt_audit_log WHERE month = n.month ORDER BY seq DESC LIMIT 1
) l ON true
WHERE n.month IS NOT NULL
"""
"""Where the chain ends: the newest month that has a head or rows, or that this node has seen."""

SIGN_HEAD: Final = """
INSERT INTO cde.audit_heads (month, seq, mac, key_version, updated_at)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (month) DO UPDATE
SET seq = excluded.seq, mac = excluded.mac, key_version = excluded.key_version,
    updated_at = excluded.updated_at
"""
APPEND: Final = """
WITH head AS (
    UPDATE cde.audit_heads SET seq = $4, mac = $5, updated_at = $6, key_version = $19
    WHERE month = $1 AND seq = $2 AND mac = $3
    RETURNING month
)
INSERT INTO cde.decrypt_audit_log
    (month, seq, at, action, actor, certificate_sha256, ip, subject, fields, purpose, outcome,
     correlation_id, mac, key_version)
SELECT head.month, r.seq, r.at, r.action, r.actor, r.certificate_sha256, r.ip, r.subject,
       ARRAY(SELECT f.name
             FROM jsonb_array_elements_text(r.fields::jsonb) WITH ORDINALITY AS f (name, n)
             ORDER BY f.n),
       r.purpose, r.outcome, r.correlation_id, r.mac, $19
FROM head, unnest(
    $7::bigint[], $8::timestamptz[], $9::text[], $10::text[], $11::text[], $12::text[],
    $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::bytea[]
) AS r (seq, at, action, actor, certificate_sha256, ip, subject, fields, purpose, outcome,
        correlation_id, mac)
"""

_MAKE_PARTITION: Final = "SELECT cde.make_audit_partition($1)"
_DROP_PARTITION: Final = "SELECT cde.drop_audit_partition($1)"
_MONTHS: Final = """
WITH RECURSIVE walked (month) AS (
    (SELECT min(l.month) FROM cde.decrypt_audit_log l)
    UNION ALL
    SELECT (SELECT min(l.month) FROM cde.decrypt_audit_log l WHERE l.month > w.month)
    FROM walked w WHERE w.month IS NOT NULL
)
SELECT month, h.seq, h.mac, h.key_version, h.last_mac,
       coalesce((SELECT max(l.seq) FROM cde.decrypt_audit_log l
                 WHERE l.month = coalesce(w.month, h.month)), 0) AS last_seq
FROM (SELECT month FROM walked WHERE month IS NOT NULL) w
FULL JOIN cde.audit_heads h USING (month)
ORDER BY month
LIMIT $1
"""
_LAST_MAC: Final = "SELECT mac FROM cde.decrypt_audit_log WHERE month = $1 AND seq = $2"
_PAGE: Final = """
SELECT seq, timestamptz_send(at), key_version, action, actor, certificate_sha256, ip, subject,
       purpose, outcome, correlation_id, fields, mac
FROM cde.decrypt_audit_log
WHERE month = $1 AND seq > $2 AND seq <= $3
ORDER BY seq
LIMIT $4
"""
_SHOWN: Final = """
SELECT month, seq, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS at, action,
       actor, certificate_sha256, ip, subject, to_jsonb(fields) AS fields, purpose, outcome,
       correlation_id, key_version, encode(mac, 'hex') AS mac
FROM cde.decrypt_audit_log
"""
_AFTER: Final = f"""
{_SHOWN} WHERE month >= $1 AND (month, seq) > ($1, $2) ORDER BY month, seq LIMIT $3
"""
_BEFORE: Final = f"""
{_SHOWN} WHERE month <= $1 AND (month, seq) < ($1, $2) ORDER BY month DESC, seq DESC LIMIT $3
"""
_MACS: Final = """
SELECT w.n, l.mac, w.month <= coalesce((SELECT max(month) FROM cde.audit_heads
                                        WHERE dropped_at IS NOT NULL), '-infinity') AS dropped
FROM unnest($1::date[], $2::bigint[]) WITH ORDINALITY AS w (month, seq, n)
LEFT JOIN cde.decrypt_audit_log l ON l.month = w.month AND l.seq = w.seq
ORDER BY w.n
"""
_USES: Final = """
SELECT EXISTS (SELECT FROM cde.audit_heads WHERE key_version = $1)
    OR EXISTS (SELECT FROM cde.decrypt_audit_log WHERE key_version = $1)
"""
_RIGHTS: Final = """
SELECT current_user::text AS role, session_user::text AS login,
       bool_or(pg_has_role(current_user, c.relowner, 'USAGE')) AS owns,
       bool_or(has_table_privilege(current_user, c.oid, 'UPDATE')
               OR has_any_column_privilege(current_user, c.oid, 'UPDATE')
               OR has_table_privilege(current_user, c.oid, 'DELETE')
               OR has_table_privilege(current_user, c.oid, 'TRUNCATE')) AS may_change,
       bool_or(pg_has_role(session_user, c.relowner, 'MEMBER')) AS login_owns
FROM pg_class c
WHERE c.oid = 'cde.decrypt_audit_log'::regclass
   OR c.oid IN (SELECT inhrelid FROM pg_inherits
                WHERE inhparent = 'cde.decrypt_audit_log'::regclass)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What this login and the role it has taken on may do to the log.

    `append_only` is what they should be: no row changed or deleted, by whatever name of a table.
    `login_owns` says that the login could take on the owner's rights again (RESET ROLE).
    """

    role: str
    login: str
    append_only: bool
    login_owns: bool


async def make_partition(connection: Connection, month: date) -> bool:
    """Make the month's partition; False where it was there."""
    return bool(await connection.fetchval(_MAKE_PARTITION, month))


async def drop_partition(database: Database, month: date) -> Dropped:
    """Drop the month, or say why not; the database keeps the rule of seven years."""
    return cast("Dropped", await database.fetchval(_DROP_PARTITION, month))


async def months(database: Database) -> list[StoredHead | date]:
    """Every month that has a head or rows, oldest first: its head, or the month without one."""
    rows = await database.fetch(_MONTHS, MONTHS_LIMIT)
    return [
        row["month"]
        if row["seq"] is None
        else StoredHead(
            month=row["month"],
            seq=row["seq"],
            mac=row["mac"],
            key_version=row["key_version"],
            last_seq=row["last_seq"],
            last_mac=row["last_mac"],
        )
        for row in rows
    ]


async def last_mac(database: Database, month: date, seq: int) -> bytes | None:
    """The MAC of one row, None where it is not there."""
    found: bytes | None = await database.fetchval(_LAST_MAC, month, seq)
    return found


async def page(
    database: Database, *, month: date, after: int, until: int, limit: int
) -> list[StoredRow]:
    """The next rows of a month, as a walk reads them."""
    return [_stored(row) for row in await database.fetch(_PAGE, month, after, until, limit)]


def _stored(row: Row) -> StoredRow:
    values = list(row)
    at_us = int.from_bytes(values[1], signed=True) + SINCE_2000_US
    values[1] = at_us if -(2**63) <= at_us < 2**63 else NO_TIME_US
    for field in values[11]:
        if type(field) is not str:
            # Whoever tampers can store NULL or an array in here.
            values[11] = [f if isinstance(f, str) else f"\0{f!r}" for f in values[11]]
            break
    return StoredRow._make(values)


async def shown_after(
    database: Database, *, month: date, seq: int, limit: int
) -> list[dict[str, object]]:
    """The next rows of all months, oldest first, in words that JSON has."""
    return [_shown(row) for row in await database.fetch(_AFTER, month, seq, limit)]


async def shown_before(
    database: Database, *, month: date, seq: int, limit: int
) -> list[dict[str, object]]:
    """The rows before one, newest first, in words that JSON has."""
    return [_shown(row) for row in await database.fetch(_BEFORE, month, seq, limit)]


def _shown(row: Row) -> dict[str, object]:
    return {**row, "month": f"{row['month']:%Y-%m}"}


async def macs(database: Database, heads: Sequence[Head]) -> list[tuple[bytes | None, bool]]:
    """For each head the MAC of the row that it names, and whether its month has been dropped."""
    rows = await database.fetch(_MACS, [head.month for head in heads], [head.seq for head in heads])
    return [(row["mac"], row["dropped"]) for row in rows]


async def uses_version(database: Database, version: str, *, timeout_s: float) -> bool:
    """Whether a row or a head names this version of the key; the log may be read for it whole."""
    async with database.transaction() as connection:
        await connection.execute(f"SET LOCAL statement_timeout = {round(timeout_s * 1000)}")
        return bool(await connection.fetchval(_USES, version, timeout_s=timeout_s))


async def rights(database: Database) -> Rights:
    """What we may do to the log."""
    row = await database.fetchrow(_RIGHTS)
    assert row is not None  # it is an aggregate
    return Rights(
        role=row["role"],
        login=row["login"],
        append_only=not (row["owns"] or row["may_change"]),
        login_owns=row["login_owns"],
    )
