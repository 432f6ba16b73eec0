"""Clients that mean harm or are broken: each loses its connection, the others notice nothing."""

import asyncio
import random
import socket
import ssl
from contextlib import suppress
from typing import cast

import pytest

from device_gateway.mqtt.codec import (
    PINGREQ,
    PINGRESP,
    Connect,
    Pingresp,
    Properties,
    Puback,
    Publish,
    Pubrel,
    Subscribe,
    Subscription,
    Version,
    encode,
)
from device_gateway.mqtt.connection import State
from device_gateway.mqtt.limits import EndpointLimits
from tests.support.mqtt_site import Client, Site, swept, until
from tests.support.mqtt_tls import Authority

V3, V5 = Version.V311, Version.V5


async def everything_back(site: Site, connected: int) -> None:
    """Nothing is left of the bad ones."""
    await until(lambda: site.endpoint.stats().opening == 0)
    await until(lambda: site.endpoint.stats().connected == connected)
    await until(lambda: len(site.endpoint._connections) == connected)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        encode(Connect(version=V5, client_id="plain text"), V5),
        b"\x16\x03\x01\xff\xff" + bytes(4000),
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00" * 50,
        bytes(range(256)) * 100,
    ],
)
async def test_garbage_before_tls(authority: Authority, data: bytes) -> None:
    async with Site(authority) as site:
        good = await site.client("pos-1")
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(data)
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        await site.works(good)
        await everything_back(site, 1)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (b"\x00", b""),
        (b"\x30\x03\x00\x01a", b""),  # a PUBLISH before CONNECT
        (b"\xc0\x00", b""),
        (b"\x10\xff\xff\xff\x7f", b""),  # a CONNECT of 256 MiB
        (b"\x10\x0c\x00\x06MQIsdp\x03\x02\x00\x3c", b"\x20\x02\x00\x01"),
        (b"\x10\x0a\x00\x04MQTT\x06\x02\x00\x3c", b"\x20\x02\x00\x01"),
        (b"\x10\x0a\x00\x04MQTT\x05\x03\x00\x3c", b"\x20\x03\x00\x81\x00"),
        (b"\x10\x0a\x00\x04MQTT\x04\x03\x00\x3c", b""),
        (b"\x10\x0f\x00\x04MQTT\x05\x02\x00\x3c\x03\x21\x00\x00\x00", b"\x20\x03\x00\x82\x00"),
    ],
)
async def test_a_first_packet_that_is_no_connect(
    authority: Authority, data: bytes, answer: bytes
) -> None:
    async with Site(authority) as site:
        good = await site.client("pos-1")
        bad = await site.open("pos-2")
        bad.send_bytes(data)
        with suppress(ConnectionError, ssl.SSLError):
            assert await bad._reader.read() == answer
        await site.works(good)
        await everything_back(site, 1)
        assert site.gateway.admitted[1:] == []


@pytest.mark.parametrize("version", Version)
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode(Connect(version=V5, client_id="again"), V5), 0x82),
        (b"\x30\x80\x80\x80\x32", 0x95),  # 100 MiB announced
        (b"\x36\x05\x00\x01a\x00\x01", 0x81),
        (b"\x00\x00", 0x81),
        (b"\x80\x02\x00\x01", 0x81),
        (encode(Pingresp(), V5), 0x82),
        (encode(Pubrel(1), V5), 0x82),
        (b"\x32\x07\x00\x03\xff\xfe\xfd\x00\x01", 0x81),
    ],
)
async def test_a_broken_packet_ends_the_connection_with_its_code(
    authority: Authority, version: Version, data: bytes, code: int
) -> None:
    async with Site(authority) as site:
        good = await site.client("pos-1")
        bad = await site.client("pos-2", version)
        bad.send_bytes(data)
        if version is V5:
            assert await bad.goodbye() == code
        else:
            assert await bad.ending() == []
        await site.works(good)
        await everything_back(site, 1)
        assert site.gateway.events[-1].startswith("pos-2 ")


async def test_auth_without_a_method_is_a_protocol_error(authority: Authority) -> None:
    async with Site(authority) as site:
        bad = await site.client("pos-1")
        bad.send_bytes(b"\xf0\x00")
        assert await bad.goodbye() == 0x82


async def test_good_packets_before_a_broken_one_count(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        client.send_bytes(
            encode(Publish(client.topic("request"), b"1", 1, packet_id=1), V5) + b"\x00\x00"
        )
        answer, acknowledged, goodbye = await client.ending()
        assert isinstance(answer, Publish)
        assert acknowledged == Puback(1)
        assert site.gateway.payloads("request") == [b"1"]
        assert goodbye.__class__.__name__ == "Disconnect"


async def test_a_packet_in_single_bytes_is_as_good_as_any(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.client("pos-1")
        request = encode(Publish(client.topic("request"), b"slow", 1, packet_id=1), V5)
        for at in range(len(request)):
            client.send_bytes(request[at : at + 1])
        assert (await client.receive_publish()).payload == b"slow"
        assert await client.receive() == Puback(1)


async def test_a_slow_drip_is_silence_to_the_keep_alive(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await client.connect(keep_alive_s=10)
        request = encode(Publish(client.topic("request"), b"x" * 60_000), V5)
        for at in range(16):
            client.send_bytes(request[at : at + 1])
            site.clock.advance(1)
            await swept(site)
        assert site.gateway.events[-1] == "pos-1 keep_alive_timeout"


async def test_a_slow_drip_of_a_connect_is_cut(authority: Authority) -> None:
    async with Site(authority) as site:
        client = await site.open("pos-1")
        await until(lambda: site.in_state(State.CONNECT))
        connect = encode(Connect(version=V5, client_id="x" * 5000), V5)
        for at in range(6):
            client.send_bytes(connect[at : at + 1])
            site.clock.advance(1)
            await swept(site)
        assert await client.ending() == []
        await everything_back(site, 0)


def stop_reading(client: Client) -> None:
    """From now on the client leaves what it gets in its socket."""
    cast("asyncio.Transport", client._writer.transport).pause_reading()


async def test_a_slow_reader_is_cut_and_its_messages_are_bounded(authority: Authority) -> None:
    limits = EndpointLimits(
        sweep_interval_s=0.01, write_high_water_bytes=20_000, slow_reader_timeout_s=5
    )
    async with Site(authority, limits) as site:
        good = await site.client("pos-1")
        bad = await site.open("pos-2", receive_buffer_bytes=4096)
        await bad.connect(keep_alive_s=0, properties=Properties(session_expiry_interval=60))
        await bad.subscribe("command", qos=0)
        stop_reading(bad)
        topic = bad.topic("command")

        def stuffed() -> bool:
            return not site.endpoint.publish("pos-2", topic, b"x" * 60_000, qos=0)

        await until(stuffed)
        await site.works(good)
        assert site.endpoint.is_connected("pos-2")
        site.clock.advance(5.1)
        await until(lambda: site.gateway.events[-1] == "pos-2 slow_reader")
        await everything_back(site, 1)
        await site.works(good)


async def test_pings_that_nobody_reads_the_answers_of_stop_being_read(authority: Authority) -> None:
    limits = EndpointLimits(
        sweep_interval_s=0.01, write_high_water_bytes=10_000, slow_reader_timeout_s=5
    )
    async with Site(authority, limits) as site:
        good = await site.client("pos-1")
        bad = await site.open("pos-2", receive_buffer_bytes=4096)
        await bad.connect()
        stop_reading(bad)
        # The kernel would take megabytes of two-byte answers before anybody stalls.
        served = site.endpoint._connected["pos-2"]
        served.socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pings = encode(PINGREQ, V5) * 100_000

        def cut() -> bool:
            if bad._writer.transport.get_write_buffer_size() == 0:
                bad.send_bytes(pings)
            site.clock.advance(0.5)
            return site.gateway.events[-1] == "pos-2 slow_reader"

        await until(cut)
        await site.works(good)


async def test_hundreds_of_broken_sessions_leave_nothing_behind(authority: Authority) -> None:
    chance = random.Random(20)
    async with Site(authority) as site:
        good = await site.client("pos-1")
        for number in range(120):
            bad = await site.open(f"bad-{number % 5}")
            if number % 3:
                await bad.connect(V5 if number % 2 else V3)
            seeds = [
                encode(Publish("pos/v1/bad-1/request", b"x" * 20, 1, packet_id=7), V5),
                encode(Subscribe(1, (Subscription(topic_filter="pos/v1/bad-1/#", qos=1),)), V5),
                encode(
                    Connect(version=V5, client_id="c", properties=Properties(receive_maximum=3)), V5
                ),
            ]
            data = bytearray(chance.choice(seeds) * 2)
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            bad.send_bytes(bytes(data))
            if number % 2:
                bad.send(PINGREQ)
            if number % 10 == 0:
                await site.works(good)
        for client in site._clients[1:]:
            client.close()
        await everything_back(site, 1)
        assert site.endpoint.stats().requests_in_flight == 0
        assert len(site.endpoint.wheel) <= 1
        good.send(PINGREQ)
        assert await good.receive() == PINGRESP
