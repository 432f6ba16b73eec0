"""What `/api/billing` takes and answers: bodies, and the TypedDicts. Pure.

Amounts are decimal texts here; which packs there are is a setting and not known to the schema.
"""

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field
from typing_extensions import TypedDict

from glamd.billing.model import Overview, PlatformName, Purchase, PurchaseStatus, Trial
from glamd.http.bodies import Body
from glamd.http.idempotent import IdempotencyKey
from glamd.http.pages import PageQuery


class TrialBody(Body):
    """A trial to be started; nothing has to be said for that."""

    idempotency_key: IdempotencyKey | None = None


class PurchaseBody(Body):
    """A pack to be bought, where to pay it, and where to go afterwards."""

    pack: Annotated[str, Field(description="A pack's name: `small`, `medium`, `large`.")]
    platform: PlatformName
    return_url: Annotated[
        str,
        Field(description="https, on the shop's own host or one that the configuration names."),
    ]
    idempotency_key: IdempotencyKey | None = None


class PurchaseQuery(PageQuery):
    """Which of the merchant's purchases."""


class TrialState(TypedDict):
    """A trial: still to be had, running, or over."""

    available: bool
    active: bool
    started_at: datetime | None
    ends_at: datetime | None


class TrialBegun(TypedDict):
    """A trial that has begun."""

    success: Literal[True]
    ends_at: datetime
    credits_granted: int


class PurchaseState(TypedDict):
    """A pack that a merchant began to buy, and what became of it; `amount` is in USD or whatever
    the pack is sold for."""

    id: UUID
    merchant_id: UUID
    credits: int
    amount: str
    status: PurchaseStatus
    platform: PlatformName
    platform_charge_id: str | None
    created_at: datetime
    completed_at: datetime | None
    expires_at: datetime


class BillingOverview(TypedDict):
    """What a merchant has had; the newest purchases first, five at most."""

    trial: TrialState
    credits_purchased: int
    last_purchase_at: datetime | None
    recent_purchases: list[PurchaseState]


class CheckoutBegun(TypedDict):
    """A purchase that waits for its money, and where that is paid."""

    purchase_id: UUID
    checkout_url: str
    expires_at: datetime


def trial_as_json(trial: Trial) -> TrialState:
    """A trial as the contract names it."""
    return {
        "available": trial.available,
        "active": trial.active,
        "started_at": trial.started_at,
        "ends_at": trial.ends_at,
    }


def purchase_as_json(purchase: Purchase) -> PurchaseState:
    """A purchase as the contract names it."""
    return {
        "id": purchase.purchase_id,
        "merchant_id": purchase.merchant_id,
        "credits": purchase.credits,
        "amount": purchase.price.amount,
        "status": purchase.status,
        "platform": purchase.platform,
        "platform_charge_id": purchase.platform_charge_id,
        "created_at": purchase.created_at,
        "completed_at": purchase.completed_at,
        "expires_at": purchase.expires_at,
    }


def overview_as_json(overview: Overview) -> BillingOverview:
    """An overview as the contract names it."""
    return {
        "trial": trial_as_json(overview.trial),
        "credits_purchased": overview.credits_purchased,
        "last_purchase_at": overview.last_purchase_at,
        "recent_purchases": [purchase_as_json(each) for each in overview.recent_purchases],
    }
