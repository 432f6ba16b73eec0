"""The one place that knows what a card looks like: decrypted bytes in, a `Card` out, or a refusal.

Pure: no asyncio, no database, no log. Sealing and storing a card, and deciding who may see it, do
not belong here, nor does what a reader puts around its ciphertext (`glamd.payments.readers`).

Five forms are read (clear form of `data` in the terminals' contract): track 1 and track 2 as
ISO/IEC 7813 lays them out, either alone or one behind the other, BER-TLV from a chip (EMV Book 3),
a bare PAN, and JSON; and the bare values of tags 57 and 5A, which some readers encrypt one by one.
Only PAN, expiry, name and service code are taken. Track 2 and the chip's TLV are sensitive
authentication data: they are kept in a `Card` only where the caller says so. A security code and a
PIN block are never taken, whoever asks.

How far clearing goes. The caller owns the clear buffers and overwrites them when this has returned
or raised; nothing here keeps a view of one. The PAN, and what is kept of a track or a chip, are
bytearrays of their own, overwritten by `Card.wipe`, or here where a card is refused. Expiry, name
and service code are `str`, which Python frees and cannot overwrite.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from glamd.payments import tlv
from glamd.payments.card_forms import DETAILS, READERS, Draft, Form, add_details, refused, wipe

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


class Piece(NamedTuple):
    """One decrypted buffer, the caller's own, and what is in it."""

    form: Form
    clear: bytearray

    def __repr__(self) -> str:
        return f"<Piece of {self.form}, masked>"


class Masked(NamedTuple):
    """A PAN as a reader shows it beside its ciphertext, with other characters where it is masked.

    With `edges`, digits stand for masked ones too, and only so many at either end are the card's.
    """

    pan: bytes
    edges: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Card:
    """A card in the clear: `expiry` is `YYMM`, the PAN 12 to 19 digits with a good check digit.

    `track2` is as on a stripe, without sentinels (`<PAN>=<YYMM><SVC>…`), `emv` the chip's objects;
    both are None unless they were to be kept. It shows itself masked, refuses to be copied or
    pickled, and is to be wiped. Only `read` makes one.
    """

    pan: bytearray
    expiry: str | None
    cardholder_name: str | None
    service_code: str | None
    track2: bytearray | None = None
    emv: bytearray | None = None

    @property
    def last4(self) -> str:
        """The last four digits, which may be shown and stored."""
        return self.pan[-4:].decode()

    @property
    def bin(self) -> str:
        """The issuer's digits: 8 of a PAN of 16 or more, else 6 (PCI DSS 3.4.1)."""
        return (self.pan[:8] if len(self.pan) >= 16 else self.pan[:6]).decode()

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

    def wipe(self) -> None:
        """Overwrite the PAN and what was kept of track and chip; the card is of no use after."""
        for buffer in (self.pan, self.track2, self.emv):
            if buffer is not None:
                wipe(buffer)

    def __repr__(self) -> str:
        return f"<Card {self.brand} …{self.last4}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a card in the clear is neither copied nor pickled")


def parse(form: Form, clear: bytearray, *, keep_sensitive: bool = False) -> Card:
    """The card in one buffer; see `read`."""
    return read((Piece(form, clear),), keep_sensitive=keep_sensitive)


def read(
    pieces: Sequence[Piece],
    *,
    beside: bytes = b"",
    masked: Sequence[Masked] = (),
    keep_sensitive: bool = False,
) -> Card:
    """The one card that all of these decrypted pieces tell of.

    `beside` is TLV that came in the clear: expiry, name and service code are taken from it where
    no piece has them, never a PAN. Each `masked` PAN must be this card's. Trailing 00 bytes of a
    piece are padding. Raises `InputError` (`DECRYPT_FAILED`) with a short reason and none of the
    bytes where there is no card with a good check digit, or more than one. Changes no buffer.
    """
    draft = Draft(keep_sensitive)
    try:
        for piece in pieces:
            _check_length(piece.clear)
            READERS[piece.form](piece.clear, draft)
        if beside:
            draft.keep_objects(beside)
            add_details(draft, tlv.find(beside, DETAILS))
        return _finished(draft, masked)
    except BaseException:
        draft.wipe()
        raise


def luhn_ok(pan: bytearray | bytes) -> bool:
    """Whether the last of these ASCII digits is their check digit (ISO/IEC 7812-1, annex B)."""
    total = sum(pan[::-2].translate(_VALUE)) + sum(pan[-2::-2].translate(_DOUBLED))
    return total % 10 == 0


# ---- what holds for every form


def _check_length(clear: bytearray) -> None:
    if len(clear) > MAX_CLEAR_BYTES:
        raise refused("the decrypted data is too long")


def _finished(draft: Draft, masked: Sequence[Masked]) -> Card:
    if draft.pan is None:
        raise refused("the data has no card number")
    if not luhn_ok(draft.pan):
        raise refused("the card number fails its check digit")
    if masked and not all(_agrees(each, draft.pan) for each in masked):
        raise refused("the masked card number is another card's")
    if draft.expiry is not None and _YYMM.fullmatch(draft.expiry) is None:
        raise refused("the expiry is not a YYMM")
    code = draft.service_code
    if code is not None and not (len(code) == 3 and code.isdecimal()):
        raise refused("the service code is not three digits")
    name = _name(draft.name) if draft.name else None
    return Card(draft.pan, draft.expiry, name, code, draft.track2, draft.emv)


def _agrees(masked: Masked, pan: bytearray) -> bool:
    """Whether every digit that a masked PAN shows is the card's, and its length too."""
    size = len(pan)
    if len(masked.pan) != size:
        return False
    edges = size if masked.edges is None else masked.edges
    return all(
        shown == digit
        for at, (shown, digit) in enumerate(zip(masked.pan, pan, strict=True))
        if 0x30 <= shown <= 0x39 and (at < edges or at >= size - edges)
    )


def _name(name: str) -> str | None:
    """A name without its padding; `None` for the blanks or the lone slash of a nameless card."""
    name = name.strip(" \x00")
    if len(name) > MAX_NAME_CHARS:
        raise refused("the name is too long")
    if not name.isprintable():
        raise refused("the name is not printable")
    return name if name.strip(" /") else None


_YYMM = re.compile(r"[0-9]{2}(?:0[1-9]|1[0-2])")
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
