"""Settings of money and events: a mistake is told by the key in the file, never by its value."""

from collections.abc import Mapping

import pytest

from glamd import wiring
from glamd.config import Settings, effective, load
from glamd.errors import ConfigError

SECRET = "correct-horse-battery-staple-0123456789"
NEEDED = {
    "GLAMD_DATABASE__URL": "postgresql://glamd@db.example/glamd",
    "GLAMD_MQTT__TLS_CERT": "/etc/glamd/mqtt.crt",
    "GLAMD_MQTT__TLS_KEY": "/etc/glamd/mqtt.key",
    "GLAMD_MQTT__CLIENT_CA": "/etc/glamd/ca.crt",
    "GLAMD_DEVICES__CA_CERT": "/etc/glamd/ca.crt",
    "GLAMD_DEVICES__CA_KEY": "/etc/glamd/ca.key",
    "GLAMD_KEYS__KEK_FILE": "/etc/glamd/kek",
    "CLIENT_JWT_SECRET": SECRET,
    "INTERNAL_JWT_SECRET": SECRET[::-1],
}


def settings(**environ: str) -> Settings:
    return load(None, environ=NEEDED | environ)


def mistakes(environ: Mapping[str, str]) -> dict[str, str]:
    """What is wrong, as `glamd check-config` and a start tell it."""
    with pytest.raises(ConfigError) as raised:
        wiring.check(load(None, environ={**NEEDED, **environ}))
    assert SECRET not in raised.value.message
    return {each.field: each.message for each in raised.value.fields}


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("BILLING__TRIAL_DAYS", "0", "billing.trial_days"),
        ("BILLING__TRIAL_CREDITS", "9007199254740992", "billing.trial_credits"),
        ("BILLING__PURCHASE_LIFE_H", "0.001", "billing.purchase_life_h"),
        ("BILLING__PURCHASE_LIFE_H", "721", "billing.purchase_life_h"),
        ("BILLING__RETURN_HOSTS", "https://shop.example", "billing.return_hosts"),
        ("BILLING__WEBHOOK_RETENTION_DAYS", "0", "billing.webhook_retention_days"),
        ("BILLING__PACKS", "{}", "billing.packs"),
        ("BILLING__PACKS", '{"small": {"credits": 100, "price": 9.99}}', "billing.packs"),
        ("BILLING__PACKS__SMALL__PRIZE", "1", "billing.packs.small"),
        ("CREDITS__LOW_BALANCE_THRESHOLD", "-1", "credits.low_balance_threshold"),
        ("LEDGER__COMMIT_CONNECTIONS", "0", "ledger.commit_connections"),
        ("CHECKOUT__SECRETS", SECRET, "checkout.secrets"),
        ("CHECKOUT__URL", "https://pay.example", "checkout.secrets"),
        ("SHOPIFY__TIMEOUT_S", "0", "shopify.timeout_s"),
        ("SHOPIFY__BASE_URL", "http://127.0.0.1:4000", "shopify.base_url"),
        ("EVENTS__SERVERS", "http://nats.example", "events.servers"),
        ("EVENTS__SERVERS", "[]", "events.servers"),
        ("EVENTS__USER", "glamd", "events.password"),
        ("EVENTS__PASSWORD", SECRET, "events.password"),
        ("EVENTS__TLS_KEY", "/etc/glamd/nats.key", "events.tls_key"),
        ("EVENTS__STREAM_REPLICAS", "6", "events.stream_replicas"),
        ("EVENTS__START_AT", "2026-11-01T00:00:00", "events.start_at"),
    ],
)
def test_a_wrong_value_is_told_by_its_key(name: str, value: str, key: str) -> None:
    told = mistakes({f"GLAMD_{name}": value})
    assert told
    assert all(field.startswith(key) for field in told), told


@pytest.mark.parametrize(
    ("pack", "key"),
    [
        ('{"credits": 0, "price": "9.99"}', "billing.packs.mini"),
        ('{"credits": 5, "price": "0.00"}', "billing.packs.mini"),
        ('{"credits": 5, "price": "9,99"}', "billing.packs.mini.price"),
        ('{"credits": 5, "price": "9.999"}', "billing.packs.mini.price"),
        ('{"credits": 5, "price": "9.99", "currency": "usd"}', "billing.packs.mini.currency"),
    ],
)
def test_a_pack_that_cannot_be_sold_is_told_by_its_name(pack: str, key: str) -> None:
    assert list(mistakes({"GLAMD_BILLING__PACKS": f'{{"mini": {pack}}}'})) == [key]


def test_mistakes_of_billing_and_of_both_platforms_are_told_at_once() -> None:
    told = mistakes(
        {
            "GLAMD_BILLING__TRIAL_DAYS": "0",
            "SHOPIFY_API_KEY": "app",
            "SHOPIFY_API_SECRET": SECRET,
            "SHOPIFY_API_VERSION": "soon",
            "GLAMD_CHECKOUT__URL": "http://pay.example",
            "GLAMD_CHECKOUT__SECRETS": "short",
        }
    )
    assert list(told) == [
        "billing.trial_days",
        "shopify.api_version",
        "checkout.url",
        "checkout.secrets",
    ]


def test_packs_that_are_set_are_all_that_there_are() -> None:
    packs = '{"mini": {"credits": 5, "price": "500", "currency": "JPY"}}'
    sold = wiring.billing(settings(GLAMD_BILLING__PACKS=packs)).packs
    assert {name: (pack.credits, pack.price.amount_minor) for name, pack in sold.items()} == {
        "mini": (5, 500)
    }


def test_what_is_not_set_is_what_the_contract_says() -> None:
    sold = wiring.billing(settings())
    assert (sold.trial_days, sold.trial_credits) == (14, 500)
    assert {name: (pack.credits, pack.price.amount) for name, pack in sold.packs.items()} == {
        "small": (100, "9.99"),
        "medium": (500, "39.99"),
        "large": (1000, "69.99"),
    }
    assert wiring.shopify(settings()) is None
    assert wiring.custom(settings()) is None


def test_the_older_names_of_shopify_are_used() -> None:
    app = wiring.shopify(
        settings(SHOPIFY_API_KEY="app", SHOPIFY_API_SECRET=SECRET, SHOPIFY_API_VERSION="2024-01")
    )
    assert app is not None
    assert (app.api_secrets, app.api_version) == ((SECRET,), "2024-01")


def test_a_login_in_a_url_is_not_shown() -> None:
    shown = effective(settings(GLAMD_EVENTS__SERVERS=f"nats://glamd:{SECRET}@nats.example:4222"))
    assert SECRET not in shown
    assert 'servers = ["nats://**********@nats.example:4222"]' in shown


def test_certificates_for_nats_that_cannot_be_read_are_told() -> None:
    assert list(mistakes({"GLAMD_EVENTS__TLS_CA": "/nowhere/ca.pem"})) == ["events.tls_ca"]
