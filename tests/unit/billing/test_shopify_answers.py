"""What Shopify's answers mean: after which there may be a charge, and after which there is none."""

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.billing.money import Money
from glamd.billing.platforms import shopify_answers as answers
from glamd.billing.platforms.interface import NotSoldError, UnansweredError
from glamd.billing.platforms.shopify_answers import RawAnswer, ThrottledError

CHARGE = {
    "id": "gid://shopify/AppPurchaseOneTime/1017262349",
    "name": "500 credits",
    "status": "PENDING",
    "test": False,
    "createdAt": "2026-11-21T12:00:00Z",
    "price": {"amount": "39.99", "currencyCode": "USD"},
}


def raw(body: object, status: int = 200, retry_after: str | None = None) -> RawAnswer:
    """An answer with this body."""
    found = body if isinstance(body, bytes) else orjson.dumps(body)
    return RawAnswer(status=status, retry_after=retry_after, body=found)


def failed(code: str, **more: object) -> RawAnswer:
    """An answer with an error of this code."""
    return raw({"errors": [{"message": "m", "extensions": {"code": code}}], **more})


def made(**changes: Any) -> dict[str, Any]:
    """The data of a charge that was made."""
    payload: dict[str, Any] = {
        "appPurchaseOneTime": CHARGE,
        "confirmationUrl": "https://cool.myshopify.com/admin/charges/1/confirm?signature=x",
        "userErrors": [],
    }
    return {"appPurchaseOneTimeCreate": payload | changes}


# ---- there may be a charge


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"", 500),
        raw(b"", 502),
        raw(b"", 503),
        raw(b"", 504),
        raw(b"", 408),
        raw(b""),
        raw(b"<html>"),
        raw([]),
        raw({}),
        raw({"data": None}),
        raw({"data": []}),
        failed("INTERNAL_SERVER_ERROR"),
        failed("SOMETHING", data={"appPurchaseOneTimeCreate": None}),
        raw({"errors": "Not quite"}),
        raw({"errors": {"a": 1}}),
    ],
)
def test_what_is_no_answer_leaves_it_open(answer: RawAnswer) -> None:
    with pytest.raises(UnansweredError):
        answers.data_of(answer)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"appPurchaseOneTimeCreate": None},
        made(appPurchaseOneTime=None),
        made(confirmationUrl=None),
        made(confirmationUrl="javascript:alert(1)"),
        made(confirmationUrl="https://x/" + "a" * 2048),
        made(confirmationUrl="https://x/\r\nSet-Cookie:"),
        made(appPurchaseOneTime=CHARGE | {"id": 5}),
        made(appPurchaseOneTime=CHARGE | {"id": "a b"}),
        made(appPurchaseOneTime=CHARGE | {"status": None}),
        made(appPurchaseOneTime=CHARGE | {"test": "false"}),
        made(appPurchaseOneTime=CHARGE | {"price": None}),
        made(appPurchaseOneTime=CHARGE | {"price": {"amount": 39.99, "currencyCode": "USD"}}),
    ],
)
def test_a_charge_that_cannot_be_read_leaves_it_open(data: dict[str, Any]) -> None:
    with pytest.raises(UnansweredError):
        answers.checkout_of(data)


# ---- there is none


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (raw(b"", 401), "TOKEN_REFUSED"),
        (raw(b"", 402), "SHOP_FROZEN"),
        (raw(b"", 403), "NOT_ALLOWED"),
        (raw(b"", 404), "NO_SUCH_SHOP"),
        (raw(b"", 423), "SHOP_LOCKED"),
        (raw(b"", 400), "REFUSED"),
        (raw(b"", 301), "REDIRECTED"),
        (raw(b"", 307), "REDIRECTED"),
        (failed("ACCESS_DENIED"), "NOT_ALLOWED"),
        (failed("SHOP_INACTIVE"), "SHOP_FROZEN"),
        (failed("MAX_COST_EXCEEDED"), "TOO_COSTLY"),
        (failed("undefinedField"), "QUERY_REFUSED"),
        (raw({"errors": [{"message": "syntax error"}]}), "QUERY_REFUSED"),
    ],
)
def test_a_refusal_before_the_execution_is_certain(answer: RawAnswer, code: str) -> None:
    with pytest.raises(NotSoldError) as caught:
        answers.data_of(answer)
    assert caught.value.code == code
    assert not caught.value.may_pass


def test_input_that_is_refused_makes_no_charge() -> None:
    errors = [{"field": ["price"], "message": "must be at least 0.50 shpat_secret"}]
    with pytest.raises(NotSoldError) as caught:
        answers.checkout_of(made(userErrors=errors, appPurchaseOneTime=None, confirmationUrl=None))
    assert caught.value.code == "INPUT_REFUSED"
    assert "shpat" not in str(caught.value)


# ---- there is room later


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [("2.0", 2.0), ("0", 0.0), (None, 1.0), ("soon", 1.0), ("-5", 1.0), ("999999", 3600.0)],
)
def test_too_many_requests_say_when_there_is_room(header: str | None, wait_s: float) -> None:
    with pytest.raises(ThrottledError) as caught:
        answers.data_of(raw(b"", 429, header))
    assert caught.value.wait_s == wait_s


@pytest.mark.parametrize(
    ("cost", "wait_s"),
    [
        ({"requestedQueryCost": 110, "throttleStatus": (10.0, 50.0)}, 2.0),
        ({"requestedQueryCost": 10, "throttleStatus": (20.0, 50.0)}, 0.0),
        ({"requestedQueryCost": 10, "throttleStatus": (0.0, 0.0)}, 1.0),
        ({"requestedQueryCost": None, "throttleStatus": (0.0, 50.0)}, 1.0),
        ({"requestedQueryCost": 10**9, "throttleStatus": (0.0, 1.0)}, 3600.0),
        ({"requestedQueryCost": 10}, 1.0),
    ],
)
def test_a_throttled_query_waits_until_its_cost_fits(cost: dict[str, Any], wait_s: float) -> None:
    if "throttleStatus" in cost:
        available, rate = cost["throttleStatus"]
        status = {"currentlyAvailable": available, "restoreRate": rate}
        cost = cost | {"throttleStatus": status}
    with pytest.raises(ThrottledError) as caught:
        answers.data_of(failed("THROTTLED", extensions={"cost": cost}))
    assert caught.value.wait_s == wait_s


def test_an_error_without_any_extension_is_waited_out_all_the_same() -> None:
    with pytest.raises(ThrottledError):
        answers.data_of(failed("THROTTLED"))


# ---- there is one


def test_a_charge_is_read_with_its_price_and_its_test_flag() -> None:
    found = answers.checkout_of(answers.data_of(raw({"data": made()})))
    assert found.report.charge_id == CHARGE["id"]
    assert found.report.status == "pending"
    assert found.report.price == Money(3999, "USD")
    assert found.report.is_test is False
    assert "signature" not in repr(found)


def test_no_charge_is_another_thing_than_no_answer() -> None:
    assert answers.charge_of({"node": None}) is None
    assert answers.charge_of({"node": CHARGE}) is not None
    unreadable: list[dict[str, object]] = [{}, {"node": {}}, {"node": "x"}]
    for data in unreadable:
        with pytest.raises(UnansweredError):
            answers.charge_of(data)


def test_a_page_of_charges_is_read_whole_or_not_at_all() -> None:
    def page(**changes: Any) -> dict[str, Any]:
        whole = {"nodes": [CHARGE], "pageInfo": {"hasNextPage": True, "endCursor": "c"}}
        return {"currentAppInstallation": {"oneTimePurchases": whole | changes}}

    found = answers.charges_of(page())
    assert [name for name, _, _ in found.charges] == ["500 credits"]
    assert found.next_cursor == "c"
    last = answers.charges_of(page(pageInfo={"hasNextPage": False, "endCursor": "c"}))
    assert last.next_cursor is None
    for changes in (
        {"nodes": None},
        {"nodes": [None]},
        {"nodes": [CHARGE | {"createdAt": "yesterday"}]},
        {"nodes": [CHARGE | {"createdAt": "2026-11-21T12:00:00"}]},
        {"nodes": [CHARGE | {"name": None}]},
        {"pageInfo": None},
        {"pageInfo": {"hasNextPage": True, "endCursor": 5}},
    ):
        with pytest.raises(UnansweredError):
            answers.charges_of(page(**changes))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "data",
                    "errors",
                    "extensions",
                    "cost",
                    "throttleStatus",
                    "code",
                    "node",
                    "appPurchaseOneTimeCreate",
                    "appPurchaseOneTime",
                    "price",
                    "userErrors",
                    "confirmationUrl",
                    "currentAppInstallation",
                    "oneTimePurchases",
                    "nodes",
                    "pageInfo",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([200, 200, 200, 201, 404, 429, 500]))
def test_whatever_comes_is_data_or_one_of_three_errors(body: Any, status: int) -> None:
    try:
        encoded = orjson.dumps(body)
    except TypeError:  # an integer that JSON has and orjson does not
        return
    with contextlib.suppress(ThrottledError, NotSoldError, UnansweredError):
        data = answers.data_of(raw(encoded, status))
        for read in (answers.checkout_of, answers.charge_of, answers.charges_of):
            with contextlib.suppress(NotSoldError, UnansweredError):
                read(data)
