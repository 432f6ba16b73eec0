"""The one place that knows what a card looks like: decrypted bytes in, a `Card` out, or a refusal.

Pure: no asyncio, no database, no log. Sealing and storing a card, and deciding who may see it, do
not belong here.

Five forms are read (clear form of `data` in the terminals' contract): track 1 and track 2 as
ISO/IEC 7813 lays them out, BER-TLV from a chip (EMV Book 3), a bare PAN, and JSON. Only PAN,
expiry, name and service code are taken. What follows them on a track, EMV cryptograms, and a
security code typed in by hand are sensitive authentication data: no group captures them and no
field holds them, so they end with the buffer that they came in.

How far clearing goes. The caller owns `clear` and overwrites it when `parse` has returned or
raised; nothing here keeps a view of it. The PAN inside a `Card` is an immutable `str`, and so are
the short-lived pieces between (match groups, the hex text of a chip's track 2, all of a JSON
document): Python gives no way to overwrite them. They are freed, not erased, as soon as nothing
refers to them, so let go of a `Card` early, and keep core dumps and swap off.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import orjson

from glamd.errors import InputError
from glamd.payments import tlv
from glamd.payments.model import Format

MAX_CLEAR_BYTES = 16 * 1024
"""A whole message of the terminal's contract is not larger than this."""
MIN_PAN_DIGITS = 12
MAX_PAN_DIGITS = 19
"""ISO/IEC 7812-1 ends at 19; below 12 nothing is issued."""
MAX_NAME_CHARS = 64
"""A track has room for 26 and EMV's extended name for 45; JSON may be a little more generous."""
CENTURY = 2000
"""Every YY is 20YY. EMV's pivot (50 and later are 19YY) would show a card that is good until 2050
as one that ended in 1950, and no card that ended before 2000 is tapped any more."""


@dataclass(frozen=True, slots=True, repr=False)
class Card:
    """A card in the clear: `expiry` is `YYMM`, the PAN 12 to 19 digits with a good check digit.

    It shows itself masked, and refuses to be copied or pickled. Only `parse` makes one.
    """

    pan: str
    expiry: str | None
    cardholder_name: str | None
    service_code: str | None

    @property
    def last4(self) -> str:
        """The last four digits, which may be shown and stored."""
        return self.pan[-4:]

    @property
    def bin(self) -> str:
        """The issuer's digits: 8 of a PAN of 16 or more, else 6 (PCI DSS 3.4.1)."""
        return self.pan[:8] if len(self.pan) >= 16 else self.pan[:6]

    @property
    def brand(self) -> str:
        """The scheme by its number range, in lower case; `unknown` outside the ranges we know."""
        return _BRANDS[int(self.pan[:4])]

    @property
    def exp_month(self) -> int | None:
        """The month of expiry, 1 to 12; `None` where the card says nothing."""
        return int(self.expiry[2:]) if self.expiry else None

    @property
    def exp_year(self) -> int | None:
        """The year of expiry in four digits (see `CENTURY`); `None` where the card says nothing."""
        return CENTURY + int(self.expiry[:2]) if self.expiry else None

    def __repr__(self) -> str:
        return f"<Card {self.brand} …{self.last4}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a card in the clear is neither copied nor pickled")


def parse(form: Format, clear: bytearray) -> Card:
    """The card in the decrypted bytes of a request that says its format is `form`.

    Trailing 00 bytes are padding. Raises `InputError` (`DECRYPT_FAILED`) with a short reason and
    none of the bytes where there is no card with a good check digit. Does not change `clear`.
    """
    if len(clear) > MAX_CLEAR_BYTES:
        raise _refused("the decrypted data is too long")
    return _READERS[form](clear)


def luhn_ok(pan: str) -> bool:
    """Whether the last of these decimal digits is their check digit (ISO/IEC 7812-1, annex B)."""
    digits = pan.encode("ascii")
    total = sum(digits[::-2].translate(_VALUE)) + sum(digits[-2::-2].translate(_DOUBLED))
    return total % 10 == 0


# ---- the five forms

# Discretionary data is matched and not captured. Every repeat is bounded but the padding's, which
# nothing follows, so that hostile bytes cost linear time.
_TRACK2 = re.compile(
    rb";?([0-9]{12,19})[=Dd](?:([0-9]{4})|[=Dd])(?:([0-9]{3})|[=Dd])?"
    rb"[0-9:<=>Dd]{0,64}[Ff]?(?:\?[\x00-\xff]?)?\x00*"
)
_TRACK1 = re.compile(
    rb"%?B([0-9]{12,19})\^([ -$&->@-\]_-~]{0,45})\^(?:([0-9]{4})|\^)(?:([0-9]{3})|\^)?"
    rb"[ ->@-~]{0,96}(?:\?[\x00-\xff]?)?\x00*"
)
_PAN = re.compile(rb"([0-9]{12,19})(?:\|([0-9]{4})(?:\|[0-9]{3,4})?)?\x00*")
_CHIP_TRACK2 = re.compile(r"([0-9]{12,19})d(?:([0-9]{4})|d)(?:([0-9]{3})|d)?[0-9d]{0,32}f?")
_CHIP_PAN = re.compile(r"([0-9]{12,19})f{0,8}")
_DIGITS = re.compile(r"[0-9]{12,19}")
_YYMM = re.compile(r"[0-9]{2}(?:0[1-9]|1[0-2])")

_TAG_TRACK2 = 0x57
_TAG_PAN = 0x5A
_TAG_NAME = 0x5F20
_TAG_EXPIRY = 0x5F24
_TAG_SERVICE_CODE = 0x5F30
_TAGS = frozenset({_TAG_TRACK2, _TAG_PAN, _TAG_NAME, _TAG_EXPIRY, _TAG_SERVICE_CODE})


def _track2(clear: bytearray) -> Card:
    match = _TRACK2.fullmatch(clear)
    if match is None:
        raise _refused("the decrypted data is not a track 2")
    pan, expiry, service_code = match.groups()
    return _card(pan.decode(), _text(expiry), None, _text(service_code))


def _track1(clear: bytearray) -> Card:
    match = _TRACK1.fullmatch(clear)
    if match is None:
        raise _refused("the decrypted data is not a track 1")
    pan, name, expiry, service_code = match.groups()
    return _card(pan.decode(), _text(expiry), name.decode(), _text(service_code))


def _pan(clear: bytearray) -> Card:
    match = _PAN.fullmatch(clear)
    if match is None:
        raise _refused("the decrypted data is not a card number")
    pan, expiry = match.groups()
    return _card(pan.decode(), _text(expiry), None, None)


def _json(clear: bytearray) -> Card:
    end = len(clear)
    while end and clear[end - 1] == 0x00:
        end -= 1
    document: object = None
    # The error holds the whole document, so it is left behind and ours raised outside of it.
    with memoryview(clear) as view, view[:end] as text, suppress(orjson.JSONDecodeError):
        document = orjson.loads(text)
    if not isinstance(document, dict):
        raise _refused("the decrypted data is not a JSON object")
    pan, expiry, name = document.get("pan"), document.get("exp"), document.get("name")
    if not isinstance(pan, str) or _DIGITS.fullmatch(pan) is None:
        raise _refused("the decrypted JSON has no card number")
    if not isinstance(expiry, str):
        raise _refused("the decrypted JSON has no expiry")
    if name is not None and not isinstance(name, str):
        raise _refused("the decrypted JSON has a name that is not text")
    return _card(pan, expiry, name, None)


def _chip(clear: bytearray) -> Card:
    """EMV Book 3, annex A: tag 57 is a whole track 2, else 5A with 5F24; both must say one PAN."""
    found = tlv.find(clear, _TAGS)
    pan, expiry, service_code = _chip_track2(found)
    own_pan = _chip_pan(found)
    if pan is None:
        pan = own_pan
    elif own_pan is not None and own_pan != pan:
        raise _refused("the chip data has two card numbers that differ")
    if pan is None:
        raise _refused("the chip data has no card number")
    if expiry is None and _TAG_EXPIRY in found:
        expiry = found[_TAG_EXPIRY].hex()[:4]  # YYMMDD, of which the day is nobody's business
    if service_code is None and _TAG_SERVICE_CODE in found:
        service_code = found[_TAG_SERVICE_CODE].hex()[1:]  # three digits behind one of padding
    name = str(found[_TAG_NAME], "latin-1") if _TAG_NAME in found else None
    return _card(pan, expiry, name, service_code)


def _chip_track2(found: dict[int, memoryview]) -> tuple[str | None, str | None, str | None]:
    if _TAG_TRACK2 not in found:
        return None, None, None
    match = _CHIP_TRACK2.fullmatch(found[_TAG_TRACK2].hex())
    if match is None:
        raise _refused("tag 57 is not a track 2")
    return match[1], match[2], match[3]


def _chip_pan(found: dict[int, memoryview]) -> str | None:
    if _TAG_PAN not in found:
        return None
    match = _CHIP_PAN.fullmatch(found[_TAG_PAN].hex())
    if match is None:
        raise _refused("tag 5A is not a card number")
    return match[1]


_READERS: dict[Format, Callable[[bytearray], Card]] = {
    "track2": _track2,
    "track1": _track1,
    "emv-tlv": _chip,
    "pan": _pan,
    "json": _json,
}


# ---- what holds for every form


def _card(pan: str, expiry: str | None, name: str | None, service_code: str | None) -> Card:
    if not luhn_ok(pan):
        raise _refused("the card number fails its check digit")
    if expiry is not None and _YYMM.fullmatch(expiry) is None:
        raise _refused("the expiry is not a YYMM")
    if service_code is not None and not (len(service_code) == 3 and service_code.isdecimal()):
        raise _refused("the service code is not three digits")
    return Card(pan, expiry, _name(name) if name else None, service_code)


def _text(group: bytes | None) -> str | None:
    return None if group is None else group.decode("ascii")


def _name(name: str) -> str | None:
    """A name without its padding; `None` for the blanks or the lone slash of a nameless card."""
    name = name.strip(" \x00")
    if len(name) > MAX_NAME_CHARS:
        raise _refused("the name is too long")
    if not name.isprintable():
        raise _refused("the name is not printable")
    return name if name.strip(" /") else None


def _refused(reason: str) -> InputError:
    return InputError(reason, code="DECRYPT_FAILED")


_VALUE = bytes(byte - 0x30 if 0x30 <= byte <= 0x39 else 0 for byte in range(256))
_DOUBLED = bytes(value * 2 - 9 if value > 4 else value * 2 for value in _VALUE)

# By the first four digits. Ranges overlap in life (622126 to 622925 is Discover's in the Americas
# and UnionPay's elsewhere); the issuer's own scheme is named.
_RANGES: tuple[tuple[int, int, str], ...] = (
    (4000, 4999, "visa"),
    (5100, 5599, "mastercard"),
    (2221, 2720, "mastercard"),
    (3400, 3499, "amex"),
    (3700, 3799, "amex"),
    (3528, 3589, "jcb"),
    (3000, 3059, "diners"),
    (3095, 3095, "diners"),
    (3600, 3699, "diners"),
    (3800, 3999, "diners"),
    (6011, 6011, "discover"),
    (6440, 6599, "discover"),
    (6200, 6299, "unionpay"),
    (8100, 8199, "unionpay"),
    (5000, 5099, "maestro"),
    (5600, 5899, "maestro"),
    (6300, 6399, "maestro"),
    (6700, 6799, "maestro"),
)


def _brand(prefix: int) -> str:
    return next((name for low, high, name in _RANGES if low <= prefix <= high), "unknown")


_BRANDS = tuple(_brand(prefix) for prefix in range(10_000))
