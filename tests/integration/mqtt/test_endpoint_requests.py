"""Requests: answered, then acknowledged, in their order, and only after the gateway is done."""

import asyncio

import pytest

from device_gateway.mqtt.codec import (
    PINGREQ,
    PINGRESP,
    Disconnect,
    Properties,
    Puback,
    Publish,
    Version,
    encode,
)
from device_gateway.mqtt.limits import EndpointLimits
from glamd.errors import UnavailableError
from tests.support.mqtt_site import Client, Site, until
from tests.support.mqtt_tls import Authority

V3, V5 = Version.V311, Version.V5


async def next_is_ping(client: Client) -> None:
    """Nothing was on its way to the client but the answer to its ping."""
    client.send(PINGREQ)
    assert await client.receive() == PINGRESP


async def held(site: Site, count: int) -> None:
    """So many requests have come to the gateway."""
    await until(lambda: len(site.gateway.held) >= count)


@pytest.mark.parametrize("version", Version)
async def test_nothing_is_acknowledged_before_its_future_is_done(
    authority: Authority, version: Version
) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", version)
        client.request(b"a", packet_id=5)
        await until(lambda: site.gateway.held)
        await next_is_ping(client)
        site.gateway.held[0].set_result(b"answer")
        answer = await client.receive_publish()
        assert (answer.topic, answer.payload, answer.qos) == ("pos/v1/pos-1/response", b"answer", 1)
        assert await client.receive() == Puback(5)


async def test_acknowledgements_keep_the_order_of_the_requests(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", subscribed=False)
        for packet_id in (3, 1, 2):
            client.request(packet_id=packet_id)
        await until(lambda: len(site.gateway.held) == 3)
        for answer in reversed(site.gateway.held[1:]):
            answer.set_result(None)
        await next_is_ping(client)
        site.gateway.held[0].set_result(None)
        assert [await client.receive() for _ in range(3)] == [Puback(3), Puback(1), Puback(2)]


@pytest.mark.parametrize(
    ("error", "code"), [(UnavailableError("away"), 0x89), (RuntimeError("a bug"), 0x83)]
)
async def test_a_failed_future_closes_the_connection_unacknowledged(
    authority: Authority, error: Exception, code: int
) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.client("pos-1")
        client.request()
        await until(lambda: site.gateway.held)
        site.gateway.held[0].set_exception(error)
        assert await client.goodbye() == code
        assert site.endpoint.counts.requests_failed == 1
        assert site.gateway.events == ["pos-1 connected", "pos-1 request_failed"]


async def test_a_cancelled_future_and_a_raising_gateway_close_it_too(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        first = await site.client("pos-1", V3)
        first.request()
        await until(lambda: site.gateway.held)
        site.gateway.held[0].cancel()
        assert await first.ending() == []
        site.gateway.raises = RuntimeError("a bug")
        second = await site.client("pos-2")
        second.request()
        assert await second.goodbye() == 0x83
        assert site.endpoint.counts.requests_failed == 2
        assert site.endpoint.stats().requests_in_flight == 0


async def test_a_failure_that_the_gateway_has_words_for_is_answered_and_acknowledged(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        site.gateway.told_instead = b"UNAVAILABLE"
        client = await site.client("pos-1")
        client.request(packet_id=4)
        await until(lambda: site.gateway.held)
        site.gateway.held[0].set_exception(UnavailableError("away"))
        assert (await client.receive_publish()).payload == b"UNAVAILABLE"
        assert await client.receive() == Puback(4)


async def test_a_request_at_qos_0_is_answered_and_not_acknowledged(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        client.request(b"zero", qos=0)
        assert (await client.receive_publish()).payload == b"zero"
        await next_is_ping(client)


async def test_without_a_subscription_there_is_only_the_acknowledgement(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1", subscribed=False)
        client.request(packet_id=6)
        assert await client.receive() == Puback(6)
        assert site.endpoint.counts.undelivered["not_subscribed"] == 1


async def test_a_status_without_a_future_is_acknowledged_at_once(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        client.send(Publish(client.topic("status"), b"{}", 1, retain=True, packet_id=8))
        assert await client.receive() == Puback(8)
        assert site.gateway.received == [("pos-1", "pos/v1/pos-1/status", b"{}")]


@pytest.mark.parametrize(
    "topic", ["pos/v1/pos-2/request", "pos/v1/pos-1/response", "pos/v1/pos-1", "x", "$SYS/a"]
)
async def test_a_topic_that_is_not_its_own_is_refused(authority: Authority, topic: str) -> None:
    async with Site(authority) as site:
        five = await site.client("pos-1")
        five.send(Publish(topic, b"", 1, packet_id=1))
        assert await five.receive() == Puback(1, 0x87)
        five.send(Publish(topic, b""))
        assert await five.goodbye() == 0x87
        three = await site.client("pos-1", V3)
        three.send(Publish(topic, b"", 1, packet_id=1))
        assert await three.ending() == []
        assert site.gateway.received == []


async def test_a_refused_topic_is_acknowledged_in_its_turn(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", subscribed=False)
        client.request(packet_id=1)
        client.send(Publish("pos/v1/pos-2/request", b"", 1, packet_id=2))
        await until(lambda: site.gateway.held)
        await next_is_ping(client)
        site.gateway.held[0].set_result(None)
        assert [await client.receive(), await client.receive()] == [Puback(1), Puback(2, 0x87)]


@pytest.mark.parametrize("version", Version)
async def test_qos_2_is_refused_as_the_version_says(authority: Authority, version: Version) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1", version)
        client.send(Publish(client.topic("request"), b"", 2, packet_id=1))
        goodbye = [Disconnect(0x9B)] if version is V5 else []
        assert [packet.__class__ for packet in await client.ending()] == [
            packet.__class__ for packet in goodbye
        ]
        assert site.gateway.received == []
        assert site.endpoint.counts.ended["qos_not_supported"] == 1


async def test_more_than_the_receive_maximum_ends_a_5_connection(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(receive_maximum=2)) as site:
        site.gateway.holds = True
        client = await site.open("pos-1")
        connack = await client.connect()
        assert connack.properties.receive_maximum == 2
        for packet_id in (1, 2, 3):
            client.request(packet_id=packet_id)
        assert await client.goodbye() == 0x93
        assert len(site.gateway.held) == 2


async def test_a_311_client_is_not_read_beyond_the_receive_maximum(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(receive_maximum=2)) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", V3, subscribed=False)
        requests = [
            Publish(client.topic("request"), b"%d" % number, 1, packet_id=number)
            for number in range(1, 8)
        ]
        client.send(*requests)
        other = await site.client("pos-2")
        other.send(PINGREQ)
        assert await other.receive() == PINGRESP
        for number in range(1, 8):
            assert len(site.gateway.held) <= number + 1
            await held(site, number)
            site.gateway.held[number - 1].set_result(None)
            assert await client.receive() == Puback(number)
        assert [payload for *_, payload in site.gateway.received] == [
            b"%d" % number for number in range(1, 8)
        ]


async def test_a_flood_at_qos_0_is_held_up_too(authority: Authority) -> None:
    async with Site(authority, EndpointLimits(receive_maximum=2)) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", subscribed=False)
        client.send(*[Publish(client.topic("request"), b"", 0) for _ in range(50)], PINGREQ)
        await until(lambda: len(site.gateway.held) == 4)
        for answered in range(50):
            await held(site, answered + 1)
            assert len(site.gateway.held) <= answered + 4
            site.gateway.held[answered].set_result(None)
        assert await client.receive() == PINGRESP


async def test_an_answer_reaches_the_connection_that_came_after(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        first = await site.open("pos-1")
        await first.connect(properties=Properties(session_expiry_interval=60))
        await first.subscribe()
        first.request(packet_id=3)
        await until(lambda: site.gateway.held)
        first.close()
        await until(lambda: len(site.gateway.events) == 2)
        second = await site.open("pos-1")
        connack = await second.connect(clean_start=False)
        assert connack.session_present
        site.gateway.held[0].set_result(b"late")
        assert (await second.receive_publish()).payload == b"late"
        await next_is_ping(second)  # the acknowledgement belonged to the first connection


@pytest.mark.parametrize(
    ("properties", "code"),
    [
        (Properties(topic_alias=1), 0x94),
        (Properties(subscription_identifiers=(1,)), 0x82),
    ],
)
async def test_what_the_endpoint_did_not_offer_ends_the_connection(
    authority: Authority, properties: Properties, code: int
) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        client.send(Publish(client.topic("request"), b"", properties=properties))
        assert await client.goodbye() == code


async def test_requests_that_came_with_the_connect_wait_for_the_admission(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        site.gateway.admission = asyncio.Event()
        client = await site.open("pos-1")
        connecting = asyncio.ensure_future(client.connect(V3))
        await until(lambda: site.gateway.admitted)
        client.send_bytes(encode(Publish(client.topic("request"), b"", 1, packet_id=1), V3) * 3)
        assert site.gateway.received == []
        site.gateway.admission.set()
        assert (await connecting).reason_code == 0
        assert [await client.receive() for _ in range(3)] == [Puback(1)] * 3
