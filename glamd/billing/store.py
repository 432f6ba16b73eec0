"""The SQL of billing: records, purchases, and who of several nodes takes what is due.

Nothing is decided here. What must happen once is a condition of the statement that does it; what is
due is judged by the caller's clock. Rows are locked in the order purchase, record, account.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar
from uuid import UUID

from glamd.billing.model import PlatformName, Purchase, PurchaseStatus, Record
from glamd.billing.money import Money
from glamd.db import Connection, Database, Row

RECONCILE_FIRST: Final = timedelta(minutes=1)
RECONCILE_PAUSE_MAX: Final = timedelta(days=1)
"""The first pause before a platform is asked, and the longest; between them it is asked again after
half of what the purchase is old."""

MaybeTime = TypeVar("MaybeTime", datetime, datetime | None)

_MICROSECOND: Final = timedelta(microseconds=1)
_FIRST: Final = datetime.min.replace(tzinfo=UTC) + _MICROSECOND
_LAST: Final = datetime.max.replace(tzinfo=UTC) - _MICROSECOND

PURCHASE_COLUMNS: Final = """
    purchase_id, merchant_id, pack, credits, amount_minor, currency, status, platform,
    platform_charge_id, checkout_url, return_url, test, failure, created_at, completed_at,
    expires_at
"""
RECORD_COLUMNS: Final = (
    "merchant_id, trial_started_at, trial_ends_at, credits_purchased, last_purchase_at"
)

_OPEN: Final = """
INSERT INTO glam.billing_records (merchant_id, created_at) VALUES ($1, $2)
ON CONFLICT (merchant_id) DO NOTHING
"""
_RECORD: Final = f"SELECT {RECORD_COLUMNS} FROM glam.billing_records WHERE merchant_id = $1"  # noqa: S608 - our own constants
_START_TRIAL: Final = """
UPDATE glam.billing_records SET trial_started_at = $2, trial_ends_at = $3
WHERE merchant_id = $1 AND trial_started_at IS NULL
RETURNING true
"""
# What stands there stays; so the same is written again, and the row is locked, where it does.
_NOTE_TRIAL: Final = """
UPDATE glam.billing_records
SET trial_started_at = coalesce(trial_started_at, $2), trial_ends_at = coalesce(trial_ends_at, $3)
WHERE merchant_id = $1
RETURNING true
"""
_LOCK_RECORD: Final = "SELECT true FROM glam.billing_records WHERE merchant_id = $1 FOR UPDATE"
# Over is what is over by our clock and by the database's: a node whose clock is ahead ends nothing
# before its time, which could not be taken back.
_EXPIRE_TRIALS: Final = """
WITH due AS MATERIALIZED (
    SELECT merchant_id FROM glam.billing_records
    WHERE trial_ends_at <= least($1, now()) AND trial_expired_at IS NULL
    ORDER BY trial_ends_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE glam.billing_records r SET trial_expired_at = $1
FROM due WHERE r.merchant_id = due.merchant_id
RETURNING r.merchant_id, r.trial_ends_at
"""
# A purchase may have been brought over from an older service for a merchant without a record.
_ADD_PURCHASED: Final = """
INSERT INTO glam.billing_records AS r (
    merchant_id, credits_purchased, last_purchase_at, created_at)
VALUES ($1, $2, $3, $3)
ON CONFLICT (merchant_id) DO UPDATE
SET credits_purchased = r.credits_purchased + EXCLUDED.credits_purchased,
    last_purchase_at = greatest(r.last_purchase_at, EXCLUDED.last_purchase_at)
"""

_INSERT: Final = """
WITH counted AS (
    UPDATE glam.billing_records SET purchase_count = purchase_count + 1 WHERE merchant_id = $2
    RETURNING merchant_id
)
INSERT INTO glam.credit_purchases (
    purchase_id, merchant_id, pack, credits, amount_minor, currency, status, platform, return_url,
    test, failure, reconcile_at, created_at, expires_at)
SELECT $1, merchant_id, $3, $4, $5, $6, $7, $8, $9, $10, $11,
       CASE WHEN $12 THEN least($13, now()) + $15::interval END, $13, $14
FROM counted
"""
_ONE: Final = f"SELECT {PURCHASE_COLUMNS} FROM glam.credit_purchases WHERE purchase_id = $1"  # noqa: S608 - our own constants
_LOCK: Final = f"{_ONE} FOR UPDATE"
_BY_CHARGE: Final = f"""
SELECT {PURCHASE_COLUMNS} FROM glam.credit_purchases
WHERE platform = ANY($1) AND platform_charge_id = ANY($2)
LIMIT 1
"""  # noqa: S608 - our own constants
_AFTER: Final = f"""
SELECT {PURCHASE_COLUMNS} FROM glam.credit_purchases
WHERE merchant_id = $1 AND (created_at, purchase_id) < ($2, $3)
ORDER BY created_at DESC, purchase_id DESC LIMIT $4
"""  # noqa: S608 - our own constants
_AT: Final = f"""
SELECT {PURCHASE_COLUMNS} FROM glam.credit_purchases WHERE merchant_id = $1
ORDER BY created_at DESC, purchase_id DESC OFFSET $2 LIMIT $3
"""  # noqa: S608 - our own constants
_TOTAL: Final = "SELECT purchase_count FROM glam.billing_records WHERE merchant_id = $1"

# Whoever comes second with another charge than the one that stands there is refused, and whoever
# comes with the same one may add where it is paid.
_BIND: Final = f"""
UPDATE glam.credit_purchases
SET platform_charge_id = $2, checkout_url = coalesce($3, checkout_url)
WHERE purchase_id = $1 AND (platform_charge_id IS NULL OR platform_charge_id = $2)
RETURNING {PURCHASE_COLUMNS}
"""  # noqa: S608 - our own constants
_COMPLETE: Final = """
UPDATE glam.credit_purchases
SET status = 'completed', completed_at = $2, failure = NULL, reconcile_at = NULL
WHERE purchase_id = $1 AND status <> 'completed'
RETURNING true
"""
_FAIL: Final = """
UPDATE glam.credit_purchases
SET status = 'failed', failure = $2, reconcile_at = CASE WHEN $3 THEN NULL ELSE reconcile_at END
WHERE purchase_id = $1 AND status = 'pending'
RETURNING true
"""
_EXPIRE: Final = """
WITH due AS MATERIALIZED (
    SELECT purchase_id FROM glam.credit_purchases
    WHERE status = 'pending' AND expires_at <= least($1, now())
    ORDER BY expires_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE glam.credit_purchases p SET status = 'expired'
FROM due WHERE p.purchase_id = due.purchase_id AND p.status = 'pending'
RETURNING p.purchase_id
"""

# Taking one is at the same time the decision when it is looked at again: no second write is needed
# where the platform has nothing new, or where whoever took it dies. Here too a clock that is ahead
# does not count: it would ask before the charge is made, and take the answer for the last word.
_CLAIM_UNSURE: Final = f"""
WITH due AS MATERIALIZED (
    SELECT purchase_id AS id FROM glam.credit_purchases
    WHERE reconcile_at <= least($1, now()) AND platform = ANY($2)
    ORDER BY reconcile_at
    LIMIT $3
    FOR UPDATE SKIP LOCKED
)
UPDATE glam.credit_purchases
SET reconcile_at = least($1, now())
    + least(greatest((least($1, now()) - created_at) / 2, $4::interval), $5::interval)
FROM due WHERE purchase_id = due.id
RETURNING {PURCHASE_COLUMNS}, least($1, now()) - created_at AS age
"""  # noqa: S608 - our own constants
_RECONCILED: Final = """
UPDATE glam.credit_purchases SET reconcile_at = NULL WHERE purchase_id = $1
"""


async def open_record(connection: Connection, merchant_id: UUID, now: datetime) -> bool:
    """Make an empty billing record; False where there is one, which stays as it is."""
    return await connection.execute(_OPEN, merchant_id, now) == "INSERT 0 1"


async def record(connection: Connection | Database, merchant_id: UUID) -> Record | None:
    """A merchant's billing record."""
    row = await connection.fetchrow(_RECORD, merchant_id)
    return None if row is None else as_record(row)


def as_record(row: Row) -> Record:
    """A record of a row with RECORD_COLUMNS."""
    return Record(
        merchant_id=row["merchant_id"],
        trial_started_at=_aware(row["trial_started_at"]),
        trial_ends_at=_aware(row["trial_ends_at"]),
        credits_purchased=row["credits_purchased"],
        last_purchase_at=_aware(row["last_purchase_at"]),
    )


async def start_trial(
    connection: Connection, merchant_id: UUID, *, now: datetime, ends_at: datetime
) -> bool:
    """Begin the trial; False where it was begun before, or there is no record."""
    return bool(await connection.fetchval(_START_TRIAL, merchant_id, now, ends_at))


async def note_trial(
    connection: Connection, merchant_id: UUID, *, now: datetime, ends_at: datetime
) -> bool:
    """Have a trial stand in the record, this one unless there is one; False without a record."""
    began, ends_at = _finite(now), _finite(ends_at)
    return bool(await connection.fetchval(_NOTE_TRIAL, merchant_id, began, ends_at))


async def lock_record(connection: Connection, merchant_id: UUID) -> bool:
    """Keep everybody else from changing the record until the transaction ends; False without."""
    return bool(await connection.fetchval(_LOCK_RECORD, merchant_id))


async def expire_trials(
    connection: Connection, *, now: datetime, limit: int
) -> list[tuple[UUID, datetime]]:
    """Mark trials that are over and that nobody has marked; whose, and when they ended."""
    rows = await connection.fetch(_EXPIRE_TRIALS, now, limit)
    return [(row[0], _aware(row[1])) for row in rows]


async def add_purchased(
    connection: Connection, merchant_id: UUID, *, credits_: int, now: datetime
) -> None:
    """Count a completed purchase in the merchant's record."""
    await connection.execute(_ADD_PURCHASED, merchant_id, credits_, now)


async def insert_purchase(
    connection: Connection | Database, purchase: Purchase, *, can_be_asked: bool
) -> bool:
    """Insert a purchase that has no charge yet, and count it; False where there is no record.

    `can_be_asked`: its platform is to be asked about it, from RECONCILE_FIRST on.
    """
    tag = await connection.execute(
        _INSERT,
        purchase.purchase_id,
        purchase.merchant_id,
        purchase.pack,
        purchase.credits,
        purchase.price.amount_minor,
        purchase.price.currency,
        purchase.status,
        purchase.platform,
        purchase.return_url,
        purchase.is_test,
        purchase.failure,
        can_be_asked,
        purchase.created_at,
        purchase.expires_at,
        RECONCILE_FIRST,
    )
    return tag == "INSERT 0 1"


async def purchase(connection: Connection | Database, purchase_id: UUID) -> Purchase | None:
    """One purchase."""
    return _maybe(await connection.fetchrow(_ONE, purchase_id))


async def lock_purchase(connection: Connection, purchase_id: UUID) -> Purchase | None:
    """One purchase, which nobody else changes until the transaction ends."""
    return _maybe(await connection.fetchrow(_LOCK, purchase_id))


async def purchase_by_charge(
    database: Database, platforms: Sequence[PlatformName], charge_ids: Sequence[str]
) -> Purchase | None:
    """The purchase whose charge has one of these ids."""
    return _maybe(await database.fetchrow(_BY_CHARGE, list(platforms), list(charge_ids)))


async def purchases_after(
    database: Database, merchant_id: UUID, *, after: tuple[datetime, UUID], limit: int
) -> list[Purchase]:
    """The merchant's purchases that are older than this one, newest first."""
    return [as_purchase(row) for row in await database.fetch(_AFTER, merchant_id, *after, limit)]


async def purchases_at(
    connection: Connection | Database, merchant_id: UUID, *, offset: int, limit: int
) -> list[Purchase]:
    """The merchant's purchases from this place on, newest first."""
    return [as_purchase(row) for row in await connection.fetch(_AT, merchant_id, offset, limit)]


async def purchase_total(database: Database, merchant_id: UUID) -> int:
    """How many purchases the merchant has begun; none without a record."""
    return int(await database.fetchval(_TOTAL, merchant_id) or 0)


async def bind_charge(
    connection: Connection, purchase_id: UUID, charge_id: str, *, checkout_url: str | None
) -> Purchase | None:
    """Write the charge's id, and where it is paid; None where the purchase has another charge.

    UniqueViolationError where another purchase has this charge.
    """
    return _maybe(await connection.fetchrow(_BIND, purchase_id, charge_id, checkout_url))


async def complete(connection: Connection, purchase_id: UUID, now: datetime) -> bool:
    """Mark it completed; False where it is."""
    return bool(await connection.fetchval(_COMPLETE, purchase_id, now))


async def fail(
    connection: Connection | Database, purchase_id: UUID, *, failure: str, is_final: bool
) -> bool:
    """Mark a pending one failed; `is_final`: its platform need not be asked any more."""
    return bool(await connection.fetchval(_FAIL, purchase_id, failure, is_final))


async def expire(database: Database, *, now: datetime, limit: int) -> list[UUID]:
    """Mark pending purchases whose time is over."""
    return [row[0] for row in await database.fetch(_EXPIRE, now, limit)]


async def claim_unsure(
    database: Database, *, now: datetime, platforms: Sequence[PlatformName], limit: int
) -> list[tuple[Purchase, timedelta]]:
    """Take purchases whose platform is to be asked now, and how old they are.

    Nobody else takes them meanwhile.
    """
    rows = await database.fetch(
        _CLAIM_UNSURE, now, list(platforms), limit, RECONCILE_FIRST, RECONCILE_PAUSE_MAX
    )
    return [(as_purchase(row), row["age"]) for row in rows]


async def reconciled(connection: Connection | Database, purchase_id: UUID) -> None:
    """Its platform need not be asked any more."""
    await connection.execute(_RECONCILED, purchase_id)


def _finite(at: datetime) -> datetime:
    """The nearest moment that comes back as it was written.

    The driver makes infinities of the calendar's two ends, which another service may well send for
    a trial without an end, and reads them without an offset: nothing can be compared with those.
    """
    return min(max(at, _FIRST), _LAST)


def _aware(at: MaybeTime) -> MaybeTime:
    """An infinity that was written by somebody else, in UTC; anything else as it is."""
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at


def _maybe(row: Row | None) -> Purchase | None:
    return None if row is None else as_purchase(row)


def as_purchase(row: Row) -> Purchase:
    """A purchase of a row with PURCHASE_COLUMNS."""
    # The table's checks hold the texts to these.
    platform: PlatformName = row["platform"]
    status: PurchaseStatus = row["status"]
    return Purchase(
        purchase_id=row["purchase_id"],
        merchant_id=row["merchant_id"],
        pack=row["pack"],
        credits=row["credits"],
        price=Money(row["amount_minor"], row["currency"]),
        status=status,
        platform=platform,
        platform_charge_id=row["platform_charge_id"],
        checkout_url=row["checkout_url"],
        return_url=row["return_url"],
        is_test=row["test"],
        failure=row["failure"],
        created_at=row["created_at"],
        completed_at=row["completed_at"],
        expires_at=row["expires_at"],
    )
