"""CONNECT judged, and CONNACK written: what client and endpoint agree on. Pure.

What the endpoint does not have is said here, in the properties of its CONNACK (5:3.2.2.3).
"""

from dataclasses import dataclass

from device_gateway.mqtt import rights
from device_gateway.mqtt.codec import (
    NO_PROPERTIES,
    Connack,
    Connect,
    Properties,
    ReasonCode,
    ReturnCode,
    Version,
    Will,
    encode,
)
from device_gateway.mqtt.limits import EndpointLimits

PACKET_BYTES_MAX = 268_435_460
CONNACK_BYTES_MAX = 128
"""Ours with everything that can be in it; a client that takes less cannot be told our terms."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A refused CONNECT: the metric's label, the code of either version, and a word for a 5."""

    reason: str
    code: ReasonCode
    return_code: ReturnCode | None
    text: str


NO_DEVICE_ID = Rejected(
    "no_device_id",
    ReasonCode.NOT_AUTHORIZED,
    ReturnCode.NOT_AUTHORIZED,
    "the certificate's common name is not a device id",
)
UNAVAILABLE = Rejected(
    "unavailable",
    ReasonCode.SERVER_UNAVAILABLE,
    ReturnCode.SERVER_UNAVAILABLE,
    "try again later",
)
_NO_CLIENT_ID = Rejected(
    "no_client_id",
    ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
    ReturnCode.IDENTIFIER_REJECTED,
    "a persistent session needs a client identifier",
)
_AUTHENTICATION = Rejected(
    "enhanced_authentication",
    ReasonCode.BAD_AUTHENTICATION_METHOD,
    ReturnCode.NOT_AUTHORIZED,
    "a device proves itself by its certificate alone",
)
_FOREIGN_WILL = Rejected(
    "foreign_will",
    ReasonCode.NOT_AUTHORIZED,
    ReturnCode.NOT_AUTHORIZED,
    "the will's topic is not this device's",
)
# 3.1.1 has no return code for it, so its connection is closed without a CONNACK.
_WILL_QOS = Rejected("will_qos", ReasonCode.QOS_NOT_SUPPORTED, None, "a will has QoS 0 or 1 here")


_SMALL_PACKETS = Rejected(
    "small_packets", ReasonCode.PACKET_TOO_LARGE, None, "takes no packet of the size of a CONNACK"
)


def not_admitted(text: str) -> Rejected:
    """The gateway does not want this device; `text` is shown to an MQTT 5 client."""
    return Rejected("not_admitted", ReasonCode.NOT_AUTHORIZED, ReturnCode.NOT_AUTHORIZED, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds on one connection after its CONNECT."""

    keep_alive_s: int
    """0: none."""
    expiry_s: int
    inflight_max: int
    max_packet_out_bytes: int
    problem_information: bool


def judge(connect: Connect, device_id: str | None) -> Rejected | None:
    """Whether the endpoint refuses the CONNECT whatever the gateway thinks of the device."""
    if device_id is None:
        return NO_DEVICE_ID
    if connect.properties.authentication_method is not None:
        return _AUTHENTICATION
    if (connect.properties.maximum_packet_size or PACKET_BYTES_MAX) < CONNACK_BYTES_MAX:
        return _SMALL_PACKETS
    if connect.version is Version.V311 and not connect.client_id and not connect.clean_start:
        return _NO_CLIENT_ID  # 3: [MQTT-3.1.3-8]
    return None if connect.will is None else _judge_will(connect.will, device_id)


def _judge_will(will: Will, device_id: str) -> Rejected | None:
    if not rights.may_publish(rights.prefix(device_id), will.topic):
        return _FOREIGN_WILL
    return _WILL_QOS if will.qos > 1 else None  # 5: [MQTT-3.2.2-12]


def agree(connect: Connect, limits: EndpointLimits) -> Terms:
    """The client's wishes cut to the endpoint's limits (5:3.1.2.11)."""
    wishes = connect.properties
    keep_alive_s = connect.keep_alive_s
    if connect.version is Version.V5:
        keep_alive_s = min(keep_alive_s or limits.max_keep_alive_s, limits.max_keep_alive_s)
        expiry_s = min(wishes.session_expiry_interval or 0, limits.session_expiry_max_s)
    else:
        expiry_s = 0 if connect.clean_start else limits.session_expiry_max_s
    return Terms(
        keep_alive_s=keep_alive_s,
        expiry_s=expiry_s,
        inflight_max=min(wishes.receive_maximum or 65_535, limits.downlink_inflight),
        max_packet_out_bytes=wishes.maximum_packet_size or PACKET_BYTES_MAX,
        problem_information=wishes.request_problem_information != 0,
    )


def accepted(
    connect: Connect,
    terms: Terms,
    limits: EndpointLimits,
    *,
    device_id: str,
    session_present: bool,
) -> bytes:
    """The CONNACK of an accepted connection; what differs from the wishes is said in it."""
    if connect.version is Version.V311:
        return encode(Connack(session_present=session_present), Version.V311)
    wished_expiry_s = connect.properties.session_expiry_interval or 0
    properties = Properties(
        session_expiry_interval=terms.expiry_s if terms.expiry_s != wished_expiry_s else None,
        receive_maximum=limits.receive_maximum,
        maximum_qos=1,
        maximum_packet_size=limits.max_packet_bytes,
        assigned_client_identifier=None if connect.client_id else device_id,  # [MQTT-3.2.2-16]
        subscription_identifier_available=0,
        shared_subscription_available=0,
        server_keep_alive=(
            terms.keep_alive_s if terms.keep_alive_s != connect.keep_alive_s else None
        ),
    )
    return encode(Connack(session_present=session_present, properties=properties), Version.V5)


def rejected(connect: Connect, why: Rejected) -> bytes:
    """The CONNACK of a refusal; empty where the version has no word for it."""
    if connect.version is Version.V311:
        if why.return_code is None:
            return b""
        return encode(Connack(reason_code=why.return_code), Version.V311)
    max_bytes = connect.properties.maximum_packet_size or PACKET_BYTES_MAX
    if connect.properties.request_problem_information != 0:
        told = Connack(reason_code=why.code, properties=Properties(reason_string=why.text))
        data = encode(told, Version.V5)
        if len(data) <= max_bytes:  # [MQTT-3.2.2-19]
            return data
    data = encode(Connack(reason_code=why.code), Version.V5)
    return data if len(data) <= max_bytes else b""


def broken(version: Version | None, code: ReasonCode) -> bytes:
    """The CONNACK for a first packet that cannot be read; empty where there is none to send."""
    if version is Version.V5:
        return encode(Connack(reason_code=code, properties=NO_PROPERTIES), Version.V5)
    if version is None and code is ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
        # In the form that the oldest client understands (3: [MQTT-3.1.2-2]).
        refusal = Connack(reason_code=ReturnCode.UNACCEPTABLE_PROTOCOL_VERSION)
        return encode(refusal, Version.V311)
    return b""
