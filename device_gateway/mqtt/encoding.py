"""The bytes of one packet, for either side of a connection.

What MQTT cannot carry (a string over 65,535 bytes, a property in the wrong packet, a packet
identifier of 0) is the caller's mistake and raises ValueError.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from device_gateway.mqtt.packets import (
    Acknowledgement,
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
    Unsuback,
    Unsubscribe,
)
from device_gateway.mqtt.primitives import encode_binary, encode_text, encode_variable
from device_gateway.mqtt.properties import (
    NO_PROPERTIES,
    PacketType,
    Properties,
    encode_properties,
)
from device_gateway.mqtt.reasons import Version

PINGRESP_BYTES: Final = b"\xd0\x00"


def encode(packet: Packet, version: Version) -> bytes:
    """The packet as it goes on the wire in `version`; a CONNECT knows its own."""
    return _ENCODERS[type(packet)](packet, version)


def puback_success(packet_id: int) -> bytes:
    """A successful PUBACK, the same 4 bytes in both versions (5:3.4.2.1)."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def publish_bytes(
    topic: str,
    payload: bytes,
    *,
    qos: int,
    packet_id: int,
    version: Version,
    retain: bool = False,
    dup: bool = False,
) -> bytes:
    """A PUBLISH without properties: the endpoint's and the clients' hot path, no packet object."""
    first = 0x30 | dup << 3 | qos << 1 | retain
    # Each device has a handful of topics and says them again and again.
    head = _topic_field(topic)
    if qos:
        head += _packet_id(packet_id)
    if version is Version.V5:
        head += b"\x00"
    length = len(head) + len(payload)
    if length < 0x80:
        return b"%c%c%b%b" % (first, length, head, payload)
    if length < 0x4000:
        return b"%c%c%c%b%b" % (first, length & 0x7F | 0x80, length >> 7, head, payload)
    return b"%c%b%b%b" % (first, encode_variable(length), head, payload)


@lru_cache(maxsize=16_384)
def _topic_field(topic: str) -> bytes:
    return encode_text(topic)


def _packet_id(packet_id: int) -> bytes:
    if not 0 < packet_id <= 0xFFFF:
        raise ValueError(f"{packet_id} is not a packet identifier")
    return packet_id.to_bytes(2, "big")


def _frame(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes((first,)) + encode_variable(len(body)) + body


def _properties(properties: Properties, place: PacketType, version: Version) -> bytes:
    if version is Version.V5:
        return encode_properties(properties, place)
    if properties != NO_PROPERTIES:
        raise ValueError("3.1.1 has no properties")
    return b""


def _publish(packet: Publish, version: Version) -> bytes:
    if packet.qos not in (0, 1, 2) or (packet.dup and not packet.qos):
        raise ValueError("no such QoS, or DUP at QoS 0")
    if bool(packet.qos) != bool(packet.packet_id):
        raise ValueError("a packet identifier belongs to QoS 1 and 2 only")  # [MQTT-2.2.1-2]
    if packet.properties is NO_PROPERTIES:
        return publish_bytes(
            packet.topic,
            packet.payload,
            qos=packet.qos,
            packet_id=packet.packet_id,
            version=version,
            retain=packet.retain,
            dup=packet.dup,
        )
    return _frame(
        0x30 | packet.dup << 3 | packet.qos << 1 | packet.retain,
        encode_text(packet.topic),
        _packet_id(packet.packet_id) if packet.qos else b"",
        _properties(packet.properties, PacketType.PUBLISH, version),
        packet.payload,
    )


def _connect(packet: Connect, _: Version) -> bytes:
    version, will = packet.version, packet.will
    flags = packet.clean_start << 1
    tail = [encode_text(packet.client_id)]
    if will is not None:
        flags |= 0x04 | will.qos << 3 | will.retain << 5
        tail += [
            _properties(will.properties, PacketType.WILL, version),
            encode_text(will.topic),
            encode_binary(will.payload),
        ]
    if packet.username is not None:
        flags |= 0x80
        tail.append(encode_text(packet.username))
    if packet.password is not None:
        flags |= 0x40
        tail.append(encode_binary(packet.password))
    return _frame(
        PacketType.CONNECT << 4,
        b"\x00\x04MQTT",
        bytes((version, flags)),
        packet.keep_alive_s.to_bytes(2, "big"),
        _properties(packet.properties, PacketType.CONNECT, version),
        *tail,
    )


def _connack(packet: Connack, version: Version) -> bytes:
    return _frame(
        PacketType.CONNACK << 4,
        bytes((packet.session_present, packet.reason_code)),
        _properties(packet.properties, PacketType.CONNACK, version),
    )


def _tail(code: int, properties: Properties, place: PacketType, version: Version) -> bytes:
    """Reason code and properties, left out as far as the standard lets them be."""
    if version is Version.V311:
        if code or properties != NO_PROPERTIES:
            raise ValueError(f"{place.name} has no reason code and no properties in 3.1.1")
        return b""
    if properties == NO_PROPERTIES:
        return bytes((code,)) if code else b""
    return bytes((code,)) + encode_properties(properties, place)


def _acknowledgement(type_: PacketType) -> Callable[[Any, Version], bytes]:
    first = type_ << 4 | (2 if type_ is PacketType.PUBREL else 0)

    def write(packet: Acknowledgement, version: Version) -> bytes:
        tail = _tail(packet.reason_code, packet.properties, type_, version)
        return _frame(first, _packet_id(packet.packet_id), tail)

    return write


def _subscribe(packet: Subscribe, version: Version) -> bytes:
    pairs = []
    for one in packet.subscriptions:
        options = one.qos | one.no_local << 2 | one.retain_as_published << 3
        options |= one.retain_handling << 4
        if version is Version.V311 and options > 2:
            raise ValueError("3.1.1 knows no subscription options but the QoS")
        pairs.append(encode_text(one.topic_filter) + bytes((options,)))
    return _frame(
        PacketType.SUBSCRIBE << 4 | 2,
        _packet_id(packet.packet_id),
        _properties(packet.properties, PacketType.SUBSCRIBE, version),
        *pairs,
    )


def _suback(packet: Suback, version: Version) -> bytes:
    return _frame(
        PacketType.SUBACK << 4,
        _packet_id(packet.packet_id),
        _properties(packet.properties, PacketType.SUBACK, version),
        bytes(packet.reason_codes),
    )


def _unsubscribe(packet: Unsubscribe, version: Version) -> bytes:
    return _frame(
        PacketType.UNSUBSCRIBE << 4 | 2,
        _packet_id(packet.packet_id),
        _properties(packet.properties, PacketType.UNSUBSCRIBE, version),
        *map(encode_text, packet.topic_filters),
    )


def _unsuback(packet: Unsuback, version: Version) -> bytes:
    return _frame(
        PacketType.UNSUBACK << 4,
        _packet_id(packet.packet_id),
        _properties(packet.properties, PacketType.UNSUBACK, version),
        bytes(packet.reason_codes) if version is Version.V5 else b"",
    )


def _disconnect(packet: Disconnect, version: Version) -> bytes:
    tail = _tail(packet.reason_code, packet.properties, PacketType.DISCONNECT, version)
    return _frame(PacketType.DISCONNECT << 4, tail)


def _auth(packet: Auth, version: Version) -> bytes:
    if version is Version.V311:
        raise ValueError("3.1.1 has no AUTH")
    tail = _tail(packet.reason_code, packet.properties, PacketType.AUTH, version)
    return _frame(PacketType.AUTH << 4, tail)


# Each encoder takes one type of packet, which is its key here; the value's type cannot say so.
_ENCODERS: Final[dict[type, Callable[[Any, Version], bytes]]] = {
    Connect: _connect,
    Connack: _connack,
    Publish: _publish,
    Puback: _acknowledgement(PacketType.PUBACK),
    Pubrec: _acknowledgement(PacketType.PUBREC),
    Pubrel: _acknowledgement(PacketType.PUBREL),
    Pubcomp: _acknowledgement(PacketType.PUBCOMP),
    Subscribe: _subscribe,
    Suback: _suback,
    Unsubscribe: _unsubscribe,
    Unsuback: _unsuback,
    Pingreq: lambda _packet, _version: b"\xc0\x00",
    Pingresp: lambda _packet, _version: PINGRESP_BYTES,
    Disconnect: _disconnect,
    Auth: _auth,
}
