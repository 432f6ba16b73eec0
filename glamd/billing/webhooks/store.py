"""The SQL of webhooks: kept once a delivery, waiting until something has come of them.

A row that waits has a `try_at`, one that is done with an `outcome`; the table holds it to that.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from glamd.billing.platforms.interface import Delivery
from glamd.db import Connection, Database

PAUSE_FIRST: Final = timedelta(seconds=1)
PAUSE_MAX: Final = timedelta(minutes=10)
DOUBLINGS_LIMIT: Final = 20

_KEEP: Final = """
INSERT INTO glam.webhooks (
    platform, delivery_id, topic, shop_domain, body, received_at, try_at, outcome)
VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $7::text IS NULL THEN least($6, now()) END, $7)
ON CONFLICT (platform, delivery_id) DO NOTHING
"""
# Taking a row is at the same time the decision when it is tried again: no second write is needed
# where nothing could come of it yet, or where whoever took it dies. A node whose clock is ahead has
# the database's, or its rows would wait until the others' clocks get there.
_CLAIM: Final = """
WITH due AS MATERIALIZED (
    SELECT id FROM glam.webhooks
    WHERE try_at <= least($1, now()) AND platform = ANY($6)
    ORDER BY try_at, id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE glam.webhooks w
SET attempts = w.attempts + 1,
    try_at = least($1, now()) + least($3::interval * 2 ^ least(w.attempts, $5), $4::interval)
FROM due WHERE w.id = due.id
RETURNING w.id, w.platform, w.delivery_id, w.topic, w.shop_domain, w.body, w.attempts
"""
_FINISH: Final = """
UPDATE glam.webhooks SET outcome = $2, applied_at = $3, try_at = NULL
WHERE id = $1 AND outcome IS NULL
"""
# In the order of ids, which is that of arrival, so that only the oldest rows are looked at. Those
# that wait, maybe for ever since their platform is no longer configured, are not in the way.
_PURGE: Final = """
WITH oldest AS MATERIALIZED (
    SELECT id, received_at FROM glam.webhooks
    WHERE outcome IS NOT NULL ORDER BY id LIMIT $2
    FOR UPDATE SKIP LOCKED
)
DELETE FROM glam.webhooks
WHERE id IN (SELECT id FROM oldest WHERE received_at < $1)
"""


class Waiting(NamedTuple):
    """A webhook of which nothing has come yet, and how often it has been tried with this time."""

    id: int
    platform: str
    delivery: Delivery
    body: bytes
    attempts: int


async def keep(
    database: Database,
    platform: str,
    delivery: Delivery,
    body: bytes,
    *,
    now: datetime,
    outcome: str | None,
) -> bool:
    """Keep a webhook, to be tried at once unless it has an outcome; False for a repetition."""
    tag = await database.execute(
        _KEEP,
        platform,
        delivery.delivery_id,
        delivery.topic,
        delivery.shop_domain,
        body,
        now,
        outcome,
    )
    return tag == "INSERT 0 1"


async def claim(
    database: Database, *, now: datetime, platforms: Sequence[str], limit: int
) -> list[Waiting]:
    """Take webhooks of these platforms that are due; in the order of their arrival."""
    rows = await database.fetch(
        _CLAIM, now, limit, PAUSE_FIRST, PAUSE_MAX, DOUBLINGS_LIMIT, list(platforms)
    )
    return [
        Waiting(
            row["id"],
            row["platform"],
            Delivery(
                delivery_id=row["delivery_id"],
                topic=row["topic"],
                shop_domain=row["shop_domain"],
            ),
            row["body"],
            row["attempts"],
        )
        for row in sorted(rows, key=lambda row: int(row["id"]))
    ]


async def finish(
    connection: Connection | Database, webhook_id: int, *, outcome: str, now: datetime
) -> None:
    """Write what has come of a webhook; the first one to say so is right."""
    await connection.execute(_FINISH, webhook_id, outcome, now)


async def purge(database: Database, *, before: datetime, limit: int) -> int:
    """Delete webhooks that came before, out of the `limit` oldest that are done with; how many."""
    tag = await database.execute(_PURGE, before, limit)
    return int(tag.rpartition(" ")[2])
