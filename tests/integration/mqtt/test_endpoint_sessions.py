"""Sessions over their connections: take-over, redelivery, wills, keep alive, retained messages."""

import pytest

from device_gateway.mqtt.codec import (
    PINGREQ,
    PINGRESP,
    Disconnect,
    Properties,
    Puback,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Version,
    Will,
)
from device_gateway.mqtt.limits import EndpointLimits
from tests.support.mqtt_site import Client, Site, swept, until
from tests.support.mqtt_tls import Authority

V3, V5 = Version.V311, Version.V5
OFFLINE = Will(topic="pos/v1/pos-1/status", payload=b"offline", qos=1, retain=True)


async def persistent(
    site: Site,
    version: Version = V5,
    *,
    clean_start: bool = False,
    receive_maximum: int | None = None,
    will: Will | None = None,
) -> tuple[Client, bool]:
    """A client with a session that outlives it, and whether the session was there before."""
    client = await site.open("pos-1")
    properties = Properties()
    if version is V5:
        properties = Properties(session_expiry_interval=60, receive_maximum=receive_maximum)
    connack = await client.connect(
        version, clean_start=clean_start, properties=properties, will=will
    )
    return client, connack.session_present


def send_down(site: Site, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
    """Publishes a command for pos-1."""
    return site.endpoint.publish("pos-1", "pos/v1/pos-1/command", payload, qos=qos, retain=retain)


async def gone(site: Site) -> None:
    """pos-1 is offline."""
    await until(lambda: site.gateway.events[-1] != "pos-1 connected")


@pytest.mark.parametrize("version", Version)
async def test_a_take_over_is_neither_offline_nor_online(
    authority: Authority, version: Version
) -> None:
    async with Site(authority) as site:
        first = await site.open("pos-1")
        await first.connect(version, client_id="one", will=OFFLINE)
        second = await site.open("pos-1")
        connack = await second.connect(version, client_id="another", will=OFFLINE)
        assert not connack.session_present
        if version is V5:
            assert await first.goodbye() == 0x8E
        else:
            assert await first.ending() == []
        second.send(PINGREQ)
        assert await second.receive() == PINGRESP
        assert site.gateway.events == ["pos-1 connected"]
        assert site.gateway.received == []
        assert site.endpoint.counts.take_overs == 1


async def test_a_take_over_may_resume_the_session(authority: Authority) -> None:
    async with Site(authority) as site:
        first, _ = await persistent(site)
        await first.subscribe("command")
        second, present = await persistent(site)
        assert present
        assert send_down(site, b"for the second")
        assert (await second.receive_publish()).payload == b"for the second"


@pytest.mark.parametrize("version", Version)
async def test_what_was_not_acknowledged_comes_again_with_dup(
    authority: Authority, version: Version
) -> None:
    async with Site(authority) as site:
        first, present = await persistent(site, version)
        assert not present
        await first.subscribe("command")
        for number in range(3):
            assert send_down(site, b"%d" % number)
        sent = [await first.receive_publish() for _ in range(3)]
        first.send(Puback(sent[1].packet_id), PINGREQ)
        assert await first.receive() == PINGRESP
        first.close()
        await gone(site)
        assert send_down(site, b"while away")
        assert not send_down(site, b"while away, at most once", qos=0)
        second, present = await persistent(site, version)
        assert present
        again = [await second.receive_publish() for _ in range(3)]
        assert [(one.payload, one.dup) for one in again] == [
            (b"0", True),
            (b"2", True),
            (b"while away", False),
        ]
        assert [one.packet_id for one in again[:2]] == [sent[0].packet_id, sent[2].packet_id]
        assert site.endpoint.counts.redelivered == 2


async def test_no_more_is_in_flight_than_the_client_allows(authority: Authority) -> None:
    async with Site(authority) as site:
        first, _ = await persistent(site, receive_maximum=3)
        await first.subscribe("command")
        for number in range(5):
            assert send_down(site, b"%d" % number)
        for _ in range(3):
            await first.receive_publish()
        first.send(PINGREQ)
        assert await first.receive() == PINGRESP
        first.close()
        await gone(site)
        second, _ = await persistent(site, receive_maximum=1)
        for number in range(5):
            message = await second.receive_publish()
            assert message.payload == b"%d" % number
            assert message.dup is (number < 3)
            second.send(PINGREQ)
            assert await second.receive() == PINGRESP
            second.send(Puback(message.packet_id))


async def test_a_full_downlink_refuses_the_newest(authority: Authority) -> None:
    limits = EndpointLimits(downlink_queue_messages=2, downlink_queue_bytes=100)
    async with Site(authority, limits) as site:
        client, _ = await persistent(site)
        await client.subscribe("command")
        client.close()
        await gone(site)
        assert send_down(site, b"x" * 99)
        assert not send_down(site, b"xx")
        assert send_down(site, b"x")
        assert not send_down(site, b"")
        assert site.endpoint.counts.undelivered["queue_full"] == 2
        again, _ = await persistent(site)
        assert [len((await again.receive_publish()).payload) for _ in range(2)] == [99, 1]


async def test_clean_start_forgets_the_session(authority: Authority) -> None:
    async with Site(authority) as site:
        first, _ = await persistent(site)
        await first.subscribe("command")
        first.close()
        await gone(site)
        assert send_down(site, b"old")
        second, present = await persistent(site, clean_start=True)
        assert not present
        assert not send_down(site, b"nobody is subscribed")
        second.send(PINGREQ)
        assert await second.receive() == PINGRESP


async def test_a_session_ends_when_its_time_is_over(authority: Authority) -> None:
    limits = EndpointLimits(sweep_interval_s=0.01, session_expiry_max_s=30)
    async with Site(authority, limits) as site:
        client = await site.open("pos-1")
        connack = await client.connect(properties=Properties(session_expiry_interval=3600))
        assert connack.properties.session_expiry_interval == 30
        client.close()
        await gone(site)
        site.clock.advance(29.5)
        await swept(site)
        assert site.endpoint.stats().sessions == 1
        site.clock.advance(1)
        await until(lambda: site.endpoint.stats().sessions == 0)


async def test_disconnect_may_shorten_the_session_and_may_not_invent_one(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        client, _ = await persistent(site)
        client.send(Disconnect(properties=Properties(session_expiry_interval=0)))
        await until(lambda: site.endpoint.stats().sessions == 0)
        other = await site.client("pos-2")
        other.send(Disconnect(properties=Properties(session_expiry_interval=60)))
        assert await other.goodbye() == 0x82


async def test_the_session_that_left_first_makes_room(authority: Authority) -> None:
    limits = EndpointLimits(max_connections=2, max_sessions=2)
    async with Site(authority, limits) as site:
        for device_id in ("pos-1", "pos-2", "pos-3"):
            client = await site.open(device_id)
            await client.connect(properties=Properties(session_expiry_interval=60))
            client.send(Disconnect())
            await until(lambda: site.endpoint.stats().connected == 0)
        assert site.endpoint.stats().sessions == 2
        for device_id, present in (("pos-2", True), ("pos-1", False)):
            client = await site.open(device_id)
            connack = await client.connect(clean_start=False)
            assert connack.session_present is present
            client.send(Disconnect())
            await until(lambda: site.endpoint.stats().connected == 0)


@pytest.mark.parametrize("version", Version)
async def test_a_lost_connection_fires_the_will(authority: Authority, version: Version) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await client.connect(version, will=OFFLINE)
        client.close()
        await gone(site)
        assert site.gateway.received == [("pos-1", OFFLINE.topic, b"offline")]
        assert site.gateway.events[-1] == "pos-1 closed_by_peer"


async def test_a_goodbye_drops_the_will_unless_it_says_otherwise(authority: Authority) -> None:
    async with Site(authority) as site:
        for disconnect, wills in ((Disconnect(), 0), (Disconnect(4), 1)):
            client = await site.open("pos-1")
            await client.connect(will=OFFLINE)
            client.send(disconnect)
            assert await client.ending() == []
            assert site.gateway.events[-1] == "pos-1 disconnected"
            assert len(site.gateway.received) == wills


@pytest.mark.parametrize("version", Version)
async def test_silence_for_one_and_a_half_keep_alives_fires_the_will(
    authority: Authority, version: Version
) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await client.connect(version, keep_alive_s=10, will=OFFLINE)
        for _ in range(3):
            site.clock.advance(14.9)
            await swept(site)
            client.send(PINGREQ)
            assert await client.receive() == PINGRESP
        site.clock.advance(15.1)
        await gone(site)
        assert site.gateway.payloads("status") == [b"offline"]
        assert site.gateway.events == ["pos-1 connected", "pos-1 keep_alive_timeout"]
        if version is V5:
            assert await client.goodbye() == 0x8D


async def test_the_keep_alive_of_a_5_client_is_cut_to_ours(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(max_keep_alive_s=20)) as site:
        for wished, told in ((0, 20), (10, None), (20, None), (600, 20)):
            client = await site.open("pos-1")
            connack = await client.connect(keep_alive_s=wished)
            assert connack.properties.server_keep_alive == told


async def test_a_delayed_will_waits_and_a_resumed_session_keeps_it_quiet(
    authority: Authority,
) -> None:
    will = Will(
        topic=OFFLINE.topic, payload=b"offline", properties=Properties(will_delay_interval=20)
    )
    async with Site(authority) as site:
        first, _ = await persistent(site, will=will)
        first.close()
        await gone(site)
        site.clock.advance(19)
        second, present = await persistent(site, will=will)
        assert present
        site.clock.advance(30)
        await swept(site)
        second.close()
        await until(lambda: len(site.gateway.events) == 4)
        assert site.gateway.received == []
        site.clock.advance(19)
        await swept(site)
        assert site.gateway.received == []
        site.clock.advance(2)
        await until(lambda: site.gateway.received)
        assert site.endpoint.stats().sessions == 1


async def test_the_end_of_the_session_ends_the_wills_delay(authority: Authority) -> None:
    will = Will(
        topic=OFFLINE.topic, payload=b"offline", properties=Properties(will_delay_interval=600)
    )
    async with Site(authority) as site:
        client, _ = await persistent(site, will=will)
        client.close()
        await gone(site)
        again, present = await persistent(site, clean_start=True)
        assert not present
        assert site.gateway.payloads("status") == [b"offline"]
        again.send(Disconnect())
        plain = await site.open("pos-2")  # no session, so no delay
        await plain.connect(
            will=Will(topic="pos/v1/pos-2/status", payload=b"2", properties=will.properties)
        )
        plain.close()
        await until(lambda: len(site.gateway.received) == 2)


async def test_a_retained_config_is_there_for_each_new_subscription(authority: Authority) -> None:
    async with Site(authority) as site:
        topic = "pos/v1/pos-1/config"
        assert not site.endpoint.publish("pos-1", topic, b"1", retain=True)
        client = await site.client("pos-1")
        for handling, is_new, comes in ((1, True, True), (1, False, False), (0, False, True)):
            if is_new:
                client.send(Unsubscribe(1, (topic,)))
                assert await client.receive() == Unsuback(1, (0x11,))
            one = Subscription(topic_filter=topic, qos=1, retain_handling=handling)
            client.send(Subscribe(2, (one,)), PINGREQ)
            assert await client.receive() == Suback(2, (1,))
            if comes:
                message = await client.receive_publish()
                assert (message.payload, message.retain, message.dup) == (b"1", True, False)
                client.send(Puback(message.packet_id))
            assert await client.receive() == PINGRESP
        assert site.endpoint.publish("pos-1", topic, b"2", retain=True)
        live = await client.receive_publish()
        assert (live.payload, live.retain) == (b"2", False)
        client.send(Puback(live.packet_id))
        one = Subscription(topic_filter=topic, qos=0, retain_as_published=True)
        client.send(Subscribe(3, (one,)))
        assert await client.receive() == Suback(3, (0,))
        assert (await client.receive_publish()).qos == 0
        assert site.endpoint.publish("pos-1", topic, b"3", retain=True)
        assert (await client.receive_publish()).retain
        assert site.endpoint.publish("pos-1", topic, b"", retain=True)
        assert site.endpoint.stats().retained == 0


async def test_subscriptions_reach_as_far_as_the_devices_own_downlink(authority: Authority) -> None:
    filters = ("#", "pos/v1/+/config", "pos/v1/pos-2/#", "pos/v1/pos-1/request", "pos/v1/pos-1/#")
    async with Site(authority) as site:
        client = await site.client("pos-1", subscribed=False)
        client.send(Subscribe(1, tuple(Subscription(topic_filter=one, qos=2) for one in filters)))
        assert await client.receive() == Suback(1, (0x87, 0x87, 0x87, 0x87, 1))
        assert await client.subscribe("+", qos=0) == 0
        assert send_down(site, b"once, at the highest QoS")
        message = await client.receive_publish()
        assert message.qos == 1
        client.send(Puback(message.packet_id), PINGREQ)
        assert await client.receive() == PINGRESP
        client.send(Unsubscribe(2, (client.topic("#"), client.topic("+"), "nothing")))
        assert await client.receive() == Unsuback(2, (0, 0, 0x11))
        assert not send_down(site, b"nobody")
        three = await site.client("pos-2", V3)
        three.send(Subscribe(1, (Subscription(topic_filter="pos/v1/pos-1/#"),)))
        assert await three.ending() == []


@pytest.mark.parametrize(
    ("subscribe", "code"),
    [
        (Subscribe(1, (Subscription(topic_filter="$share/g/pos/v1/pos-1/command"),)), 0x9E),
        (
            Subscribe(
                1,
                (Subscription(topic_filter="pos/v1/pos-1/command"),),
                Properties(subscription_identifiers=(1,)),
            ),
            0xA1,
        ),
    ],
)
async def test_what_the_connack_said_is_not_there_is_not_there(
    authority: Authority, subscribe: Subscribe, code: int
) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        offered = (await client.connect(client_id="")).properties
        assert offered.assigned_client_identifier == "pos-1"
        assert offered.maximum_qos == 1
        assert offered.subscription_identifier_available == 0
        assert offered.shared_subscription_available == 0
        assert offered.topic_alias_maximum is None
        assert offered.maximum_packet_size == EndpointLimits().max_packet_bytes
        client.send(subscribe)
        assert await client.goodbye() == code


async def test_a_message_too_long_for_the_client_is_dropped_as_if_sent(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await client.connect(properties=Properties(maximum_packet_size=200))
        await client.subscribe("command")
        send_down(site, b"x" * 200)
        send_down(site, b"short")
        assert (await client.receive_publish()).payload == b"short"
        assert site.endpoint.counts.undelivered["too_large"] == 1
