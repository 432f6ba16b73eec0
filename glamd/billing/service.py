"""Trials and purchases as the rest of glamd sees them.

How a purchase begins stands in `checkouts`, what platforms say of it later takes effect in
`settlement`. Whose merchant a caller may name, and which HTTP status an error has, is decided
above.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd import cursors
from glamd.billing import store
from glamd.billing.checkouts import Checkouts
from glamd.billing.elsewhere import Elsewhere
from glamd.billing.grants import trial_command
from glamd.billing.model import (
    PLATFORMS,
    TRIAL_STARTED,
    BillingSettings,
    MerchantNotFoundError,
    Outcome,
    Overview,
    Purchase,
    PurchaseNotFoundError,
    PurchasePage,
    Record,
    Report,
    Trial,
    TrialAlreadyUsedError,
    TrialStarted,
    trial_of,
)
from glamd.billing.platforms.interface import Platform
from glamd.billing.settlement import Settlement, ShopOf
from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import FieldError, InputError
from glamd.idempotency import Keep
from glamd.ledger.model import DuplicateTransactionError
from glamd.ledger.service import Ledger
from glamd.outbox import Outbox

PAGE_LIMIT: Final = 200
RECENT: Final = 5
"""Purchases in an overview."""


log = structlog.get_logger()

_TRIALS: Final = Counter("glamd_billing_trials_total", "Trials by what happened.", ["event"])


class Billing:
    """The trials and purchases of all merchants.

    `platforms` are those that are configured; the others of the contract refuse. `shop_of` gives a
    merchant's shop.
    """

    def __init__(
        self,
        database: Database,
        *,
        ledger: Ledger,
        platforms: Sequence[Platform],
        shop_of: ShopOf,
        clock: Clock,
        settings: BillingSettings,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._clock = clock
        self._settings = settings
        self._outbox = Outbox("glam")
        self._checkouts = Checkouts(
            database, platforms=platforms, shop_of=shop_of, clock=clock, settings=settings
        )
        self._elsewhere = Elsewhere(database, ledger=ledger, clock=clock, settings=settings)
        self.settlement = Settlement(database, ledger=ledger, shop_of=shop_of, clock=clock)

    async def merchant_created(self, connection: Connection, merchant_id: UUID) -> bool:
        """Make the merchant's empty record, in this transaction; False where there is one."""
        return await store.open_record(connection, merchant_id, self._clock.now())

    # ---- trials

    async def overview(self, merchant_id: UUID) -> Overview:
        """What the merchant has had. Raises MerchantNotFoundError."""
        async with self._database.connection() as connection:
            record = await _record(connection, merchant_id)
            recent = await store.purchases_at(connection, merchant_id, offset=0, limit=RECENT)
        return Overview(
            trial=trial_of(record, self._clock.now()),
            credits_purchased=record.credits_purchased,
            last_purchase_at=record.last_purchase_at,
            recent_purchases=tuple(recent),
        )

    async def trial(self, merchant_id: UUID) -> Trial:
        """The merchant's trial. Raises MerchantNotFoundError."""
        async with self._database.connection() as connection:
            return trial_of(await _record(connection, merchant_id), self._clock.now())

    async def start_trial(
        self, merchant_id: UUID, *, correlation_id: str, keep: Keep[TrialStarted] | None = None
    ) -> TrialStarted:
        """Begin the trial and grant its credits, in one transaction with the events of both.

        Raises TrialAlreadyUsedError, also where another billing service's trial was granted;
        MerchantNotFoundError; AccountNotFoundError; UnavailableError; what `keep` raises.
        """
        now = self._clock.now()
        ends_at = now + timedelta(days=self._settings.trial_days)
        started = TrialStarted(ends_at=ends_at, credits_granted=self._settings.trial_credits)
        async with self._database.transaction() as connection:
            if not await store.start_trial(connection, merchant_id, now=now, ends_at=ends_at):
                await _record(connection, merchant_id)
                raise TrialAlreadyUsedError
            await self._grant_trial(connection, merchant_id, now, correlation_id)
            await self._outbox.add(
                connection,
                subject=TRIAL_STARTED,
                merchant_id=merchant_id,
                correlation_id=correlation_id,
                data={
                    "merchant_id": str(merchant_id),
                    "ends_at": ends_at.isoformat(),
                    "credits": started.credits_granted,
                },
            )
            if keep is not None:
                await keep(connection, started)
        self._ledger.forget(merchant_id)
        _TRIALS.labels("started").inc()
        log.info("trial_started", merchant_id=str(merchant_id), ends_at=ends_at.isoformat())
        return started

    async def _grant_trial(
        self, connection: Connection, merchant_id: UUID, now: datetime, correlation_id: str
    ) -> None:
        command = trial_command(
            merchant_id, amount=self._settings.trial_credits, correlation_id=correlation_id
        )
        try:
            applied = await self._ledger.apply_within(connection, command, now)
        except DuplicateTransactionError:
            raise TrialAlreadyUsedError from None
        if applied.replayed:
            raise TrialAlreadyUsedError

    async def trial_elsewhere(
        self,
        merchant_id: UUID,
        *,
        ends_at: datetime,
        credits: int | None,  # noqa: A002 - the event's own word
        correlation_id: str,
    ) -> bool:
        """A trial that another billing service began (`evt.billing.trial.started.v1`).

        The record has it from now on, and the merchant its credits (None: as many as here), in one
        transaction. A merchant that has had a trial keeps that one, whatever it was, and False is
        returned. Raises MerchantNotFoundError and AccountNotFoundError, after both of which it may
        succeed later; InputError; UnavailableError.
        """
        return await self._elsewhere.trial(
            merchant_id, ends_at=ends_at, amount=credits, correlation_id=correlation_id
        )

    # ---- purchases

    async def credits_bought_elsewhere(
        self,
        merchant_id: UUID,
        *,
        purchase_id: str,
        credits: int,  # noqa: A002 - the event's own word
        correlation_id: str,
    ) -> bool:
        """Credits that another billing service sold (`evt.billing.credits.purchased.v1`).

        They are granted and counted in the record, in one transaction; False where the purchase had
        that effect before. One that is stored here as well is completed by it. Raises
        MerchantNotFoundError and AccountNotFoundError, after both of which it may succeed later;
        InputError, also where the id is of another merchant's purchase or of one of other credits;
        DuplicateTransactionError where the id had another effect; UnavailableError.
        """
        return await self._elsewhere.bought(
            merchant_id, purchase_id=purchase_id, amount=credits, correlation_id=correlation_id
        )

    async def purchase(
        self,
        merchant_id: UUID,
        *,
        pack: str,
        platform: str,
        return_url: str,
        correlation_id: str,
        keep: Keep[Purchase] | None = None,
    ) -> Purchase:
        """Begin to buy a pack; its `checkout_url` is where the merchant pays.

        InputError (`INVALID_PACK`, or the field that is wrong) and NotFoundError before anything is
        stored. After that the purchase stays, whatever is raised: as failed with PlatformError, and
        with UnavailableError where the same may succeed later; as pending with
        PurchaseUnansweredError, and where the database went away under it.
        """
        return await self._checkouts.begin(
            merchant_id,
            pack=pack,
            platform=platform,
            return_url=return_url,
            correlation_id=correlation_id,
            keep=keep,
        )

    async def purchases(
        self, merchant_id: UUID, *, limit: int, page: int | None = None, cursor: str | None = None
    ) -> PurchasePage:
        """The merchant's purchases, newest first, by page number (from 1) or behind a cursor.

        `limit` is at most PAGE_LIMIT. InputError for a cursor that is not one of ours.
        """
        limit = max(1, min(limit, PAGE_LIMIT))
        if cursor is None:
            offset = ((page or 1) - 1) * limit
            rows = await store.purchases_at(
                self._database, merchant_id, offset=offset, limit=limit + 1
            )
        else:
            rows = await store.purchases_after(
                self._database, merchant_id, after=_decode(cursor), limit=limit + 1
            )
        items = tuple(rows[:limit])
        return PurchasePage(
            items=items,
            total=await store.purchase_total(self._database, merchant_id),
            next_cursor=_encode(items[-1]) if len(rows) > limit else None,
        )

    async def purchase_of(self, merchant_id: UUID, purchase_id: UUID) -> Purchase:
        """One of the merchant's purchases; PurchaseNotFoundError, for another merchant's too."""
        found = await store.purchase(self._database, purchase_id)
        if found is None or found.merchant_id != merchant_id:
            raise PurchaseNotFoundError
        return found

    async def charge_updated(
        self, *, charge_id: str, status: str, merchant_id: UUID, correlation_id: str
    ) -> Outcome:
        """What another service heard of a charge (`evt.webhook.app.purchase_updated.v1`).

        PurchaseNotFoundError where the charge is not known, which may be a question of time;
        InputError where it is another merchant's; otherwise the errors of `Settlement.settle`.
        """
        report = Report(charge_id=charge_id, status=status.lower(), merchant_id=merchant_id)
        outcome = await self.settlement.settle_charge(
            report, PLATFORMS, source="event", correlation_id=correlation_id
        )
        if outcome == "wrong_merchant":
            message = "it is not the merchant of this charge"
            raise InputError(
                "The charge is another merchant's.", fields=(FieldError("merchant_id", message),)
            )
        return outcome


async def _record(connection: Connection, merchant_id: UUID) -> Record:
    found = await store.record(connection, merchant_id)
    if found is None:
        raise MerchantNotFoundError
    return found


def _encode(last: Purchase) -> str:
    return cursors.encode(last.created_at, str(last.purchase_id))


def _decode(cursor: str) -> tuple[datetime, UUID]:
    at, purchase_id = cursors.decode(cursor)
    try:
        return at, UUID(purchase_id)
    except ValueError:
        raise cursors.not_ours() from None
