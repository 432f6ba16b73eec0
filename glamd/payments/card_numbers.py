"""Card numbers in texts that others chose: found and masked before such a text is kept anywhere.

For ids, purposes and path segments, which have no business holding a PAN and which somebody will
put one into all the same. Pure. Logs have a room of their own for this (`glamd.redaction`), which
card-data code does not share.
"""

import re

from glamd.payments.card import luhn_ok

MIN_DIGITS = 13
MAX_DIGITS = 19
"""What counts as a card number: so many digits, the first not 0, with a good check digit, also
between other digits. An id of digits alone may look so by chance, and is better masked."""

MASK = "*"

_RUN = re.compile(r"[0-9](?:[ -]{0,3}[0-9]){12,}")
# One hexadecimal id of 128 bits in a hundred has a card number in it by chance; whoever made ids
# of these forms could not be followed through the logs if those were touched.
_MADE_BY_MACHINE = re.compile(
    r"(?<![0-9A-Za-z])(?=[0-9-]*[A-Fa-f])"
    r"(?:[0-9A-Fa-f]{32,}|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})(?![0-9A-Za-z])"
)


def masked(text: str) -> str:
    """The text with each digit of a card number as `*`.

    Digits may have up to three spaces or hyphens between them. UUIDs, and words of 32 or more
    hexadecimal digits that are not all decimal, are left as they are.
    """
    if _RUN.search(text) is None:
        return text
    kept, at = [], 0
    for made in _MADE_BY_MACHINE.finditer(text):
        kept += [_RUN.sub(_mask, text[at : made.start()]), made[0]]
        at = made.end()
    return "".join([*kept, _RUN.sub(_mask, text[at:])])


def _mask(match: re.Match[str]) -> str:
    run = list(match[0])
    places = [at for at, character in enumerate(run) if character.isdecimal()]
    digits = "".join(run[at] for at in places)
    for start in range(len(digits) - MIN_DIGITS + 1):
        if digits[start] == "0":
            continue
        for end in range(start + MIN_DIGITS, min(start + MAX_DIGITS, len(digits)) + 1):
            if luhn_ok(digits[start:end].encode()):
                for at in places[start:end]:
                    run[at] = MASK
    return "".join(run)
