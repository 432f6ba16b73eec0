"""Whatever the codec writes it reads back as the same value, in both versions and both roles."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_gateway.mqtt.codec import (
    NO_PROPERTIES,
    PINGREQ,
    PINGRESP,
    Auth,
    Connack,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    Properties,
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
    Version,
    Will,
    encode,
)

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40)
TOPIC = st.text(
    st.characters(exclude_characters="\x00+#", exclude_categories=["Cs"]), min_size=1, max_size=40
)
FILTER = st.one_of(TOPIC, TOPIC.map(lambda topic: topic + "/#"), st.sampled_from(["#", "+", "+/a"]))
BYTES = st.binary(max_size=300)
PACKET_ID = st.integers(1, 65_535)
FOUR = st.integers(0, 0xFFFFFFFF)
TWO = st.integers(0, 0xFFFF)
FLAG = st.integers(0, 1)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple)
MESSAGE = {
    "payload_format_indicator": FLAG,
    "message_expiry_interval": FOUR,
    "content_type": TEXT,
    "response_topic": TOPIC,
    "correlation_data": BYTES,
    "user_properties": PAIRS,
}
ANSWER = {"reason_string": TEXT, "user_properties": PAIRS}
AUTHENTICATION = {"authentication_method": TEXT}
OPENING = {
    "session_expiry_interval": FOUR,
    "receive_maximum": st.integers(1, 0xFFFF),
    "topic_alias_maximum": TWO,
    "maximum_packet_size": st.integers(1, 0xFFFFFFFF),
    "user_properties": PAIRS,
    **AUTHENTICATION,
}


def properties(table: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Properties]:
    return st.fixed_dictionaries({}, optional=dict(table)).map(
        lambda values: replace(NO_PROPERTIES, **values)
    )


IDENTIFIERS = st.lists(st.integers(1, 268_435_455), max_size=3).map(tuple)
WILLS = st.builds(
    Will,
    topic=TOPIC,
    payload=BYTES,
    qos=st.integers(0, 2),
    retain=st.booleans(),
    properties=properties({**MESSAGE, "will_delay_interval": FOUR}),
)
PUBLISH_5 = st.integers(0, 2).flatmap(
    lambda qos: st.builds(
        Publish,
        TOPIC,
        BYTES,
        st.just(qos),
        st.booleans(),
        st.booleans() if qos else st.just(False),
        PACKET_ID if qos else st.just(0),
        properties(
            {
                **MESSAGE,
                "topic_alias": st.integers(1, 0xFFFF),
                "subscription_identifiers": IDENTIFIERS,
            }
        ),
    )
)
CODES = st.sampled_from([0x10, 0x80, 0x87, 0x97])
PACKETS_5: st.SearchStrategy[Packet] = st.one_of(
    st.builds(
        Connect,
        version=st.just(Version.V5),
        client_id=TEXT,
        clean_start=st.booleans(),
        keep_alive_s=TWO,
        will=st.none() | WILLS,
        username=st.none() | TEXT,
        password=st.none() | BYTES,
        properties=properties(
            {
                **OPENING,
                "request_problem_information": FLAG,
                "request_response_information": FLAG,
            }
        ),
    ),
    st.builds(
        Connack,
        session_present=st.booleans(),
        properties=properties(
            {
                **OPENING,
                **ANSWER,
                "assigned_client_identifier": TEXT,
                "server_keep_alive": TWO,
                "response_information": TEXT,
                "server_reference": TEXT,
                "maximum_qos": FLAG,
                "retain_available": FLAG,
                "wildcard_subscription_available": FLAG,
                "subscription_identifier_available": FLAG,
                "shared_subscription_available": FLAG,
            }
        ),
    ),
    PUBLISH_5,
    st.builds(Puback, PACKET_ID, CODES, properties(ANSWER)),
    st.builds(Pubrec, PACKET_ID, CODES, properties(ANSWER)),
    st.builds(Pubrel, PACKET_ID, st.sampled_from([0, 0x92]), properties(ANSWER)),
    st.builds(Pubcomp, PACKET_ID, st.sampled_from([0, 0x92]), properties(ANSWER)),
    st.builds(
        Subscribe,
        PACKET_ID,
        st.lists(
            st.builds(
                Subscription,
                topic_filter=FILTER,
                qos=st.integers(0, 2),
                no_local=st.booleans(),
                retain_as_published=st.booleans(),
                retain_handling=st.integers(0, 2),
            ),
            min_size=1,
            max_size=4,
        ).map(tuple),
        properties({"subscription_identifiers": st.tuples(st.integers(1, 268_435_455))}),
    ),
    st.builds(
        Suback,
        PACKET_ID,
        st.lists(st.sampled_from([0, 1, 2, 0x80, 0x87, 0xA1]), min_size=1, max_size=4).map(tuple),
        properties(ANSWER),
    ),
    st.builds(
        Unsubscribe,
        PACKET_ID,
        st.lists(FILTER, min_size=1, max_size=4).map(tuple),
        properties({"user_properties": PAIRS}),
    ),
    st.builds(
        Unsuback,
        PACKET_ID,
        st.lists(st.sampled_from([0, 0x11, 0x87]), min_size=1, max_size=4).map(tuple),
        properties(ANSWER),
    ),
    st.sampled_from([PINGREQ, PINGRESP]),
    st.builds(
        Disconnect,
        st.sampled_from([0, 4, 0x82, 0x8E]),
        properties({**ANSWER, "session_expiry_interval": FOUR, "server_reference": TEXT}),
    ),
    st.builds(Auth, st.sampled_from([0, 0x18, 0x19]), properties(AUTHENTICATION)),
)
PACKETS_311: st.SearchStrategy[Packet] = st.one_of(
    st.builds(
        Connect,
        version=st.just(Version.V311),
        client_id=TEXT,
        clean_start=st.booleans(),
        keep_alive_s=TWO,
        will=st.none()
        | st.builds(Will, topic=TOPIC, payload=BYTES, qos=st.integers(0, 2), retain=st.booleans()),
        username=TEXT,
        password=st.none() | BYTES,
    ),
    st.builds(Connack, session_present=st.booleans()),
    st.builds(Connack, reason_code=st.integers(1, 5)),
    st.builds(Publish, TOPIC, BYTES, st.just(1), st.booleans(), st.booleans(), PACKET_ID),
    st.builds(Publish, TOPIC, BYTES, st.just(0), st.booleans()),
    st.builds(Puback, PACKET_ID),
    st.builds(Pubrec, PACKET_ID),
    st.builds(Pubrel, PACKET_ID),
    st.builds(Pubcomp, PACKET_ID),
    st.builds(
        Subscribe,
        PACKET_ID,
        st.lists(
            st.builds(Subscription, topic_filter=FILTER, qos=st.integers(0, 2)),
            min_size=1,
            max_size=4,
        ).map(tuple),
    ),
    st.builds(Suback, PACKET_ID, st.lists(st.sampled_from([0, 1, 2, 0x80]), min_size=1).map(tuple)),
    st.builds(Unsubscribe, PACKET_ID, st.lists(FILTER, min_size=1, max_size=4).map(tuple)),
    st.builds(Unsuback, PACKET_ID),
    st.sampled_from([PINGREQ, PINGRESP, Disconnect()]),
)


def there_and_back(packet: Packet, version: Version) -> None:
    known = None if isinstance(packet, Connect) else version
    decoder = Decoder(268_435_460, known)
    assert list(decoder.feed(encode(packet, version))) == [packet]
    assert decoder.version is version


@settings(max_examples=500, deadline=None)
@given(PACKETS_5)
def test_every_packet_of_5_survives_the_round_trip(packet: Packet) -> None:
    there_and_back(packet, Version.V5)


@settings(max_examples=300, deadline=None)
@given(PACKETS_311)
def test_every_packet_of_311_survives_the_round_trip(packet: Packet) -> None:
    there_and_back(packet, Version.V311)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_of_one_to_four_bytes_survive_the_round_trip(size: int) -> None:
    there_and_back(Publish("t", b"x" * size, 1, packet_id=9), Version.V5)


@pytest.mark.parametrize(
    ("packet", "version"),
    [
        (Puback(0), Version.V5),
        (Puback(65_536), Version.V5),
        (Puback(1, 0x87), Version.V311),
        (Publish("t", b"", 1), Version.V5),
        (Publish("t", b"", 0, packet_id=1), Version.V5),
        (Publish("t", b"", 3, packet_id=1), Version.V5),
        (Publish("t", b"", 0, dup=True), Version.V5),
        (Publish("t" * 65_536, b""), Version.V5),
        (Publish("a\x00b", b""), Version.V5),
        (Publish("a\ud800b", b""), Version.V5),
        (Publish("t", b"", properties=Properties(content_type="x")), Version.V311),
        (Publish("t", b"", properties=Properties(receive_maximum=1)), Version.V5),
        (Connack(properties=Properties(receive_maximum=0)), Version.V5),
        (Connack(properties=Properties(maximum_qos=2)), Version.V5),
        (Subscribe(1, (Subscription(topic_filter="a", no_local=True),)), Version.V311),
        (Auth(), Version.V311),
    ],
)
def test_what_mqtt_cannot_carry_is_the_callers_mistake(packet: Packet, version: Version) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        encode(packet, version)


def test_no_repr_shows_a_payload_or_a_password() -> None:
    secret = b"hunter2"
    will = Will(topic="t", payload=secret)
    for packet in (
        Publish("t", secret),
        Connect(version=Version.V5, client_id="c", username="hunter2", password=secret, will=will),
        Auth(properties=Properties(authentication_method="m", authentication_data=secret)),
    ):
        assert "hunter2" not in repr(packet)
