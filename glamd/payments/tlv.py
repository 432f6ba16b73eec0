"""A bounded reader of BER-TLV, as chip cards and their readers send it.

The bytes come from a terminal that may be anybody's, so there is one pass, no recursion, no copy,
and a limit on everything; whatever does not fit is an `InputError` with code `DECRYPT_FAILED`
that shows no byte of it. Encoding TLV and knowing what a tag means do not belong here.

Padding is tolerated where EMV Book 3, annex B.1, allows it: 00 bytes before, between and after the
objects, which is also what a terminal's zero padding looks like.
"""

from collections.abc import Iterator

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

ENCRYPTED = 0x40
MASKED = 0x20
"""Flags of ID TECH's lengths (80000502-001): `57 C1 18` is an encrypted tag 57, `57 A1 13` a masked
one. They stand where BER would count the bytes of a length past 31, which nobody sends."""

_CONSTRUCTED = 0x20
_LONG_TAG = 0x1F
_MORE = 0x80


Object = tuple[int, int, int, int, int]
"""A tag, its mark, and where the object lies in the bytes: start, start of the value, end.

The mark is 0, `ENCRYPTED` or `MASKED`, and always 0 where marks were not asked for. A plain tuple,
for there are dozens of them in each message.
"""


def find(data: bytearray | bytes, wanted: frozenset[int]) -> dict[int, memoryview]:
    """The values of the `wanted` tags at any depth, as views into `data`, not copies.

    A wanted tag that appears twice is refused, because which of the two counts would be a guess;
    one with an empty value counts as absent; what a wanted template holds is not looked into.
    Raises `InputError` (`DECRYPT_FAILED`) for anything truncated, of indefinite length, too deep,
    too long or too many.
    """
    view = memoryview(data).toreadonly()
    found: dict[int, memoryview] = {}
    for tag, _, _, value, end in objects(data, opaque=wanted):
        if tag in wanted and end > value:
            if tag in found:
                raise _refused("the chip data has a tag twice")
            found[tag] = view[value:end]
    return found


def objects(
    data: bytearray | bytes, *, opaque: frozenset[int] = frozenset(), marked: bool = False
) -> Iterator[Object]:
    """Every primitive object at any depth, in the order sent; raises as `find`.

    A template of a tag in `opaque` counts as primitive. With `marked`, lengths may carry ID TECH's
    two flags (see `Object`), which is not BER.
    """
    size = len(data)
    if size > MAX_BYTES:
        raise _refused("the chip data is too long")
    ends = [size]  # where each template that is open ends, the outermost first
    at = count = 0
    while ends:
        end = ends[-1]
        if at == end:
            ends.pop()
            continue
        start, first = at, data[at]
        if first == 0x00:
            at += 1
            continue
        count += 1
        if count > MAX_OBJECTS:
            raise _refused("the chip data has too many objects")
        tag, at = _tag(data, at, end)
        mark = _mark(data, at, end) if marked else 0
        length, at = _length(data, at, end, mark)
        if length > end - at:
            raise _refused("the chip data is cut short")
        if first & _CONSTRUCTED and tag not in opaque:
            if len(ends) > MAX_DEPTH:
                raise _refused("the chip data is nested too deep")
            ends.append(at + length)
            continue
        yield tag, mark, start, at, at + length
        at += length


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


def _mark(data: bytearray | bytes, at: int, end: int) -> int:
    """The two flags in a length's first byte; a length of the short form has none."""
    return data[at] & (ENCRYPTED | MASKED) if at < end and data[at] & _MORE else 0


def _length(data: bytearray | bytes, at: int, end: int, mark: int) -> tuple[int, int]:
    """The length at `at`, and where the value starts (ISO/IEC 8825-1, 8.1.3)."""
    if at == end:
        raise _refused("the chip data is cut short")
    length = data[at] & ~mark
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
