"""How a card reads in each form that a reader decrypts to: clear bytes in, a `Draft` filled.

Pure, and a part of `glamd.payments.card`, which says what holds for every form, and how far
clearing goes. What a card is, and which refusals follow once all is gathered, does not belong here.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Final, Literal

import orjson

from glamd.errors import InputError
from glamd.payments import tlv
from glamd.payments.model import Format

Form = Format | Literal["tag-57", "tag-5a"]
"""The contract's formats, and the value of one encrypted tag without its tag and length."""


def wipe(buffer: bytearray) -> None:
    """Overwrite a buffer with zeros, in place."""
    buffer[:] = bytes(len(buffer))


def refused(reason: str) -> InputError:
    """The one refusal of card data; `reason` has none of its bytes."""
    return InputError(reason, code="DECRYPT_FAILED")


# ---- what is gathered until it is a card


class Draft:
    """The parts of a card as the pieces bring them; a PAN that comes twice must be the same."""

    __slots__ = ("emv", "expiry", "keep", "name", "pan", "service_code", "track2")

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.pan: bytearray | None = None
        self.expiry: str | None = None
        self.name: str | None = None
        self.service_code: str | None = None
        self.track2: bytearray | None = None
        self.emv: bytearray | None = None

    def take_pan(self, pan: bytearray) -> None:
        if self.pan is None:
            self.pan = pan
            return
        same = pan == self.pan
        wipe(pan)
        if not same:
            raise refused("the data has two card numbers that differ")

    def take_track(self, expiry: str | None, service_code: str | None) -> None:
        """What a track says beside the PAN; a second track must not say otherwise."""
        if self.expiry is None:
            self.expiry = expiry
        elif expiry is not None and expiry != self.expiry:
            raise refused("the two tracks have expiries that differ")
        self.take_service_code(service_code)

    def take_service_code(self, code: str | None) -> None:
        # No issuer's service code begins with 0: readers put zeros there when a card was keyed in.
        if code and code[0] == "0":
            self.keep_nothing()
        if self.service_code is None:
            self.service_code = code

    def keep_nothing(self) -> None:
        """It was keyed in: somewhere behind what the reader filled in stands the security code."""
        self.keep = False
        for buffer in (self.track2, self.emv):
            if buffer is not None:
                wipe(buffer)
        self.track2 = self.emv = None

    def keep_track2(self, track: bytearray, service_code: str | None) -> None:
        if self.keep and self.track2 is None and service_code:
            self.track2 = track
        else:
            wipe(track)

    def keep_objects(self, data: bytearray | bytes) -> None:
        """Append the chip's objects out of their templates, but for a PIN block."""
        if not self.keep:
            return
        objects = tlv.objects(data)
        spans = [(start, end) for tag, _, start, _, end in objects if tag not in _NEVER_KEPT]
        size = len(self.emv) if self.emv else 0
        kept = bytearray(size + sum(end - start for start, end in spans))
        if self.emv:
            kept[:size] = self.emv
            wipe(self.emv)
        with memoryview(data) as view:
            for start, end in spans:
                kept[size : size + end - start] = view[start:end]
                size += end - start
        self.emv = kept

    def wipe(self) -> None:
        for buffer in (self.pan, self.track2, self.emv):
            if buffer is not None:
                wipe(buffer)


# ---- the forms

# Discretionary data is matched and not captured. Every repeat is bounded but the padding's, which
# nothing follows, so that hostile bytes cost linear time. Only spans are asked of a match: a group
# would be an immutable copy.
_TRACK1_BODY = (
    rb"([BM])([0-9]{12,19})\^([ -$&->@-\]_-~]{0,45})\^(?:([0-9]{4})|\^)(?:([0-9]{3})|\^)?"
    rb"[ ->@-~]{0,96}"
)
_TRACK2_BODY = rb"([0-9]{12,19})[=Dd](?:([0-9]{4})|[=Dd])(?:([0-9]{3})|[=Dd])?[0-9:<=>Dd]{0,64}"
_TRACK1 = re.compile(rb"%?" + _TRACK1_BODY + rb"(?:\?[\x00-\xff]?)?\x00*")
_TRACK2 = re.compile(rb";?(" + _TRACK2_BODY + rb")[Ff]?(?:\?[\x00-\xff]?)?\x00*")
_BOTH_TRACKS = re.compile(
    rb"%" + _TRACK1_BODY + rb"\?[\x00-\xff]?;(" + _TRACK2_BODY + rb")(?:\?[\x00-\xff]?)?\x00*"
)
_PAN = re.compile(rb"([0-9]{12,19})(?:\|([0-9]{4})(?:\|(?:[0-9]{3,4})?)?)?\x00*")
_CHIP_TRACK2 = re.compile(rb"(([0-9]{12,19})D(?:([0-9]{4})|D)(?:([0-9]{3})|D)?[0-9D]{0,64})F?")
_PADDED_TRACK2 = re.compile(_CHIP_TRACK2.pattern + rb"(?:00)*")
_CHIP_PAN = re.compile(rb"([0-9]{12,19})F{0,8}")
_ENDED_PAN = re.compile(rb"([0-9]{12,19})F{1,8}0*")
_JSON_DIGITS = re.compile(rb'"([0-9]{12,19})"')

_TAG_TRACK2: Final = 0x57
_TAG_PAN: Final = 0x5A
_TAG_NAME: Final = 0x5F20
_TAG_EXPIRY: Final = 0x5F24
_TAG_SERVICE_CODE: Final = 0x5F30
_TAG_PIN_BLOCK: Final = 0x99
DETAILS = frozenset({_TAG_NAME, _TAG_EXPIRY, _TAG_SERVICE_CODE})
_TAGS = DETAILS | {_TAG_TRACK2, _TAG_PAN}
_NEVER_KEPT = frozenset({_TAG_PIN_BLOCK})

_KEYED_IN: Final = ord("M")
"""The format code that readers write instead of B when a card was typed in."""


def _track1(clear: bytearray, draft: Draft) -> None:
    match = _TRACK1.fullmatch(clear)
    if match is None:
        _both_tracks(clear, draft, "the decrypted data is not a track 1")
        return
    _take_track1(clear, match, draft)


def _track2(clear: bytearray, draft: Draft) -> None:
    match = _TRACK2.fullmatch(clear)
    if match is None:
        _both_tracks(clear, draft, "the decrypted data is not a track 2")
        return
    _take_track2(clear, match, draft, first=1)


def _both_tracks(clear: bytearray, draft: Draft, otherwise: str) -> None:
    match = _BOTH_TRACKS.fullmatch(clear)
    if match is None:
        raise refused(otherwise)
    _take_track1(clear, match, draft)
    _take_track2(clear, match, draft, first=6)


def _take_track1(clear: bytearray, match: re.Match[bytes], draft: Draft) -> None:
    draft.take_pan(clear[slice(*match.span(2))])
    if clear[match.start(1)] == _KEYED_IN:
        # Name and service code are the reader's filling.
        draft.keep_nothing()
        draft.take_track(_text(clear, match.span(4)), None)
        return
    draft.name = _text(clear, match.span(3))
    draft.take_track(_text(clear, match.span(4)), _text(clear, match.span(5)))


def _take_track2(clear: bytearray, match: re.Match[bytes], draft: Draft, *, first: int) -> None:
    """The groups from `first` on: all of the track, PAN, expiry, service code."""
    draft.take_pan(clear[slice(*match.span(first + 1))])
    service_code = _text(clear, match.span(first + 3))
    draft.take_track(_text(clear, match.span(first + 2)), service_code)
    if draft.keep:
        draft.keep_track2(_as_on_a_stripe(clear[slice(*match.span(first))]), service_code)


def _pan(clear: bytearray, draft: Draft) -> None:
    match = _PAN.fullmatch(clear)
    if match is None:
        raise refused("the decrypted data is not a card number")
    draft.take_pan(clear[slice(*match.span(1))])
    draft.take_track(_text(clear, match.span(2)), None)


def _json(clear: bytearray, draft: Draft) -> None:
    """A PAN never becomes a `str`: the document is read with a stand-in where its digits were."""
    if 0x7F in clear:
        raise refused("the decrypted data is not a JSON object")
    end = len(clear)
    while end and clear[end - 1] == 0x00:
        end -= 1
    text = clear[:end]
    spans = [match.span(1) for match in _JSON_DIGITS.finditer(clear, 0, end)]
    for index, (start, stop) in enumerate(spans):
        text[start:stop] = b"\x7f%011x" % index + b"\x7f" * (stop - start - 12)
    document: object = None
    # The error holds the whole document, so it is left behind and ours raised outside of it.
    with suppress(orjson.JSONDecodeError):
        document = orjson.loads(text)
    wipe(text)
    if not isinstance(document, dict):
        raise refused("the decrypted data is not a JSON object")
    pan, expiry, name = document.get("pan"), document.get("exp"), document.get("name")
    if not isinstance(pan, str) or not pan.startswith("\x7f"):
        raise refused("the decrypted JSON has no card number")
    draft.take_pan(clear[slice(*spans[int(pan[1:12], 16)])])
    if not isinstance(expiry, str):
        raise refused("the decrypted JSON has no expiry")
    if name is not None and not isinstance(name, str):
        raise refused("the decrypted JSON has a name that is not text")
    draft.expiry, draft.name = expiry, name


def _chip(clear: bytearray, draft: Draft) -> None:
    """EMV Book 3, annex A: tag 57 is a whole track 2, else 5A with 5F24; both must say one PAN."""
    found = tlv.find(clear, _TAGS)
    if _TAG_TRACK2 in found:
        _take_chip_track2(found[_TAG_TRACK2], draft, _CHIP_TRACK2)
    if _TAG_PAN in found:
        _take_chip_pan(found[_TAG_PAN], draft, _CHIP_PAN)
    draft.keep_objects(clear)
    add_details(draft, found)


def _tag_57(clear: bytearray, draft: Draft) -> None:
    _take_chip_track2(clear, draft, _PADDED_TRACK2)


def _tag_5a(clear: bytearray, draft: Draft) -> None:
    """The value alone: after a last byte of 00 only its F filling, or tag 57, can tell its end."""
    if clear and clear[-1]:
        _take_chip_pan(clear, draft, _CHIP_PAN)
    elif draft.pan is None:
        _take_chip_pan(clear, draft, _ENDED_PAN)
    else:
        _take_chip_pan(clear, draft, re.compile(rb"([0-9]{%d})F{0,8}0*" % len(draft.pan)))


def _take_chip_track2(
    value: bytearray | memoryview, draft: Draft, pattern: re.Pattern[bytes]
) -> None:
    digits = nibbles(value)
    try:
        match = pattern.fullmatch(digits)
        if match is None:
            raise refused("tag 57 is not a track 2")
        draft.take_pan(digits[slice(*match.span(2))])
        service_code = _text(digits, match.span(4))
        draft.take_track(_text(digits, match.span(3)), service_code)
        if draft.keep:
            draft.keep_track2(_as_on_a_stripe(digits[slice(*match.span(1))]), service_code)
    finally:
        wipe(digits)


def _take_chip_pan(value: bytearray | memoryview, draft: Draft, pattern: re.Pattern[bytes]) -> None:
    digits = nibbles(value)
    try:
        match = pattern.fullmatch(digits)
        if match is None:
            raise refused("tag 5A is not a card number")
        draft.take_pan(digits[slice(*match.span(1))])
    finally:
        wipe(digits)


def add_details(draft: Draft, found: dict[int, memoryview]) -> None:
    """Take expiry, name and service code (`DETAILS`) from a chip's tags where still missing."""
    if draft.expiry is None and _TAG_EXPIRY in found:
        draft.expiry = found[_TAG_EXPIRY].hex()[:4]  # YYMMDD; the day is nobody's business
    if _TAG_SERVICE_CODE in found:
        # Three digits behind a padding one.
        draft.take_service_code(found[_TAG_SERVICE_CODE].hex()[1:])
    if draft.name is None and _TAG_NAME in found:
        draft.name = str(found[_TAG_NAME], "latin-1")


READERS: Mapping[Form, Callable[[bytearray, Draft], None]] = MappingProxyType(
    {
        "track2": _track2,
        "track1": _track1,
        "emv-tlv": _chip,
        "pan": _pan,
        "json": _json,
        "tag-57": _tag_57,
        "tag-5a": _tag_5a,
    }
)
"""What reads each form; raises `InputError` (`DECRYPT_FAILED`) with none of the bytes."""


# ---- digits


def nibbles(value: bytearray | memoryview) -> bytearray:
    """A value's hexadecimal digits in upper case, in a buffer for the caller to overwrite."""
    copy = bytearray(value)
    digits = bytearray(2 * len(copy))
    digits[0::2] = copy.translate(_HIGH)
    digits[1::2] = copy.translate(_LOW)
    wipe(copy)
    return digits


def _as_on_a_stripe(track: bytearray) -> bytearray:
    for at, byte in enumerate(track):
        if byte in b"Dd":
            track[at] = 0x3D  # "=", which a chip and some readers write as D
    return track


def _text(clear: bytearray, span: tuple[int, int]) -> str | None:
    start, end = span
    return None if start < 0 else clear[start:end].decode()


_DIGITS: Final = b"0123456789ABCDEF"
_HIGH = bytes(_DIGITS[byte >> 4] for byte in range(256))
_LOW = bytes(_DIGITS[byte & 15] for byte in range(256))
