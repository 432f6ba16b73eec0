"""A payment page of one's own: forged and stale callbacks first, then both signatures in full."""

import hashlib
import hmac
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import orjson
import pytest

from glamd.billing.money import Money
from glamd.billing.platforms.custom import Custom, CustomSettings, sign_callback
from glamd.billing.platforms.interface import Delivery, NotSoldError, Order
from glamd.errors import ConfigError, InputError, UnauthenticatedError

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
CURRENT, PREVIOUS = "c" * 32, "p" * 40
CUSTOM = Custom(
    CustomSettings(checkout_url="https://pay.example.com/checkout", secrets=(CURRENT, PREVIOUS))
)
NONCE = "0123456789abcdef"
ORDER = Order(
    purchase_id=UUID(int=1),
    merchant_id=UUID(int=7),
    credits=500,
    price=Money(3999, "USD"),
    is_test=False,
    return_url="https://cool.myshopify.com/back?a=b&c",
    created_at=NOW,
    expires_at=NOW + timedelta(days=1),
)
SAID: dict[str, Any] = {
    "charge_id": str(UUID(int=1)),
    "merchant_id": str(UUID(int=7)),
    "status": "ACTIVE",
    "amount": "39.99",
    "currency": "USD",
    "test": False,
}
BODY = orjson.dumps(SAID)
DELIVERY = Delivery(delivery_id=NONCE, topic="charge", shop_domain="")


def signed(
    body: bytes = BODY, *, secret: str = CURRENT, at: datetime = NOW, nonce: str = NONCE
) -> dict[str, str]:
    """The headers of a callback."""
    timestamp = str(int(at.timestamp()))
    return {
        "x-glamd-timestamp": timestamp,
        "x-glamd-nonce": nonce,
        "x-glamd-signature": sign_callback(secret, timestamp, nonce, body),
    }


@pytest.mark.parametrize("missing", ["x-glamd-timestamp", "x-glamd-nonce", "x-glamd-signature"])
def test_a_callback_without_one_of_its_headers_is_refused(missing: str) -> None:
    headers = signed()
    del headers[missing]
    with pytest.raises(UnauthenticatedError):
        CUSTOM.receive(BODY, headers, NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"x-glamd-timestamp": str(int(NOW.timestamp()) + 1)},
        {"x-glamd-timestamp": "+1"},
        {"x-glamd-timestamp": "9" * 30},
        {"x-glamd-nonce": "fedcba9876543210"},
        {"x-glamd-nonce": "short"},
        {"x-glamd-nonce": "0123456789abcde\n"},
        {"x-glamd-signature": "0" * 64},
        {"x-glamd-signature": signed()["x-glamd-signature"].upper()},
        {"x-glamd-signature": ""},
        {"x-glamd-signature": "ä" * 64},
    ],
)
def test_a_callback_that_was_tampered_with_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UnauthenticatedError):
        CUSTOM.receive(BODY, signed() | changes, NOW)


def test_a_callback_with_another_body_or_an_unknown_secret_is_refused() -> None:
    for headers in (signed(BODY.replace(b"39.99", b"00.01")), signed(secret="x" * 32)):
        with pytest.raises(UnauthenticatedError):
            CUSTOM.receive(BODY, headers, NOW)


@pytest.mark.parametrize("seconds", [-301, 301, 86_400])
def test_a_callback_of_another_time_is_refused(seconds: int) -> None:
    with pytest.raises(UnauthenticatedError):
        CUSTOM.receive(BODY, signed(at=NOW + timedelta(seconds=seconds)), NOW)


def test_where_a_newline_moves_from_one_part_to_the_next_the_signature_is_another_one() -> None:
    headers = signed(b"a\n" + BODY)
    with pytest.raises(UnauthenticatedError):
        CUSTOM.receive(BODY, headers | {"x-glamd-nonce": f"{NONCE}\na"}, NOW)


async def test_the_signature_of_an_address_is_none_of_a_callback() -> None:
    url = (await CUSTOM.check_out(ORDER)).url
    query, _, signature = urlsplit(url).query.rpartition("&signature=")
    timestamp = str(int(NOW.timestamp()))
    headers = {
        "x-glamd-timestamp": timestamp,
        "x-glamd-nonce": NONCE,
        "x-glamd-signature": signature,
    }
    with pytest.raises(UnauthenticatedError):
        CUSTOM.receive(query.encode(), headers, NOW)


@pytest.mark.parametrize("secret", [CURRENT, PREVIOUS])
@pytest.mark.parametrize("seconds", [-299, 0, 299])
def test_a_callback_signed_in_time_with_any_of_the_secrets_is_taken(
    secret: str, seconds: int
) -> None:
    headers = signed(secret=secret, at=NOW + timedelta(seconds=seconds))
    assert CUSTOM.receive(BODY, headers, NOW) == DELIVERY


@pytest.mark.parametrize(
    "changes",
    [
        {"charge_id": None},
        {"charge_id": "a b"},
        {"merchant_id": "somebody"},
        {"merchant_id": None},
        {"status": 1},
        {"status": ""},
        {"amount": 39.99},
        {"amount": "39,99"},
        {"amount": None},
        {"currency": None},
        {"test": "false"},
        {"test": None},
    ],
)
def test_a_callback_has_to_say_everything(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        CUSTOM.read(DELIVERY, orjson.dumps(SAID | changes))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b"\xff"])
def test_a_callback_that_is_no_object_cannot_be_read(body: bytes) -> None:
    with pytest.raises(InputError):
        CUSTOM.read(DELIVERY, body)


def test_what_a_callback_says_is_compared_in_full() -> None:
    report = CUSTOM.read(DELIVERY, BODY)
    assert (report.charge_id, report.status) == (SAID["charge_id"], "active")
    assert (report.price, report.is_test) == (Money(3999, "USD"), False)
    assert report.merchant_id == UUID(int=7)
    assert report.shop is None


async def test_the_address_to_pay_at_is_signed_as_the_docs_say() -> None:
    checkout = await CUSTOM.check_out(ORDER)
    assert checkout.report.charge_id == str(ORDER.purchase_id)
    page, _, rest = checkout.url.partition("?")
    query, _, signature = rest.rpartition("&signature=")
    expected = hmac.new(CURRENT.encode(), digestmod=hashlib.sha256)
    expected.update(b"glamd-checkout-v1\n" + query.encode())
    assert page == "https://pay.example.com/checkout"
    assert signature == expected.hexdigest()
    told = {name: values[0] for name, values in parse_qs(query).items()}
    assert len(told.pop("nonce")) >= 16
    assert told == {
        "charge_id": str(ORDER.purchase_id),
        "merchant_id": str(ORDER.merchant_id),
        "credits": "500",
        "amount": "39.99",
        "currency": "USD",
        "test": "false",
        "return_url": ORDER.return_url,
        "expires_at": str(int(ORDER.expires_at.timestamp())),
    }
    assert "signature" not in repr(checkout)


async def test_there_is_nobody_to_ask() -> None:
    assert not CUSTOM.can_be_asked
    with pytest.raises(NotSoldError):
        await CUSTOM.find(ORDER, None)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"checkout_url": "http://pay.example.com/"}, "checkout_url"),
        ({"checkout_url": "https://"}, "checkout_url"),
        ({"checkout_url": "https://u:p@pay.example.com/"}, "checkout_url"),
        ({"checkout_url": "https://pay.example.com/?a=b"}, "checkout_url"),
        ({"checkout_url": "https://pay.example.com/#a"}, "checkout_url"),
        ({"checkout_url": "https://pay.example.com/a b"}, "checkout_url"),
        ({"secrets": ()}, "secrets"),
        ({"secrets": (CURRENT, "short")}, "secrets"),
        ({"max_age_s": 0.0}, "max_age_s"),
        ({"max_age_s": 86_400.0}, "max_age_s"),
    ],
)
def test_a_setting_that_could_be_forged_or_read_along_is_refused(
    changes: dict[str, Any], field: str
) -> None:
    usual: dict[str, Any] = {"checkout_url": "https://pay.example.com/", "secrets": (CURRENT,)}
    with pytest.raises(ConfigError) as caught:
        CustomSettings(**(usual | changes))
    assert [error.field for error in caught.value.fields] == [field]
    assert CURRENT not in repr(CUSTOM.settings)
