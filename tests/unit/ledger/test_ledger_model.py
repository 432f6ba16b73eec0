"""The rules of credits: what is refused, what a command does, and which events tell of it."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.ledger.model import (
    AMOUNT_LIMIT,
    METADATA_LIMIT_BYTES,
    REFERENCE_ID_LIMIT,
    TOTAL_LIMIT,
    Account,
    Command,
    Decision,
    Effect,
    InsufficientCreditsError,
    Operation,
    Refusal,
    decide,
)

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MERCHANT = UUID("018f2f3e-1111-7aaa-8bbb-000000000001")
TRANSACTION = uuid4()
THRESHOLD = 100

ACCOUNT = Account(
    merchant_id=MERCHANT,
    platform_name="shopify",
    platform_id="gid-1",
    platform_domain="shop.example.com",
    balance=0,
    total_granted=0,
    total_consumed=0,
    transaction_count=0,
    version=7,
)
DEBIT = Command(
    merchant_id=MERCHANT,
    operation="debit",
    amount=1,
    reference_type="match",
    reference_id="m1",
    correlation_id="c1",
)


def _nested(levels: int) -> dict[str, object]:
    """Objects within one another, so many that no encoder takes them inside of another document."""
    found: dict[str, object] = {}
    for _ in range(levels - 1):
        found = {"a": found}
    return found


def holding(balance: int) -> Account:
    """An account that was granted so much once."""
    return ACCOUNT._replace(balance=balance, total_granted=balance, transaction_count=1)


def decided(account: Account, command: Command, threshold: int = THRESHOLD) -> Decision:
    """The decision on this command."""
    return decide(
        account, command, NOW, transaction_id=TRANSACTION, low_balance_threshold=threshold
    )


def names(decision: Decision) -> list[str]:
    """The events by what is special in their names."""
    return [e.subject.removeprefix("evt.credits.").removesuffix(".v1") for e in decision.events]


def debit(account: Account, amount: int) -> Effect:
    """The effect of a debit that the account can pay."""
    effect = decided(account, replace(DEBIT, amount=amount))
    assert isinstance(effect, Effect)
    return effect


@pytest.mark.parametrize("amount", [0, -1, AMOUNT_LIMIT + 1, 2**63, True, 1.0, "1", None])
def test_an_amount_that_is_no_whole_number_in_range_is_refused_by_name(amount: object) -> None:
    with pytest.raises(InputError) as refused:
        replace(DEBIT, amount=cast("int", amount))
    assert [error.field for error in refused.value.fields] == ["amount"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference_type", ""),
        ("reference_type", "x" * 65),
        ("reference_id", ""),
        ("reference_id", "x" * (REFERENCE_ID_LIMIT + 1)),
        ("reference_id", "a\0b"),
        ("reference_id", "a\nb"),
        ("reference_id", "\ud800"),
        ("correlation_id", "a\x1fb"),
        ("description", "a\0b"),
        ("description", "\udfff"),
        ("description", "x" * 1001),
        ("metadata", {"a": "\0"}),
        ("metadata", {"a": "\\\0"}),
        ("metadata", {"\ud800": 1}),
        ("metadata", {"a": 2**64}),
        ("metadata", {1: 1}),
        ("metadata", _nested(251)),
        ("metadata", {"a": "x" * METADATA_LIMIT_BYTES}),
    ],
)
def test_what_could_not_be_stored_never_gets_into_a_commit_with_others(
    field: str, value: object
) -> None:
    with pytest.raises(InputError) as refused:
        replace(DEBIT, **{field: value})  # type: ignore[arg-type]  # fields of several types
    assert [error.field for error in refused.value.fields] == [field]


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(InputError) as refused:
        replace(DEBIT, amount=0, reference_id="", description="\0", metadata={"a": "\0"})
    assert [error.field for error in refused.value.fields] == [
        "amount",
        "reference_id",
        "description",
        "metadata",
    ]


def test_text_of_any_script_and_an_escaped_backslash_pass() -> None:
    replace(
        DEBIT,
        reference_id="заказ-№7 Ü",
        description="Zwei\nZeilen 🧾",
        metadata={"path": "C:\\u0000", "note": "日本"},
    )


def test_a_debit_above_the_balance_takes_nothing_and_says_what_is_there() -> None:
    decision = decided(holding(4), replace(DEBIT, amount=5))
    assert isinstance(decision, Refusal)
    assert isinstance(decision.error, InsufficientCreditsError)
    assert (decision.error.balance, decision.error.required) == (4, 5)
    assert decision.error.code == "INSUFFICIENT_CREDITS"
    (event,) = decision.events
    assert event.subject == "evt.credits.insufficient.v1"
    assert event.correlation_id == "c1"
    assert event.data == {
        "merchant_id": MERCHANT,
        "attempted_amount": 5,
        "balance": 4,
        "platform_name": "shopify",
    }


def test_grants_stop_where_the_total_would_pass_what_a_bigint_holds() -> None:
    almost = ACCOUNT._replace(
        total_granted=TOTAL_LIMIT - 5, total_consumed=TOTAL_LIMIT - 5, balance=0
    )
    grant = replace(DEBIT, operation="credit", amount=5)
    assert isinstance(decided(almost, grant), Effect)
    decision = decided(almost, replace(grant, amount=6))
    assert isinstance(decision, Refusal)
    assert isinstance(decision.error, InputError)
    assert [error.field for error in decision.error.fields] == ["amount"]
    assert decision.events == ()


def test_a_debit_moves_the_account_and_leaves_a_transaction_and_an_event() -> None:
    command = replace(DEBIT, amount=3, description="why", metadata={"shopper_id": "s"})
    effect = decided(holding(500), command)
    assert isinstance(effect, Effect)
    assert effect.account == holding(500)._replace(
        balance=497, total_consumed=3, transaction_count=2
    )
    moved = effect.transaction
    assert (moved.id, moved.seq, moved.created_at) == (TRANSACTION, 2, NOW)
    assert (moved.balance_before, moved.balance_after, moved.amount) == (500, 497, 3)
    assert (moved.description, moved.metadata) == ("why", {"shopper_id": "s"})
    (event,) = effect.events
    assert event.subject == "evt.credits.consumed.v1"
    assert event.data == {
        "merchant_id": MERCHANT,
        "amount": 3,
        "balance": 497,
        "reference_type": "match",
        "reference_id": "m1",
        "platform_name": "shopify",
    }


def test_a_grant_is_told_as_granted_and_never_as_low() -> None:
    effect = decided(ACCOUNT, replace(DEBIT, operation="credit", amount=3))
    assert isinstance(effect, Effect)
    assert effect.account == ACCOUNT._replace(balance=3, total_granted=3, transaction_count=1)
    assert names(effect) == ["granted"]


@pytest.mark.parametrize(
    ("balance", "amount", "told"),
    [
        (500, 400, ["consumed"]),  # exactly at the threshold is not below it
        (100, 1, ["consumed", "low_balance"]),
        (101, 2, ["consumed", "low_balance"]),
        (99, 1, ["consumed"]),  # below it already
        (1, 1, ["consumed", "exhausted"]),
        (100, 100, ["consumed", "low_balance", "exhausted"]),
        (500, 500, ["consumed", "low_balance", "exhausted"]),
    ],
)
def test_low_balance_is_told_when_it_is_crossed_and_exhausted_at_zero(
    balance: int, amount: int, told: list[str]
) -> None:
    effect = debit(holding(balance), amount)
    assert names(effect) == told
    for event in effect.events:
        assert event.data["merchant_id"] == MERCHANT
        assert event.data["platform_name"] == "shopify"
        if event.subject.endswith("low_balance.v1"):
            assert (event.data["balance"], event.data["threshold"]) == (balance - amount, 100)


def test_a_threshold_of_zero_tells_of_no_low_balance() -> None:
    assert names(decided(holding(1), DEBIT, threshold=0)) == ["consumed", "exhausted"]


@given(
    st.lists(
        st.tuples(st.sampled_from(("credit", "debit")), st.integers(1, 300)),
        max_size=40,
    )
)
def test_a_top_up_above_the_threshold_arms_it_and_nothing_else_does(
    steps: list[tuple[Operation, int]],
) -> None:
    account, is_armed = ACCOUNT, False
    for operation, amount in steps:
        decision = decided(account, replace(DEBIT, operation=operation, amount=amount))
        if isinstance(decision, Refusal):
            assert operation == "debit"
            assert amount > account.balance
            continue
        account = decision.account
        assert account.balance == account.total_granted - account.total_consumed >= 0
        is_low = account.balance < THRESHOLD
        assert ("low_balance" in names(decision)) == (is_armed and is_low)
        is_armed = not is_low
