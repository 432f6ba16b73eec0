"""Where a report of a charge takes effect: once, whoever brings it, and however often.

Webhooks, events and reconciliation all end here. The purchase is locked, the rules say what
becomes of it, and its state, its credits and its event are committed together. What is repeated, or
comes in another order, meets a purchase that has moved on and changes nothing.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final, Literal, TypeAlias
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.billing import store
from glamd.billing.grants import grant_bought
from glamd.billing.model import (
    CREDITS_PURCHASED,
    Outcome,
    PlatformName,
    Purchase,
    PurchaseNotFoundError,
    Report,
    Shop,
    ids_of_charge,
    judge,
)
from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.ledger.service import Ledger
from glamd.outbox import Outbox

Source = Literal["webhook", "event", "reconciliation"]

ShopOf: TypeAlias = Callable[[UUID], Awaitable[Shop]]
"""The shop of a merchant; NotFoundError where there is no such merchant."""

AndThen: TypeAlias = Callable[[Connection, Outcome], Awaitable[None]]
"""Awaited last in the transaction of an effect, also of one that changes nothing."""

log = structlog.get_logger()

_SETTLED: Final = Counter(
    "glamd_billing_reports_total",
    "What platforms said of charges, by what came of it.",
    ["platform", "source", "outcome"],
)


class Settlement:
    """Gives reports of charges their effect."""

    def __init__(
        self, database: Database, *, ledger: Ledger, shop_of: ShopOf, clock: Clock
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._shop_of = shop_of
        self._clock = clock
        self._outbox = Outbox("glam")

    async def settle_charge(
        self,
        report: Report,
        platforms: Sequence[PlatformName],
        *,
        source: Source,
        correlation_id: str,
        and_then: AndThen | None = None,
    ) -> Outcome:
        """Settle the purchase whose charge this is; `settle`'s errors.

        PurchaseNotFoundError also where the charge's id is not stored yet.
        """
        ids = ids_of_charge(report.charge_id)
        found = await store.purchase_by_charge(self._database, platforms, ids)
        if found is None:
            raise PurchaseNotFoundError
        return await self.settle(
            found, report, source=source, correlation_id=correlation_id, and_then=and_then
        )

    async def settle(
        self,
        purchase: Purchase,
        report: Report,
        *,
        source: Source,
        correlation_id: str,
        and_then: AndThen | None = None,
    ) -> Outcome:
        """Do what the report does to this purchase, which it need not name.

        A purchase without a charge gets this one. Raises NotFoundError where the merchant or its
        account is missing; ConflictError where the purchase's credits were granted otherwise, or
        the charge is another purchase's; TransientError, after which the same may be done again.
        """
        # Before the transaction: whoever holds a connection of the pool must not wait for another.
        shop = None if report.shop is None else await self._shop_of(purchase.merchant_id)
        now = self._clock.now()
        async with self._database.transaction() as connection:
            locked = await store.lock_purchase(connection, purchase.purchase_id)
            if locked is None:
                raise PurchaseNotFoundError
            outcome = judge(locked, report, shop)
            if not outcome.startswith("wrong_"):
                if locked.platform_charge_id is None:
                    await store.bind_charge(
                        connection, locked.purchase_id, report.charge_id, checkout_url=None
                    )
                await self._change(
                    connection, locked, report, outcome, now=now, correlation_id=correlation_id
                )
            if and_then is not None:
                await and_then(connection, outcome)
        if outcome == "completed":
            self._ledger.forget(locked.merchant_id)
        _tell(locked, report, outcome, source)
        return outcome

    async def _change(
        self,
        connection: Connection,
        purchase: Purchase,
        report: Report,
        outcome: Outcome,
        *,
        now: datetime,
        correlation_id: str,
    ) -> None:
        purchase_id = purchase.purchase_id
        if outcome == "completed":
            await self._complete(connection, purchase, now, correlation_id)
        elif outcome == "failed":
            failure = f"CHARGE_{report.status.upper()}"
            await store.fail(connection, purchase_id, failure=failure, is_final=True)
        elif report.is_final:
            await store.reconciled(connection, purchase_id)

    async def _complete(
        self, connection: Connection, purchase: Purchase, now: datetime, correlation_id: str
    ) -> None:
        merchant_id, purchase_id = purchase.merchant_id, str(purchase.purchase_id)
        completed = await store.complete(connection, purchase.purchase_id, now)
        assert completed, "the row is locked, and was not completed"
        await store.lock_record(connection, merchant_id)
        # Where the reference has had this effect, which an import or another billing service may
        # have given it, it has no second one.
        await grant_bought(
            connection,
            self._ledger,
            merchant_id=merchant_id,
            purchase_id=purchase_id,
            amount=purchase.credits,
            now=now,
            correlation_id=correlation_id,
        )
        await self._outbox.add(
            connection,
            subject=CREDITS_PURCHASED,
            merchant_id=merchant_id,
            correlation_id=correlation_id,
            data={
                "merchant_id": str(merchant_id),
                "purchase_id": purchase_id,
                "credits": purchase.credits,
                "amount": purchase.price.amount,
                "platform": purchase.platform,
            },
        )


def _tell(purchase: Purchase, report: Report, outcome: Outcome, source: Source) -> None:
    """Count and log what came of a report, once that is committed."""
    _SETTLED.labels(purchase.platform, source, outcome).inc()
    about = {
        "purchase_id": str(purchase.purchase_id),
        "merchant_id": str(purchase.merchant_id),
        "platform": purchase.platform,
        "source": source,
    }
    if outcome.startswith("wrong_"):
        # Somebody may have paid for something else; that is for a human to find out.
        write = log.error if report.is_paid else log.warning
        write("charge_report_refused", reason=outcome, **about)
    elif outcome != "unchanged":
        log.info("purchase_settled", outcome=outcome, before=purchase.status, **about)
