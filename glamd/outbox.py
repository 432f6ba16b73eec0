"""Writing events into an outbox, inside the transaction that caused them.

Every schema has its own outbox table. Reading them and publishing is the relay's part, which is not
here. The group commit of the vault writes its rows in its own statement, for speed.
"""

from collections.abc import Mapping
from typing import Literal
from uuid import UUID

from glamd.db import Connection


class Outbox:
    """The outbox of one schema."""

    def __init__(self, schema: Literal["cde", "glam"]) -> None:
        self._insert = (
            f"INSERT INTO {schema}.outbox (subject, merchant_id, correlation_id, data) "  # noqa: S608 - one of two names
            "VALUES ($1, $2, $3, $4)"
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
        """Add one event; it exists if, and only if, the connection's transaction commits."""
        await connection.execute(self._insert, subject, merchant_id, correlation_id, dict(data))
