"""Claims on platform tokens that are to be renewed, and what becomes of them, in SQL.

A claim makes one node at a time ask the platform. It is a lease on the database's own clock, which
is the only one that all nodes share; what is due is judged by the caller's clock. Nothing is opened
or sealed here, and nothing is decided about a failure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple
from uuid import UUID

from glamd.credentials.model import Accessor, Health, Platform, ShopConnection
from glamd.credentials.store import COLUMNS, connection_of, log_access
from glamd.db import Connection, Database, Row

LEASE_S: Final = 90.0
"""How long a claim keeps others away: the longest wait for a platform (`settings.TIMEOUT_MAX_S`),
fetching a key before it and a commit after it, with time to spare."""

BACK_OFF_MAX: Final = timedelta(days=7)
"""No pause is longer. One that seems to be was written by a clock that went wrong."""

GIVE_UP_AFTER: Final = timedelta(days=100)
"""What has been expired for longer is not looked for any more, so that shops that left do not cost
ever more: Shopify's refresh tokens live 90 days. Whoever reads such a token still has it tried."""

FAILURES_MAX: Final = 1_000_000
CENSUS_ROWS: Final = 100_000
"""The most rows that are counted for the gauges."""

SUPERSEDED: Final = "SUPERSEDED"
"""The error of an access row whose new pair was not stored, because there was a newer secret."""

# $1 now, $2 the longest pause, $3 whether claims that have run out may be taken over, $4 the lease.
_UNCLAIMED: Final = """
    refreshable AND (refresh_claim IS NULL OR ($3 AND refresh_claim_until <= now()))
"""
_PAUSE_IS_OVER: Final = "(refresh_not_before <= $1 OR refresh_not_before > $1 + $2::interval)"
_CLAIM: Final = f"""
UPDATE glam.platform_tokens
SET refresh_claim = gen_random_uuid(), refresh_claim_until = now() + $4::interval
FROM due WHERE token_id = due.id
RETURNING {COLUMNS}, ciphertext, refresh_claim
"""  # noqa: S608 - our own constant

# Three ways to be due, each of them a range of the index: with OR between them every token that
# there is would be looked at, and without the pause in it every one whose shop has left.
_CLAIM_DUE: Final = f"""
WITH expiring AS MATERIALIZED (
    SELECT token_id AS id FROM glam.platform_tokens
    WHERE platform = $5 AND {_UNCLAIMED}
      AND refresh_not_before IS NULL AND expires_at BETWEEN $6 AND $7
    ORDER BY expires_at
    LIMIT $9
    FOR UPDATE SKIP LOCKED
), paused AS MATERIALIZED (
    SELECT token_id AS id FROM glam.platform_tokens
    WHERE platform = $5 AND {_UNCLAIMED}
      AND {_PAUSE_IS_OVER}
      AND (expires_at BETWEEN $6 AND $7 OR (expires_at IS NULL AND updated_at <= $8))
    LIMIT $9
    FOR UPDATE SKIP LOCKED
), unsaid AS MATERIALIZED (
    SELECT token_id AS id FROM glam.platform_tokens
    WHERE platform = $5 AND {_UNCLAIMED}
      AND refresh_not_before IS NULL AND expires_at IS NULL AND updated_at <= $8
    LIMIT $9
    FOR UPDATE SKIP LOCKED
), due AS (
    SELECT id FROM expiring UNION ALL SELECT id FROM unsaid UNION ALL SELECT id FROM paused
    LIMIT $9
)
{_CLAIM}"""  # noqa: S608 - our own constants
_CLAIM_ONE: Final = f"""
WITH due AS MATERIALIZED (
    SELECT token_id AS id FROM glam.platform_tokens
    WHERE token_id = $5 AND platform = ANY($6) AND {_UNCLAIMED}
      AND (refresh_not_before IS NULL OR {_PAUSE_IS_OVER}) AND expires_at <= $7
    FOR UPDATE SKIP LOCKED
)
{_CLAIM}"""  # noqa: S608 - our own constants

_LOOK: Final = """
SELECT generation, coalesce(refresh_claim_until > now(), false) AS is_claimed
FROM glam.platform_tokens WHERE token_id = $1
"""

# A pair in hand is worth more than a claim: it is stored as long as the secret that it came from
# is still the one in the row, even where another node has taken the claim over meanwhile. That
# claim is left to its holder, whose answer is the later one. A client that stores or deletes the
# token ends both conditions.
_COMMIT: Final = """
UPDATE glam.platform_tokens
SET ciphertext = $4, key_version = $5, expires_at = $6, scopes = coalesce($7, scopes),
    generation = generation + 1,
    refresh_claim = nullif(refresh_claim, $2),
    refresh_claim_until = CASE WHEN refresh_claim <> $2 THEN refresh_claim_until END,
    refresh_failures = 0, refresh_error = NULL, refresh_not_before = $8,
    refreshed_at = $9, updated_at = $9, older_updated_at = NULL
WHERE token_id = $1 AND (refresh_claim = $2 OR generation = $3)
RETURNING generation
"""
_IS_THERE: Final = """
SELECT true FROM glam.platform_tokens WHERE token_id = $1 AND ciphertext = $2
"""

# A failure of a refresh whose secret was replaced meanwhile says nothing of the new secret.
_FAIL: Final = """
UPDATE glam.platform_tokens
SET refresh_claim = NULL, refresh_claim_until = NULL,
    refresh_failures = CASE WHEN generation = $3 THEN least(refresh_failures + 1, $4)
                            ELSE refresh_failures END,
    refresh_error = CASE WHEN generation = $3 THEN $5 ELSE refresh_error END,
    refresh_not_before = CASE WHEN generation = $3 THEN $6 ELSE refresh_not_before END
WHERE token_id = $1 AND refresh_claim = $2
"""

# `ShopConnection.health` in SQL, as in the parent's store; tests hold the two to it.
_CENSUS: Final = """
SELECT platform, health, count(*) AS connections, count(*) FILTER (WHERE is_due) AS due
FROM (
    SELECT t.platform,
           CASE WHEN t.refresh_failures > 0 THEN 'refresh-failing'
                WHEN t.expires_at <= $1 THEN 'expired'
                ELSE 'valid' END AS health,
           t.refreshable AND t.expires_at BETWEEN $2 AND $1 + p.before
           AND (t.refresh_not_before IS NULL OR t.refresh_not_before <= $1) AS is_due
    FROM glam.platform_tokens t
    LEFT JOIN unnest($3::text[], $4::interval[]) AS p (platform, before) USING (platform)
    LIMIT $5
) counted
GROUP BY platform, health
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A token that this node, and no other, may renew now."""

    connection: ShopConnection
    ciphertext: bytes = field(repr=False)
    claim: UUID
    claimed_at_s: float
    """Monotonic, from before the claim was made: the lease has LEASE_S from then on, or longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A new pair, ready for the row."""

    ciphertext: bytes = field(repr=False)
    key_version: str
    expires_at: datetime
    scopes: tuple[str, ...] | None
    not_before: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What of a platform is due at `now`; see `service`."""

    platform: Platform
    now: datetime
    before: timedelta
    assumed_lifetime: timedelta


class Look(NamedTuple):
    """Which secret is in the row, and whether somebody is renewing it."""

    generation: int
    is_claimed: bool


class Count(NamedTuple):
    """How many connections of a platform are in this state, and how many of them are due."""

    platform: Platform
    health: Health
    connections: int
    due: int


Kept = Literal["stored", "superseded"]


async def claim_due(
    database: Database, due: Due, *, limit: int, takes_over: bool, monotonic_s: float
) -> tuple[Claimed, ...]:
    """Claim up to `limit` tokens that are due, those first that expire first.

    A token that says nothing of its expiry is taken for one that lives `assumed_lifetime`.
    """
    rows = await database.fetch(
        _CLAIM_DUE,
        due.now,
        BACK_OFF_MAX,
        takes_over,
        timedelta(seconds=LEASE_S),
        due.platform,
        due.now - GIVE_UP_AFTER,
        due.now + due.before,
        due.now + due.before - due.assumed_lifetime,
        limit,
    )
    return tuple(_claimed(row, monotonic_s) for row in rows)


async def claim_one(
    database: Database,
    token_id: UUID,
    *,
    platforms: Sequence[Platform],
    now: datetime,
    before: timedelta,
    takes_over: bool,
    monotonic_s: float,
) -> Claimed | None:
    """Claim this token if it is due and nobody renews it."""
    row = await database.fetchrow(
        _CLAIM_ONE,
        now,
        BACK_OFF_MAX,
        takes_over,
        timedelta(seconds=LEASE_S),
        token_id,
        list(platforms),
        now + before,
    )
    return None if row is None else _claimed(row, monotonic_s)


async def look(database: Database, token_id: UUID) -> Look | None:
    """What the row says now; None where there is no such token."""
    row = await database.fetchrow(_LOOK, token_id)
    return None if row is None else Look(row["generation"], row["is_claimed"])


async def commit(
    database: Database, claimed: Claimed, sealed: Sealed, *, at: datetime, accessor: Accessor
) -> Kept:
    """Put the new pair into the row with its access row; may be called again with the same.

    `superseded` where a client has stored or deleted the token meanwhile: nothing is changed, and
    the access row says so. OutcomeUnknownError and the like leave it to the next call to find out.
    """
    found = claimed.connection
    async with database.transaction() as connection:
        generation = await connection.fetchval(
            _COMMIT,
            found.token_id,
            claimed.claim,
            found.generation,
            sealed.ciphertext,
            sealed.key_version,
            sealed.expires_at,
            None if sealed.scopes is None else list(sealed.scopes),
            sealed.not_before,
            at,
        )
        if generation is None and await connection.fetchval(
            _IS_THERE, found.token_id, sealed.ciphertext
        ):
            return "stored"  # by a commit before this one, whose outcome had not been heard of
        error = None if generation is not None else SUPERSEDED
        await _log(connection, found, at=at, accessor=accessor, error=error)
    return "superseded" if generation is None else "stored"


async def fail(
    database: Database,
    claimed: Claimed,
    *,
    code: str,
    not_before: datetime,
    at: datetime,
    accessor: Accessor,
) -> None:
    """Note the failure where it still concerns the secret in the row, and release the claim."""
    found = claimed.connection
    async with database.transaction() as connection:
        await connection.execute(
            _FAIL,
            found.token_id,
            claimed.claim,
            found.generation,
            FAILURES_MAX,
            code,
            not_before,
        )
        await _log(connection, found, at=at, accessor=accessor, error=code)


async def census(
    database: Database, *, now: datetime, before: Sequence[tuple[Platform, timedelta]]
) -> tuple[Count, ...]:
    """Connections by platform and health, of CENSUS_ROWS at most."""
    rows = await database.fetch(
        _CENSUS,
        now,
        now - GIVE_UP_AFTER,
        [platform for platform, _ in before],
        [how_long for _, how_long in before],
        CENSUS_ROWS,
    )
    return tuple(
        Count(row["platform"], row["health"], row["connections"], row["due"]) for row in rows
    )


async def _log(
    connection: Connection,
    found: ShopConnection,
    *,
    at: datetime,
    accessor: Accessor,
    error: str | None,
) -> None:
    await log_access(
        connection,
        at=at,
        merchant_id=found.merchant_id,
        platform=found.platform,
        token_id=found.token_id,
        action="refresh",
        accessor=accessor,
        error=error,
    )


def _claimed(row: Row, monotonic_s: float) -> Claimed:
    return Claimed(
        connection=connection_of(row),
        ciphertext=row["ciphertext"],
        claim=row["refresh_claim"],
        claimed_at_s=monotonic_s,
    )
