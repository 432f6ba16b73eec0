"""A bounded reader of BER-TLV, as chip cards send it: finds the few tags asked for, no others.

The bytes come from a terminal that may be anybody's, so there is one pass, no recursion, no copy,
and a limit on everything; whatever does not fit is an `InputError` with code `DECRYPT_FAILED`
that shows no byte of it. Encoding TLV and knowing what a tag means do not belong here.

Padding is tolerated where EMV Book 3, annex B.1, allows it: 00 bytes before, between and after the
objects, which is also what a terminal's zero padding looks like.
"""

from glamd.errors import InputError

MAX_BYTES = 16 * 1024
"""A whole message of the terminal's contract is not larger than this."""
MAX_OBJECTS = 256
"""Real cards answer with some dozens; more is an attempt to keep us busy."""
MAX_DEPTH = 8
"""EMV nests templates three deep."""
MAX_TAG_BYTES = 4
"""EMV and the card schemes use three at most."""
MAX_LENGTH_BYTES = 2
"""Two bytes of length say 65,535, which is already more than `MAX_BYTES`."""

_CONSTRUCTED = 0x20
_LONG_TAG = 0x1F
_MORE = 0x80


def find(data: bytearray | bytes, wanted: frozenset[int]) -> dict[int, memoryview]:
    """The values of the `wanted` primitive tags at any depth, as views into `data`, not copies.

    A wanted tag that appears twice is refused, because which of the two counts would be a guess;
    one with an empty value counts as absent. Raises `InputError` (`DECRYPT_FAILED`) for anything
    truncated, of indefinite length, too deep, too long or too many.
    """
    size = len(data)
    if size > MAX_BYTES:
        raise _refused("the chip data is too long")
    view = memoryview(data).toreadonly()
    found: dict[int, memoryview] = {}
    ends = [size]  # where each template that is open ends, the outermost first
    at = objects = 0
    while ends:
        end = ends[-1]
        if at == end:
            ends.pop()
            continue
        first = data[at]
        if first == 0x00:
            at += 1
            continue
        objects += 1
        if objects > MAX_OBJECTS:
            raise _refused("the chip data has too many objects")
        tag, at = _tag(data, at, end)
        length, at = _length(data, at, end)
        if length > end - at:
            raise _refused("the chip data is cut short")
        if first & _CONSTRUCTED:
            if len(ends) > MAX_DEPTH:
                raise _refused("the chip data is nested too deep")
            ends.append(at + length)
            continue
        if tag in wanted and length:
            if tag in found:
                raise _refused("the chip data has a tag twice")
            found[tag] = view[at : at + length]
        at += length
    return found


def _tag(data: bytearray | bytes, at: int, end: int) -> tuple[int, int]:
    """The tag at `at` as one number, and where its length starts (ISO/IEC 8825-1, 8.1.2)."""
    tag = data[at]
    at += 1
    if tag & _LONG_TAG != _LONG_TAG:
        return tag, at
    for _ in range(MAX_TAG_BYTES - 1):
        if at == end:
            raise _refused("the chip data is cut short")
        byte = data[at]
        at += 1
        tag = tag << 8 | byte
        if not byte & _MORE:
            return tag, at
    raise _refused("the chip data has a tag that is too long")


def _length(data: bytearray | bytes, at: int, end: int) -> tuple[int, int]:
    """The length at `at`, and where the value starts (ISO/IEC 8825-1, 8.1.3)."""
    if at == end:
        raise _refused("the chip data is cut short")
    length = data[at]
    at += 1
    if not length & _MORE:
        return length, at
    size = length & ~_MORE
    if size == 0:
        raise _refused("the chip data has an indefinite length")
    if size > MAX_LENGTH_BYTES:
        raise _refused("the chip data has a length that is too long")
    if size > end - at:
        raise _refused("the chip data is cut short")
    return int.from_bytes(data[at : at + size], "big"), at + size


def _refused(reason: str) -> InputError:
    return InputError(reason, code="DECRYPT_FAILED")
