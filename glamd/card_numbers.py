"""Card numbers in bytes that others sent about money: hidden in a dead letter, refused elsewhere.

Pure. No event and no reference has a card number in it; somebody will send one all the same, and a
table that operators read, or an event, is no place for it. This looks for numbers of known schemes
in the scheme's own length with a good check digit, so that the ids of shop platforms, which are
long numbers too, are left alone. Ids and texts about cards have `glamd.payments.card_numbers`,
which masks whatever might be one, and logs `glamd.redaction`.
"""

import re
from typing import Final

MASK: Final = b"[card number]"
REFUSED_DIGITS: Final = 15

_MAY_HAVE: Final = re.compile(rb"[0-9](?:[ -]?[0-9]){12}")
_MAY_HOLD: Final = re.compile(rb"[0-9](?:[ -]?[0-9]){14}")
"""Cheaper than the search itself, and most have neither."""

_UUID: Final = rb"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
_UUID_OR_RUN: Final = re.compile(
    rb"(?<![0-9a-fA-F-])" + _UUID + rb"(?![0-9a-fA-F-])"
    rb"|(?P<run>(?<![0-9])[0-9](?:[ -]?[0-9]){12,18}(?![0-9]))"
)
_SCHEMES: Final = re.compile(
    rb"4[0-9]{12}(?:[0-9]{3}){0,2}"
    rb"|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    rb"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}(?:[0-9]{2})?"
    rb"|35(?:2[89]|[3-8][0-9])[0-9]{12}"
    rb"|6(?:011|4[4-9][0-9]|5[0-9]{2})[0-9]{12}(?:[0-9]{3})?|(?:62|81)[0-9]{14,17}"
    rb"|(?:50|5[6-8]|6[37])[0-9]{14}(?:[0-9]{2,3})?"
)
_DOUBLED: Final = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def hidden(content: bytes) -> bytes:
    """The bytes with each card number, also one with blanks or hyphens in it, as MASK."""
    if _MAY_HAVE.search(content) is None:
        return content
    return _UUID_OR_RUN.sub(_judged, content)


def holds_one(content: bytes) -> bool:
    """Whether there is a card number of 15 digits or more, for who has to refuse it.

    Shorter ones are hidden but not refused: shop platforms give their things numbers of 13 and 14
    digits, and every tenth of some would be a card's.
    """
    return _MAY_HOLD.search(content) is not None and any(
        _judged(match) == MASK and len(match[0].translate(None, b" -")) >= REFUSED_DIGITS
        for match in _UUID_OR_RUN.finditer(content)
    )


def _judged(match: re.Match[bytes]) -> bytes:
    run = match["run"]
    if run is None:
        return match[0]
    digits = run.replace(b" ", b"").replace(b"-", b"")
    return MASK if _SCHEMES.fullmatch(digits) and _has_good_check_digit(digits) else run


def _has_good_check_digit(digits: bytes) -> bool:
    """ISO/IEC 7812-1, annex B (Luhn)."""
    values = [byte - 0x30 for byte in reversed(digits)]
    return (sum(values[::2]) + sum(_DOUBLED[value] for value in values[1::2])) % 10 == 0
