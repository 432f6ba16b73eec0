"""The shapes of an event: ours, structured CloudEvents, flat; hostile ones; what we send."""

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.events import envelope
from glamd.events.schemas import (
    CreditsPurchased,
    EventData,
    MatchCompleted,
    MerchantCreated,
    PurchaseUpdated,
    TrialStarted,
)

MERCHANT = "018f3b1c-0000-7000-8000-000000000001"
MATCH: dict[str, Any] = {
    "merchant_id": MERCHANT,
    "match_id": "m-1",
    "shopper_id": "s-1",
    "matched_items_count": 3,
}
OURS: dict[str, Any] = {
    "event_id": "e-1",
    "event_type": "evt.ai.match.completed.v1",
    "correlation_id": "c-1",
    "timestamp": "2025-11-12T10:30:00",
    "source_service": "ai-service",
    "data": MATCH,
    "metadata": {"a": 1},
}
CLOUD: dict[str, Any] = {
    "specversion": "1.0",
    "id": "e-1",
    "source": "/ai",
    "type": "evt.ai.match.completed.v1",
    "time": "2025-11-12T10:30:00Z",
    "correlationid": "c-1",
    "data": MATCH,
}
FLAT: dict[str, Any] = {**MATCH, "event_id": "e-1", "correlation_id": "c-1"}


def read(
    content: object,
    model: type[EventData] = MatchCompleted,
    *,
    headers: Mapping[str, str] | None = None,
) -> envelope.Event[EventData] | None:
    """Read an event that is given as what JSON can hold."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return envelope.read(model, body=body, headers=headers or {})


def refused(content: object, model: type[EventData] = MatchCompleted) -> dict[str, str]:
    """What is told about an event that is refused, by field; the code where there is no field."""
    with pytest.raises(InputError) as caught:
        read(content, model)
    return {each.field: each.message for each in caught.value.fields} or {caught.value.code: ""}


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"merchant_id": None}, "merchant_id", "it is missing"),
        ({"merchant_id": ""}, "merchant_id", "it is not a UUID"),
        ({"merchant_id": 5}, "merchant_id", "it is not a UUID"),
        ({"merchant_id": [MERCHANT]}, "merchant_id", "it is not a UUID"),
        ({"match_id": 17}, "match_id", "it is not a text"),
        ({"match_id": ""}, "match_id", "it is empty"),
        ({"match_id": "x" * 201}, "match_id", "it is too long"),
        ({"match_id": "a\x00b"}, "match_id", "it has characters that it must not have"),
        ({"match_id": "a\nb"}, "match_id", "it has characters that it must not have"),
        ({"matched_items_count": "3"}, "matched_items_count", "it is not an integer"),
        ({"matched_items_count": 3.0}, "matched_items_count", "it is not an integer"),
        ({"matched_items_count": True}, "matched_items_count", "it is not an integer"),
        ({"matched_items_count": -1}, "matched_items_count", "it is too small"),
        ({"matched_items_count": 10**30}, "matched_items_count", "it is not an integer"),
        ({"matched_items_count": 2**31}, "matched_items_count", "it is too large"),
    ],
)
@pytest.mark.parametrize("shape", [OURS, CLOUD, FLAT])
def test_a_wrong_field_is_named_in_every_shape(
    shape: dict[str, Any], change: dict[str, object], field: str, message: str
) -> None:
    in_data = {"data": {**MATCH, **change}}
    content = {**shape, **(in_data if "data" in shape else change)}
    assert refused(content) == {field: message}


@pytest.mark.parametrize("amount", [0, -1, 1.5, "100", True, None, 2**53, [1], {"a": 1}])
def test_credits_are_a_positive_integer_that_json_can_hold(amount: object) -> None:
    data = {"merchant_id": MERCHANT, "purchase_id": "p-1", "credits": amount}
    assert set(refused(data, CreditsPurchased)) == {"credits"}


@pytest.mark.parametrize(
    "moment", [5, 1.7e9, "", "soon", "2025-13-01T00:00:00Z", "0001-01-01T00:00:00+05:00", True, []]
)
def test_a_time_is_one_of_rfc_3339(moment: object) -> None:
    data = {"merchant_id": MERCHANT, "ends_at": moment}
    assert refused(data, TrialStarted) == {"ends_at": "it is not a time of RFC 3339"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({**OURS, "data": None}, "data"),
        ({**OURS, "data": "x"}, "data"),
        ({**OURS, "data": [MATCH]}, "data"),
        ({**OURS, "event_id": ""}, "event_id"),
        ({**OURS, "event_id": {"a": 1}}, "event_id"),
        ({**OURS, "event_id": "x" * 201}, "event_id"),
        ({**OURS, "event_id": "a b\n"}, "event_id"),
        ({**OURS, "event_id": True}, "event_id"),
        ({**CLOUD, "specversion": "2.0"}, "specversion"),
        ({**CLOUD, "specversion": None}, "specversion"),
        ({**CLOUD, "data": None}, "data"),
        ({**CLOUD, "data": "e30="}, "data"),
        ({k: v for k, v in CLOUD.items() if k != "data"} | {"data_base64": "e30="}, "data"),
        ([OURS], "EVENT_MALFORMED"),
        (None, "EVENT_MALFORMED"),
        ("text", "EVENT_MALFORMED"),
        (5, "EVENT_MALFORMED"),
        (b"", "EVENT_MALFORMED"),
        (b'{"a":NaN}', "EVENT_MALFORMED"),
        (b'{"a":"\xff"}', "EVENT_MALFORMED"),
        (b'{"a":"\\ud800"}', "EVENT_MALFORMED"),
        (b"{" * 100_000, "EVENT_TOO_LARGE"),
        (b"[" * 60_000, "EVENT_MALFORMED"),
        (b"[" * 30_000 + b"]" * 30_000, "EVENT_MALFORMED"),
        (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "EVENT_MALFORMED"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "EVENT_MALFORMED"),
        (b" " * (envelope.MAX_BODY_BYTES + 1), "EVENT_TOO_LARGE"),
    ],
)
def test_what_has_no_shape_is_refused(content: object, told: str) -> None:
    assert set(refused(content)) == {told}


def test_no_error_tells_what_was_sent() -> None:
    with pytest.raises(InputError) as caught:
        read({**FLAT, "merchant_id": "4111111111111111", "match_id": 4111111111111111})
    error = caught.value
    assert "4111" not in repr((error, error.fields, error.__cause__, error.message))
    assert error.__suppress_context__


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_arbitrary_bytes_are_refused_in_good_order(body: bytes) -> None:
    with suppress(InputError):
        envelope.read(MatchCompleted, body=body, headers={})
    assert envelope.id_of(body, {}) is None or b"id" in body


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([OURS, CLOUD, FLAT]),
    st.dictionaries(st.sampled_from([*OURS, *CLOUD, *FLAT]), _JSON, min_size=1, max_size=3),
)
def test_an_event_with_anything_in_its_place_is_read_or_refused_in_good_order(
    shape: dict[str, Any], changes: dict[str, Any]
) -> None:
    with suppress(InputError):
        found = read({**shape, **changes})
        assert found is None or isinstance(found.data, MatchCompleted)


# ---- what is taken


@pytest.mark.parametrize("shape", [OURS, CLOUD, {**CLOUD, "specversion": "0.3"}, FLAT])
def test_every_shape_gives_the_same_event(shape: dict[str, Any]) -> None:
    assert read(shape) == envelope.Event(
        subject="evt.ai.match.completed.v1",
        event_id="e-1",
        correlation_id="c-1",
        data=MatchCompleted(
            merchant_id=UUID(MERCHANT), match_id="m-1", shopper_id="s-1", matched_items_count=3
        ),
    )


def test_fields_that_nobody_knows_and_nulls_are_passed_over() -> None:
    data = {**MATCH, "new_field": {"x": [1]}, "other": None}
    assert read({**OURS, "data": data, "extra": 1}) == read(OURS)


@pytest.mark.parametrize(
    ("content", "headers", "event_id"),
    [
        ({**FLAT, "id": "i-1"}, {"Nats-Msg-Id": "n-1"}, "e-1"),
        ({**MATCH, "id": "i-1"}, {"Nats-Msg-Id": "n-1"}, "i-1"),
        ({**MATCH, "id": 17}, {"Nats-Msg-Id": "n-1"}, "17"),
        ({**MATCH, "event_id": None}, {"Nats-Msg-Id": "n-1"}, "n-1"),
        (MATCH, {"Nats-Msg-Id": "n-1"}, "n-1"),
        (MATCH, {"Nats-Msg-Id": "n 1\x00"}, None),
        (MATCH, {}, None),
        ({**CLOUD, "event_id": None}, {}, "e-1"),
    ],
)
def test_the_id_is_found_in_its_order(
    content: dict[str, Any], headers: dict[str, str], event_id: str | None
) -> None:
    found = read(content, headers=headers)
    assert found is not None
    assert found.event_id == event_id
    assert envelope.id_of(orjson.dumps(content), headers) == event_id


@pytest.mark.parametrize(
    ("content", "correlation_id"),
    [
        ({**OURS, "correlation_id": None}, "e-1"),
        ({**OURS, "correlation_id": "a\nb"}, "e-1"),
        ({**OURS, "correlation_id": ["x"]}, "e-1"),
        ({**CLOUD, "correlationid": None, "correlation_id": "c-2"}, "c-2"),
        (MATCH, "-"),
    ],
)
def test_a_correlation_id_is_optional(content: dict[str, Any], correlation_id: str) -> None:
    found = read(content)
    assert found is not None
    assert found.correlation_id == correlation_id


def test_our_own_events_are_told_by_header_or_source_and_their_data_is_not_looked_at() -> None:
    assert read(b"anything", headers={"ce-source": "glamd"}) is None
    assert read({**OURS, "source_service": "glamd", "data": {}}) is None
    assert read({**CLOUD, "source": "glamd", "data": {}}) is None
    assert read({"source_service": "glamd"}) is None
    assert read(OURS, headers={"ce-source": "glamd-2"}) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-11-12T10:30:00Z", datetime(2025, 11, 12, 10, 30, tzinfo=UTC)),
        ("2025-11-12T10:30:00", datetime(2025, 11, 12, 10, 30, tzinfo=UTC)),
        ("2025-11-12 10:30:00.123456", datetime(2025, 11, 12, 10, 30, 0, 123456, tzinfo=UTC)),
        ("2025-11-12T12:30:00+02:00", datetime(2025, 11, 12, 10, 30, tzinfo=UTC)),
    ],
)
def test_a_time_without_an_offset_is_utc(text: str, expected: datetime) -> None:
    found = read({"merchant_id": MERCHANT, "ends_at": text}, TrialStarted)
    assert found is not None
    assert isinstance(found.data, TrialStarted)
    assert found.data.ends_at == expected
    assert found.data.ends_at.tzinfo is UTC
    assert found.data.credits is None


@pytest.mark.parametrize(
    "names",
    [
        ("platform", "shop_domain", "shop_gid"),
        ("platform_name", "domain", "platform_shop_id"),
    ],
)
def test_a_merchant_comes_under_older_and_newer_names(names: tuple[str, str, str]) -> None:
    values = ("shopify", "a.example.com", "gid://shopify/Shop/1")
    data = {"merchant_id": MERCHANT, **dict(zip(names, values, strict=True))}
    found = read({**data, "installed_at": "2025-01-01T00:00:00"}, MerchantCreated)
    assert found is not None
    assert isinstance(found.data, MerchantCreated)
    assert (found.data.platform, found.data.domain, found.data.shop_id) == values
    assert found.data.installed_at == datetime(2025, 1, 1, tzinfo=UTC)
    assert (found.data.name, found.data.email) == (None, None)


def test_of_two_names_the_one_that_is_not_null_counts() -> None:
    data = {
        "merchant_id": MERCHANT,
        "platform": None,
        "platform_name": "shopify",
        "shop_domain": "a.example.com",
        "shop_gid": "1",
    }
    found = read(data, MerchantCreated)
    assert found is not None
    assert isinstance(found.data, MerchantCreated)
    assert found.data.platform == "shopify"


@pytest.mark.parametrize("amount", ["39.99", 39.99, Decimal("39.99")])
def test_an_amount_of_money_is_a_decimal(amount: object) -> None:
    body = f'{{"merchant_id":"{MERCHANT}","purchase_id":"p","credits":5,"amount":'
    text = f'"{amount}"' if isinstance(amount, str) else str(amount)
    found = read(f"{body}{text}}}".encode(), CreditsPurchased)
    assert found is not None
    assert isinstance(found.data, CreditsPurchased)
    assert found.data.amount == Decimal("39.99")


@pytest.mark.parametrize("charge", [1017262355, "1017262355"])
@pytest.mark.parametrize("status", ["ACTIVE", "active", "Active"])
def test_a_charge_is_a_number_or_a_text_and_its_status_in_any_case(
    charge: object, status: str
) -> None:
    data = {"merchant_id": MERCHANT, "charge_id": charge, "status": status}
    found = read(data, PurchaseUpdated)
    assert found is not None
    assert isinstance(found.data, PurchaseUpdated)
    assert (found.data.charge_id, found.data.status) == ("1017262355", "active")


# ---- what is sent


def test_the_headers_are_a_block_as_nats_has_it() -> None:
    at = datetime(2025, 11, 12, 10, 30, tzinfo=timezone(timedelta(0))).isoformat()
    block = envelope.outgoing_headers(
        event_id="e-1", subject="evt.credits.granted.v1", merchant_id=MERCHANT, at=at
    )
    assert block.decode().split("\r\n") == [
        "NATS/1.0",
        "Nats-Msg-Id: e-1",
        "ce-specversion: 1.0",
        "ce-id: e-1",
        "ce-type: evt.credits.granted.v1",
        "ce-source: glamd",
        "ce-time: 2025-11-12T10:30:00+00:00",
        f"ce-subject: {MERCHANT}",
        "",
        "",
    ]


def test_what_we_send_is_what_we_would_take_for_our_own() -> None:
    body = envelope.outgoing_body(
        event_id="e-1",
        subject="evt.ai.match.completed.v1",
        correlation_id='c "1"',
        at="2025-11-12T10:30:00+00:00",
        data=json.dumps(MATCH),
    )
    assert json.loads(body)["data"] == MATCH
    assert json.loads(body)["correlation_id"] == 'c "1"'
    assert envelope.read(MatchCompleted, body=body, headers={}) is None


@pytest.mark.parametrize("subject", ["evt.credits.granted.v1", "cmd.x", "evt.a-b.C_d.0"])
def test_subjects_of_ours(subject: str) -> None:
    assert envelope.is_subject(subject)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "evt",
        "evt.",
        "evt..a",
        "evt.*",
        "evt.>",
        "evt.a b",
        "evt.a\r\n",
        "x.a",
        "evt.a.",
        "évt.a",
        "evt." + "a" * 65,
        "evt" + ".a" * 13,
    ],
)
def test_subjects_that_are_none(subject: str) -> None:
    assert not envelope.is_subject(subject)
