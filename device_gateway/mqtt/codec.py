"""Bytes in, packets out, and back: MQTT 3.1.1 and 5 for both roles, without any I/O.

`Decoder` finds where packets end and refuses what is too long before it is there; what is in a
packet is read by `decoding` and written by `encoding`. This is the only module of the codec that
others need: it has all its names.
"""

from typing import Final, NoReturn, Self

from device_gateway.mqtt.decoding import (
    BODIES,
    RESERVED_FLAGS,
    check_topic_filter,
    check_topic_name,
    decode_connect,
    decode_publish,
    decode_version,
)
from device_gateway.mqtt.encoding import (
    PINGRESP_BYTES,
    encode,
    puback_success,
    publish_bytes,
)
from device_gateway.mqtt.packets import (
    PINGREQ,
    PINGRESP,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
)
from device_gateway.mqtt.primitives import Reader
from device_gateway.mqtt.properties import NO_PROPERTIES, PacketType, Properties
from device_gateway.mqtt.reasons import (
    ProtocolError,
    ReasonCode,
    ReturnCode,
    Version,
    malformed,
    violation,
)

__all__ = [
    "NO_PROPERTIES",
    "PINGREQ",
    "PINGRESP",
    "PINGRESP_BYTES",
    "Auth",
    "Connack",
    "Connect",
    "Decoder",
    "Disconnect",
    "Packet",
    "PacketType",
    "Pingreq",
    "Pingresp",
    "Properties",
    "ProtocolError",
    "Puback",
    "Pubcomp",
    "Publish",
    "Pubrec",
    "Pubrel",
    "ReasonCode",
    "ReturnCode",
    "Suback",
    "Subscribe",
    "Subscription",
    "Unsuback",
    "Unsubscribe",
    "Version",
    "Will",
    "check_topic_filter",
    "check_topic_name",
    "encode",
    "puback_success",
    "publish_bytes",
    "violation",
]

_PUBLISH: Final = 3
_PUBACK: Final = 0x40
_PADDED: Final = "a remaining length is longer than it needs to be"


class Decoder:
    """An iterator over the packets in the bytes that were fed so far.

    `for packet in decoder.feed(data)` takes whole packets in their order; a half one stays inside
    until its rest comes, at most `max_packet_bytes` of it. What was not taken stays for the next
    time. With `version` None the peer is a client, and its CONNECT, which has to come first, says
    the version. ProtocolError, raised where the broken packet would have come, is final: the same
    error is raised ever after.
    """

    __slots__ = (
        "_data",
        "_error",
        "_need_bytes",
        "_padded_length",
        "_partial",
        "_position",
        "max_packet_bytes",
        "version",
    )

    def __init__(self, max_packet_bytes: int, version: Version | None = None) -> None:
        self.version = version
        self.max_packet_bytes = max_packet_bytes
        self._data = b""
        self._position = 0
        self._partial = bytearray()
        self._need_bytes = 0
        self._padded_length = False
        self._error: ProtocolError | None = None

    def feed(self, data: bytes) -> Self:
        """Adds received bytes and gives the iterator, which is the decoder itself."""
        if self._partial:
            # A slow sender costs one append a read, not a copy of what came before it.
            self._partial += data
            if len(self._partial) >= self._need_bytes:
                self._data, self._position = bytes(self._partial), 0
                self._partial = bytearray()
        elif self._position >= len(self._data):
            self._data, self._position = data, 0
        else:
            self._data, self._position = self._data[self._position :] + data, 0
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Packet:
        data, position = self._data, self._position
        have = len(data)
        if position >= have and self._error is None:
            self._data, self._position = b"", 0
            raise StopIteration
        if self._error is not None:
            raise self._error
        try:
            return self._next(data, position, have)
        except ProtocolError as error:
            self._error = error
            self._data, self._partial = b"", bytearray()
            raise

    def _next(self, data: bytes, position: int, have: int) -> Packet:
        """The packet that starts at `position`; written for PUBLISH and PUBACK."""
        first = data[position]
        version = self.version
        body = position + 2
        if first >> 4 != _PUBLISH or version is None:
            if first == _PUBACK and version is not None and body + 2 <= have:
                packet_id = data[body] << 8 | data[body + 1]
                if packet_id and data[position + 1] == 2:
                    self._position = body + 2
                    return Puback(packet_id)
            self._check_first(first)
        if body <= have and data[position + 1] < 0x80:
            end = body + data[position + 1]
        else:
            body, end = self._long_length(data, position)
        if end - position > self.max_packet_bytes:
            raise ProtocolError(
                ReasonCode.PACKET_TOO_LARGE, f"a packet of more than {self.max_packet_bytes} bytes"
            )
        if end > have:
            self._wait_for(end - position)
        self._position = end
        if first >> 4 == _PUBLISH and version is not None:
            return decode_publish(first, data, body, end, version)
        return self._body(first, body, end)

    def _check_first(self, first: int) -> None:
        """Refuses a first byte that no packet here may have, before its length is even known."""
        if self.version is None:
            if first >> 4 != PacketType.CONNECT:
                raise violation("the first packet is not a CONNECT")  # [MQTT-3.1.0-1]
        elif first >> 4 == PacketType.CONNECT:
            raise violation("a CONNECT on a connection that has had its own")  # [MQTT-3.1.0-2]
        if RESERVED_FLAGS.get(first >> 4) != first & 0x0F:
            raise malformed("reserved bits of the first byte are set, or packet type 0")

    def _long_length(self, data: bytes, position: int) -> tuple[int, int]:
        """Where the body starts and ends when the length has two to four bytes (2.1.4).

        With too few bytes to know, the end is one byte beyond what is there. 3.1.1 does not ask
        for the shortest form, 5 does [MQTT-1.5.5-1].
        """
        length = 0
        for index in range(4):
            at = position + 1 + index
            if at >= len(data):
                return len(data), len(data) + 1
            digit = data[at]
            length |= (digit & 0x7F) << (7 * index)
            if digit < 0x80:
                self._padded_length = index > 0 and digit == 0
                if self._padded_length and self.version is Version.V5:
                    raise malformed(_PADDED)
                return at + 1, at + 1 + length
        raise malformed("a remaining length has more than four bytes")

    def _wait_for(self, need_bytes: int) -> NoReturn:
        """Keeps a half packet until `need_bytes` of it are there."""
        self._partial = bytearray(self._data[self._position :])
        self._need_bytes = need_bytes
        self._data, self._position = b"", 0
        raise StopIteration

    def _body(self, first: int, body: int, end: int) -> Packet:
        reader = Reader(self._data, body, end)
        if self.version is None:
            # Known before the rest is read, so that a refusal can be said in the right version.
            self.version = decode_version(reader)
            if self._padded_length and self.version is Version.V5:
                raise malformed(_PADDED)
            return decode_connect(reader, self.version)
        return BODIES[PacketType(first >> 4)](reader, self.version)
