"""The events room at work beside a test: parts that run, rows that wait, orders that are kept."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import UUID

from glamd.db import Connection, Database
from glamd.events.bus import Bus
from tests.support.nats import Stored

TIMEOUT_S = 10.0


class Runs(Protocol):
    """A part of the daemon that runs until it is cancelled."""

    async def run(self) -> None:
        """Run."""


@asynccontextmanager
async def running(*parts: Runs) -> AsyncIterator[None]:
    """Run parts beside the test; one that ends by itself fails it."""
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            task.result()
        assert not ended, "a part ended by itself"


@asynccontextmanager
async def running_bus(url: str) -> AsyncIterator[Bus]:
    """A bus with its first link."""
    bus = Bus([url], name="test")
    async with running(bus):
        async with asyncio.timeout(TIMEOUT_S):
            await bus.link()
        yield bus


def merchant(number: int) -> UUID:
    """The merchant of this number."""
    return UUID(int=(0x0198 << 112) + number)


async def add(
    where: Connection | Database,
    *merchants: int,
    schema: str = "glam",
    subject: str = "evt.credits.consumed.v1",
    text: str = "",
) -> list[str]:
    """Commit an event for each of these merchants, in this order; the events' ids."""
    sql = (
        f"INSERT INTO {schema}.outbox (subject, merchant_id, correlation_id, data)"
        " SELECT $1, m, 'c-1', jsonb_build_object('merchant_id', m, 'text', $3::text)"
        " FROM unnest($2::uuid[]) AS m RETURNING event_id"
    )
    rows = await where.fetch(sql, subject, [merchant(each) for each in merchants], text)
    return [str(row[0]) for row in rows]


async def unpublished(database: Database, schema: str = "glam") -> int:
    """How many rows are not marked as sent."""
    found: int = await database.fetchval(
        f"SELECT count(*) FROM {schema}.outbox WHERE published_at IS NULL"
    )
    return found


async def in_outbox(database: Database, schema: str = "glam") -> dict[str, list[str]]:
    """The ids of all events by merchant, in the order in which they were written."""
    rows = await database.fetch(
        f"SELECT merchant_id::text, event_id::text FROM {schema}.outbox ORDER BY id"
    )
    return by_merchant((row[0], row[1]) for row in rows)


def first_seen(messages: Sequence[Stored]) -> dict[str, list[str]]:
    """The ids by merchant as somebody has them who drops what he has seen before."""
    pairs = ((message.merchant_id, message.headers["Nats-Msg-Id"]) for message in messages)
    return by_merchant(pairs)


def by_merchant(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The ids of each merchant in their order, each once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for merchant_id, event_id in pairs:
        found[merchant_id][event_id] = None
    return {merchant_id: list(ids) for merchant_id, ids in found.items()}
