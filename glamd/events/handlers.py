"""What the five consumed events do: each is one call of the capability whose effect it is.

No rule stands here. A handler returns after the commit and bears the same event again, since its
reference, or the merchant's id, has one effect only. What is not there yet is NotFoundError, which
is tried again; what will never fit is InputError or ConflictError, which is a dead letter.
"""

import asyncio
from typing import Final

from glamd.billing.service import Billing
from glamd.events.envelope import Event
from glamd.events.schemas import (
    CreditsPurchased,
    MatchCompleted,
    MerchantCreated,
    PurchaseUpdated,
    TrialStarted,
)
from glamd.events.subscription import Subscription
from glamd.ledger.model import Applied, Command, InsufficientCreditsError
from glamd.ledger.service import Ledger
from glamd.onboarding import Onboarding

MATCH_COST: Final = 1
"""Credits."""


def subscriptions(
    *, onboarding: Onboarding, ledger: Ledger, billing: Billing
) -> tuple[Subscription, ...]:
    """All that is consumed."""
    handlers = Handlers(onboarding=onboarding, ledger=ledger, billing=billing)
    return (
        Subscription(MerchantCreated, handlers.merchant_created),
        Subscription(TrialStarted, handlers.trial_started),
        Subscription(CreditsPurchased, handlers.credits_purchased),
        # The ledger puts it into the merchant's mailbox before anybody waits.
        Subscription(
            MatchCompleted,
            handlers.match_completed,
            in_turn=False,
            settled=(InsufficientCreditsError,),
        ),
        Subscription(PurchaseUpdated, handlers.purchase_updated),
    )


class Handlers:
    """The effects, by subject."""

    def __init__(self, *, onboarding: Onboarding, ledger: Ledger, billing: Billing) -> None:
        self._onboarding = onboarding
        self._ledger = ledger
        self._billing = billing

    async def merchant_created(self, event: Event[MerchantCreated]) -> None:
        """Make merchant, billing record and credit account, or what is missing of them."""
        data = event.data
        await self._onboarding.create(
            platform=data.platform,
            shop_id=data.shop_id,
            domain=data.domain,
            merchant_id=data.merchant_id,
        )

    async def trial_started(self, event: Event[TrialStarted]) -> None:
        """Give a merchant the trial that another billing service has started."""
        data = event.data
        await self._billing.trial_elsewhere(
            data.merchant_id,
            ends_at=data.ends_at,
            credits=data.credits,
            correlation_id=event.correlation_id,
        )

    async def credits_purchased(self, event: Event[CreditsPurchased]) -> None:
        """Grant what another billing service has sold.

        The same purchase with another number of credits is refused for good: somebody has to look
        at that.
        """
        data = event.data
        await self._billing.credits_bought_elsewhere(
            data.merchant_id,
            purchase_id=data.purchase_id,
            credits=data.credits,
            correlation_id=event.correlation_id,
        )

    def match_completed(self, event: Event[MatchCompleted]) -> asyncio.Future[Applied]:
        """Take what a match costs; of a balance that is too small an event of its own tells."""
        data = event.data
        return self._ledger.apply(
            Command(
                merchant_id=data.merchant_id,
                operation="debit",
                amount=MATCH_COST,
                reference_type="match",
                reference_id=data.match_id,
                metadata={
                    "shopper_id": data.shopper_id,
                    "matched_items_count": data.matched_items_count,
                },
                correlation_id=event.correlation_id,
            )
        )

    async def purchase_updated(self, event: Event[PurchaseUpdated]) -> None:
        """Give a charge's status its effect on the purchase."""
        data = event.data
        await self._billing.charge_updated(
            charge_id=data.charge_id,
            status=data.status,
            merchant_id=data.merchant_id,
            correlation_id=event.correlation_id,
        )
