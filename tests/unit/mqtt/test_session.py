"""The downlink of one session, without any connection but a list of what was sent."""

import pytest

from device_gateway.mqtt.codec import Decoder, Publish, Subscription, Version
from device_gateway.mqtt.counts import Counts
from device_gateway.mqtt.limits import EndpointLimits
from device_gateway.mqtt.opening import Terms
from device_gateway.mqtt.session import PACKET_ID_MAX, Message, Session

COMMAND = "pos/v1/pos-1/command"


class Wire:
    """A link that keeps what was sent."""

    version = Version.V5

    def __init__(self, inflight_max: int = 2) -> None:
        self.writable = True
        self.terms = Terms(
            keep_alive_s=0,
            expiry_s=60,
            inflight_max=inflight_max,
            max_packet_out_bytes=1000,
            problem_information=True,
        )
        self._decoder = Decoder(100_000, Version.V5)
        self.sent: list[Publish] = []

    def send(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            assert isinstance(packet, Publish)
            self.sent.append(packet)


@pytest.fixture
def session() -> Session:
    made = Session("pos-1", EndpointLimits(downlink_queue_messages=3), Counts())
    made.subscribe(Subscription(topic_filter=COMMAND, qos=1))
    return made


def message(text: str, qos: int = 1) -> Message:
    return Message(COMMAND, text.encode(), qos, retain=False)


def texts(wire: Wire) -> list[str]:
    return [one.payload.decode() for one in wire.sent]


def test_a_peer_that_does_not_read_gets_nothing_until_it_does(session: Session) -> None:
    wire = Wire()
    wire.writable = False
    session.attach(wire)
    assert session.deliver(message("a"))
    assert session.deliver(message("b", qos=0))
    assert wire.sent == []
    wire.writable = True
    session.pump()
    assert texts(wire) == ["a", "b"]


def test_messages_keep_their_order_past_a_full_window(session: Session) -> None:
    wire = Wire(inflight_max=1)
    session.attach(wire)
    for text in "abc":
        assert session.deliver(message(text))
    assert session.deliver(message("d", qos=0))  # not before those that came before it
    assert not session.deliver(message("e"))
    for _ in range(3):
        session.acknowledge(wire.sent[-1].packet_id)
    assert texts(wire) == ["a", "b", "c", "d"]


def test_an_acknowledgement_of_nothing_changes_nothing(session: Session) -> None:
    wire = Wire(inflight_max=1)
    session.attach(wire)
    session.deliver(message("a"))
    session.deliver(message("b"))
    session.acknowledge(wire.sent[0].packet_id + 1)
    assert texts(wire) == ["a"]


def test_packet_identifiers_wrap_and_skip_those_in_flight(session: Session) -> None:
    wire = Wire(inflight_max=3)
    session.attach(wire)
    session.deliver(message("held"))
    for _ in range(PACKET_ID_MAX):
        session.deliver(message("x"))
        session.acknowledge(wire.sent.pop().packet_id)
    session.deliver(message("y"))
    assert wire.sent[0].packet_id == 1
    assert wire.sent[-1].packet_id not in (0, 1)


def test_an_acknowledgement_may_come_before_its_redelivery(session: Session) -> None:
    first = Wire(inflight_max=3)
    session.attach(first)
    for text in "abc":
        session.deliver(message(text))
    second = Wire(inflight_max=1)
    session.attach(second)
    session.pump()
    session.acknowledge(first.sent[1].packet_id)
    session.acknowledge(first.sent[0].packet_id)
    assert texts(second) == ["a", "c"]
    assert all(one.dup for one in second.sent)


def test_the_strongest_of_overlapping_subscriptions_counts(session: Session) -> None:
    wire = Wire()
    session.attach(wire)
    session.subscribe(Subscription(topic_filter="pos/v1/pos-1/#", qos=0))
    session.deliver(message("at least once"))
    assert session.unsubscribe(COMMAND)
    session.deliver(message("at most once"))
    assert [one.qos for one in wire.sent] == [1, 0]
    assert session.unsubscribe("pos/v1/pos-1/#")
    assert not session.unsubscribe("pos/v1/pos-1/#")
    assert not session.deliver(message("nobody"))
