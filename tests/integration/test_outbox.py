"""That an event's id is ours, in the order of time, and that it lives with its transaction only."""

from datetime import UTC, datetime
from typing import Literal
from uuid import UUID, uuid4

import pytest

from glamd.db import Connection, Database
from glamd.outbox import Outbox
from tests.support.settable_clock import SettableClock

Schema = Literal["cde", "glam"]


async def add(outbox: Outbox, connection: Connection, number: int) -> None:
    """Add an event that can be told from the others."""
    await outbox.add(
        connection,
        subject="evt.test.v1",
        merchant_id=uuid4(),
        correlation_id="c",
        data={"number": number},
    )


@pytest.mark.parametrize("schema", ["cde", "glam"])
async def test_ids_are_of_version_7_and_grow_with_the_clock(
    database: Database, schema: Schema
) -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    clock = SettableClock(began)
    outbox = Outbox(schema, clock=clock)
    for number in range(3):
        async with database.transaction() as connection:
            await add(outbox, connection, number)
        clock.advance(0.001)
    rows = await database.fetch(f"SELECT event_id, data FROM {schema}.outbox ORDER BY event_id")
    assert [row["data"] for row in rows] == [{"number": 0}, {"number": 1}, {"number": 2}]
    ids: list[UUID] = [row["event_id"] for row in rows]
    assert [each.version for each in ids] == [7, 7, 7]
    assert [(each.int >> 80) - int(began.timestamp() * 1000) for each in ids] == [0, 1, 2]


async def test_an_event_of_a_transaction_that_fails_never_was(database: Database) -> None:
    async def write_and_fail() -> None:
        async with database.transaction() as connection:
            await add(Outbox("glam"), connection, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await write_and_fail()
    assert await database.fetchval("SELECT count(*) FROM glam.outbox") == 0
