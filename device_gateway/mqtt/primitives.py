"""The data types that every MQTT packet is made of (1.5): integers, text, binary, lengths.

A reader never looks past the end of its packet, whatever a length field claims.
"""

import re

from device_gateway.mqtt.reasons import malformed, violation

VARIABLE_INTEGER_MAX = 268_435_455
STRING_BYTES_MAX = 65_535
# A lone surrogate cannot come out of a strict UTF-8 decoder; U+0000 can, and is forbidden.
_UNSENDABLE = re.compile("[\x00\ud800-\udfff]")


class Reader:
    """Reads the fields of one packet, from `position` up to and without `end`."""

    __slots__ = ("data", "end", "position")

    def __init__(self, data: bytes, position: int, end: int) -> None:
        self.data = data
        self.position = position
        self.end = end

    def _take(self, length: int) -> int:
        """Moves over `length` bytes and gives where they started."""
        start = self.position
        if start + length > self.end:
            raise malformed("a field reaches beyond the end of its packet")
        self.position = start + length
        return start

    @property
    def exhausted(self) -> bool:
        """Nothing is left of the packet."""
        return self.position >= self.end

    def byte(self) -> int:
        """One byte."""
        return self.data[self._take(1)]

    def two(self) -> int:
        """A two byte integer, big-endian (1.5.2)."""
        start = self._take(2)
        return self.data[start] << 8 | self.data[start + 1]

    def four(self) -> int:
        """A four byte integer, big-endian (5:1.5.3)."""
        start = self._take(4)
        return int.from_bytes(self.data[start : start + 4], "big")

    def variable(self) -> int:
        """A variable byte integer of 1 to 4 bytes, shortest form only [MQTT-1.5.5-1]."""
        value = 0
        for index in range(4):
            digit = self.byte()
            value |= (digit & 0x7F) << (7 * index)
            if not digit & 0x80:
                if index and not digit:
                    raise malformed("a variable byte integer is longer than it needs to be")
                return value
        raise malformed("a variable byte integer has more than four bytes")

    def binary(self) -> bytes:
        """0 to 65,535 bytes behind their two byte length (5:1.5.6)."""
        length = self.two()
        start = self._take(length)
        return self.data[start : start + length]

    def text(self) -> str:
        """A UTF-8 string behind its two byte length, without U+0000 and surrogates."""
        return decode_text(self.binary())

    def packet_id(self) -> int:
        """A packet identifier, never 0 (5:2.2.1; 3: [MQTT-2.3.1-1])."""
        value = self.two()
        if not value:
            raise violation("packet identifier 0")
        return value

    def rest(self) -> bytes:
        """All that is left of the packet."""
        start, self.position = self.position, self.end
        return self.data[start : self.end]

    def finish(self) -> None:
        """Refuses bytes that are left over after the last field."""
        if self.position != self.end:
            raise malformed("bytes are left over at the end of a packet")


def decode_text(raw: bytes) -> str:
    """Strict UTF-8 [MQTT-1.5.4-1] without U+0000 [MQTT-1.5.4-2]; 3: [MQTT-1.5.3-1, -2].

    A byte order mark is kept as U+FEFF [MQTT-1.5.4-3].
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        # The bytes stay out of the message: they are the peer's and may be anything.
        raise malformed("a string is not well-formed UTF-8") from None
    if "\x00" in text:
        raise malformed("a string contains U+0000")
    return text


def encode_text(text: str) -> bytes:
    """`text` as UTF-8 behind its two byte length; ValueError for what MQTT cannot carry."""
    if _UNSENDABLE.search(text):
        raise ValueError("MQTT strings carry neither U+0000 nor surrogates")
    return encode_binary(text.encode("utf-8"))


def encode_binary(raw: bytes) -> bytes:
    """`raw`, at most 65,535 bytes, behind its two byte length."""
    if len(raw) > STRING_BYTES_MAX:
        raise ValueError(f"{len(raw)} bytes do not fit a two byte length")
    return len(raw).to_bytes(2, "big") + raw


def encode_variable(value: int) -> bytes:
    """`value`, 0 to 268,435,455, as a variable byte integer of 1 to 4 bytes (1.5.5)."""
    if 0 <= value < 0x80:
        return bytes((value,))
    if not 0 <= value <= VARIABLE_INTEGER_MAX:
        raise ValueError(f"{value} does not fit a variable byte integer")
    digits = bytearray()
    while value:
        value, digit = value >> 7, value & 0x7F
        digits.append(digit | 0x80 if value else digit)
    return bytes(digits)
