"""What card readers put around their ciphertext, as data: a profile by name, and one `unwrap`.

Pure: the bytes of a request's `data` in, the ciphertexts in them out, with what lies beside them in
the clear. Nothing is decrypted here, and how a clear text reads is said in
`glamd.payments.card_forms`. A key set names its reader. Where each profile comes from, and which of
them are only like the real thing, is told in docs/readers.md.

The bytes are anybody's: each envelope is read in one pass, with a limit on everything, and what
does not fit is an `InputError` with code `DECRYPT_FAILED` that shows no byte of it.
"""

import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import xor
from types import MappingProxyType
from typing import Final, NamedTuple

from glamd.payments import tlv
from glamd.payments.card import Masked
from glamd.payments.card_forms import Form, refused
from glamd.payments.model import Format

MAX_BYTES: Final = 16 * 1024
"""A whole message of the terminal's contract is not larger than this."""
MAX_FIELDS: Final = 32
"""Fields in one line of text; MagTek's longest has 15."""

# ---- what an envelope may be


@dataclass(frozen=True, slots=True)
class Whole:
    """Nothing is around it: all of `data` is ciphertext, and reads as the request's format says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piped:
    """One line of text: masked tracks, then fields between bars, the encrypted tracks in hex."""

    tracks: Mapping[int, Form]
    """Which field, counted from 0, holds which track."""
    mask_edges: int
    """Digits stand for masked ones too, but for so many at either end of the PAN."""


@dataclass(frozen=True, slots=True)
class Framed:
    """ID TECH's STX … ETX with lengths, check bytes, masked tracks and encrypted tracks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """TLV in which the values of some tags are ciphertext."""

    ciphers: Mapping[int, Form | None]
    """The encrypted tags in the order in which they are read; None: as the request's format."""
    masked: frozenset[int] = frozenset()
    """Tags with a masked track in text."""
    mask_edges: int | None = None
    marked: bool = False
    """Encrypted and masked objects are told by ID TECH's two flags in their lengths."""


Envelope = Whole | Piped | Framed | Tagged
WHOLE: Final = Whole()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One kind of reader: its name, and an envelope for each format that has one."""

    name: str
    envelopes: Mapping[Format, Envelope]


# ---- the profiles

_SWIPED = Piped(tracks=MappingProxyType({2: "track1", 3: "track2"}), mask_edges=4)
_FRAMED = Framed()
_ID_TECH_CHIP = Tagged(ciphers=MappingProxyType({0x57: "emv-tlv", 0x5A: "emv-tlv"}), marked=True)
_MAGTEK_CHIP = Tagged(
    ciphers=MappingProxyType({0xDFDF59: "emv-tlv"}), masked=frozenset({0xDFDF4D}), mask_edges=4
)
_VERIFONE = Tagged(ciphers=MappingProxyType({0xDF9020: None}))
_INGENICO_CHIP = Tagged(ciphers=MappingProxyType({0xFF1F: "emv-tlv"}))
_BARE_VALUES = Tagged(ciphers=MappingProxyType({0x57: "tag-57", 0x5A: "tag-5a"}))
_WHOLE_OBJECTS = Tagged(ciphers=MappingProxyType({0x57: "emv-tlv", 0x5A: "emv-tlv"}))


def _profile(name: str, envelopes: Mapping[Format, Envelope]) -> Reader:
    return Reader(name=name, envelopes=MappingProxyType(dict(envelopes)))


GENERIC: Final = _profile("generic", {})

READERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        reader.name: reader
        for reader in (
            GENERIC,
            _profile("magtek", {"track1": _SWIPED, "track2": _SWIPED, "emv-tlv": _MAGTEK_CHIP}),
            _profile("idtech", {"track1": _FRAMED, "track2": _FRAMED, "emv-tlv": _ID_TECH_CHIP}),
            _profile(
                "verifone",
                {
                    "track1": _VERIFONE,
                    "track2": _VERIFONE,
                    "emv-tlv": _VERIFONE,
                    "pan": _VERIFONE,
                },
            ),
            _profile("ingenico", {"emv-tlv": _INGENICO_CHIP}),
            _profile("emv-values", {"emv-tlv": _BARE_VALUES}),
            _profile("emv-objects", {"emv-tlv": _WHOLE_OBJECTS}),
        )
    }
)
"""Every profile by its name; `generic` for a reader that puts nothing around its ciphertext."""

reader_names: Final = frozenset(READERS)
"""The names that a key set may have as its reader."""


# ---- taking an envelope off


class Ciphertext(NamedTuple):
    """One encrypted piece, and what its clear text will be."""

    form: Form
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrapped:
    """What was in an envelope: at least one ciphertext; clear TLV; PANs as the reader masks them.

    `ciphertexts` are in the order in which they are to be read, which is also the MAC's.
    """

    ciphertexts: tuple[Ciphertext, ...]
    beside: bytes = b""
    masked: tuple[Masked, ...] = ()

    def under_mac(self) -> bytes:
        """What a MAC is over: the ciphertexts, one behind the other."""
        return b"".join(piece.data for piece in self.ciphertexts)


def unwrap(reader: Reader, form: Format, data: bytes) -> Unwrapped:
    """Take off what this reader puts around the ciphertext of a request in this format.

    Raises `InputError` (`DECRYPT_FAILED`) where there is no such envelope or nothing in it.
    """
    if len(data) > MAX_BYTES:
        raise refused("the data is too long")
    match reader.envelopes.get(form, WHOLE):
        case Whole():
            return Unwrapped(ciphertexts=(Ciphertext(form, data),))
        case Piped() as envelope:
            found = _from_line(envelope, data)
        case Framed():
            found = _from_frame(data)
        case Tagged() as envelope:
            found = _from_tags(envelope, form, data)
    if not found.ciphertexts:
        raise refused("the reader's envelope has nothing encrypted in it")
    return found


_MASKED_TRACK = re.compile(rb"(?:%[BM*]|;)([0-9*]{12,19})[\^=]")
"""Format code `*` is ID TECH's way of masking even that."""


def _masked_in(text: bytes, edges: int | None) -> tuple[Masked, ...]:
    return tuple(Masked(found, edges) for found in _MASKED_TRACK.findall(text))


def _from_line(envelope: Piped, data: bytes) -> Unwrapped:
    # A reader fills its last block with x, and a keyboard's line ends in CR.
    fields = data.rstrip(b"x\r\n\x00").split(b"|", MAX_FIELDS)
    if max(envelope.tracks) >= len(fields) or len(fields) > MAX_FIELDS:
        raise refused("the reader's line has not its number of fields")
    ciphertexts = []
    for index, form in envelope.tracks.items():
        try:
            track = binascii.unhexlify(fields[index])
        except binascii.Error:
            raise refused("a track in the reader's line is not hexadecimal") from None
        if track:
            ciphertexts.append(Ciphertext(form, track))
    return Unwrapped(
        ciphertexts=tuple(ciphertexts), masked=_masked_in(fields[0], envelope.mask_edges)
    )


_STX, _ETX = 0x02, 0x03
_HEAD_BYTES: Final = 3
_TAIL_BYTES: Final = 3
_ENHANCED: Final = 0x80
_ENCODING: Final = 0x3F
_OPTIONAL_BYTES: Final = 0x40
_AES: Final = 0x10
_TRACK_FORMS: Final[tuple[Form | None, ...]] = ("track1", "track2", None)
"""Track 3 is stepped over: nothing that we keep is on it."""


def _from_frame(data: bytes) -> Unwrapped:
    """Fields 1 to 17 of 80000502-001; what follows the encrypted tracks is of no use here."""
    card = _framed(data)
    enhanced = bool(card[0] & _ENHANCED)
    lengths = card[2:5]
    if enhanced:
        shown, encrypted, at = card[5], card[6], 7
        if card[1] & _OPTIONAL_BYTES:
            at += 1 + _byte(card, at)
    else:
        shown, encrypted, at = 0b111, 0b011, 5
    end_of_shown = at + sum(length for bit, length in enumerate(lengths) if shown >> bit & 1)
    masked = _masked_in(card[at:end_of_shown], None)
    block_bytes = 16 if enhanced and shown & _AES else 8
    if enhanced:
        sizes = [length if encrypted >> bit & 1 else 0 for bit, length in enumerate(lengths)]
    else:
        # The original format encrypts both tracks in one go, whichever of them there are.
        both = lengths[0] + lengths[1]
        sizes = [both, 0, 0] if lengths[0] else [0, both, 0]
    ciphertexts, at = [], end_of_shown
    for size, form in zip(sizes, _TRACK_FORMS, strict=True):
        padded = size + -size % block_bytes
        if padded > len(card) - at:
            raise refused("the reader's frame is cut short")
        if padded and form is not None:
            ciphertexts.append(Ciphertext(form, card[at : at + padded]))
        at += padded
    return Unwrapped(ciphertexts=tuple(ciphertexts), masked=masked)


def _framed(data: bytes) -> bytes:
    """The card data inside a frame whose lengths and check bytes are right; at least 7 bytes."""
    size = len(data) - _HEAD_BYTES - _TAIL_BYTES
    if size < 7 or data[0] != _STX or data[-1] != _ETX:
        raise refused("the reader's data is not in a frame")
    card = data[_HEAD_BYTES:-_TAIL_BYTES]
    lrc, checksum = reduce(xor, card), sum(card) & 0xFF
    if int.from_bytes(data[1:3], "little") != size or data[-3] != lrc or data[-2] != checksum:
        raise refused("the reader's frame has a wrong length or check byte")
    if card[0] & _ENCODING:
        raise refused("the reader's frame does not hold a bank card")
    return card


def _byte(card: bytes, at: int) -> int:
    if at >= len(card):
        raise refused("the reader's frame is cut short")
    return card[at]


def _from_tags(envelope: Tagged, form: Format, data: bytes) -> Unwrapped:
    found: dict[int, bytes] = {}
    beside: list[bytes] = []
    masked: list[Masked] = []
    wanted = frozenset(envelope.ciphers)
    needed = tlv.ENCRYPTED if envelope.marked else 0
    for tag, mark, start, at, end in tlv.objects(data, opaque=wanted, marked=envelope.marked):
        value = data[at:end]
        if mark & tlv.MASKED:
            masked += _masked_digits(tag, value)
        elif tag in wanted and mark == needed:
            if tag in found:
                raise refused("an encrypted tag is there twice")
            found[tag] = value
        elif tag in envelope.masked:
            masked += _masked_in(value, envelope.mask_edges)
        elif not mark:
            beside.append(data[start:end])
    return Unwrapped(
        ciphertexts=tuple(
            Ciphertext(own or form, found[tag])
            for tag, own in envelope.ciphers.items()
            if found.get(tag)
        ),
        beside=b"".join(beside),
        masked=tuple(masked),
    )


_MASKED_CHIP_PAN = re.compile(r"([0-9C*]{12,19}?)(?:D|F{0,8}$)")


def _masked_digits(tag: int, value: bytes) -> list[Masked]:
    """The masked PAN in tag 57 or 5A, where a nibble C hides a digit."""
    match = _MASKED_CHIP_PAN.match(value.hex().upper()) if tag in {0x57, 0x5A} else None
    return [] if match is None else [Masked(match[1].encode(), None)]
