"""Where a shop's token may go, and who may say that he is Shopify."""

import base64
import hmac
import re
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from glamd.billing.model import Report, ShopClaim
from glamd.billing.platforms import shopify_webhooks as webhooks
from glamd.billing.platforms.interface import Delivery
from glamd.billing.platforms.shopify import ShopAccess, ShopifySettings
from glamd.errors import ConfigError, InputError, UnauthenticatedError
from glamd.ledger.model import CORRELATION_LIMIT

SECRETS = ("shpss_current", "shpss_previous")
SETTINGS = ShopifySettings(api_secrets=SECRETS)
CHARGE = {
    "admin_graphql_api_id": "gid://shopify/AppPurchaseOneTime/1017262349",
    "name": "500 credits",
    "status": "ACTIVE",
    "admin_graphql_api_shop_id": "gid://shopify/Shop/548380009",
    "created_at": "2026-11-21T12:00:00-05:00",
    "updated_at": "2026-11-21T12:00:00-05:00",
}
BODY = orjson.dumps({"app_purchase_one_time": CHARGE})
DELIVERY = Delivery(delivery_id="d", topic=webhooks.TOPIC, shop_domain="cool.myshopify.com")


def access(domain: str, shop_id: str = "548380009") -> ShopAccess:
    """The access to a shop that is called so."""
    return ShopAccess(domain=domain, shop_id=shop_id, access_token="shpat_secret")


def signed(
    body: bytes = BODY, *, secret: str = SECRETS[0], more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The headers of a signed delivery."""
    signature = base64.b64encode(hmac.digest(secret.encode(), body, "sha256")).decode()
    return {"x-shopify-hmac-sha256": signature, "x-shopify-webhook-id": "w-1", **(more or {})}


# ---- where a token may go


@pytest.mark.parametrize(
    "name",
    [
        "",
        "localhost",
        "127.0.0.1",
        "169.254.169.254",
        "cool.example",
        "myshopify.com",
        ".myshopify.com",
        "-.myshopify.com",
        "a.b.myshopify.com",
        "evil-myshopify.com",
        "cool.myshopify.com.evil.example",
        "cool.myshopify.com:8080",
        "cool.myshopify.com/@evil.example",
        "evil.example/.myshopify.com",
        "evil.example#.myshopify.com",
        "user@cool.myshopify.com",
        "cool.myshopify.com\n",
        "\uff43ool.myshopify.com",
        "\u212aool.myshopify.com",
        f"{'a' * 64}.myshopify.com",
    ],
)
def test_a_token_goes_to_a_shop_at_shopify_or_nowhere(name: str) -> None:
    assert SETTINGS.url_for(access(name)) is None
    assert SETTINGS.url_for(access("www.cool.example", name)) is None


def test_any_name_of_the_shop_may_be_its_host() -> None:
    url = "https://cool.myshopify.com/admin/api/2026-10/graphql.json"
    assert SETTINGS.url_for(access("Cool.MyShopify.com")) == url
    assert SETTINGS.url_for(access("www.cool.example", "cool.myshopify.com")) == url


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"api_secrets": ()}, "api_secrets"),
        ({"api_secrets": ("a", "")}, "api_secrets"),
        ({"api_version": "latest"}, "api_version"),
        ({"api_version": "2026-10/../../x"}, "api_version"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": 21.0}, "timeout_s"),
        ({"base_url": "https://127.0.0.1:1"}, "base_url"),
        ({"base_url": "http://10.0.0.1:1"}, "base_url"),
        ({"base_url": "http://localhost.evil.example:1"}, "base_url"),
        ({"base_url": "http://127.0.0.1:1@evil.example"}, "base_url"),
        ({"base_url": "http://127.0.0.1:1/x?y"}, "base_url"),
    ],
)
def test_a_setting_that_would_lead_astray_is_refused(changes: dict[str, Any], field: str) -> None:
    usual: dict[str, Any] = {"api_secrets": SECRETS}
    with pytest.raises(ConfigError) as caught:
        ShopifySettings(**(usual | changes))
    assert [error.field for error in caught.value.fields] == [field]
    assert "evil" not in caught.value.message


def test_neither_a_secret_nor_a_token_is_shown() -> None:
    assert "shpss" not in repr(SETTINGS)
    assert "shpat" not in repr(access("cool.myshopify.com"))


# ---- who is Shopify


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-shopify-hmac-sha256": ""},
        {"x-shopify-hmac-sha256": "!"},
        {"x-shopify-hmac-sha256": "ä"},
        {"x-shopify-hmac-sha256": base64.b64encode(b"\0" * 32).decode()},
        {"x-shopify-hmac-sha256": hmac.new(SECRETS[0].encode(), BODY, "sha256").hexdigest()},
        {"x-shopify-hmac-sha256": signed()["x-shopify-hmac-sha256"][:-4]},
        signed(secret="shpss_older"),
        signed(secret=""),
        signed(BODY + b" "),
    ],
)
def test_a_webhook_that_is_not_signed_with_one_of_the_secrets_is_refused(
    headers: dict[str, str],
) -> None:
    with pytest.raises(UnauthenticatedError):
        webhooks.receive(SECRETS, BODY, headers)


def test_without_a_secret_nobody_is_shopify() -> None:
    with pytest.raises(UnauthenticatedError):
        webhooks.receive((), BODY, signed(secret=""))


@pytest.mark.parametrize("secret", SECRETS)
def test_the_current_and_the_previous_secret_are_good(secret: str) -> None:
    more = {"x-shopify-topic": webhooks.TOPIC, "x-shopify-shop-domain": "Cool.myshopify.com"}
    found = webhooks.receive(SECRETS, BODY, signed(secret=secret, more=more))
    assert re.fullmatch(r"w-1:[0-9a-f]{32}", found.delivery_id)
    assert found == Delivery(
        delivery_id=found.delivery_id, topic=webhooks.TOPIC, shop_domain="cool.myshopify.com"
    )


def test_two_bodies_under_one_id_are_two_deliveries() -> None:
    other = BODY.replace(b"ACTIVE", b"DECLINED")
    ids = {webhooks.receive(SECRETS, body, signed(body)).delivery_id for body in (BODY, other)}
    assert len(ids) == 2
    longest = {"x-shopify-webhook-id": "w" * 200}
    found = webhooks.receive(SECRETS, BODY, signed(more=longest))
    assert len(found.delivery_id) <= CORRELATION_LIMIT


def test_a_delivery_without_an_id_is_known_by_its_body() -> None:
    headers = signed()
    del headers["x-shopify-webhook-id"]
    first = webhooks.receive(SECRETS, BODY, headers)
    assert first.delivery_id.startswith("unnamed:")
    assert webhooks.receive(SECRETS, BODY, headers) == first
    other = BODY.replace(b"ACTIVE", b"DECLINED")
    headers = signed(other)
    del headers["x-shopify-webhook-id"]
    assert webhooks.receive(SECRETS, other, headers).delivery_id != first.delivery_id
    event = webhooks.receive(SECRETS, other, headers | {"x-shopify-event-id": "e-1"})
    assert event.delivery_id.startswith("e-1:")


@pytest.mark.parametrize("text", ["a" * 300, "a\0b", "a\nb", "ä"])
def test_a_header_that_could_not_be_kept_is_as_good_as_none(text: str) -> None:
    more = dict.fromkeys(("x-shopify-webhook-id", "x-shopify-topic", "x-shopify-shop-domain"), text)
    found = webhooks.receive(SECRETS, BODY, signed(more=more))
    assert found.delivery_id.startswith("unnamed:")
    assert (found.topic, found.shop_domain) == ("", "")


# ---- what it says


@pytest.mark.parametrize("before", [b" ", b"\n", b"\t ", b"embedded=1&"])
def test_a_signed_address_that_was_made_into_json_is_no_webhook(before: bytes) -> None:
    # Shopify signs sorted parameters with the same secret, and a merchant chooses some of them.
    with pytest.raises(InputError) as caught:
        webhooks.read(DELIVERY, before + BODY)
    assert [error.field for error in caught.value.fields] == ["body"]


def test_a_webhook_tells_its_charge_its_status_and_its_shop() -> None:
    assert webhooks.read(DELIVERY, BODY) == Report(
        charge_id="gid://shopify/AppPurchaseOneTime/1017262349",
        status="active",
        shop=ShopClaim(number="548380009", domain="cool.myshopify.com"),
    )


def test_a_shop_without_a_number_is_only_claimed_by_its_header() -> None:
    for shop in (None, 5, "", "gid://shopify/Shop/", "gid://shopify/Shop/x"):
        body = orjson.dumps({"app_purchase_one_time": CHARGE | {"admin_graphql_api_shop_id": shop}})
        assert webhooks.read(DELIVERY, body).shop == ShopClaim(
            number=None, domain="cool.myshopify.com"
        )


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"app_subscription": {}},
        {"app_purchase_one_time": None},
        {"app_purchase_one_time": [CHARGE]},
        {"app_purchase_one_time": CHARGE | {"admin_graphql_api_id": 1017262349}},
        {"app_purchase_one_time": CHARGE | {"admin_graphql_api_id": "a b"}},
        {"app_purchase_one_time": CHARGE | {"admin_graphql_api_id": "a\0"}},
        {"app_purchase_one_time": CHARGE | {"status": None}},
        {"app_purchase_one_time": CHARGE | {"status": "A" * 65}},
    ],
)
def test_a_body_that_is_not_about_a_charge_cannot_be_read(said: object) -> None:
    with pytest.raises(InputError):
        webhooks.read(DELIVERY, orjson.dumps(said))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"app_purchase_one_time=1"])
def test_a_body_that_is_not_json_cannot_be_read(body: bytes) -> None:
    with pytest.raises(InputError):
        webhooks.read(DELIVERY, body)
