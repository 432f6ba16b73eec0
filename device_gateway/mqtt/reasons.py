"""The two protocol versions, MQTT's reason codes, and the one error that the codec raises.

Section numbers in this package are those of the OASIS standards: "5:" before one means MQTT 5.0
(7 March 2019), "3:" means MQTT 3.1.1 (29 October 2014); without either it is the same in both.
"""

from enum import IntEnum, unique

from glamd.errors import InputError


@unique
class Version(IntEnum):
    """The protocol level as it stands in CONNECT (3.1.2.2)."""

    V311 = 4
    V5 = 5


@unique
class ReasonCode(IntEnum):
    """MQTT 5 reason codes (5:2.4); 0, 1 and 2 are also the granted QoS in a SUBACK."""

    SUCCESS = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    REAUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2


@unique
class ReturnCode(IntEnum):
    """The return codes of a 3.1.1 CONNACK (3:3.2.2.3)."""

    ACCEPTED = 0
    UNACCEPTABLE_PROTOCOL_VERSION = 1
    IDENTIFIER_REJECTED = 2
    SERVER_UNAVAILABLE = 3
    BAD_USER_NAME_OR_PASSWORD = 4
    NOT_AUTHORIZED = 5


class ProtocolError(InputError):
    """The peer broke the protocol; `reason_code` is what MQTT 5 tells it before the close.

    After it the connection has to be closed: the bytes that follow have no meaning
    [MQTT-4.13.1-1 in 5, MQTT-4.8.0-1 in 3.1.1].
    """

    default_code = "MQTT_PROTOCOL_ERROR"

    def __init__(self, reason_code: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.reason_code = reason_code


def malformed(message: str) -> ProtocolError:
    """Bytes that cannot be parsed as the standard says (5:1.2, "Malformed Packet")."""
    return ProtocolError(ReasonCode.MALFORMED_PACKET, message)


def violation(message: str) -> ProtocolError:
    """Well-formed bytes that say what the protocol does not allow (5:1.2, "Protocol Error")."""
    return ProtocolError(ReasonCode.PROTOCOL_ERROR, message)
