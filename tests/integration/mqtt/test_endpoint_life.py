"""Starting, draining, cutting devices off, and what the metrics say."""

import asyncio
import ssl
import warnings

import pytest
from prometheus_client import generate_latest

from device_gateway.mqtt.codec import Disconnect, Puback, Version, Will
from tests.support.mqtt_site import Site, until
from tests.support.mqtt_tls import Authority

V3, V5 = Version.V311, Version.V5


async def test_stopping_waits_for_what_is_with_the_gateway(authority: Authority) -> None:
    will = Will(topic="pos/v1/pos-1/status", payload=b"offline")
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.open("pos-1")
        await client.connect(will=will)
        await client.subscribe()
        client.request(packet_id=1)
        await until(lambda: site.gateway.held)
        stopping = asyncio.ensure_future(site.endpoint.stop(5.0))
        await until(lambda: site.endpoint.draining)
        client.request(packet_id=2)
        with pytest.raises(ConnectionRefusedError):
            await site.open("pos-2")
        site.gateway.held[0].set_result(b"committed")
        answer, acknowledged, goodbye = await client.ending()
        assert answer.__class__.__name__ == "Publish"
        assert acknowledged == Puback(1)
        assert isinstance(goodbye, Disconnect)
        assert goodbye.reason_code == 0x8B
        await stopping
        assert len(site.gateway.received) == 1  # neither the second request nor the will
        assert site.gateway.events[-1] == "pos-1 server_shutting_down"


async def test_stopping_does_not_wait_for_ever(authority: Authority) -> None:
    async with Site(authority) as site:
        site.gateway.holds = True
        client = await site.client("pos-1", V3)
        opening = await site.open("pos-2")
        client.request(packet_id=1)
        await until(lambda: site.gateway.held)
        await site.endpoint.stop(0.02)
        assert await client.ending() == []
        assert await opening.ending() == []
        site.gateway.held[0].set_result(b"too late")
        await site.endpoint.stop(0.02)  # twice is harmless


async def test_a_device_that_is_cut_off_is_told_and_its_session_is_gone(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await client.connect(V3, clean_start=False)
        client.send(Disconnect())
        await until(lambda: site.endpoint.stats().connected == 0)
        assert site.endpoint.stats().sessions == 1
        site.endpoint.disconnect("pos-1", "DEVICE_REVOKED")
        assert site.endpoint.stats().sessions == 0
        connected = await site.client("pos-1")
        assert site.endpoint.is_connected("pos-1")
        site.endpoint.disconnect("pos-1", "DEVICE_REVOKED")
        assert not site.endpoint.is_connected("pos-1")
        connected.request()
        assert await connected.goodbye() == 0x98
        assert site.gateway.received == []
        assert site.gateway.events[-1] == "pos-1 DEVICE_REVOKED"
        site.endpoint.disconnect("nobody", "DEVICE_REVOKED")


async def test_a_message_published_while_connecting_comes_after_the_connack(
    authority: Authority,
) -> None:
    async with Site(authority) as site:
        first = await site.open("pos-1")
        await first.connect(V3, clean_start=False)
        await first.subscribe("config")
        first.send(Disconnect())
        await until(lambda: site.endpoint.stats().connected == 0)
        topic = first.topic("config")
        site.gateway.on_connected = lambda device: site.endpoint.publish(device, topic, b"now")
        second = await site.open("pos-1")
        assert (await second.connect(V3, clean_start=False)).session_present
        assert (await second.receive_publish()).payload == b"now"


async def test_the_metrics_count_what_happened(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        await site.works(client)
        text = generate_latest(site.registry).decode()
        for line in (
            "glamd_mqtt_connections_total 1.0",
            "glamd_mqtt_accepted_total 1.0",
            "glamd_mqtt_requests_total 1.0",
            "glamd_mqtt_acknowledged_total 1.0",
            "glamd_mqtt_delivered_total 1.0",
            "glamd_mqtt_connected_count 1.0",
        ):
            assert line in text.splitlines()
        client.send_bytes(b"\x00\x00")
        await client.ending()
        text = generate_latest(site.registry).decode()
        assert 'glamd_mqtt_ended_total{reason="malformed_packet"} 1.0' in text
    assert generate_latest(site.registry) == b""


async def test_publishing_on_a_foreign_topic_is_a_programmers_error(authority: Authority) -> None:
    async with Site(authority) as site:
        for topic in ("pos/v1/pos-2/config", "pos/v1/pos-1/request"):
            with pytest.raises(AssertionError):
                site.endpoint.publish("pos-1", topic, b"")


async def test_a_context_is_hardened_before_it_is_used(authority: Authority) -> None:
    async with Site(authority) as site:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
        site.endpoint.replace_tls(context)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.num_tickets == 0
