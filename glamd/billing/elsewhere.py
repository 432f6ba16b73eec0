"""Trials and purchases of another billing service, of which its events tell.

For as long as an older service and glamd run beside each other, a merchant may have its trial, or
buy, at either. What was had there has its credits and stands in the record here, once, however
often it is told. No event of ours tells of it again: that one was the other service's.
"""

from datetime import datetime
from typing import Final
from uuid import UUID

import structlog

from glamd.billing import store
from glamd.billing.grants import grant_bought, trial_command
from glamd.billing.model import BillingSettings, MerchantNotFoundError
from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import FieldError, InputError
from glamd.ids import as_uuid
from glamd.ledger.model import DuplicateTransactionError
from glamd.ledger.service import Ledger

log = structlog.get_logger()

_OTHER: Final = "it is not that of the purchase with this id"


class Elsewhere:
    """Gives what merchants had at another billing service its effect here."""

    def __init__(
        self, database: Database, *, ledger: Ledger, clock: Clock, settings: BillingSettings
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._clock = clock
        self._settings = settings

    async def trial(
        self, merchant_id: UUID, *, ends_at: datetime, amount: int | None, correlation_id: str
    ) -> bool:
        """See `Billing.trial_elsewhere`."""
        now = self._clock.now()
        command = trial_command(
            merchant_id,
            amount=self._settings.trial_credits if amount is None else amount,
            correlation_id=correlation_id,
        )
        async with self._database.transaction() as connection:
            # It may be over when we hear of it.
            began = min(now, ends_at)
            if not await store.note_trial(connection, merchant_id, now=began, ends_at=ends_at):
                raise MerchantNotFoundError
            try:
                granted = not (await self._ledger.apply_within(connection, command, now)).replayed
            except DuplicateTransactionError:
                # There is one trial, and the merchant has had it, with another number of credits.
                granted = False
        if granted:
            self._ledger.forget(merchant_id)
            log.info("trial_elsewhere", merchant_id=str(merchant_id), ends_at=ends_at.isoformat())
        return granted

    async def bought(
        self, merchant_id: UUID, *, purchase_id: str, amount: int, correlation_id: str
    ) -> bool:
        """See `Billing.credits_bought_elsewhere`."""
        now = self._clock.now()
        # One id is one reference, in whichever case its letters come.
        known_id = as_uuid(purchase_id)
        async with self._database.transaction() as connection:
            if known_id is not None:
                await self._complete(connection, known_id, merchant_id, amount, now)
            if not await store.lock_record(connection, merchant_id):
                raise MerchantNotFoundError
            granted = await grant_bought(
                connection,
                self._ledger,
                merchant_id=merchant_id,
                purchase_id=purchase_id if known_id is None else str(known_id),
                amount=amount,
                now=now,
                correlation_id=correlation_id,
            )
        if granted:
            self._ledger.forget(merchant_id)
            log.info("bought_elsewhere", merchant_id=str(merchant_id), purchase_id=purchase_id)
        return granted

    async def _complete(
        self,
        connection: Connection,
        purchase_id: UUID,
        merchant_id: UUID,
        amount: int,
        now: datetime,
    ) -> None:
        """Complete the purchase where we have it, brought over before it was paid there."""
        ours = await store.lock_purchase(connection, purchase_id)
        if ours is None:
            return
        wrong = [
            FieldError(name, _OTHER)
            for name, told, is_so in (
                ("merchant_id", merchant_id, ours.merchant_id),
                ("credits", amount, ours.credits),
            )
            if told != is_so
        ]
        if wrong:
            raise InputError("The purchase with this id is another one.", fields=wrong)
        await store.complete(connection, purchase_id, now)
