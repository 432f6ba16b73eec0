"""The rows of the older billing service, read: trials, and purchases with their money exact. Pure.

That service kept money as text or as a number; it is an integer of minor units here, or refused.
What a merchant's rows come to, here or there, is compared by `state_of`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, cast
from uuid import UUID

import orjson

from glamd.billing.model import (
    CHARGE_ID_LIMIT,
    CREDITS_LIMIT,
    DEFAULT_PACKS,
    PLATFORMS,
    PlatformName,
    Purchase,
    PurchaseStatus,
    Record,
    fits_charge_id,
)
from glamd.billing.money import Money
from glamd.errors import InputError
from glamd.ledger.importing.fields import Fields
from glamd.ledger.importing.merchant import OlderColumn, OlderRow, OlderTable
from glamd.ledger.model import TOTAL_LIMIT

USUAL_CURRENCY: Final = "USD"
USUAL_LIFE: Final = timedelta(hours=24)
"""Of a purchase that does not say when it ends."""

IMPORTED_PACK: Final = "imported"
"""The pack of a purchase that does not name it, and whose credits are none of the usual ones'."""

_STATUSES: Final = ("pending", "completed", "failed", "expired")
_URL_LIMIT: Final = 2048

RECORDS: Final = OlderTable(
    "billing_records",
    MappingProxyType(
        {
            "merchant_id": OlderColumn(("merchant_id",), 64),
            "trial_started_at": OlderColumn(("trial_started_at",), 64),
            "trial_ends_at": OlderColumn(("trial_ends_at",), 64),
            "credits_purchased": OlderColumn(
                ("credits_purchased", "total_credits_purchased"), 32, is_needed=False
            ),
            "last_purchase_at": OlderColumn(("last_purchase_at",), 64, is_needed=False),
            "created_at": OlderColumn(("created_at",), 64, is_needed=False),
        }
    ),
)
PURCHASES: Final = OlderTable(
    "purchases",
    MappingProxyType(
        {
            "id": OlderColumn(("id", "purchase_id"), 64),
            "merchant_id": OlderColumn(("merchant_id",), 64),
            "credits": OlderColumn(("credits",), 32),
            "amount": OlderColumn(("amount", "price"), 32),
            "currency": OlderColumn(("currency",), 8, is_needed=False),
            "status": OlderColumn(("status",), 32),
            "platform": OlderColumn(("platform", "platform_name"), 32),
            "platform_charge_id": OlderColumn(("platform_charge_id", "charge_id"), CHARGE_ID_LIMIT),
            "pack": OlderColumn(("pack", "pack_size"), 32, is_needed=False),
            "checkout_url": OlderColumn(("checkout_url",), _URL_LIMIT, is_needed=False),
            "return_url": OlderColumn(("return_url",), _URL_LIMIT, is_needed=False),
            "test": OlderColumn(("test", "is_test"), 8, is_needed=False),
            "created_at": OlderColumn(("created_at",), 64),
            "completed_at": OlderColumn(("completed_at",), 64),
            "expires_at": OlderColumn(("expires_at",), 64, is_needed=False),
        }
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderRecord:
    """An older billing record; `credits_purchased` is None where it does not say."""

    merchant_id: UUID
    trial_started_at: datetime | None
    trial_ends_at: datetime | None
    credits_purchased: int | None
    last_purchase_at: datetime | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bills:
    """All of a merchant's billing as it is to stand here."""

    record: Record
    created_at: datetime | None
    purchases: Sequence[Purchase]

    @property
    def completed_credits(self) -> int:
        """The credits of all purchases that were paid."""
        return sum(one.credits for one in self.purchases if one.status == "completed")


def read_record(row: OlderRow) -> OlderRecord:
    """An older billing record. Raises RefusedError with every field that is wrong."""
    fields = Fields(RECORDS, row, key="merchant_id")
    found = OlderRecord(
        merchant_id=fields.uuid("merchant_id"),
        trial_started_at=fields.maybe_time("trial_started_at"),
        trial_ends_at=fields.maybe_time("trial_ends_at"),
        credits_purchased=fields.maybe_whole("credits_purchased", least=0, most=TOTAL_LIMIT),
        last_purchase_at=fields.maybe_time("last_purchase_at"),
        created_at=fields.maybe_time("created_at"),
    )
    for one, other in (
        ("trial_started_at", "trial_ends_at"),
        ("trial_ends_at", "trial_started_at"),
    ):
        if fields.has(one) and not fields.has(other):
            fields.is_wrong(other, "It is missing from a trial.")
    fields.done()
    return found


def read_purchase(row: OlderRow, merchant_id: UUID) -> Purchase:
    """A purchase of this merchant. Raises RefusedError with every field that is wrong."""
    fields = Fields(PURCHASES, row, key="id")
    purchase_id = fields.uuid("id")
    credits_ = fields.whole("credits", least=1, most=CREDITS_LIMIT)
    price = _money(fields)
    status = cast("PurchaseStatus", fields.choice("status", _STATUSES))
    platform = cast("PlatformName", fields.choice("platform", PLATFORMS))
    charge_id = fields.maybe_text("platform_charge_id")
    if charge_id is not None and not fits_charge_id(charge_id):
        fields.is_wrong("platform_charge_id", "It is no id of a charge.")
    created_at = fields.time("created_at")
    completed_at = fields.maybe_time("completed_at")
    if status == "completed" and completed_at is None and not fields.has("completed_at"):
        fields.is_wrong("completed_at", "It is missing from a completed purchase.")
    found = Purchase(
        purchase_id=purchase_id,
        merchant_id=merchant_id,
        pack=fields.maybe_text("pack") or _usual_pack(credits_),
        credits=credits_,
        price=price,
        status=status,
        platform=platform,
        platform_charge_id=charge_id,
        checkout_url=fields.maybe_text("checkout_url"),
        return_url=fields.maybe_text("return_url") or "",
        is_test=fields.truth("test"),
        failure=None,
        created_at=created_at,
        completed_at=completed_at if status == "completed" else None,
        expires_at=fields.maybe_time("expires_at") or created_at + USUAL_LIFE,
    )
    fields.done()
    return found


def bills_of(record: OlderRecord | None, purchases: Sequence[Purchase], merchant_id: UUID) -> Bills:
    """What a merchant's rows come to; a merchant may have purchases and no record."""
    paid = [one for one in purchases if one.completed_at is not None]
    total = sum(one.credits for one in paid)
    last = max((one.completed_at for one in paid if one.completed_at), default=None)
    if record is not None:
        total = total if record.credits_purchased is None else record.credits_purchased
        last = record.last_purchase_at or last
    return Bills(
        record=Record(
            merchant_id=merchant_id,
            trial_started_at=None if record is None else record.trial_started_at,
            trial_ends_at=None if record is None else record.trial_ends_at,
            credits_purchased=total,
            last_purchase_at=last,
        ),
        created_at=None if record is None else record.created_at,
        purchases=purchases,
    )


def state_of(record: Record | None, purchases: Iterable[Purchase]) -> str:
    """What stands for a merchant's billing: the same as long as nothing that counts has changed."""
    told: list[object] = [
        None
        if record is None or not _says_anything(record)
        else [
            record.trial_started_at,
            record.trial_ends_at,
            record.credits_purchased,
            record.last_purchase_at,
        ]
    ]
    told += sorted(
        [
            str(one.purchase_id),
            one.status,
            one.platform,
            one.platform_charge_id or "",
            str(one.credits),
            str(one.price.amount_minor),
            one.price.currency,
            str(one.completed_at),
        ]
        for one in purchases
    )
    return f"state:{hashlib.sha256(orjson.dumps(told)).hexdigest()}"


def amounts_of(purchases: Iterable[Purchase]) -> Mapping[str, int]:
    """The sum of all prices in minor units, paid or not, as `amount_<currency>`."""
    found: dict[str, int] = {}
    for one in purchases:
        name = f"amount_{one.price.currency}"
        found[name] = found.get(name, 0) + one.price.amount_minor
    return found


def _says_anything(record: Record) -> bool:
    return bool(
        record.trial_started_at
        or record.trial_ends_at
        or record.credits_purchased
        or record.last_purchase_at
    )


def _money(fields: Fields) -> Money:
    amount = fields.text("amount")
    currency = (fields.maybe_text("currency") or USUAL_CURRENCY).upper()
    if "." in amount:
        # PostgreSQL divides with sixteen digits: 9.9900000000000000.
        amount = amount.rstrip("0").removesuffix(".")
    try:
        return Money.parse(amount, currency)
    except InputError as error:
        name = "currency" if error.fields[0].field == "currency" else "amount"
        if amount:
            fields.refused(name, error)
        return Money(0, USUAL_CURRENCY)


def _usual_pack(credits_: int) -> str:
    names = (name for name, pack in DEFAULT_PACKS.items() if pack.credits == credits_)
    return next(names, IMPORTED_PACK)
