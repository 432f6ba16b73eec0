"""SUBSCRIBE and UNSUBSCRIBE carried out on a session (3.8.4, 3.10.4)."""

from device_gateway.mqtt import rights
from device_gateway.mqtt.codec import (
    ProtocolError,
    ReasonCode,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Version,
)
from device_gateway.mqtt.session import Message, Session

Retained = list[tuple[Message, Subscription]]


def subscribe(
    session: Session, packet: Subscribe, version: Version, kept: dict[str, Message]
) -> tuple[Suback, Retained]:
    """The answer, and the retained messages to send behind it, out of `kept`.

    QoS 2 is granted as 1. ProtocolError if the connection cannot go on.
    """
    if packet.properties.subscription_identifiers:  # 5:3.2.2.3.12
        raise ProtocolError(
            ReasonCode.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED,
            "subscription identifiers are not supported",
        )
    codes: list[int] = []
    retained: Retained = []
    for one in packet.subscriptions:
        topics = rights.covered(rights.prefix(session.device_id), one.topic_filter)
        if not topics:
            codes.append(_foreign(one.topic_filter, version))
            continue
        is_new = session.subscribe(one)
        codes.append(min(one.qos, 1))
        # 5: [MQTT-3.3.1-9, -10, -11]; in 3.1.1 the handling is always 0 (3: [MQTT-3.3.1-6]).
        if one.retain_handling == 0 or (one.retain_handling == 1 and is_new):
            retained += [(kept[topic], one) for topic in topics if topic in kept]
    return Suback(packet.packet_id, tuple(codes)), retained


def _foreign(topic_filter: str, version: Version) -> ReasonCode:
    """What a filter gets that is not the device's own: a code in 5, the end in 3.1.1."""
    if version is Version.V311:
        raise ProtocolError(ReasonCode.NOT_AUTHORIZED, "not a topic filter of this device")
    if topic_filter.startswith("$share/"):  # 5:3.2.2.3.13
        raise ProtocolError(
            ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED, "shared subscriptions are not supported"
        )
    return ReasonCode.NOT_AUTHORIZED


def unsubscribe(session: Session, packet: Unsubscribe) -> Unsuback:
    """The answer: one code for each filter, whether there was a subscription or not."""
    codes = [
        ReasonCode.SUCCESS
        if session.unsubscribe(topic_filter)
        else ReasonCode.NO_SUBSCRIPTION_EXISTED
        for topic_filter in packet.topic_filters
    ]
    return Unsuback(packet.packet_id, tuple(codes))
