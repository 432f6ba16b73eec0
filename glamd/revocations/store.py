"""The rows of `glam.jwt_revocations`, and an order among them that a reader can follow.

`revoked_at` rises with every row that is committed, whatever the clocks of the nodes say: writers
take turns, and each stamps its row later than all that are there. So the newest row that a reader
has seen tells exactly which ones are new to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

from glamd.db import Connection, Database, Row

Kind = Literal["jti", "kid"]
Position: TypeAlias = tuple[datetime, str, str]
"""Where a reader is: `revoked_at`, `kind` and `value` of the last row that it has seen."""

START: Final[Position] = (datetime(1970, 1, 1, tzinfo=UTC), "", "")

# It lets readers through, and is held until the transaction has ended for all to see.
_TAKE_TURNS: Final = "LOCK TABLE glam.jwt_revocations IN SHARE ROW EXCLUSIVE MODE"

_COUNT: Final = "SELECT count(*) FROM glam.jwt_revocations"

_ADD: Final = """
INSERT INTO glam.jwt_revocations AS known (kind, value, revoked_at, revoked_by, expires_at)
SELECT $1, $2, greatest($3::timestamptz, max(revoked_at) + interval '1 microsecond'), $4, $5
FROM glam.jwt_revocations
ON CONFLICT (kind, value) DO UPDATE SET expires_at =
    CASE WHEN known.expires_at IS NULL OR excluded.expires_at IS NULL THEN NULL
         ELSE greatest(known.expires_at, excluded.expires_at) END
RETURNING kind, value, revoked_at, revoked_by, expires_at
"""

_COLUMNS: Final = (
    "SELECT kind, value, revoked_at, revoked_by, expires_at FROM glam.jwt_revocations "
)
_AFTER: Final = (
    _COLUMNS + "WHERE (revoked_at, kind, value) > ($1, $2, $3) "
    "ORDER BY revoked_at, kind, value LIMIT $4"
)
_NEWEST: Final = _COLUMNS + "ORDER BY revoked_at DESC, kind, value LIMIT $1"

_PURGE: Final = "DELETE FROM glam.jwt_revocations WHERE expires_at < $1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """A `jti` or `kid` that is not believed; `expires_at` None holds for good."""

    kind: Kind
    value: str
    revoked_at: datetime
    revoked_by: str
    expires_at: datetime | None

    @property
    def position(self) -> Position:
        """Where a reader is that has seen it."""
        return (self.revoked_at, self.kind, self.value)


async def take_turns(connection: Connection) -> None:
    """Keep other writers out until the connection's transaction ends."""
    await connection.execute(_TAKE_TURNS)


async def count(connection: Connection) -> int:
    """How many rows there are."""
    return int(await connection.fetchval(_COUNT))


async def add(
    connection: Connection,
    *,
    kind: Kind,
    value: str,
    at: datetime,
    by: str,
    expires_at: datetime | None,
) -> Revocation:
    """Add a row, or let the one that is there hold for as long as the later of both.

    Only after `take_turns`, in the same transaction.
    """
    row = await connection.fetchrow(_ADD, kind, value, at, by, expires_at)
    assert row is not None
    return _revocation(row)


async def after(
    connection: Connection, position: Position, *, limit: int, timeout_s: float
) -> Sequence[Revocation]:
    """The next `limit` rows behind a position, in the order in which they were committed."""
    rows = await connection.fetch(_AFTER, *position, limit, timeout_s=timeout_s)
    return [_revocation(row) for row in rows]


async def newest(database: Database, *, limit: int) -> tuple[Revocation, ...]:
    """The last `limit` rows, newest first."""
    return tuple(_revocation(row) for row in await database.fetch(_NEWEST, limit))


async def purge(connection: Connection, *, before: datetime, timeout_s: float) -> None:
    """Delete what expired before this moment."""
    await connection.execute(_PURGE, before, timeout_s=timeout_s)


def _revocation(row: Row) -> Revocation:
    return Revocation(
        kind=row["kind"],
        value=row["value"],
        revoked_at=row["revoked_at"],
        revoked_by=row["revoked_by"],
        expires_at=row["expires_at"],
    )
