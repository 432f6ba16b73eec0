"""The rules of billing: what a report does to a purchase, and which reports do nothing at all."""

from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest

from glamd.billing.model import (
    DEFAULT_PACKS,
    BillingSettings,
    Pack,
    Purchase,
    PurchaseStatus,
    Record,
    Report,
    Shop,
    ShopClaim,
    fits_charge_id,
    ids_of_charge,
    is_of_shop,
    judge,
    trial_of,
)
from glamd.billing.money import Money
from glamd.errors import ConfigError, InputError

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MERCHANT = UUID(int=7)
SHOP = Shop(shop_id="gid://shopify/Shop/548380009", domain="cool.myshopify.com")
PRICE = Money(3999, "USD")
STATUSES: tuple[PurchaseStatus, ...] = get_args(PurchaseStatus)


def purchase(**changes: Any) -> Purchase:
    """A purchase that waits for its money."""
    whole: dict[str, Any] = {
        "purchase_id": UUID(int=1),
        "merchant_id": MERCHANT,
        "pack": "medium",
        "credits": 500,
        "price": PRICE,
        "status": "pending",
        "platform": "shopify",
        "platform_charge_id": "gid://shopify/AppPurchaseOneTime/1",
        "checkout_url": "https://cool.myshopify.com/admin/charges/1",
        "return_url": "https://cool.myshopify.com/",
        "is_test": False,
        "failure": None,
        "created_at": NOW,
        "completed_at": None,
        "expires_at": NOW + timedelta(days=1),
    }
    return Purchase(**(whole | changes))


def report(status: str = "active", **changes: Any) -> Report:
    """A report of its charge."""
    return Report(charge_id="gid://shopify/AppPurchaseOneTime/1", status=status, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"merchant_id": UUID(int=8)}, "wrong_merchant"),
        ({"shop": ShopClaim(number="1", domain="cool.myshopify.com")}, "wrong_shop"),
        ({"shop": ShopClaim(number=None, domain="other.myshopify.com")}, "wrong_shop"),
        ({"shop": ShopClaim(number=None, domain=None)}, "wrong_shop"),
        ({"price": Money(3998, "USD")}, "wrong_price"),
        ({"price": Money(4000, "USD")}, "wrong_price"),
        ({"price": Money(3999, "CAD")}, "wrong_price"),
        ({"is_test": True}, "wrong_test"),
    ],
)
@pytest.mark.parametrize("status", ["active", "accepted", "declined", "pending"])
def test_a_report_of_another_thing_does_nothing_whatever_it_says(
    changes: dict[str, Any], reason: str, status: str
) -> None:
    for before in STATUSES:
        assert judge(purchase(status=before), report(status, **changes), SHOP) == reason


def test_a_test_charge_buys_nothing_that_was_to_be_paid_and_the_other_way_round() -> None:
    assert judge(purchase(is_test=True), report(is_test=False), None) == "wrong_test"
    assert judge(purchase(is_test=True), report(is_test=True), None) == "completed"


def test_a_claimed_shop_is_nothing_without_one_to_compare_it_with() -> None:
    claim = ShopClaim(number="548380009", domain=None)
    assert judge(purchase(), report(shop=claim), None) == "wrong_shop"


@pytest.mark.parametrize(
    ("status", "outcomes"),
    [
        # of a pending, completed, failed, expired purchase
        ("active", ("completed", "unchanged", "completed", "completed")),
        ("accepted", ("completed", "unchanged", "completed", "completed")),
        ("declined", ("failed", "unchanged", "unchanged", "unchanged")),
        ("cancelled", ("failed", "unchanged", "unchanged", "unchanged")),
        ("expired", ("failed", "unchanged", "unchanged", "unchanged")),
        ("pending", ("unchanged",) * 4),
        ("frozen", ("unchanged",) * 4),
        ("ACTIVE", ("unchanged",) * 4),
        ("", ("unchanged",) * 4),
    ],
)
def test_what_each_status_makes_of_each_state(status: str, outcomes: tuple[str, ...]) -> None:
    found = tuple(judge(purchase(status=before), report(status), None) for before in STATUSES)
    assert STATUSES == ("pending", "completed", "failed", "expired")
    assert found == outcomes


def test_only_what_the_platform_will_not_take_back_is_final() -> None:
    final = {"active", "accepted", "declined", "cancelled", "expired"}
    for status in final | {"pending", "unheard-of"}:
        assert report(status).is_final == (status in final)


@pytest.mark.parametrize(
    ("claim", "shop", "same"),
    [
        (("548380009", "cool.myshopify.com"), SHOP, True),
        (("548380009", None), SHOP, True),
        ((None, "cool.myshopify.com"), SHOP, True),
        (("548380009", "other.myshopify.com"), SHOP, False),
        (("548380009", None), Shop(shop_id="548380009", domain="www.cool.example"), True),
        (("548380009", "cool.myshopify.com"), Shop(shop_id="9", domain="www.x.example"), False),
        # A shop known by its Shopify host in place of a number.
        ((None, "cool.myshopify.com"), Shop(shop_id="cool.myshopify.com", domain="x.y"), True),
        (("1", "cool.myshopify.com"), Shop(shop_id="cool.myshopify.com", domain="x.y"), True),
        # Nothing that could be compared is no agreement.
        (("1", "cool.myshopify.com"), Shop(shop_id="demo", domain="www.cool.example"), False),
        (("1", "www.cool.example"), Shop(shop_id="demo", domain="www.cool.example"), True),
        (("٣", None), Shop(shop_id="٣", domain="www.cool.example"), False),
    ],
)
def test_a_shop_is_known_by_any_of_its_names_and_by_no_contradiction(
    claim: tuple[str | None, str | None], shop: Shop, same: bool
) -> None:
    assert is_of_shop(ShopClaim(number=claim[0], domain=claim[1]), shop) == same


def test_a_charge_is_looked_for_by_both_forms_of_its_id() -> None:
    both = ("gid://shopify/AppPurchaseOneTime/12", "12")
    assert ids_of_charge("12") == ids_of_charge(both[0]) == both
    assert ids_of_charge("ch_12") == ("ch_12",)
    assert not any(map(fits_charge_id, [None, 12, "", "a b", "a\0", "ä", "a" * 256]))


def test_a_trial_is_to_be_had_once_and_runs_until_its_last_moment() -> None:
    empty = Record(
        merchant_id=MERCHANT,
        trial_started_at=None,
        trial_ends_at=None,
        credits_purchased=0,
        last_purchase_at=None,
    )
    assert trial_of(empty, NOW).available
    assert not trial_of(empty, NOW).active
    begun = Record(
        merchant_id=MERCHANT,
        trial_started_at=NOW,
        trial_ends_at=NOW + timedelta(days=14),
        credits_purchased=0,
        last_purchase_at=None,
    )
    ends_at = NOW + timedelta(days=14)
    assert trial_of(begun, ends_at - timedelta(microseconds=1)).active
    assert not trial_of(begun, ends_at).active
    assert not trial_of(begun, ends_at).available


def test_the_packs_are_those_of_the_contract() -> None:
    prices = {name: (pack.credits, pack.price.amount) for name, pack in DEFAULT_PACKS.items()}
    assert prices == {"small": (100, "9.99"), "medium": (500, "39.99"), "large": (1000, "69.99")}
    assert {pack.price.currency for pack in DEFAULT_PACKS.values()} == {"USD"}


@pytest.mark.parametrize("name", ["", "huge", "Small", "small ", "__class__"])
def test_a_pack_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        BillingSettings().pack(name)
    assert caught.value.code == "INVALID_PACK"
    assert caught.value.fields[0].message == "it is one of small, medium, large"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"packs": {}}, "packs"),
        ({"packs": {"Big Pack": Pack(1, PRICE)}}, "packs"),
        ({"packs": {"free": Pack(1, Money(0, "USD"))}}, "packs.free"),
        ({"packs": {"empty": Pack(0, PRICE)}}, "packs.empty"),
        ({"trial_days": 0}, "trial_days"),
        ({"trial_credits": 0}, "trial_credits"),
        ({"trial_credits": 2**53}, "trial_credits"),
        ({"purchase_life": timedelta(0)}, "purchase_life"),
        ({"purchase_life": timedelta(days=31)}, "purchase_life"),
        ({"return_hosts": frozenset({"https://app.example.com"})}, "return_hosts"),
        ({"return_hosts": frozenset({".example.com"})}, "return_hosts"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BillingSettings(**changes)
    assert [error.field for error in caught.value.fields] == [field]


def test_where_a_purchase_is_paid_is_not_shown() -> None:
    assert "admin/charges" not in repr(purchase())
