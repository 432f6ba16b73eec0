"""Credits for trials and purchases: under which references the ledger is asked for them.

Other billing services use the same references, so that whoever grants first is the only one.
"""

from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.billing import store
from glamd.db import Connection
from glamd.ledger.model import Command
from glamd.ledger.service import Ledger

TRIAL_REFERENCE_TYPE: Final = "trial"
PURCHASE_REFERENCE_TYPE: Final = "purchase"


def trial_command(merchant_id: UUID, *, amount: int, correlation_id: str) -> Command:
    """The grant of a merchant's trial. Raises InputError where `amount` cannot be granted."""
    return Command(
        merchant_id=merchant_id,
        operation="credit",
        amount=amount,
        reference_type=TRIAL_REFERENCE_TYPE,
        reference_id=f"TRIAL_GRANT_{merchant_id}",
        description="Credits of the trial",
        correlation_id=correlation_id,
    )


async def grant_bought(
    connection: Connection,
    ledger: Ledger,
    *,
    merchant_id: UUID,
    purchase_id: str,
    amount: int,
    now: datetime,
    correlation_id: str,
) -> bool:
    """Grant what was bought and count it in the record; False where that was done before.

    The caller has locked the record, if there is one: rows are locked in the order purchase,
    record, account. Raises AccountNotFoundError, DuplicateTransactionError, InputError.
    """
    command = Command(
        merchant_id=merchant_id,
        operation="credit",
        amount=amount,
        reference_type=PURCHASE_REFERENCE_TYPE,
        reference_id=purchase_id,
        description=f"{amount} credits bought",
        correlation_id=correlation_id,
    )
    if (await ledger.apply_within(connection, command, now)).replayed:
        # Whoever granted it, an import or another billing service, has counted it.
        return False
    await store.add_purchased(connection, merchant_id, credits_=amount, now=now)
    return True
