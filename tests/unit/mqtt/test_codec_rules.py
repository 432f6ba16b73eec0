"""The standard's rules for single packets, each broken once, in raw bytes.

The name of a case is the clause: "5:" MQTT 5.0, "3:" MQTT 3.1.1, neither: the same in both.
"""

import pytest

from device_gateway.mqtt.codec import (
    Connack,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    ProtocolError,
    Puback,
    Publish,
    ReasonCode,
    Suback,
    Unsuback,
    Version,
)

V3, V5 = Version.V311, Version.V5
MALFORMED, VIOLATION = ReasonCode.MALFORMED_PACKET, ReasonCode.PROTOCOL_ERROR


def frame(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    assert len(body) < 128
    return bytes((first, len(body))) + body


def text(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def connect(flags: int, *payload: bytes, level: int = 5, properties: bytes = b"\x00") -> bytes:
    return frame(
        0x10,
        b"\x00\x04MQTT",
        bytes((level, flags)),
        b"\x00\x3c",
        properties if level == 5 else b"",
        *payload,
    )


def only(version: Version | None, data: bytes) -> Packet:
    (packet,) = Decoder(4096, version).feed(data)
    return packet


CONNECTS = {
    "[MQTT-3.1.2-3] reserved flag": connect(0x03, text(b"a")),
    "5:[MQTT-3.1.2-11] will QoS without will": connect(0x0A, text(b"a")),
    "5:[MQTT-3.1.2-13] will retain without will": connect(0x22, text(b"a")),
    "3:[MQTT-3.1.2-13] will QoS without will": connect(0x0A, text(b"a"), level=4),
    "5:[MQTT-3.1.2-12] will QoS 3": connect(0x1E, text(b"a"), b"\x00", text(b"t"), text(b"p")),
    "3:[MQTT-3.1.2-22] password alone": connect(0x42, text(b"a"), text(b"p"), level=4),
    "[MQTT-3.1.3-3] no client identifier": connect(0x02),
    "[MQTT-3.1.3-4] client identifier not UTF-8": connect(0x02, text(b"\xff")),
    "3.1.3 user name missing": connect(0x82, text(b"a")),
    "3.1.3 bytes left over": connect(0x02, text(b"a"), b"x"),
    "3.1.3 will topic missing": connect(0x06, text(b"a"), level=4),
    "5:3.1.2.11 properties beyond the packet": connect(0x02, properties=b"\x50"),
}
CONNECT_VIOLATIONS = {
    "[MQTT-4.7.3-1] empty will topic": connect(0x06, text(b"a"), b"\x00", text(b""), text(b"p")),
    "[MQTT-3.3.2-2] wildcard in will topic": connect(
        0x06, text(b"a"), text(b"a/#"), text(b"p"), level=4
    ),
    "5:3.1.2.11.3 receive maximum 0": connect(0x02, text(b"a"), properties=b"\x03\x21\x00\x00"),
    "5:3.1.2.11.4 maximum packet size 0": connect(
        0x02, text(b"a"), properties=b"\x05\x27\x00\x00\x00\x00"
    ),
    "5:3.1.2.11.7 problem information 2": connect(0x02, text(b"a"), properties=b"\x02\x17\x02"),
    "5:3.1.2.11.2 session expiry twice": connect(
        0x02, text(b"a"), properties=b"\x0a\x11\x00\x00\x00\x01\x11\x00\x00\x00\x01"
    ),
    "5:3.1.2.11.10 authentication data alone": connect(
        0x02, text(b"a"), properties=b"\x04\x16\x00\x01x"
    ),
    "5:2.2.2.2 a property of PUBLISH": connect(0x02, text(b"a"), properties=b"\x02\x01\x01"),
}
BROKEN = {
    "[MQTT-3.3.1-4] QoS 3": (V5, frame(0x36, text(b"t"), b"\x00\x01\x00"), MALFORMED),
    "[MQTT-3.3.1-2] DUP at QoS 0": (V5, frame(0x38, text(b"t"), b"\x00"), VIOLATION),
    "[MQTT-3.3.2-1] no topic": (V5, frame(0x30), MALFORMED),
    "3.3.2.1 topic beyond the packet": (V3, frame(0x30, b"\x00\x05ab"), MALFORMED),
    "3.3.2.2 no packet identifier": (V3, frame(0x32, text(b"t"), b"\x00"), MALFORMED),
    "3.3.2.2 topic and identifier beyond": (V3, frame(0x32, b"\x00\x09t"), MALFORMED),
    "5:[MQTT-2.2.1-3] packet identifier 0": (
        V5,
        frame(0x32, text(b"t"), b"\x00\x00\x00"),
        VIOLATION,
    ),
    "3:[MQTT-2.3.1-1] packet identifier 0": (V3, frame(0x32, text(b"t"), b"\x00\x00"), VIOLATION),
    "[MQTT-3.3.2-2] plus in a topic": (V3, frame(0x30, text(b"a/+")), VIOLATION),
    "[MQTT-3.3.2-2] hash in a topic": (V5, frame(0x30, text(b"#"), b"\x00"), VIOLATION),
    "[MQTT-4.7.3-1] empty topic": (V3, frame(0x30, text(b"")), VIOLATION),
    "5:3.3.2.3.4 empty topic, no alias": (V5, frame(0x30, text(b""), b"\x00"), VIOLATION),
    "5:[MQTT-3.3.2-8] alias 0": (
        V5,
        frame(0x30, text(b"t"), b"\x03\x23\x00\x00"),
        ReasonCode.TOPIC_ALIAS_INVALID,
    ),
    "5:[MQTT-3.3.2-14] wildcard response topic": (
        V5,
        frame(0x30, text(b"t"), b"\x04\x08", text(b"+")),
        VIOLATION,
    ),
    "5:2.2.2.1 no properties at all": (V5, frame(0x30, text(b"t")), MALFORMED),
    "5:2.2.2.2 unknown property": (V5, frame(0x30, text(b"t"), b"\x02\x7f\x00"), MALFORMED),
    "5:2.2.2.1 property cut off": (V5, frame(0x30, text(b"t"), b"\x01\x01"), MALFORMED),
    "5:3.3.2.3.8 subscription identifier 0": (
        V5,
        frame(0x30, text(b"t"), b"\x02\x0b\x00"),
        VIOLATION,
    ),
    "5:[MQTT-1.5.5-1] padded integer": (V5, frame(0x30, text(b"t"), b"\x80\x00"), MALFORMED),
    "5:1.5.5 integer of five bytes": (
        V5,
        frame(0x30, text(b"t"), b"\xff\xff\xff\xff\x01"),
        MALFORMED,
    ),
    "[MQTT-1.5.4-1] a surrogate": (V3, frame(0x30, text(b"\xed\xa0\x80")), MALFORMED),
    "[MQTT-1.5.4-1] an over-long form": (V3, frame(0x30, text(b"\xc0\xaf")), MALFORMED),
    "[MQTT-1.5.4-2] U+0000": (V3, frame(0x30, text(b"a\x00b")), MALFORMED),
    "2.1.2 packet type 0": (V5, frame(0x00), MALFORMED),
    "3:2.2.1 AUTH": (V3, frame(0xF0), MALFORMED),
    "3.4.1 PUBACK flags": (V5, frame(0x42, b"\x00\x01"), MALFORMED),
    "5:[MQTT-3.6.1-1] PUBREL flags": (V5, frame(0x60, b"\x00\x01"), MALFORMED),
    "3.4.2 PUBACK with identifier 0": (V5, frame(0x40, b"\x00\x00"), VIOLATION),
    "3.4.2 PUBACK cut off": (V5, frame(0x40, b"\x00"), MALFORMED),
    "3:3.4.2 PUBACK with a reason": (V3, frame(0x40, b"\x00\x01\x00"), MALFORMED),
    "5:[MQTT-3.4.2-1] PUBACK code": (V5, frame(0x40, b"\x00\x01\x01"), VIOLATION),
    "5:3.4.2 PUBACK left over": (V5, frame(0x40, b"\x00\x01\x00\x00x"), MALFORMED),
    "[MQTT-3.8.1-1] SUBSCRIBE flags": (V5, frame(0x80, b"\x00\x01\x00"), MALFORMED),
    "5:[MQTT-3.8.3-2] no filter": (V5, frame(0x82, b"\x00\x01\x00"), VIOLATION),
    "3:[MQTT-3.8.3-3] no filter": (V3, frame(0x82, b"\x00\x01"), VIOLATION),
    "5:[MQTT-3.8.3-5] reserved options": (
        V5,
        frame(0x82, b"\x00\x01\x00", text(b"a"), b"\x40"),
        MALFORMED,
    ),
    "3:[MQTT-3.8.3-4] options of 5": (V3, frame(0x82, b"\x00\x01", text(b"a"), b"\x04"), MALFORMED),
    "3.8.3.1 QoS 3": (V5, frame(0x82, b"\x00\x01\x00", text(b"a"), b"\x03"), VIOLATION),
    "5:3.8.3.1 retain handling 3": (
        V5,
        frame(0x82, b"\x00\x01\x00", text(b"a"), b"\x30"),
        VIOLATION,
    ),
    "5:[MQTT-3.8.3-4] no-local, shared": (
        V5,
        frame(0x82, b"\x00\x01\x00", text(b"$share/g/a"), b"\x04"),
        VIOLATION,
    ),
    "5:3.8.2.1.2 two identifiers": (
        V5,
        frame(0x82, b"\x00\x01\x04\x0b\x01\x0b\x02", text(b"a"), b"\x00"),
        VIOLATION,
    ),
    "[MQTT-4.7.1-1] levels after hash": (
        V3,
        frame(0x82, b"\x00\x01", text(b"#/a"), b"\0"),
        MALFORMED,
    ),
    "[MQTT-4.7.1-2] hash in a level": (V3, frame(0x82, b"\x00\x01", text(b"a#"), b"\0"), MALFORMED),
    "[MQTT-4.7.1-3] plus in a level": (
        V3,
        frame(0x82, b"\x00\x01", text(b"a+/b"), b"\0"),
        MALFORMED,
    ),
    "[MQTT-4.7.3-1] empty filter": (V3, frame(0x82, b"\x00\x01", text(b""), b"\0"), MALFORMED),
    "[MQTT-3.10.3-2] no filter": (V3, frame(0xA2, b"\x00\x01"), VIOLATION),
    "[MQTT-3.10.1-1] UNSUBSCRIBE flags": (V3, frame(0xA0, b"\x00\x01", text(b"a")), MALFORMED),
    "3.12 PINGREQ with a body": (V5, frame(0xC0, b"x"), MALFORMED),
    "3.13 PINGRESP with a body": (V5, frame(0xD0, b"x"), MALFORMED),
    "5:[MQTT-3.14.1-1] DISCONNECT flags": (V5, frame(0xE1), MALFORMED),
    "3:3.14 DISCONNECT with a reason": (V3, frame(0xE0, b"\x00"), MALFORMED),
    "5:[MQTT-3.14.2-1] DISCONNECT code": (V5, frame(0xE0, b"\x01"), VIOLATION),
    "5:[MQTT-3.15.2-1] AUTH code": (V5, frame(0xF0, b"\x01"), VIOLATION),
    "[MQTT-3.2.2-1] CONNACK flags": (V5, frame(0x20, b"\x02\x00\x00"), MALFORMED),
    "5:[MQTT-3.2.2-6] present in a refusal": (V5, frame(0x20, b"\x01\x87\x00"), VIOLATION),
    "5:[MQTT-3.2.2-8] CONNACK code": (V5, frame(0x20, b"\x00\x01\x00"), VIOLATION),
    "3:3.2.2.3 CONNACK code": (V3, frame(0x20, b"\x00\x06"), MALFORMED),
    "3:[MQTT-3.9.3-2] SUBACK code": (V3, frame(0x90, b"\x00\x01\x03"), VIOLATION),
    "3.9.3 SUBACK without codes": (V3, frame(0x90, b"\x00\x01"), VIOLATION),
    "5:[MQTT-3.11.3-2] UNSUBACK code": (V5, frame(0xB0, b"\x00\x01\x00\x01"), VIOLATION),
    "3:3.11.3 UNSUBACK with codes": (V3, frame(0xB0, b"\x00\x01\x00"), MALFORMED),
}


def refused_with(version: Version | None, data: bytes) -> ReasonCode:
    with pytest.raises(ProtocolError) as caught:
        only(version, data)
    return caught.value.reason_code


@pytest.mark.parametrize("clause", CONNECTS)
def test_a_malformed_connect_is_refused(clause: str) -> None:
    assert refused_with(None, CONNECTS[clause]) is MALFORMED


@pytest.mark.parametrize("clause", CONNECT_VIOLATIONS)
def test_a_connect_against_the_rules_is_refused(clause: str) -> None:
    assert refused_with(None, CONNECT_VIOLATIONS[clause]) is VIOLATION


@pytest.mark.parametrize("clause", BROKEN)
def test_a_packet_against_the_rules_is_refused(clause: str) -> None:
    version, data, reason = BROKEN[clause]
    assert refused_with(version, data) is reason


def test_the_error_never_repeats_what_was_sent() -> None:
    with pytest.raises(ProtocolError) as caught:
        only(V3, frame(0x30, text(b"4111111111111111\xff")))
    assert "4111" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_byte_order_mark_is_kept() -> None:  # [MQTT-1.5.4-3]
    packet = only(V3, frame(0x30, text(b"\xef\xbb\xbfa")))
    assert packet == Publish("\ufeffa", b"")


def test_5_allows_a_password_without_a_user_name() -> None:
    packet = only(None, connect(0x42, text(b"a"), text(b"p")))
    assert isinstance(packet, Connect)
    assert packet.password == b"p"


def test_an_alias_may_stand_for_the_topic() -> None:
    packet = only(V5, frame(0x30, text(b""), b"\x03\x23\x00\x05"))
    assert isinstance(packet, Publish)
    assert packet.properties.topic_alias == 5


@pytest.mark.parametrize(
    ("data", "packet"),
    [
        (b"\x40\x02\x00\x07", Puback(7)),
        (b"\x40\x03\x00\x07\x10", Puback(7, 0x10)),
        (b"\x40\x04\x00\x07\x10\x00", Puback(7, 0x10)),
        (b"\xe0\x00", Disconnect()),
        (b"\xe0\x01\x04", Disconnect(4)),
        (b"\xe0\x02\x8e\x00", Disconnect(0x8E)),
        (b"\x20\x03\x01\x00\x00", Connack(session_present=True)),
        (b"\x90\x05\x00\x07\x00\x01\x87", Suback(7, (1, 0x87))),
        (b"\xb0\x05\x00\x07\x00\x00\x11", Unsuback(7, (0, 0x11))),
    ],
)
def test_answers_of_5_may_leave_out_what_is_zero(data: bytes, packet: Packet) -> None:
    assert only(V5, data) == packet


@pytest.mark.parametrize(
    ("data", "packet"),
    [
        (b"\x20\x02\x00\x05", Connack(reason_code=5)),
        (b"\x90\x03\x00\x07\x80", Suback(7, (0x80,))),
        (b"\xb0\x02\x00\x07", Unsuback(7)),
    ],
)
def test_answers_of_311_have_their_own_form(data: bytes, packet: Packet) -> None:
    assert only(V3, data) == packet
