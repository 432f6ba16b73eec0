"""The SQL of the relay and of the dead letters. No rule stands here.

Writing into an outbox is not here: that belongs to the transaction of whoever has something to
tell (`glamd.outbox`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple, TypeAlias
from uuid import UUID

from glamd.db import Connection, Database, Row

Schema: TypeAlias = Literal["cde", "glam"]

_LOCK_CLASS: Final = 0x676C616D
_LOCK_OF: Final[Mapping[Schema, int]] = {"cde": 1, "glam": 2}

# The lock lasts as long as the session, and asking again for what one has is free. A node that
# loses its power says no goodbye: without keep-alives of this session its lock would stand until
# the system's, which is two hours. Marks need not survive a crash, since what is sent again is
# dropped by its id, so they wait for no disk.
_LEAD: Final = """
SELECT set_config('tcp_keepalives_idle', '10', false),
       set_config('tcp_keepalives_interval', '5', false),
       set_config('tcp_keepalives_count', '3', false),
       set_config('synchronous_commit', 'off', false),
       pg_try_advisory_lock($1, $2) AS leads
"""

_UNPUBLISHED: Final = """
SELECT id, event_id::text, subject, merchant_id::text, correlation_id, data::text, created_at
FROM {schema}.outbox
WHERE published_at IS NULL AND id > $1 AND merchant_id <> ALL ($2::uuid[])
ORDER BY id LIMIT $3
"""
# By the server's clock, which all nodes share: when one replays what another has sent, what their
# own clocks differ by would be left out.
_MARK: Final = "UPDATE {schema}.outbox SET published_at = now() WHERE id = ANY ($1::bigint[])"
_NOW: Final = "SELECT now()"
_WAITING: Final = """
SELECT count(*), min(created_at) FROM (
    SELECT created_at FROM {schema}.outbox WHERE published_at IS NULL ORDER BY id LIMIT $1) AS w
"""
# Both in arrays of ids, never in joins: a join is planned on what LIMIT could let through, and may
# read the whole table. The lower end keeps a long run from stepping over what it has done before.
# The earlier of both clocks decides, so that a node whose clock is ahead purges nothing early.
_PURGE: Final = """
WITH old AS (
    SELECT id, published_at FROM {schema}.outbox
    WHERE published_at >= $1 AND published_at < least($2, now()) - $4::interval
    ORDER BY published_at LIMIT $3
), gone AS (
    DELETE FROM {schema}.outbox
    WHERE id = ANY (ARRAY(SELECT id FROM old)) AND published_at IS NOT NULL
)
SELECT count(*), max(published_at) FROM old
"""
# What was marked together has one time and goes together, so the time alone is the position.
_AGAIN: Final = """
WITH seen AS (
    SELECT max(published_at) AS last_at FROM (
        SELECT published_at FROM {schema}.outbox
        WHERE published_at > $1 AND published_at < $2 ORDER BY published_at LIMIT $3) AS s
), again AS (
    UPDATE {schema}.outbox SET published_at = NULL
    WHERE id = ANY (ARRAY(
        SELECT id FROM {schema}.outbox
        WHERE published_at > $1 AND published_at <= (SELECT last_at FROM seen)
          AND ($4::text IS NULL OR subject = $4) AND ($5::uuid IS NULL OR merchant_id = $5)))
    RETURNING id
)
SELECT last_at, (SELECT array_agg(id) FROM again) AS again FROM seen
"""
_STILL_WAITING: Final = """
SELECT EXISTS (SELECT FROM {schema}.outbox WHERE id = ANY ($1::bigint[]) AND published_at IS NULL)
"""


class OutboxRow(NamedTuple):
    """A row that waits to be sent: ids as text, which is all that they are here, `data` as JSON."""

    row_id: int
    event_id: str
    subject: str
    merchant_id: str
    correlation_id: str
    data: str
    created_at: datetime


class OutboxTable:
    """The outbox of one schema, as the relay sees it."""

    def __init__(self, schema: Schema) -> None:
        self.schema: Schema = schema
        self._unpublished = _UNPUBLISHED.format(schema=schema)
        self._mark = _MARK.format(schema=schema)
        self._waiting = _WAITING.format(schema=schema)
        self._purge = _PURGE.format(schema=schema)
        self._again = _AGAIN.format(schema=schema)
        self._still_waiting = _STILL_WAITING.format(schema=schema)

    async def lead(self, connection: Connection) -> bool:
        """Whether this session is, or has just become, the one that relays this outbox."""
        row = await connection.fetchrow(_LEAD, _LOCK_CLASS, _LOCK_OF[self.schema])
        assert row is not None
        return bool(row["leads"])

    async def unpublished(
        self, connection: Connection, *, above: int, without: Iterable[str], limit: int
    ) -> list[OutboxRow]:
        """The next rows by id, of all merchants but some."""
        excluded = [UUID(merchant_id) for merchant_id in without]
        rows = await connection.fetch(self._unpublished, above, excluded, limit)
        return [OutboxRow(*row) for row in rows]

    async def mark(self, connection: Connection, ids: Sequence[int]) -> None:
        """Store that these were sent, now."""
        await connection.execute(self._mark, ids)

    async def now(self, database: Database) -> datetime:
        """The moment by the clock that rows are marked by."""
        found: datetime = await database.fetchval(_NOW)
        return found

    async def waiting(self, database: Database, *, most: int) -> tuple[int, datetime | None]:
        """How many wait, counted up to `most`, and since when the oldest of them does."""
        row = await database.fetchrow(self._waiting, most)
        assert row is not None
        return row[0], row[1]

    async def purge(
        self,
        database: Database,
        *,
        above: datetime,
        now: datetime,
        window: timedelta,
        limit: int,
    ) -> tuple[int, datetime | None]:
        """Delete the oldest rows sent since `above` and before the window.

        How many, and when the last of them was.
        """
        row = await database.fetchrow(self._purge, above, now, limit, window)
        assert row is not None
        return row[0], row[1]

    async def send_again(
        self,
        database: Database,
        *,
        after: datetime,
        until: datetime,
        subject: str | None,
        merchant_id: UUID | None,
        limit: int,
    ) -> tuple[datetime, list[int]] | None:
        """Look at the next rows that were sent in this time, and make those that fit wait again.

        When the last one looked at was sent, and the ids of those that wait again; None where
        there is nothing more. Somewhat more than `limit` are looked at where they were sent at
        the same time.
        """
        row = await database.fetchrow(self._again, after, until, limit, subject, merchant_id)
        assert row is not None
        return None if row["last_at"] is None else (row["last_at"], row["again"] or [])

    async def still_waiting(self, database: Database, ids: Sequence[int]) -> bool:
        """Whether one of these still waits."""
        return bool(await database.fetchval(self._still_waiting, ids))


# ---- dead letters

_COLUMNS: Final = """
    id, subject, event_id, payload, headers, reason, attempts, received_at, replayed_at, resolved_at
"""
_KEEP: Final = """
INSERT INTO glam.dead_letters (
    subject, event_id, payload, headers, reason, attempts, received_at)
VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id
"""
_LETTER: Final = f"SELECT {_COLUMNS} FROM glam.dead_letters WHERE id = $1"  # noqa: S608 - our own constants
_OPEN_PAGE: Final = f"""
SELECT {_COLUMNS} FROM glam.dead_letters
WHERE resolved_at IS NULL AND id < $1 AND ($2::text IS NULL OR subject = $2)
ORDER BY id DESC LIMIT $3
"""  # noqa: S608 - our own constants
_PAGE: Final = f"""
SELECT {_COLUMNS} FROM glam.dead_letters
WHERE id < $1 AND ($2::text IS NULL OR subject = $2)
ORDER BY id DESC LIMIT $3
"""  # noqa: S608 - our own constants
_OPEN_IDS: Final = """
SELECT id FROM glam.dead_letters
WHERE resolved_at IS NULL AND id > $1 AND id <= $2 AND ($3::text IS NULL OR subject = $3)
ORDER BY id LIMIT $4
"""
_PURGE_RESOLVED: Final = """
DELETE FROM glam.dead_letters WHERE id IN (
    SELECT id FROM glam.dead_letters WHERE resolved_at < $1 ORDER BY resolved_at LIMIT $2
    FOR UPDATE SKIP LOCKED)
"""
_NEWEST: Final = "SELECT coalesce(max(id), 0) FROM glam.dead_letters"
_RESOLVED: Final = """
UPDATE glam.dead_letters SET replayed_at = $2, resolved_at = $2 WHERE id = $1
"""
_DISCARDED: Final = """
UPDATE glam.dead_letters SET resolved_at = $2 WHERE id = $1 AND resolved_at IS NULL
"""
_FAILED_AGAIN: Final = """
UPDATE glam.dead_letters SET replayed_at = $2, reason = $3, attempts = attempts + 1
WHERE id = $1 AND resolved_at IS NULL
"""
_OPEN_COUNT: Final = """
SELECT count(*) FROM (SELECT FROM glam.dead_letters WHERE resolved_at IS NULL LIMIT $1) AS o
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that could not be applied; open until `resolved_at`."""

    letter_id: int
    subject: str
    event_id: str | None
    payload: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    reason: str
    attempts: int
    received_at: datetime
    replayed_at: datetime | None
    resolved_at: datetime | None


async def keep_letter(
    database: Database,
    *,
    subject: str,
    event_id: str | None,
    payload: bytes,
    headers: Mapping[str, str],
    reason: str,
    attempts: int,
    at: datetime,
) -> int:
    """Store a dead letter, committed; its id."""
    found: int = await database.fetchval(
        _KEEP, subject, event_id, payload, dict(headers), reason, attempts, at
    )
    return found


async def letter(database: Database, letter_id: int) -> DeadLetter | None:
    """One dead letter, resolved or not."""
    row = await database.fetchrow(_LETTER, letter_id)
    return None if row is None else _letter(row)


async def letters_before(
    database: Database, *, before: int, subject: str | None, resolved_too: bool, limit: int
) -> tuple[DeadLetter, ...]:
    """The letters with a smaller id, newest first."""
    rows = await database.fetch(_PAGE if resolved_too else _OPEN_PAGE, before, subject, limit)
    return tuple(_letter(row) for row in rows)


async def open_letters_after(
    database: Database, *, after: int, until: int, subject: str | None, limit: int
) -> list[int]:
    """The ids of open letters behind `after` and not behind `until`, oldest first."""
    rows = await database.fetch(_OPEN_IDS, after, until, subject, limit)
    return [row[0] for row in rows]


async def newest_letter(database: Database) -> int:
    """The largest id there is, or 0."""
    found: int = await database.fetchval(_NEWEST)
    return found


async def letter_resolved(database: Database, letter_id: int, at: datetime) -> None:
    """Store that the event has had its effect after all."""
    await database.execute(_RESOLVED, letter_id, at)


async def letter_discarded(database: Database, letter_id: int, at: datetime) -> None:
    """Store that nobody wants the event's effect any more; it was never replayed for that."""
    await database.execute(_DISCARDED, letter_id, at)


async def letter_failed_again(
    database: Database, letter_id: int, *, at: datetime, reason: str
) -> None:
    """Store that another attempt failed, and why."""
    await database.execute(_FAILED_AGAIN, letter_id, at, reason)


async def purge_resolved(database: Database, *, before: datetime, limit: int) -> int:
    """Delete letters that were resolved before; how many, at most `limit`."""
    tag = await database.execute(_PURGE_RESOLVED, before, limit)
    return int(tag.rpartition(" ")[2])


async def open_letters(database: Database, *, most: int) -> int:
    """How many are open, counted up to `most`."""
    found: int = await database.fetchval(_OPEN_COUNT, most)
    return found


def _letter(row: Row) -> DeadLetter:
    return DeadLetter(
        letter_id=row["id"],
        subject=row["subject"],
        event_id=row["event_id"],
        payload=row["payload"],
        headers=row["headers"],
        reason=row["reason"],
        attempts=row["attempts"],
        received_at=row["received_at"],
        replayed_at=row["replayed_at"],
        resolved_at=row["resolved_at"],
    )
