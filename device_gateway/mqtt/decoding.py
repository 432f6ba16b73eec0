"""One whole packet from its bytes: every field, flag and reason code checked to the letter.

Framing (where a packet ends, how long it may be) lives in `codec`; what a packet means at this
moment of a connection is the endpoint's or the client's to judge.
"""

from collections.abc import Callable
from typing import Final

from device_gateway.mqtt.packets import (
    PINGREQ,
    PINGRESP,
    Acknowledgement,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
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
from device_gateway.mqtt.primitives import Reader, decode_text
from device_gateway.mqtt.properties import (
    NO_PROPERTIES,
    PacketType,
    Properties,
    decode_properties,
)
from device_gateway.mqtt.reasons import (
    ProtocolError,
    ReasonCode,
    ReturnCode,
    Version,
    malformed,
    violation,
)

# The low four bits that a packet's first byte must have [MQTT-2.1.3-1 in 5, MQTT-2.2.2-1 in
# 3.1.1]. PUBLISH is not here: its bits mean something.
RESERVED_FLAGS: Final[dict[int, int]] = {
    type_: 2 if type_ in (PacketType.PUBREL, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE) else 0
    for type_ in PacketType
    if type_ not in (PacketType.PUBLISH, PacketType.WILL)
}

_PUBLISH_REFUSALS = {0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99}
# 5: which reason codes each packet may carry: 3.2.2.2, 3.4.2.1 to 3.7.2.1, 3.9.3, 3.11.3,
# 3.14.2.1 and 3.15.2.1.
_CODES: Final[dict[PacketType, frozenset[int]]] = {
    place: frozenset(codes)
    for place, codes in {
        PacketType.CONNACK: {0, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97}
        | {0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F},
        PacketType.PUBACK: {0, 0x10} | _PUBLISH_REFUSALS,
        PacketType.PUBREC: {0, 0x10} | _PUBLISH_REFUSALS,
        PacketType.PUBREL: {0, 0x92},
        PacketType.PUBCOMP: {0, 0x92},
        PacketType.SUBACK: {0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2},
        PacketType.UNSUBACK: {0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91},
        PacketType.DISCONNECT: {0, 4, *range(0x80, 0x84), 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F}
        | {0x90, *range(0x93, 0xA3)},
        PacketType.AUTH: {0, 0x18, 0x19},
    }.items()
}
_SUBACK_CODES_311: Final = frozenset({0, 1, 2, 0x80})


def _code(reader: Reader, place: PacketType) -> int:
    code = reader.byte()
    if code not in _CODES[place]:
        raise violation(f"{place.name} may not carry reason code {code:#04x}")
    return code


def check_topic_name(topic: str) -> None:
    """Refuses an empty topic name and one with wildcards [MQTT-4.7.3-1, MQTT-3.3.2-2]."""
    if not topic or "+" in topic or "#" in topic:
        raise violation("a topic name is empty or has wildcards")


def check_topic_filter(topic_filter: str) -> None:
    """Refuses an empty filter and wildcards out of their place [MQTT-4.7.1-1, -2, -3, 4.7.3-1]."""
    if not topic_filter:
        raise malformed("an empty topic filter")
    if "+" not in topic_filter and "#" not in topic_filter:
        return
    levels = topic_filter.split("/")
    for index, level in enumerate(levels):
        if len(level) > 1 and ("+" in level or "#" in level):
            raise malformed("a wildcard does not stand alone in its level")
        if level == "#" and index != len(levels) - 1:
            raise malformed("levels follow a multi-level wildcard")


def decode_publish(first: int, data: bytes, position: int, end: int, version: Version) -> Publish:
    """PUBLISH (3.3), read without a `Reader`: this and PUBACK are what traffic consists of."""
    qos = first >> 1 & 3
    if qos == 3:
        raise malformed("QoS 3")  # [MQTT-3.3.1-4]
    dup = first & 8 != 0
    payload_at = position + 2
    if payload_at > end:
        raise malformed("a PUBLISH without a topic")  # [MQTT-3.3.2-1]
    topic_at, payload_at = payload_at, payload_at + (data[position] << 8 | data[position + 1])
    topic = decode_text(data[topic_at:payload_at])
    packet_id = 0
    if qos:
        payload_at += 2
        if payload_at > end:
            raise malformed("a PUBLISH ends before its packet identifier")
        packet_id = data[payload_at - 2] << 8 | data[payload_at - 1]
        if not packet_id:
            raise violation("packet identifier 0")  # 5: [MQTT-2.2.1-3], 3: [MQTT-2.3.1-1]
    elif dup:
        raise violation("DUP at QoS 0")  # [MQTT-3.3.1-2]
    if payload_at > end:
        raise malformed("a topic reaches beyond the end of its packet")
    properties = NO_PROPERTIES
    if version is Version.V5:
        if payload_at < end and not data[payload_at]:
            payload_at += 1
        else:
            reader = Reader(data, payload_at, end)
            properties = decode_properties(reader, PacketType.PUBLISH)
            payload_at = reader.position
    if topic or properties.topic_alias is None:  # 5:3.3.2.3.4: an alias may stand for the name
        check_topic_name(topic)
    return Publish(topic, data[payload_at:end], qos, first & 1 != 0, dup, packet_id, properties)


def decode_version(reader: Reader) -> Version:
    """The start of CONNECT; a protocol that is not spoken here is refused with 0x84."""
    if reader.binary() != b"MQTT":  # [MQTT-3.1.2-1]
        raise ProtocolError(ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, "not MQTT's protocol name")
    level = reader.byte()
    if level not in (Version.V311, Version.V5):  # [MQTT-3.1.2-2]
        raise ProtocolError(
            ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, f"protocol level {level} is not spoken here"
        )
    return Version(level)


def decode_connect(reader: Reader, version: Version) -> Connect:
    """The rest of CONNECT (3.1), after its protocol level."""
    flags = reader.byte()
    _check_connect_flags(flags, version)
    keep_alive_s = reader.two()
    properties = _properties(reader, PacketType.CONNECT, version)
    client_id = reader.text()  # [MQTT-3.1.3-3, -4]
    will = _will(reader, flags, version) if flags & 0x04 else None
    username = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    reader.finish()
    return Connect(
        version=version,
        client_id=client_id,
        clean_start=bool(flags & 0x02),
        keep_alive_s=keep_alive_s,
        will=will,
        username=username,
        password=password,
        properties=properties,
    )


def _check_connect_flags(flags: int, version: Version) -> None:
    if flags & 0x01:
        raise malformed("the reserved CONNECT flag is set")  # [MQTT-3.1.2-3]
    if not flags & 0x04 and flags & 0x38:
        raise malformed("will QoS or will retain without a will")  # [MQTT-3.1.2-11, -13, -15]
    if flags & 0x18 == 0x18:
        raise malformed("will QoS 3")  # 5: [MQTT-3.1.2-12], 3: [MQTT-3.1.2-14]
    if version is Version.V311 and flags & 0xC0 == 0x40:
        raise malformed("a password without a user name")  # 3: [MQTT-3.1.2-22]


def _will(reader: Reader, flags: int, version: Version) -> Will:
    properties = _properties(reader, PacketType.WILL, version)
    topic = reader.text()
    check_topic_name(topic)
    return Will(
        topic=topic,
        payload=reader.binary(),
        qos=flags >> 3 & 3,
        retain=bool(flags & 0x20),
        properties=properties,
    )


def _properties(reader: Reader, place: PacketType, version: Version) -> Properties:
    return decode_properties(reader, place) if version is Version.V5 else NO_PROPERTIES


def _connack(reader: Reader, version: Version) -> Connack:
    flags = reader.byte()
    if flags & 0xFE:
        raise malformed("reserved CONNACK flags are set")  # [MQTT-3.2.2-1]
    if version is Version.V5:
        code = _code(reader, PacketType.CONNACK)
    elif (code := reader.byte()) > ReturnCode.NOT_AUTHORIZED:
        raise malformed("a reserved CONNACK return code")  # 3:3.2.2.3
    if code and flags:
        raise violation("session present in a refusal")  # 5: [MQTT-3.2.2-6], 3: [MQTT-3.2.2-4]
    properties = _properties(reader, PacketType.CONNACK, version)
    reader.finish()
    return Connack(session_present=bool(flags), reason_code=code, properties=properties)


_ACKNOWLEDGEMENTS: Final[dict[PacketType, Callable[..., Acknowledgement]]] = {
    PacketType.PUBACK: Puback,
    PacketType.PUBREC: Pubrec,
    PacketType.PUBREL: Pubrel,
    PacketType.PUBCOMP: Pubcomp,
}


def _acknowledgement(type_: PacketType) -> Callable[[Reader, Version], Packet]:
    make = _ACKNOWLEDGEMENTS[type_]

    def decode(reader: Reader, version: Version) -> Packet:
        packet_id = reader.packet_id()
        if reader.exhausted:  # 5:3.4.2.1: success without properties is two bytes long
            return make(packet_id)
        code, properties = _code_and_properties(reader, type_, version)
        return make(packet_id, code, properties)

    return decode


def _code_and_properties(
    reader: Reader, place: PacketType, version: Version
) -> tuple[int, Properties]:
    """The tail that may be left out, property length or all of it (5:3.4.2.1, 5:3.14.2.1)."""
    if version is not Version.V5:
        raise malformed(f"{place.name} is longer than 3.1.1 knows it")
    code = _code(reader, place)
    properties = NO_PROPERTIES if reader.exhausted else decode_properties(reader, place)
    reader.finish()
    return code, properties


def _subscribe(reader: Reader, version: Version) -> Subscribe:
    packet_id = reader.packet_id()
    properties = _properties(reader, PacketType.SUBSCRIBE, version)
    subscriptions = []
    while not reader.exhausted:
        topic_filter = reader.text()
        check_topic_filter(topic_filter)
        subscriptions.append(_subscription(topic_filter, reader.byte(), version))
    if not subscriptions:  # 5: [MQTT-3.8.3-2], 3: [MQTT-3.8.3-3]
        raise violation("a SUBSCRIBE without a topic filter")
    return Subscribe(packet_id, tuple(subscriptions), properties)


def _subscription(topic_filter: str, options: int, version: Version) -> Subscription:
    # 5: [MQTT-3.8.3-5]; 3: [MQTT-3.8.3-4], where all but the QoS is reserved.
    if options & (0xC0 if version is Version.V5 else 0xFC):
        raise malformed("reserved subscription options are set")
    if options & 0x03 == 3 or options & 0x30 == 0x30:
        raise violation("QoS 3 or retain handling 3")  # 5:3.8.3.1
    if options & 0x04 and topic_filter.startswith("$share/"):
        raise violation("no-local on a shared subscription")  # [MQTT-3.8.3-4]
    return Subscription(
        topic_filter=topic_filter,
        qos=options & 0x03,
        no_local=bool(options & 0x04),
        retain_as_published=bool(options & 0x08),
        retain_handling=options >> 4 & 3,
    )


def _suback(reader: Reader, version: Version) -> Suback:
    packet_id = reader.packet_id()
    properties = _properties(reader, PacketType.SUBACK, version)
    codes = tuple(reader.rest())
    allowed = _CODES[PacketType.SUBACK] if version is Version.V5 else _SUBACK_CODES_311
    if not codes or not allowed.issuperset(codes):  # 5: [MQTT-3.9.3-2], 3: [MQTT-3.9.3-2]
        raise violation("a SUBACK without codes, or with one it may not carry")
    return Suback(packet_id, codes, properties)


def _unsubscribe(reader: Reader, version: Version) -> Unsubscribe:
    packet_id = reader.packet_id()
    properties = _properties(reader, PacketType.UNSUBSCRIBE, version)
    topic_filters = []
    while not reader.exhausted:
        topic_filter = reader.text()
        check_topic_filter(topic_filter)
        topic_filters.append(topic_filter)
    if not topic_filters:  # [MQTT-3.10.3-2]
        raise violation("an UNSUBSCRIBE without a topic filter")
    return Unsubscribe(packet_id, tuple(topic_filters), properties)


def _unsuback(reader: Reader, version: Version) -> Unsuback:
    packet_id = reader.packet_id()
    if version is Version.V311:
        reader.finish()  # 3:3.11.3: no payload
        return Unsuback(packet_id)
    properties = decode_properties(reader, PacketType.UNSUBACK)
    codes = tuple(reader.rest())
    if not codes or not _CODES[PacketType.UNSUBACK].issuperset(codes):  # [MQTT-3.11.3-2]
        raise violation("an UNSUBACK without codes, or with one it may not carry")
    return Unsuback(packet_id, codes, properties)


def _pingreq(reader: Reader, _: Version) -> Packet:
    reader.finish()
    return PINGREQ


def _pingresp(reader: Reader, _: Version) -> Packet:
    reader.finish()
    return PINGRESP


def _disconnect(reader: Reader, version: Version) -> Disconnect:
    if reader.exhausted:
        return Disconnect()
    return Disconnect(*_code_and_properties(reader, PacketType.DISCONNECT, version))


def _auth(reader: Reader, version: Version) -> Auth:
    if version is not Version.V5:
        raise malformed("packet type 15 is reserved in 3.1.1")  # 3:2.2.1
    if reader.exhausted:
        return Auth()
    return Auth(*_code_and_properties(reader, PacketType.AUTH, version))


BODIES: Final[dict[PacketType, Callable[[Reader, Version], Packet]]] = {
    PacketType.CONNACK: _connack,
    **{type_: _acknowledgement(type_) for type_ in _ACKNOWLEDGEMENTS},
    PacketType.SUBSCRIBE: _subscribe,
    PacketType.SUBACK: _suback,
    PacketType.UNSUBSCRIBE: _unsubscribe,
    PacketType.UNSUBACK: _unsuback,
    PacketType.PINGREQ: _pingreq,
    PacketType.PINGRESP: _pingresp,
    PacketType.DISCONNECT: _disconnect,
    PacketType.AUTH: _auth,
}
"""How the bytes after the length of each type are read; CONNECT and PUBLISH have their own."""
