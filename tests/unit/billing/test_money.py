"""Money: what is refused, then that nothing is lost between minor units and text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.billing.money import MINOR_LIMIT, Money
from glamd.errors import InputError


@pytest.mark.parametrize(
    "amount",
    [
        9.99,
        999,
        None,
        True,
        "",
        "-9.99",
        "+9.99",
        "9,99",
        "9.",
        ".99",
        "09.99",
        "9.999",
        "9.991",
        "1e2",
        "0x10",
        "\uff19.99",
        " 9.99",
        "9.99\n",
        "NaN",
        "1_000",
        "9" * 16,
        "1." + "0" * 11,
    ],
)
def test_what_is_no_exact_amount_is_refused(amount: object) -> None:
    with pytest.raises(InputError) as caught:
        Money.parse(amount, "USD")
    assert [error.field for error in caught.value.fields] == ["amount"]


@pytest.mark.parametrize("currency", [None, "", "usd", "US", "USDX", "\uff35SD", 840])
def test_what_is_no_currency_is_refused(currency: object) -> None:
    with pytest.raises(InputError):
        Money.parse("9.99", currency)


def test_a_negative_or_boundless_sum_cannot_be_made() -> None:
    for amount in (-1, MINOR_LIMIT + 1, True):
        with pytest.raises(InputError):
            Money(amount, "USD")


@pytest.mark.parametrize(
    ("amount", "currency", "minor", "text"),
    [
        ("9.99", "USD", 999, "9.99"),
        ("9.9", "USD", 990, "9.90"),
        ("10", "USD", 1000, "10.00"),
        ("10.0", "USD", 1000, "10.00"),
        ("39.9900", "USD", 3999, "39.99"),
        ("0.05", "USD", 5, "0.05"),
        ("500", "JPY", 500, "500"),
        ("500.0", "JPY", 500, "500"),
        ("1.005", "KWD", 1005, "1.005"),
    ],
)
def test_trailing_zeros_do_not_matter_and_a_currency_has_its_own_digits(
    amount: str, currency: str, minor: int, text: str
) -> None:
    money = Money.parse(amount, currency)
    assert money == Money(minor, currency)
    assert money.amount == text


def test_a_fraction_that_the_currency_does_not_have_is_refused() -> None:
    with pytest.raises(InputError):
        Money.parse("1.5", "JPY")


@given(st.integers(0, MINOR_LIMIT), st.sampled_from(["USD", "JPY", "KWD"]))
def test_every_sum_is_read_back_from_its_text(minor: int, currency: str) -> None:
    money = Money(minor, currency)
    assert Money.parse(money.amount, currency) == money
