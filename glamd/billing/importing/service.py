"""Taking over one merchant's billing record with all of its purchases, in one transaction.

Nothing is granted and nothing published: the credits come with the ledger's import, and what
happened at the older service was told there. What is still open is glamd's from now on: a trial
that runs ends here, a purchase that is pending is asked about.
"""

import asyncio
from datetime import datetime
from typing import Final, NoReturn
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.billing.importing import store
from glamd.billing.importing.model import (
    PURCHASES,
    RECORDS,
    Bills,
    amounts_of,
    bills_of,
    read_purchase,
    read_record,
    state_of,
)
from glamd.billing.model import Purchase
from glamd.billing.reconciliation import OPEN_FOR
from glamd.billing.store import RECONCILE_FIRST
from glamd.clock import Clock
from glamd.db import Connection, Database, UniqueViolationError
from glamd.errors import InternalError
from glamd.ids import as_uuid
from glamd.ledger.importing.merchant import (
    REFUSED_LIMIT,
    OlderMerchant,
    Outcome,
    Refusal,
    RefusedError,
    Taken,
)
from glamd.ledger.importing.store import Record, lock_record, set_record

PURCHASES_LIMIT: Final = 50_000
"""Purchases of one merchant, which are all in memory at once."""

ASKED: Final = "shopify"
"""The platform that can be asked about a charge."""

log = structlog.get_logger()

_RECORDS = Counter(
    "glamd_billing_imported_merchants_total", "Older merchants' billing by outcome.", ["outcome"]
)
_NOTHING: Final = state_of(None, ())


class _TriedError(Exception):
    """The end of a dry run, so that its transaction is rolled back."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()
        self.taken = taken


class BillingImporter:
    """Takes older billing records and purchases; as `CreditImporter` in all else."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def take(
        self, merchant: OlderMerchant, *, strict: bool = False, dry_run: bool = False
    ) -> Taken:
        """Take a merchant: all of it is committed or nothing, also where this raises.

        `strict` refuses a record whose total is not that of its purchases; with `dry_run` nothing
        is kept. UnavailableError, after which the same may be taken again.
        """
        try:
            bills = await asyncio.to_thread(_read, merchant)
            if strict and bills.completed_credits != bills.record.credits_purchased:
                message = "It is not the sum of the completed purchases."
                _refuse(bills.record.merchant_id, "credits_purchased", message)
            taken = await self._take(bills, dry_run=dry_run)
        except RefusedError as error:
            taken = Taken(
                merchant_id=merchant.merchant_id, outcome="refused", refused=error.refused
            )
        if not dry_run:
            _RECORDS.labels(taken.outcome).inc()
            log.info(
                "older_billing_imported", merchant_id=merchant.merchant_id, outcome=taken.outcome
            )
        return taken

    async def _take(self, bills: Bills, *, dry_run: bool) -> Taken:
        now = self._clock.now()
        try:
            async with self._database.transaction() as connection:
                taken = await _within(connection, bills, now)
                if dry_run:
                    _end_dry_run(taken)
        except _TriedError as tried:
            return tried.taken
        except UniqueViolationError as error:
            is_charge = "charge" in error.constraint
            field = "platform_charge_id" if is_charge else "id"
            message = "Another purchase, here or in the older table, has it too."
            _refuse(bills.record.merchant_id, field, message, table=PURCHASES.name)
        return taken


async def _within(connection: Connection, bills: Bills, now: datetime) -> Taken:
    merchant_id = bills.record.merchant_id
    name = f"billing/{merchant_id}"
    left = await lock_record(connection, name, at=now)
    await store.lock(connection, merchant_id, now=bills.created_at or now)
    here = state_of(*await store.standing(connection, merchant_id))
    wanted = state_of(bills.record, bills.purchases)
    outcome: Outcome = "updated" if left.position else "taken"
    if here not in (left.position, wanted, _NOTHING):
        return _taken(bills, "moved_on", left.counts)
    if here == wanted and wanted != _NOTHING:
        return await _already(connection, bills, left, name=name, state=wanted, now=now)
    await store.write(
        connection, bills, ask=_open(bills, now), ask_at=now + RECONCILE_FIRST, now=now
    )
    counts = await _checked(connection, bills)
    await set_record(connection, name, source=wanted, position=wanted, counts=counts, at=now)
    if here == wanted and left.position:
        outcome = "already"
    return _taken(bills, outcome, counts)


async def _already(
    connection: Connection, bills: Bills, left: Record, *, name: str, state: str, now: datetime
) -> Taken:
    """It stands here as it is there, perhaps since both have moved on alike."""
    counts = await _checked(connection, bills)
    if left.position != state:
        await set_record(connection, name, source=state, position=state, counts=counts, at=now)
    return _taken(bills, "already", counts)


async def _checked(connection: Connection, bills: Bills) -> dict[str, int]:
    """The figures of what stands here now, which has to be what was wanted."""
    amounts = amounts_of(bills.purchases)
    count, credits_, amount = await store.sums(connection, bills.record.merchant_id)
    if (count, credits_, amount) != (
        len(bills.purchases),
        bills.completed_credits,
        sum(amounts.values()),
    ):
        log.error("imported_bills_do_not_agree", merchant_id=str(bills.record.merchant_id))
        raise InternalError("What was written is not what should have been.")
    return {
        "merchants": 1,
        "trials": int(bills.record.trial_started_at is not None),
        "purchases": count,
        "completed_credits": credits_,
        "credits_purchased": bills.record.credits_purchased,
        **amounts,
    }


def _read(merchant: OlderMerchant) -> Bills:
    """Read all of a merchant. Raises RefusedError."""
    merchant_id = as_uuid(merchant.merchant_id)
    if merchant_id is None or len(merchant.heads) > 1:
        message = "It is no UUID." if merchant_id is None else "There are several of this merchant."
        table = (RECORDS if merchant.heads else PURCHASES).name
        raise RefusedError([Refusal(table, merchant.merchant_id[:64], "merchant_id", message)])
    wrong: list[Refusal] = []
    purchases: list[Purchase] = []
    record = None
    try:
        record = read_record(merchant.heads[0]) if merchant.heads else None
    except RefusedError as error:
        wrong += error.refused
    for chunk in merchant.chunks():
        for row in chunk:
            try:
                purchases.append(read_purchase(row, merchant_id))
            except RefusedError as error:
                wrong += error.refused
        if len(purchases) > PURCHASES_LIMIT:
            message = f"There are more than {PURCHASES_LIMIT} of this merchant."
            wrong.append(Refusal(PURCHASES.name, str(merchant_id), "id", message))
        if len(wrong) >= REFUSED_LIMIT or len(purchases) > PURCHASES_LIMIT:
            break
    if wrong:
        raise RefusedError(wrong)
    return bills_of(record, purchases, merchant_id)


def _open(bills: Bills, now: datetime) -> list[UUID]:
    """Purchases whose charge may still be paid, or was without the older service's knowing."""
    return [
        one.purchase_id
        for one in bills.purchases
        if one.platform == ASKED
        and (
            one.status == "pending" or (one.status == "expired" and now - one.created_at < OPEN_FOR)
        )
    ]


def _taken(bills: Bills, outcome: Outcome, counts: dict[str, int]) -> Taken:
    differs = bills.record.credits_purchased - bills.completed_credits
    return Taken(
        merchant_id=str(bills.record.merchant_id),
        outcome=outcome,
        figures=counts,
        notes={"credits_purchased_differs_by": differs} if differs else {},
    )


def _end_dry_run(taken: Taken) -> NoReturn:
    raise _TriedError(taken)


def _refuse(merchant_id: UUID, field: str, message: str, *, table: str = RECORDS.name) -> NoReturn:
    raise RefusedError([Refusal(table, str(merchant_id), field, message)])
