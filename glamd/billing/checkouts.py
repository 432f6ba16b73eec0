"""Beginning a purchase: a row that is pending, then the platform, then where the merchant pays.

The row is committed before the platform is asked for anything, so that whatever happens then, there
is something that remembers to find out. Nothing is paid here: what became of a charge takes effect
in `settlement`.
"""

import asyncio
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.billing import store
from glamd.billing.model import (
    PLATFORMS,
    BillingSettings,
    MerchantNotFoundError,
    PlatformError,
    PlatformName,
    Purchase,
    PurchaseUnansweredError,
    judge,
)
from glamd.billing.platforms.interface import (
    Checkout,
    NotSoldError,
    Order,
    Platform,
    UnansweredError,
)
from glamd.billing.return_urls import check_return_url
from glamd.billing.settlement import ShopOf
from glamd.clock import Clock
from glamd.db import Database, OutcomeUnknownError, UniqueViolationError
from glamd.errors import FieldError, InputError, TransientError, UnavailableError
from glamd.idempotency import Keep
from glamd.ids import uuid7

UNANSWERED_RETRY_S: Final = 60
"""When whoever got no answer may look again: the platform has been asked by then."""

STORE_ATTEMPTS: Final = 3
STORE_PAUSE_S: Final = 0.1
"""How often, and after which pause, doubled each time, a charge that was made is stored."""

log = structlog.get_logger()

_CHECKOUTS: Final = Counter(
    "glamd_billing_checkouts_total",
    "Purchases begun; `offered`, or why there is nothing to pay.",
    ["platform", "outcome"],
)


def order_of(purchase: Purchase) -> Order:
    """What a platform is told of a purchase."""
    return Order(
        purchase_id=purchase.purchase_id,
        merchant_id=purchase.merchant_id,
        credits=purchase.credits,
        price=purchase.price,
        is_test=purchase.is_test,
        return_url=purchase.return_url,
        created_at=purchase.created_at,
        expires_at=purchase.expires_at,
    )


class Checkouts:
    """Begins purchases at the platforms that are configured; the others of the contract refuse."""

    def __init__(
        self,
        database: Database,
        *,
        platforms: Sequence[Platform],
        shop_of: ShopOf,
        clock: Clock,
        settings: BillingSettings,
    ) -> None:
        self._database = database
        self._platforms = {one.name: one for one in platforms}
        self._shop_of = shop_of
        self._clock = clock
        self._settings = settings

    async def begin(
        self,
        merchant_id: UUID,
        *,
        pack: str,
        platform: str,
        return_url: str,
        correlation_id: str,
        keep: Keep[Purchase] | None,
    ) -> Purchase:
        """Begin to buy; see `Billing.purchase`."""
        begun = await self._begin(merchant_id, pack, platform, return_url)
        seller = self._platforms.get(begun.platform)
        if seller is None:
            raise _refused(begun, NotSoldError("NOT_CONFIGURED"), correlation_id)
        try:
            checkout = await seller.check_out(order_of(begun))
        except NotSoldError as error:
            await self._fail(begun, error.code)
            raise _refused(begun, error, correlation_id) from None
        except UnansweredError as error:
            _count(begun, error.code, correlation_id)
            raise PurchaseUnansweredError(
                begun.purchase_id, retry_after_s=UNANSWERED_RETRY_S
            ) from None
        wrong = judge(begun, checkout.report, None)
        if wrong.startswith("wrong_"):
            # Nobody is told where to pay this charge, so nobody pays it.
            await self._fail(begun, "OTHER_CHARGE")
            raise _refused(begun, NotSoldError("OTHER_CHARGE"), correlation_id)
        offered = await self._offer(begun, checkout, keep, correlation_id)
        _count(offered, "offered", correlation_id)
        return offered

    async def _begin(
        self, merchant_id: UUID, pack_name: str, platform: str, return_url: str
    ) -> Purchase:
        """Check what was asked for, and store the purchase; from here on it exists."""
        pack = self._settings.pack(pack_name)
        name = _platform(platform)
        shop = await self._shop_of(merchant_id)
        check_return_url(return_url, self._settings.return_hosts | {shop.domain})
        seller = self._platforms.get(name)
        now = self._clock.now()
        begun = Purchase(
            purchase_id=uuid7(now),
            merchant_id=merchant_id,
            pack=pack_name,
            credits=pack.credits,
            price=pack.price,
            status="pending" if seller else "failed",
            platform=name,
            platform_charge_id=None,
            checkout_url=None,
            return_url=return_url,
            is_test=seller is not None and seller.is_test,
            failure=None if seller else "NOT_CONFIGURED",
            created_at=now,
            completed_at=None,
            expires_at=now + self._settings.purchase_life,
        )
        # That it is to be asked stands there from the start: we may die before we hear an answer.
        can_be_asked = seller is not None and seller.can_be_asked
        if not await store.insert_purchase(self._database, begun, can_be_asked=can_be_asked):
            raise MerchantNotFoundError
        return begun

    async def _offer(
        self,
        begun: Purchase,
        checkout: Checkout,
        keep: Keep[Purchase] | None,
        correlation_id: str,
    ) -> Purchase:
        """Store the charge, which is worth some patience: where it is paid is told only once."""
        pause_s = STORE_PAUSE_S
        for attempt in range(1, STORE_ATTEMPTS + 1):
            try:
                async with self._database.transaction() as connection:
                    offered = await store.bind_charge(
                        connection,
                        begun.purchase_id,
                        checkout.report.charge_id,
                        checkout_url=checkout.url,
                    )
                    if offered is not None and keep is not None:
                        await keep(connection, offered)
            except UniqueViolationError:
                offered = None
            except TransientError as error:
                # An answer is kept once: after an outcome that is unknown, its key will tell.
                is_kept = keep is not None and isinstance(error, OutcomeUnknownError)
                if is_kept or attempt == STORE_ATTEMPTS:
                    _count(begun, "unstored", correlation_id)
                    raise
                await asyncio.sleep(pause_s)
                pause_s *= 2
                continue
            if offered is None:
                await self._fail(begun, "OTHER_CHARGE")
                raise _refused(begun, NotSoldError("OTHER_CHARGE"), correlation_id)
            return offered
        raise AssertionError("the last attempt returns or raises")

    async def _fail(self, purchase: Purchase, failure: str) -> None:
        """Mark it failed; where that cannot be written, reconciliation finds that it has failed."""
        try:
            await store.fail(self._database, purchase.purchase_id, failure=failure, is_final=True)
        except TransientError as error:
            log.warning(
                "purchase_failure_unwritten",
                purchase_id=str(purchase.purchase_id),
                code=error.code,
            )


def _platform(name: str) -> PlatformName:
    for known in PLATFORMS:
        if name == known:
            return known
    message = f"it is one of {', '.join(PLATFORMS)}"
    raise InputError("There is no such platform.", fields=(FieldError("platform", message),))


def _refused(
    purchase: Purchase, error: NotSoldError, correlation_id: str
) -> PlatformError | UnavailableError:
    """What the caller is told of a purchase that has failed."""
    _count(purchase, error.code, correlation_id)
    if error.may_pass:
        return UnavailableError(
            "The platform cannot be reached now; nothing was bought.",
            retry_after_s=error.retry_after_s,
        )
    return PlatformError(
        f"{purchase.platform} did not take purchase {purchase.purchase_id}: {error.code}."
    )


def _count(purchase: Purchase, outcome: str, correlation_id: str) -> None:
    _CHECKOUTS.labels(purchase.platform, outcome).inc()
    write = log.info if outcome == "offered" else log.warning
    write(
        "purchase_begun",
        outcome=outcome,
        purchase_id=str(purchase.purchase_id),
        merchant_id=str(purchase.merchant_id),
        platform=purchase.platform,
        pack=purchase.pack,
        correlation_id=correlation_id,
    )
