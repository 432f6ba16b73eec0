"""What billing asks of a platform, and what it hears from it.

A platform says what it said and nothing more: whether that fits the purchase is judged in one place
for all of them. Two kinds of failure are kept apart, since money hangs on the difference:
`NotSoldError`, after which there certainly is no charge, and `UnansweredError`, after which there
may be one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

from glamd.billing.model import PlatformName, Report
from glamd.billing.money import Money
from glamd.errors import GlamError

DELIVERY_ID_LIMIT: Final = 200
"""Characters of what a sender calls it. What it is known by here may be 33 longer, and is a
correlation id then, of 255 at most."""
TOPIC_LIMIT: Final = 100
DOMAIN_LIMIT: Final = 253


class NotSoldError(GlamError):
    """There is no charge, and there will be none; `code` is ours, from a fixed list.

    `may_pass` says that the same may succeed later, after `retry_after_s`.
    """

    default_code = "REFUSED"

    def __init__(self, code: str, *, may_pass: bool = False, retry_after_s: int = 1) -> None:
        super().__init__("The platform did not take the purchase.", code=code)
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


class UnansweredError(GlamError):
    """Whether there is a charge is not known; `code` is ours, from a fixed list."""

    default_code = "UNKNOWN"

    def __init__(self, code: str) -> None:
        super().__init__("The platform gave no answer that can be used.", code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a platform needs to know to collect the money of a purchase."""

    purchase_id: UUID
    merchant_id: UUID
    credits: int
    price: Money
    is_test: bool
    return_url: str = field(repr=False)
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """A charge that waits for the merchant: what the platform says of it, and where it is paid."""

    report: Report
    url: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A webhook whose signature is right; what is not signed of it is a claim.

    One that comes again has the same `delivery_id`.
    """

    delivery_id: str
    topic: str
    shop_domain: str


class Platform(Protocol):
    """A platform that collects money, and tells what became of it."""

    @property
    def name(self) -> PlatformName:
        """What it is called in the contract."""

    @property
    def is_test(self) -> bool:
        """Whether its charges are tests, for which nobody pays."""

    @property
    def can_be_asked(self) -> bool:
        """Whether `find` can be called; otherwise only its webhooks tell of a charge."""

    async def check_out(self, order: Order) -> Checkout:
        """Make a charge. Raises NotSoldError, UnansweredError. Takes 20 s at most."""

    async def find(self, order: Order, charge_id: str | None) -> Report | None:
        """What became of the charge with this id, or without one of that made for this order.

        None: there certainly is none. Raises NotSoldError and UnansweredError, after both of which
        one knows as much as before.
        """

    def receive(self, body: bytes, headers: Mapping[str, str], now: datetime) -> Delivery:
        """Check who has sent a webhook; the names of `headers` are in small letters.

        UnauthenticatedError unless it is signed with one of the secrets.
        """

    def concerns(self, topic: str) -> bool:
        """Whether `read` makes a report of webhooks with this topic."""

    def read(self, delivery: Delivery, body: bytes) -> Report:
        """What a stored webhook says; InputError where that cannot be read."""
