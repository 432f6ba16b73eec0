"""The rules of billing, pure: packs, trials, and what a platform's word does to a purchase.

No database, no event loop, no clock: the moment comes from the caller. What is decided here has its
effect in `settlement` and `service`, each of them once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal
from uuid import UUID

from glamd.billing.money import Money
from glamd.billing.return_urls import is_host
from glamd.errors import (
    ConfigError,
    ConflictError,
    FieldError,
    GlamError,
    InputError,
    NotFoundError,
    UnavailableError,
)

PlatformName = Literal["shopify", "stripe", "custom"]
PLATFORMS: Final[tuple[PlatformName, ...]] = ("shopify", "stripe", "custom")
PurchaseStatus = Literal["pending", "completed", "failed", "expired"]

TRIAL_STARTED: Final = "evt.billing.trial.started.v1"
TRIAL_EXPIRED: Final = "evt.billing.trial.expired.v1"
CREDITS_PURCHASED: Final = "evt.billing.credits.purchased.v1"

CREDITS_LIMIT: Final = 2**53 - 1
TRIAL_DAYS_LIMIT: Final = 3650
PURCHASE_LIFE_LIMIT: Final = timedelta(days=30)
RETURN_HOSTS_LIMIT: Final = 1000
CHARGE_ID_LIMIT: Final = 255
"""Characters; with the platform's name it has to fit into an index entry."""

CHARGE_GID: Final = "gid://shopify/AppPurchaseOneTime/"

_PACK_NAME: Final = re.compile(r"[a-z0-9_-]{1,32}", re.ASCII)
_PAID: Final = frozenset({"accepted", "active"})
_REFUSED: Final = frozenset({"declined", "cancelled", "expired"})

# What was paid is delivered, however long ago we gave it up.
_DELIVERED: Final[Mapping[PurchaseStatus, PurchaseStatus]] = MappingProxyType(
    {"pending": "completed", "failed": "completed", "expired": "completed"}
)
_FAILED: Final[Mapping[PurchaseStatus, PurchaseStatus]] = MappingProxyType({"pending": "failed"})

EFFECTS: Final[Mapping[str, Mapping[PurchaseStatus, PurchaseStatus]]] = MappingProxyType(
    {
        **dict.fromkeys(_PAID, _DELIVERED),
        **dict.fromkeys(_REFUSED, _FAILED),
    }
)
"""What a charge's status makes of a purchase's: `EFFECTS[charge][purchase]`.

What does not stand here (`pending`, states that we do not know) changes nothing.
"""

Outcome = Literal[
    "completed",
    "failed",
    "unchanged",
    "wrong_merchant",
    "wrong_shop",
    "wrong_price",
    "wrong_test",
]
"""What came of a report; the wrong ones are refused, and nothing is changed by them."""


class TrialAlreadyUsedError(ConflictError):
    """The merchant has had its trial, here or at an older billing service."""

    default_code = "TRIAL_ALREADY_USED"

    def __init__(self) -> None:
        super().__init__("The trial has been used.")


class MerchantNotFoundError(NotFoundError):
    """The merchant has no billing record."""

    default_code = "MERCHANT_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("There is no billing record for this merchant.")


class PurchaseNotFoundError(NotFoundError):
    """There is no such purchase, or none of this merchant."""

    default_code = "PURCHASE_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("There is no such purchase.")


class PlatformError(GlamError):
    """The platform will not sell this: it refused, or is not configured. The purchase has failed.

    The one class whose fault is another server's; HTTP calls it 502.
    """

    default_code = "PLATFORM_ERROR"


class PurchaseUnansweredError(UnavailableError):
    """The platform's answer did not come: nobody knows yet whether there is a charge.

    The purchase stays pending until the platform was asked. Nothing is lost, and nothing is paid
    twice, by buying again: what the merchant does not approve is never charged.
    """

    def __init__(self, purchase_id: UUID, *, retry_after_s: int) -> None:
        super().__init__(
            f"The platform did not answer in time. Purchase {purchase_id} will tell what became"
            " of it; another one may be begun.",
            retry_after_s=retry_after_s,
        )
        self.purchase_id = purchase_id


@dataclass(frozen=True, slots=True)
class Pack:
    """So many credits for that price."""

    credits: int
    price: Money


DEFAULT_PACKS: Final[Mapping[str, Pack]] = MappingProxyType(
    {
        "small": Pack(100, Money(9_99, "USD")),
        "medium": Pack(500, Money(39_99, "USD")),
        "large": Pack(1000, Money(69_99, "USD")),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BillingSettings:
    """What is sold, what is given, and how long an offer stands. ConfigError names what is wrong.

    `return_hosts` are whole host names, beside the shop's own, that a merchant may return to.
    A purchase keeps the credits and the price that it was begun with.
    """

    packs: Mapping[str, Pack] = field(default_factory=lambda: DEFAULT_PACKS)
    trial_days: int = 14
    trial_credits: int = 500
    purchase_life: timedelta = timedelta(hours=24)
    return_hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what could not be sold, stored or compared."""
        mistakes = [FieldError(name, why) for name, why in self._mistakes()]
        if mistakes:
            told = "; ".join(f"{one.field} {one.message}" for one in mistakes)
            raise ConfigError(f"Billing: {told}.", fields=mistakes)

    def pack(self, name: str) -> Pack:
        """The pack of this name; InputError `INVALID_PACK`."""
        found = self.packs.get(name)
        if found is None:
            message = f"it is one of {', '.join(self.packs)}"
            raise InputError(
                "There is no such pack.", code="INVALID_PACK", fields=(FieldError("pack", message),)
            )
        return found

    def _mistakes(self) -> list[tuple[str, str]]:
        mistakes = []
        if not self.packs:
            mistakes.append(("packs", "is empty"))
        for name, pack in self.packs.items():
            if _PACK_NAME.fullmatch(name) is None:
                mistakes.append(("packs", "should have names of small letters, digits, - and _"))
            if not 1 <= pack.credits <= CREDITS_LIMIT or not pack.price.amount_minor:
                mistakes.append((f"packs.{name}", "should have credits and a price above 0"))
        if not 1 <= self.trial_days <= TRIAL_DAYS_LIMIT:
            mistakes.append(("trial_days", f"should be 1 to {TRIAL_DAYS_LIMIT}"))
        if not 1 <= self.trial_credits <= CREDITS_LIMIT:
            mistakes.append(("trial_credits", f"should be 1 to {CREDITS_LIMIT}"))
        if not timedelta(minutes=1) <= self.purchase_life <= PURCHASE_LIFE_LIMIT:
            mistakes.append(("purchase_life", "should be a minute to 30 days"))
        if len(self.return_hosts) > RETURN_HOSTS_LIMIT or not all(map(is_host, self.return_hosts)):
            mistakes.append(("return_hosts", "should be host names in lower case"))
        return mistakes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """The shop that a merchant is: its id at its platform, and its domain."""

    shop_id: str
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopClaim:
    """Which shop a report says that it comes from.

    `number` is signed along with the report; `domain` may be a header that is not.
    """

    number: str | None
    domain: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a platform, or somebody in its name, says of a charge; `status` in small letters.

    What is None was not said, and is not compared.
    """

    charge_id: str
    status: str
    price: Money | None = None
    is_test: bool | None = None
    merchant_id: UUID | None = None
    shop: ShopClaim | None = None

    @property
    def is_paid(self) -> bool:
        """Whether the merchant has paid."""
        return self.status in _PAID

    @property
    def is_final(self) -> bool:
        """Whether the platform will not say anything else of this charge."""
        return self.is_paid or self.status in _REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """A pack that a merchant began to buy, and what became of it.

    A `platform_charge_id` stands here only after the platform has named the charge's price and test
    flag together with it, and they were right: later reports need not repeat them.
    """

    purchase_id: UUID
    merchant_id: UUID
    pack: str
    credits: int
    price: Money
    status: PurchaseStatus
    platform: PlatformName
    platform_charge_id: str | None
    checkout_url: str | None = field(repr=False)
    return_url: str = field(repr=False)
    is_test: bool
    failure: str | None
    """Why it failed, as a stable code."""

    created_at: datetime
    completed_at: datetime | None
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A merchant's billing record."""

    merchant_id: UUID
    trial_started_at: datetime | None
    trial_ends_at: datetime | None
    credits_purchased: int
    last_purchase_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A merchant's trial at some moment: still to be had, running, or over."""

    available: bool
    active: bool
    started_at: datetime | None
    ends_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """A trial that has just begun."""

    ends_at: datetime
    credits_granted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a merchant has had of billing; the newest purchases first."""

    trial: Trial
    credits_purchased: int
    last_purchase_at: datetime | None
    recent_purchases: tuple[Purchase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchasePage:
    """Some of a merchant's purchases, newest first, and how many there are.

    `next_cursor` is None on the last page.
    """

    items: tuple[Purchase, ...]
    total: int
    next_cursor: str | None


def trial_of(record: Record, now: datetime) -> Trial:
    """The trial that this record tells of."""
    ends_at = record.trial_ends_at
    return Trial(
        available=ends_at is None,
        active=ends_at is not None and now < ends_at,
        started_at=record.trial_started_at,
        ends_at=ends_at,
    )


def judge(purchase: Purchase, report: Report, shop: Shop | None) -> Outcome:
    """What this report does to this purchase; `shop` is the buyer's, where one is claimed.

    A report of another merchant, shop, price or test flag does nothing, whatever its status is.
    """
    if report.merchant_id not in (None, purchase.merchant_id):
        return "wrong_merchant"
    if report.shop is not None and (shop is None or not is_of_shop(report.shop, shop)):
        return "wrong_shop"
    if report.price not in (None, purchase.price):
        return "wrong_price"
    if report.is_test not in (None, purchase.is_test):
        return "wrong_test"
    becomes = EFFECTS.get(report.status, {}).get(purchase.status)
    if becomes == "completed":
        return "completed"
    return "failed" if becomes == "failed" else "unchanged"


def is_of_shop(claim: ShopClaim, shop: Shop) -> bool:
    """Whether at least one of the shop's names is claimed, and none that contradicts another.

    A merchant may be known by a domain of its own, or by an id that is no number; then that name
    says nothing about the claim, and another one must.
    """
    says = []
    number = shop_number(shop.shop_id)
    if claim.number is not None and number is not None:
        says.append(claim.number == number)
    names = {shop.domain.lower(), shop.shop_id.lower()}
    if claim.domain is not None:
        # Beyond ASCII there are letters whose small form is an ASCII one.
        is_named = claim.domain.isascii() and claim.domain.lower() in names
        if is_named or any(name.endswith(".myshopify.com") for name in names):
            says.append(is_named)
    return bool(says) and all(says)


def shop_number(shop_id: str) -> str | None:
    """The number in `gid://shopify/Shop/548380009`, or in `548380009`; None without one."""
    number = shop_id.removeprefix("gid://shopify/Shop/")
    return number if number.isascii() and number.isdigit() else None


def ids_of_charge(charge_id: str) -> tuple[str, ...]:
    """The forms in which a charge's id may be stored or said, the one for questions first.

    Shopify's GraphQL API writes `gid://…/1017262349`; older services stored the number.
    """
    number = charge_id.removeprefix(CHARGE_GID)
    if number.isascii() and number.isdigit():
        return (f"{CHARGE_GID}{number}", number)
    return (charge_id,)


def fits_charge_id(text: object) -> bool:
    """Whether it can be a charge's id: a bounded text of visible ASCII."""
    return (
        isinstance(text, str)
        and 1 <= len(text) <= CHARGE_ID_LIMIT
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )
