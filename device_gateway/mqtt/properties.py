"""The properties of MQTT 5 (5:2.2.2): one table says what each is and in which packet it may be.

3.1.1 has none; its packets carry `NO_PROPERTIES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum, unique
from typing import Any, Final

from device_gateway.mqtt.primitives import (
    Reader,
    encode_binary,
    encode_text,
    encode_variable,
)
from device_gateway.mqtt.reasons import ProtocolError, ReasonCode, malformed, violation


@unique
class PacketType(IntEnum):
    """The upper four bits of a packet's first byte (2.1.2); WILL is a place for properties only."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15
    WILL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """The properties of one packet or will; what is None was absent. Intervals are in seconds."""

    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    subscription_identifiers: tuple[int, ...] = ()
    session_expiry_interval: int | None = None
    assigned_client_identifier: str | None = None
    server_keep_alive: int | None = None
    authentication_method: str | None = None
    authentication_data: bytes | None = None
    request_problem_information: int | None = None
    will_delay_interval: int | None = None
    request_response_information: int | None = None
    response_information: str | None = None
    server_reference: str | None = None
    reason_string: str | None = None
    receive_maximum: int | None = None
    topic_alias_maximum: int | None = None
    topic_alias: int | None = None
    maximum_qos: int | None = None
    retain_available: int | None = None
    user_properties: tuple[tuple[str, str], ...] = ()
    maximum_packet_size: int | None = None
    wildcard_subscription_available: int | None = None
    subscription_identifier_available: int | None = None
    shared_subscription_available: int | None = None


NO_PROPERTIES: Final = Properties()


@unique
class _Kind(Enum):
    """How a value stands on the wire (5:1.5)."""

    BYTE = 1
    TWO = 2
    FOUR = 4
    VARIABLE = 5
    TEXT = 6
    TOPIC = 7
    BINARY = 8
    PAIR = 9


@dataclass(frozen=True, slots=True)
class _Property:
    """One line of 5:2.2.2.2: identifier, field, kind, packets it may be in, range of an integer."""

    identifier: int
    field: str
    kind: _Kind
    places: frozenset[PacketType]
    low: int = 0
    high: int = 0xFFFFFFFF

    @property
    def repeats(self) -> bool:
        """Whether it may stand in one packet more than once (and is kept as a tuple)."""
        return self.field in ("user_properties", "subscription_identifiers")


def _at(*places: PacketType) -> frozenset[PacketType]:
    return frozenset(places)


_K, _P = _Kind, PacketType
_MESSAGE = _at(_P.PUBLISH, _P.WILL)
_OPENING = _at(_P.CONNECT, _P.CONNACK)
_AUTHENTICATION = _at(_P.CONNECT, _P.CONNACK, _P.AUTH)
_ANSWERS = _at(
    _P.CONNACK, _P.PUBACK, _P.PUBREC, _P.PUBREL, _P.PUBCOMP, _P.SUBACK, _P.UNSUBACK
) | _at(_P.DISCONNECT, _P.AUTH)
_EVERYWHERE = _ANSWERS | _MESSAGE | _at(_P.CONNECT, _P.SUBSCRIBE, _P.UNSUBSCRIBE)

_TABLE: Final = (
    _Property(1, "payload_format_indicator", _K.BYTE, _MESSAGE, high=1),
    _Property(2, "message_expiry_interval", _K.FOUR, _MESSAGE),
    _Property(3, "content_type", _K.TEXT, _MESSAGE),
    _Property(8, "response_topic", _K.TOPIC, _MESSAGE),
    _Property(9, "correlation_data", _K.BINARY, _MESSAGE),
    _Property(11, "subscription_identifiers", _K.VARIABLE, _at(_P.PUBLISH, _P.SUBSCRIBE), low=1),
    _Property(17, "session_expiry_interval", _K.FOUR, _OPENING | _at(_P.DISCONNECT)),
    _Property(18, "assigned_client_identifier", _K.TEXT, _at(_P.CONNACK)),
    _Property(19, "server_keep_alive", _K.TWO, _at(_P.CONNACK)),
    _Property(21, "authentication_method", _K.TEXT, _AUTHENTICATION),
    _Property(22, "authentication_data", _K.BINARY, _AUTHENTICATION),
    _Property(23, "request_problem_information", _K.BYTE, _at(_P.CONNECT), high=1),
    _Property(24, "will_delay_interval", _K.FOUR, _at(_P.WILL)),
    _Property(25, "request_response_information", _K.BYTE, _at(_P.CONNECT), high=1),
    _Property(26, "response_information", _K.TEXT, _at(_P.CONNACK)),
    _Property(28, "server_reference", _K.TEXT, _at(_P.CONNACK, _P.DISCONNECT)),
    _Property(31, "reason_string", _K.TEXT, _ANSWERS),
    _Property(33, "receive_maximum", _K.TWO, _OPENING, low=1),
    _Property(34, "topic_alias_maximum", _K.TWO, _OPENING),
    _Property(35, "topic_alias", _K.TWO, _at(_P.PUBLISH), low=1),
    _Property(36, "maximum_qos", _K.BYTE, _at(_P.CONNACK), high=1),
    _Property(37, "retain_available", _K.BYTE, _at(_P.CONNACK), high=1),
    _Property(38, "user_properties", _K.PAIR, _EVERYWHERE),
    _Property(39, "maximum_packet_size", _K.FOUR, _OPENING, low=1),
    _Property(40, "wildcard_subscription_available", _K.BYTE, _at(_P.CONNACK), high=1),
    _Property(41, "subscription_identifier_available", _K.BYTE, _at(_P.CONNACK), high=1),
    _Property(42, "shared_subscription_available", _K.BYTE, _at(_P.CONNACK), high=1),
)
_BY_IDENTIFIER: Final = {line.identifier: line for line in _TABLE}


def decode_properties(reader: Reader, place: PacketType) -> Properties:
    """The property length and the properties behind it, leaving `reader` after them (5:2.2.2)."""
    length = reader.variable()
    if not length:
        return NO_PROPERTIES
    end = reader.position + length
    if end > reader.end:
        raise malformed("the properties reach beyond the end of their packet")
    inner = Reader(reader.data, reader.position, end)
    reader.position = end
    values: dict[str, Any] = {}
    while not inner.exhausted:
        line = _BY_IDENTIFIER.get(inner.variable())
        if line is None:
            raise malformed("an unknown property")
        if place not in line.places:
            raise violation(f"{line.field} is not a property of {place.name}")
        value = _read(inner, line)
        if line.repeats:
            values.setdefault(line.field, []).append(value)
        elif line.field in values:
            raise violation(f"{line.field} is there twice")
        else:
            values[line.field] = value
    return _checked(values, place)


def _checked(values: dict[str, Any], place: PacketType) -> Properties:
    """The rules that concern more than one property."""
    if "authentication_data" in values and "authentication_method" not in values:
        raise violation("authentication data without a method")  # 5:3.1.2.11.10
    if place is PacketType.SUBSCRIBE and len(values.get("subscription_identifiers", ())) > 1:
        raise violation("more than one subscription identifier")  # 5:3.8.2.1.2
    for field in ("user_properties", "subscription_identifiers"):
        if field in values:
            values[field] = tuple(values[field])
    return Properties(**values)


def _topic(reader: Reader) -> str:
    topic = reader.text()
    if not topic or "+" in topic or "#" in topic:
        raise violation("a response topic is empty or has wildcards")  # [MQTT-3.3.2-14]
    return topic


_READ: Final[dict[_Kind, Callable[[Reader], Any]]] = {
    _Kind.BYTE: Reader.byte,
    _Kind.TWO: Reader.two,
    _Kind.FOUR: Reader.four,
    _Kind.VARIABLE: Reader.variable,
    _Kind.TEXT: Reader.text,
    _Kind.TOPIC: _topic,
    _Kind.BINARY: Reader.binary,
    _Kind.PAIR: lambda reader: (reader.text(), reader.text()),  # [MQTT-1.5.7-1]
}


def _read(reader: Reader, line: _Property) -> Any:
    value = _READ[line.kind](reader)
    return _in_range(value, line) if isinstance(value, int) else value


def _in_range(value: int, line: _Property) -> int:
    if line.low <= value <= line.high:
        return value
    if line.field == "topic_alias":  # 5:3.3.2.3.4 gives this one a reason code of its own
        raise ProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, "topic alias 0")
    raise violation(f"{line.field} may not be {value}")


def encode_properties(properties: Properties, place: PacketType) -> bytes:
    """The property length and the properties; ValueError for one that has no place there."""
    if properties is NO_PROPERTIES:
        return b"\x00"  # [MQTT-2.2.2-1]
    parts: list[bytes] = []
    for line in _TABLE:
        value = getattr(properties, line.field)
        if value is None or value == ():
            continue
        if place not in line.places:
            raise ValueError(f"{line.field} is not a property of {place.name}")
        head = bytes((line.identifier,))
        parts += [head + _write(one, line) for one in (value if line.repeats else (value,))]
    body = b"".join(parts)
    return encode_variable(len(body)) + body


def _write(value: Any, line: _Property) -> bytes:
    match line.kind:
        case _Kind.BYTE | _Kind.TWO | _Kind.FOUR:
            return _ranged(value, line).to_bytes(line.kind.value, "big")
        case _Kind.VARIABLE:
            return encode_variable(_ranged(value, line))
        case _Kind.TEXT | _Kind.TOPIC:
            return encode_text(value)
        case _Kind.BINARY:
            return encode_binary(value)
        case _Kind.PAIR:
            return encode_text(value[0]) + encode_text(value[1])


def _ranged(value: int, line: _Property) -> int:
    if not line.low <= value <= line.high:
        raise ValueError(f"{line.field} may not be {value}")
    return value
