"""The rows of an import of billing; all of it in the transaction that it is given.

Rows are locked in the order of the rest of billing: purchases, then the record.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.billing.importing.model import Bills
from glamd.billing.model import Purchase, Record
from glamd.billing.store import PURCHASE_COLUMNS, RECORD_COLUMNS, as_purchase, as_record
from glamd.db import Connection

_PURCHASES: Final = f"""
SELECT {PURCHASE_COLUMNS} FROM glam.credit_purchases
WHERE merchant_id = $1 ORDER BY purchase_id FOR UPDATE
"""  # noqa: S608 - our own constants
_OPEN: Final = """
INSERT INTO glam.billing_records (merchant_id, created_at) VALUES ($1, $2)
ON CONFLICT (merchant_id) DO NOTHING
"""
_RECORD: Final = f"""
SELECT {RECORD_COLUMNS} FROM glam.billing_records WHERE merchant_id = $1 FOR UPDATE
"""  # noqa: S608 - our own constants
_REMOVE: Final = "DELETE FROM glam.credit_purchases WHERE merchant_id = $1"
_ADD: Final = """
INSERT INTO glam.credit_purchases (
    purchase_id, merchant_id, pack, credits, amount_minor, currency, status, platform,
    platform_charge_id, checkout_url, return_url, test, reconcile_at, created_at, completed_at,
    expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
"""
_WRITE: Final = """
UPDATE glam.billing_records
SET trial_started_at = $2, trial_ends_at = $3,
    trial_expired_at = CASE WHEN $3::timestamptz <= $7 THEN $3::timestamptz END,
    credits_purchased = $4, last_purchase_at = $5, created_at = least(created_at, $6),
    purchase_count = (SELECT count(*) FROM glam.credit_purchases WHERE merchant_id = $1)
WHERE merchant_id = $1
"""
_SUMS: Final = """
SELECT count(*), coalesce(sum(credits) FILTER (WHERE status = 'completed'), 0)::bigint,
       coalesce(sum(amount_minor), 0)::bigint
FROM glam.credit_purchases WHERE merchant_id = $1
"""


async def lock(connection: Connection, merchant_id: UUID, *, now: datetime) -> None:
    """Lock all that the merchant has; a record is made where there is none."""
    await connection.execute(_OPEN, merchant_id, now)
    await connection.fetch(_PURCHASES, merchant_id)
    await connection.fetch(_RECORD, merchant_id)


async def standing(
    connection: Connection, merchant_id: UUID
) -> tuple[Record | None, list[Purchase]]:
    """What the merchant has here; it is locked."""
    purchases = [as_purchase(row) for row in await connection.fetch(_PURCHASES, merchant_id)]
    row = await connection.fetchrow(_RECORD, merchant_id)
    return None if row is None else as_record(row), purchases


async def write(
    connection: Connection,
    bills: Bills,
    *,
    ask: Sequence[UUID],
    ask_at: datetime,
    now: datetime,
) -> None:
    """Have the merchant's billing be this; the platforms of `ask` are asked from then on.

    UniqueViolationError where a purchase's id or charge is there already, of another merchant.
    """
    record = bills.record
    merchant_id = record.merchant_id
    await connection.execute(_REMOVE, merchant_id)
    await connection.executemany(
        _ADD,
        [
            (
                one.purchase_id,
                merchant_id,
                one.pack,
                one.credits,
                one.price.amount_minor,
                one.price.currency,
                one.status,
                one.platform,
                one.platform_charge_id,
                one.checkout_url,
                one.return_url,
                one.is_test,
                ask_at if one.purchase_id in ask else None,
                one.created_at,
                one.completed_at,
                one.expires_at,
            )
            for one in bills.purchases
        ],
    )
    await connection.execute(
        _WRITE,
        merchant_id,
        record.trial_started_at,
        record.trial_ends_at,
        record.credits_purchased,
        record.last_purchase_at,
        bills.created_at or now,
        now,
    )


async def sums(connection: Connection, merchant_id: UUID) -> tuple[int, int, int]:
    """How many purchases there are, the credits of those completed, the prices of all."""
    row = await connection.fetchrow(_SUMS, merchant_id)
    assert row is not None
    return row[0], row[1], row[2]
