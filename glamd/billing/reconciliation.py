"""Asking platforms what became of purchases that we are not sure of.

There are three kinds of them: the answer to making the charge did not come, or could not be stored,
or we died in between; a webhook got lost; the purchase has expired here and may still be paid there
(at Shopify for two days). Each is asked about again and again, ever more rarely, until the platform
has said its last word or nothing more can come.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter

from glamd.billing import store
from glamd.billing.checkouts import order_of
from glamd.billing.model import Purchase, Report
from glamd.billing.platforms.interface import NotSoldError, Platform, UnansweredError
from glamd.billing.settlement import Settlement
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import GlamError, TransientError

BATCH: Final = 8
"""Purchases that are asked about at once."""

MADE_WITHIN: Final = timedelta(minutes=10)
"""A charge that the platform does not have after this was never made."""

OPEN_FOR: Final = timedelta(days=3)
"""Beyond it a charge that nobody has paid is not paid any more: Shopify's last two days."""

GIVE_UP_AFTER: Final = timedelta(days=30)
"""A platform that could not be asked for so long will not be asked any more."""

log = structlog.get_logger()

_ASKED: Final = Counter(
    "glamd_billing_reconciliations_total",
    "Questions to platforms about purchases; `answered`, `no_charge`, or why there was no answer.",
    ["platform", "outcome"],
)


class Reconciliation:
    """Asks the platforms that answer; several nodes share the work."""

    def __init__(
        self,
        database: Database,
        *,
        settlement: Settlement,
        platforms: Sequence[Platform],
        clock: Clock,
    ) -> None:
        self._database = database
        self._settlement = settlement
        self._platforms = {one.name: one for one in platforms if one.can_be_asked}
        self._clock = clock

    async def run_once(self) -> int:
        """Ask about up to BATCH purchases that are due; how many. Raises TransientError."""
        if not self._platforms:
            return 0
        due = await store.claim_unsure(
            self._database, now=self._clock.now(), platforms=list(self._platforms), limit=BATCH
        )
        async with asyncio.TaskGroup() as group:
            for purchase, age in due:
                group.create_task(
                    self._one(purchase, age), name=f"reconcile:{purchase.purchase_id}"
                )
        return len(due)

    async def _one(self, purchase: Purchase, age: timedelta) -> None:
        """Ask about one purchase. Raises nothing: one that fails must not stop the others."""
        try:
            await self._ask(purchase, age)
        except (NotSoldError, UnansweredError) as error:
            self._count(purchase, error.code)
            await self._give_up_some_day(purchase, age)
        except TransientError as error:
            self._count(purchase, error.code)
        except GlamError as error:
            # Such as a merchant without an account, or credits that were granted otherwise.
            self._count(purchase, error.code)
            await self._give_up_some_day(purchase, age)
        except Exception:
            log.exception("reconciliation_crashed", **_ids(purchase))

    async def _ask(self, purchase: Purchase, age: timedelta) -> None:
        platform = self._platforms[purchase.platform]
        report = await platform.find(order_of(purchase), purchase.platform_charge_id)
        if report is None:
            self._count(purchase, "no_charge")
            await self._without_charge(purchase, age)
            return
        self._count(purchase, "answered")
        outcome = await self._settlement.settle(
            purchase,
            report,
            source="reconciliation",
            correlation_id=f"reconciliation-{purchase.purchase_id}",
        )
        if outcome.startswith("wrong_"):
            await self._give_up_some_day(purchase, age)
        elif not report.is_final:
            await self._close(purchase, age, report)

    async def _without_charge(self, purchase: Purchase, age: timedelta) -> None:
        """The platform has no such charge: certain, once it has had the time to make it."""
        if age > MADE_WITHIN:
            failure = "NOT_MADE" if purchase.platform_charge_id is None else "CHARGE_GONE"
            is_over = age > OPEN_FOR
            purchase_id = purchase.purchase_id
            if await store.fail(self._database, purchase_id, failure=failure, is_final=is_over):
                log.info("purchase_failed", reason=failure, **_ids(purchase))
            elif is_over:
                await store.reconciled(self._database, purchase_id)

    async def _close(self, purchase: Purchase, age: timedelta, report: Report) -> None:
        """Ask no more about a charge that was open for so long that nobody can pay it."""
        if age > OPEN_FOR:
            log.info("purchase_left_open", status=report.status, **_ids(purchase))
            await store.reconciled(self._database, purchase.purchase_id)

    async def _give_up_some_day(self, purchase: Purchase, age: timedelta) -> None:
        if age <= GIVE_UP_AFTER:
            return
        log.error("purchase_unreconciled", **_ids(purchase))
        try:
            await store.reconciled(self._database, purchase.purchase_id)
        except TransientError as error:
            self._count(purchase, error.code)

    def _count(self, purchase: Purchase, outcome: str) -> None:
        _ASKED.labels(purchase.platform, outcome).inc()
        if outcome not in {"answered", "no_charge"}:
            log.warning("purchase_not_reconciled", reason=outcome, **_ids(purchase))


def _ids(purchase: Purchase) -> dict[str, str]:
    return {
        "purchase_id": str(purchase.purchase_id),
        "merchant_id": str(purchase.merchant_id),
        "platform": purchase.platform,
    }
