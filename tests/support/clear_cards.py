"""Cards in the clear for the tests of their parser, and what a parser made of them."""

import pytest
from hypothesis import strategies as st

from glamd.errors import InputError
from glamd.payments import card as cards
from glamd.payments.card import Card, parse
from glamd.payments.model import Format

VISA = "4111111111111111"
AMEX = "378282246310005"
FORMATS: tuple[Format, ...] = ("track2", "track1", "emv-tlv", "pan", "json")


def luhn_ok(pan: str) -> bool:
    return cards.luhn_ok(pan.encode())


def made(pan: str, expiry: str | None, name: str | None, service_code: str | None) -> Card:
    return Card(bytearray(pan.encode()), expiry, name, service_code)


def fields(card: Card) -> tuple[str, str | None, str | None, str | None]:
    assert card.track2 is None
    assert card.emv is None
    return card.pan.decode(), card.expiry, card.cardholder_name, card.service_code


def check_digit(body: str) -> str:
    return next(digit for digit in "0123456789" if luhn_ok(body + digit))


pans = (
    st.integers(11, 18)
    .flatmap(lambda size: st.text("0123456789", min_size=size, max_size=size))
    .map(lambda body: body + check_digit(body))
)
expiries = st.tuples(st.integers(0, 99), st.integers(1, 12)).map(lambda ym: f"{ym[0]:02}{ym[1]:02}")
paddings = st.integers(0, 15).map(bytes)


def chip(*objects: str) -> bytearray:
    """Objects written as `tag:hex`, with the length put in."""
    data = bytearray()
    for item in objects:
        tag, value = item.split(":")
        data += bytes.fromhex(tag) + bytes([len(value) // 2]) + bytes.fromhex(value)
    return data


def even(digits: str) -> str:
    return digits + "F" * (len(digits) % 2)


def attempt(form: Format, clear: bytearray) -> Card | InputError:
    try:
        return parse(form, clear)
    except InputError as error:
        return error


def refused(form: Format, clear: bytes | bytearray) -> str:
    with pytest.raises(InputError) as raised:
        parse(form, bytearray(clear))
    error = raised.value
    assert error.code == "DECRYPT_FAILED"
    assert not error.retryable
    assert error.__context__ is None, "a driver's error would carry the document along"
    return error.message
