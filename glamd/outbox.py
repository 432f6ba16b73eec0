"""Writing events into an outbox, inside the transaction that caused them.

Every schema has its own outbox table. Reading them and publishing is the relay's part, which is not
here. The group commits of the vault and of the ledger write their rows in their own statements, for
speed.
"""

from collections.abc import Mapping
from typing import Literal
from uuid import UUID

from glamd.clock import Clock, SystemClock
from glamd.db import Connection
from glamd.ids import uuid7


class Outbox:
    """The outbox of one schema."""

    def __init__(self, schema: Literal["cde", "glam"], *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._insert = (
            f"INSERT INTO {schema}.outbox (event_id, subject, merchant_id, correlation_id, data) "  # noqa: S608 - one of two names
            "VALUES ($1, $2, $3, $4, $5)"
        )

    async def add(
        self,
        connection: Connection,
        *,
        subject: str,
        merchant_id: UUID,
        correlation_id: str,
        data: Mapping[str, object],
    ) -> None:
        """Add one event; it exists if, and only if, the connection's transaction commits.

        Its id, by which consumers know a repetition, is a UUIDv7 of this moment.
        """
        # The column has a default, which is random: such ids lie anywhere in an index.
        event_id = uuid7(self._clock.now())
        await connection.execute(
            self._insert, event_id, subject, merchant_id, correlation_id, dict(data)
        )
