"""The bounds of what `/api/v1/tokens` takes: each is where it is said to be, and says its name.

A secret stands in every body here, and in no error.
"""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.http.bodies import parse_json
from glamd.http.platform_token_models import StoreBody

MERCHANT = UUID("6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c")
CANARY = "shpat_canary_0d1f2e3c4b5a69788796a5b4c3d2e1f0"


def parsed(**changes: Any) -> StoreBody:
    """A body with these changes, read as a request's is; `...` takes a field away."""
    whole = {
        "merchant_id": str(MERCHANT),
        "platform_name": "shopify",
        "platform_shop_id": "67890",
        "domain": "shop.example",
        "token_data": {"access_token": CANARY},
        "token_type": "oauth",
    } | changes
    sent = {name: value for name, value in whole.items() if value is not ...}
    request = make_mocked_request("POST", "/", headers={"Content-Type": "application/json"})
    return parse_json(request, json.dumps(sent).encode(), StoreBody)


def nested(levels: int) -> dict[str, Any]:
    """So many objects within one another."""
    made: dict[str, Any] = {"token": 1}
    for _ in range(levels - 1):
        made = {"in": made}
    return made


WRONG: list[tuple[str, Any]] = [
    ("merchant_id", 5),
    ("merchant_id", f"{MERCHANT}0"),
    ("merchant_id", ...),
    ("platform_name", "Shopify"),
    ("platform_name", "ebay"),
    ("platform_name", ["shopify"]),
    ("platform_name", ...),
    ("platform_shop_id", ""),
    ("platform_shop_id", "x" * 256),
    ("platform_shop_id", "67890\u0000"),
    ("platform_shop_id", "67890\n"),
    ("platform_shop_id", "\u202e09876"),
    ("platform_shop_id", 67890),
    ("platform_shop_id", ...),
    ("domain", "localhost"),
    ("domain", "https://shop.example"),
    ("domain", "shop.example:443"),
    ("domain", "shop.example."),
    ("domain", "shop..example"),
    ("domain", "-shop.example"),
    ("domain", "127.0.0.1"),
    ("domain", "shop.example\n"),
    ("domain", "shop.e\u017fample"),
    ("domain", f"{'a' * 64}.example"),
    ("domain", f"{'a.' * 124}toolong"),
    ("domain", ...),
    ("token_data", {}),
    ("token_data", [CANARY]),
    ("token_data", CANARY),
    ("token_data", {CANARY: 2**63}),
    ("token_data", {"a": [{"b": -(2**63) - 1}]}),
    ("token_data", {"a": 1e300}),
    ("token_data", {"a": CANARY * 1500}),
    ("token_data", ...),
    ("token_type", "OAuth"),
    ("token_type", "password"),
    ("token_type", True),
    ("token_type", ...),
    ("expires_at", 1893499200),
    ("expires_at", "1893499200"),
    ("expires_at", "2030-01-01"),
    ("expires_at", "2030-02-30T00:00:00Z"),
    ("expires_at", "0000-01-01T00:00:00Z"),
    ("expires_at", "10000-01-01T00:00:00Z"),
    ("expires_at", "0001-01-01T00:00:00+01:00"),
    ("expires_at", "9999-12-31T23:59:59-00:01"),
    ("expires_at", "tomorrow"),
    ("expires_at", {"at": CANARY}),
    ("scopes", 5),
    ("scopes", {CANARY: True}),
    ("scopes.0", ["read orders"]),
    ("scopes.0", ["read,orders"]),
    ("scopes.1", ["read", ""]),
    ("scopes.0", ["x" * 256]),
    ("scopes.0", "x" * 256),
    ("scopes", ["x"] * 257),
    ("scopes", "x " * 9000),
    ("scopes.1", ["x", None]),
    ("idempotency_key", ""),
    ("idempotency_key", "a b"),
    ("idempotency_key", "x" * 256),
    ("nonsense", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_is_wrong_is_named_and_never_repeated(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        parsed(**{field.partition(".")[0]: value})
    error = caught.value
    assert error.code == "VALIDATION_ERROR"
    assert [each.field for each in error.fields] == [field]
    assert CANARY not in repr(error) + repr(error.fields)
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    "changes",
    [
        {"token_data": nested(16)},
        {"token_data": {"a": [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]}},
        {"token_data": {"a": "x" * (64 * 1024 - 8)}},
        {"token_data": {"a": "ä" * (32 * 1024 - 4)}},
        {"token_data": {"a": -(2**63), "b": 2**63 - 1, "c": -0.0, "": "\u0000\u2028"}},
        {"platform_shop_id": "ä" * 255},
        {"platform_shop_id": "gid://shopify/Shop/1 x"},
        {"domain": f"{'a' * 63}.example"},
        {"domain": f"{'a.' * 123}example"},
        {"domain": "xn--bcher-kva.EXAMPLE"},
        {"scopes": ["x" * 255] * 256},
        {"scopes": None, "expires_at": None, "idempotency_key": None},
        {"idempotency_key": "x" * 255},
    ],
)
def test_what_is_just_within_its_bounds_is_taken(changes: dict[str, Any]) -> None:
    body = parsed(**changes)
    assert body.token_data == changes.get("token_data", {"access_token": CANARY})
    assert body.domain == changes.get("domain", "shop.example").lower()


@pytest.mark.parametrize(
    ("given_scopes", "stored"),
    [
        ("read_products,write_orders", ("read_products", "write_orders")),
        (" read\twrite,\r\n read ,", ("read", "write")),
        (["b", "a", "b"], ("b", "a")),
        (["https://api.example/auth/x.read:y"], ("https://api.example/auth/x.read:y",)),
        ("", ()),
        (" ,\t", ()),
        ([], ()),
        (None, ()),
    ],
)
def test_scopes_are_a_list_in_the_end(given_scopes: object, stored: tuple[str, ...]) -> None:
    assert parsed(scopes=given_scopes).new_token().scopes == stored


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2030-01-01T14:00:00+02:00", datetime(2030, 1, 1, 12, tzinfo=UTC)),
        ("1970-01-01t00:00:00z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("2030-01-01 00:00:00.5", datetime(2030, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)),
        ("2031-05-06T07:08:09", datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime.min.replace(tzinfo=UTC)),
        ("9999-12-31T23:59:59.9999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_times_are_read_with_any_offset_and_without_one_as_utc(text: str, at: datetime) -> None:
    assert parsed(expires_at=text).expires_at == at


@given(st.datetimes(), st.integers(-1439, 1439))
def test_every_time_with_every_offset_is_read_or_is_named(at: datetime, minutes: int) -> None:
    sign = "-" if minutes < 0 else "+"
    text = f"{at.isoformat()}{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"
    try:
        wanted = at.replace(tzinfo=UTC) - timedelta(minutes=minutes)
    except OverflowError:
        with pytest.raises(InputError) as caught:
            parsed(expires_at=text)
        assert [each.field for each in caught.value.fields] == ["expires_at"]
    else:
        assert parsed(expires_at=text).expires_at == wanted


def test_no_secret_shows_in_the_body_or_in_what_is_made_of_it() -> None:
    body = parsed(scopes="read", idempotency_key="k")
    assert CANARY not in repr(body) + str(body)
    assert CANARY not in repr(body.new_token())
    assert body.new_token().secret.data == {"access_token": CANARY}
