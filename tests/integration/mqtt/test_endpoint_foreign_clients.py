"""The endpoint through clients that nobody here wrote: paho-mqtt, aiomqtt, gmqtt; 3.1.1 and 5."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, cast

import aiomqtt
import gmqtt
import pytest
from gmqtt.mqtt.constants import MQTTv50, MQTTv311
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode as PahoReasonCode

from device_gateway.mqtt.codec import Version
from tests.support.mqtt_site import PATIENCE_S, Site, until
from tests.support.mqtt_tls import Authority

REQUEST, RESPONSE = "pos/v1/pos-1/request", "pos/v1/pos-1/response"
CONFIG, STATUS = "pos/v1/pos-1/config", "pos/v1/pos-1/status"
EXPIRY_S = 60


class Foreign(Protocol):
    """What the tests need of each library."""

    messages: list[tuple[str, bytes]]

    async def start(self) -> None:
        """Connects: persistent session, a last will, keep alive 60 s."""

    async def subscribe(self, topic: str) -> None:
        """Subscribes at QoS 1 and waits for the answer."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Publishes at QoS 1 and waits for the acknowledgement."""

    async def stop(self) -> None:
        """Says goodbye."""

    async def vanish(self) -> None:
        """Is gone without a word."""


def kept_session() -> PahoProperties:
    """The properties with which a 5 client asks for a session that outlives its connection."""
    make: Any = PahoProperties  # it has no annotations
    properties: PahoProperties = make(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = EXPIRY_S
    return properties


def pull_the_plug(client: paho.Client) -> None:
    """Ends the client's TCP connection as a power failure would."""
    connection = client.socket()
    assert connection is not None
    cast("socket.socket", connection).shutdown(socket.SHUT_RDWR)


class Paho:
    """paho-mqtt 2 with its own thread."""

    def __init__(self, port: int, tls: ssl.SSLContext, version: Version) -> None:
        five = version is Version.V5
        self.messages: list[tuple[str, bytes]] = []
        self._loop = asyncio.get_running_loop()
        self._port = port
        self._connected = asyncio.Event()
        self._subscribed = asyncio.Event()
        self._five = five
        self.codes: list[PahoReasonCode] = []
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id="paho",
            clean_session=None if five else False,
            protocol=paho.MQTTv5 if five else paho.MQTTv311,
            reconnect_on_failure=False,
        )
        self.client.tls_set_context(tls)
        self.client.will_set(STATUS, b"offline", qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message
        self.client.on_publish = self._on_publish

    def _on_connect(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._connected.set)

    def _on_subscribe(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._subscribed.set)

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        self.messages.append((message.topic, bytes(message.payload)))

    def _on_publish(
        self, _client: object, _data: object, _mid: int, code: PahoReasonCode, _properties: object
    ) -> None:
        self.codes.append(code)

    async def start(self) -> None:
        properties = kept_session() if self._five else None
        options: dict[str, Any] = {"clean_start": False} if self._five else {}
        await asyncio.to_thread(
            self.client.connect, "127.0.0.1", self._port, 60, properties=properties, **options
        )
        self.client.loop_start()
        await self._connected.wait()

    async def subscribe(self, topic: str) -> None:
        self._subscribed.clear()
        self.client.subscribe(topic, qos=1)
        await self._subscribed.wait()

    async def publish(self, topic: str, payload: bytes) -> None:
        info = self.client.publish(topic, payload, qos=1)
        await asyncio.to_thread(info.wait_for_publish, PATIENCE_S)
        assert info.is_published()

    async def stop(self) -> None:
        self.client.disconnect()
        await self._end()

    async def vanish(self) -> None:
        pull_the_plug(self.client)
        await self._end()

    async def _end(self) -> None:
        await asyncio.to_thread(self.client.loop_stop)
        self.client._reset_sockets()  # its own pair, which it leaves to the garbage collector


class Aiomqtt:
    """aiomqtt 2, which is paho under asyncio."""

    def __init__(self, port: int, tls: ssl.SSLContext, version: Version) -> None:
        five = version is Version.V5
        properties = kept_session() if five else None
        self.messages: list[tuple[str, bytes]] = []
        self.client = aiomqtt.Client(
            "127.0.0.1",
            port,
            identifier="aiomqtt",
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(STATUS, b"offline", qos=1, retain=True),
            clean_session=None if five else False,
            clean_start=False if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
            tls_context=tls,
            timeout=PATIENCE_S,
        )
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.client.__aenter__()
        self._reading = asyncio.create_task(self._read(), name="aiomqtt-messages")

    async def _read(self) -> None:
        async for message in self.client.messages:
            assert isinstance(message.payload, bytes)
            self.messages.append((str(message.topic), message.payload))

    async def subscribe(self, topic: str) -> None:
        await self.client.subscribe(topic, qos=1)

    async def publish(self, topic: str, payload: bytes) -> None:
        await self.client.publish(topic, payload, qos=1)

    async def _stop_reading(self) -> None:
        assert self._reading is not None
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def stop(self) -> None:
        await self._stop_reading()
        await self.client.__aexit__(None, None, None)
        self.client._client._reset_sockets()

    async def vanish(self) -> None:
        await self._stop_reading()
        pull_the_plug(self.client._client)
        with suppress(aiomqtt.MqttError):
            await self.client.__aexit__(None, None, None)
        self.client._client._reset_sockets()


class Gmqtt:
    """gmqtt, asyncio from the ground up."""

    def __init__(self, port: int, tls: ssl.SSLContext, version: Version) -> None:
        five = version is Version.V5
        options = {"session_expiry_interval": EXPIRY_S} if five else {}
        self.messages: list[tuple[str, bytes]] = []
        self._port = port
        self._tls = tls
        self._version = MQTTv50 if five else MQTTv311
        self._subscribed = asyncio.Event()
        will = gmqtt.Message(STATUS, b"offline", qos=1, retain=True)
        self.client = gmqtt.Client("gmqtt", clean_session=False, will_message=will, **options)
        self.client.set_config({"reconnect_retries": 0})
        self.client.on_message = self._on_message
        self.client.on_subscribe = lambda *_: self._subscribed.set()

    async def _on_message(
        self, _client: object, topic: str, payload: bytes, _qos: int, _properties: object
    ) -> int:
        self.messages.append((topic, bytes(payload)))
        return 0

    async def start(self) -> None:
        await self.client.connect("127.0.0.1", self._port, ssl=self._tls, version=self._version)

    async def subscribe(self, topic: str) -> None:
        self._subscribed.clear()
        self.client.subscribe(topic, qos=1)
        await self._subscribed.wait()

    async def publish(self, topic: str, payload: bytes) -> None:
        self.client.publish(topic, payload, qos=1)
        await until(lambda: self.client._persistent_storage.is_empty)

    async def stop(self) -> None:
        await self.client.disconnect()

    async def vanish(self) -> None:
        self.client.stop_reconnect()
        self.client._connection._transport.abort()


Make = Callable[[int, ssl.SSLContext, Version], Foreign]
everyone = pytest.mark.parametrize("make", [Paho, Aiomqtt, Gmqtt])
both = pytest.mark.parametrize("version", Version)


@asynccontextmanager
async def site_with(
    authority: Authority, make: Make, version: Version
) -> AsyncIterator[tuple[Site, Callable[[], Foreign]]]:
    """A site, and what makes clients for pos-1 that know its certificate."""
    async with asyncio.timeout(2 * PATIENCE_S), Site(authority) as site:
        tls = authority.client_context(site.pair("pos-1"))
        yield site, lambda: make(site.port, tls, version)


@everyone
@both
async def test_requests_are_answered(authority: Authority, make: Make, version: Version) -> None:
    async with site_with(authority, make, version) as (site, fresh):
        client = fresh()
        await client.start()
        await client.subscribe(RESPONSE)
        payloads = [b"first", b"x" * 60_000, b""] + [b"%d" % number for number in range(10)]
        for payload in payloads:
            await client.publish(REQUEST, payload)
        await until(lambda: len(client.messages) == len(payloads))
        assert client.messages == [(RESPONSE, payload) for payload in payloads]
        assert site.gateway.payloads("request") == payloads
        await client.stop()
        await until(lambda: site.gateway.events == ["pos-1 connected", "pos-1 disconnected"])
        assert site.gateway.payloads("status") == []


@everyone
@both
async def test_requests_at_once_are_answered_in_their_order(
    authority: Authority, make: Make, version: Version
) -> None:
    async with site_with(authority, make, version) as (_, fresh):
        client = fresh()
        await client.start()
        await client.subscribe(RESPONSE)
        payloads = [b"%d" % number for number in range(20)]
        await asyncio.gather(*(client.publish(REQUEST, payload) for payload in payloads))
        await until(lambda: len(client.messages) == len(payloads))
        assert sorted(client.messages) == sorted((RESPONSE, payload) for payload in payloads)
        await client.stop()


@everyone
@both
async def test_a_session_waits_with_its_messages(
    authority: Authority, make: Make, version: Version
) -> None:
    async with site_with(authority, make, version) as (site, fresh):
        assert not site.endpoint.publish("pos-1", CONFIG, b"retained", retain=True)
        first = fresh()
        await first.start()
        await first.subscribe(CONFIG)
        await until(lambda: first.messages == [(CONFIG, b"retained")])
        await first.stop()
        await until(lambda: site.endpoint.stats().connected == 0)
        for number in range(3):
            assert site.endpoint.publish("pos-1", CONFIG, b"%d" % number)
        second = fresh()
        await second.start()
        await until(lambda: len(second.messages) == 3)
        assert second.messages == [(CONFIG, b"%d" % number) for number in range(3)]
        await second.stop()


@everyone
@both
async def test_a_client_that_vanishes_leaves_its_will(
    authority: Authority, make: Make, version: Version
) -> None:
    async with site_with(authority, make, version) as (site, fresh):
        client = fresh()
        await client.start()
        await client.publish(STATUS, b"online")
        await client.vanish()
        await until(lambda: len(site.gateway.received) == 2)
        assert site.gateway.payloads("status") == [b"online", b"offline"]
        assert site.gateway.events[-1] == "pos-1 closed_by_peer"


@both
async def test_paho_sees_what_it_may_not_do(authority: Authority, version: Version) -> None:
    async with site_with(authority, Paho, version) as (site, fresh):
        client = fresh()
        assert isinstance(client, Paho)
        await client.start()
        client.client.publish("pos/v1/pos-2/request", b"", qos=1)
        if version is Version.V5:
            await until(lambda: client.codes)
            assert client.codes[0].value == 0x87
            await client.publish(REQUEST, b"still here")
        else:
            await until(lambda: site.endpoint.stats().connected == 0)
        await client.stop()
        assert all(topic != "pos/v1/pos-2/request" for _, topic, _ in site.gateway.received)
