"""An endpoint with a gateway that records, and a client that says exactly what a test wants.

The client stands on our codec and so may break any rule above it; clients that nobody here wrote
have a file of tests of their own.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Self

from prometheus_client import CollectorRegistry

from device_gateway.mqtt.codec import (
    Connack,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    Properties,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Subscription,
    Version,
    Will,
    encode,
)
from device_gateway.mqtt.connection import State
from device_gateway.mqtt.endpoint import Endpoint, EndpointLimits, Refusal
from tests.support.mqtt_tls import Authority
from tests.support.settable_clock import SettableClock

PATIENCE_S = 20.0
POLL_S = 0.002


async def swept(site: "Site") -> None:
    """The endpoint has looked at its deadlines since the clock was moved."""
    await until(lambda: site.endpoint.wheel.now_s == site.clock.monotonic_s())


async def until(condition: Callable[[], object]) -> None:
    """Waits for the condition, but not for ever."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(POLL_S)


class RecordingGateway:
    """Admits everyone, echoes requests, and remembers what it was told; each can be changed."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, str]] = []
        self.received: list[tuple[str, str, bytes]] = []
        self.events: list[str] = []
        self.refuses: Refusal | Exception | None = None
        self.admission: asyncio.Event | None = None
        """Admissions wait for it."""
        self.holds = False
        """Whether answers wait in `held` for the test."""
        self.held: list[asyncio.Future[bytes | None]] = []
        self.raises: Exception | None = None
        self.told_instead: bytes | None = None
        self.on_connected: Callable[[str], object] | None = None

    async def admit(self, device_id: str, certificate_sha256: str) -> Refusal | None:
        """Records, waits if it has to, and admits unless told otherwise."""
        self.admitted.append((device_id, certificate_sha256))
        if self.admission is not None:
            await self.admission.wait()
        if isinstance(self.refuses, Exception):
            raise self.refuses
        return self.refuses

    def receive(
        self, device_id: str, topic: str, payload: bytes
    ) -> asyncio.Future[bytes | None] | None:
        """Records; a request is answered with itself, a status not at all."""
        self.received.append((device_id, topic, payload))
        if self.raises is not None:
            raise self.raises
        if topic.endswith("/status"):
            return None
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        if self.holds:
            self.held.append(answer)
        else:
            answer.set_result(payload)
        return answer

    def refusal(self, topic: str, payload: bytes, error: BaseException) -> bytes | None:
        """What the test wants to be told instead."""
        return self.told_instead

    def connected(self, device_id: str) -> None:
        """Records."""
        self.events.append(f"{device_id} connected")
        if self.on_connected is not None:
            self.on_connected(device_id)

    def disconnected(self, device_id: str, reason: str) -> None:
        """Records."""
        self.events.append(f"{device_id} {reason}")

    def payloads(self, leaf: str) -> list[bytes]:
        """What came in on topics that end in `leaf`."""
        return [payload for _, topic, payload in self.received if topic.endswith(leaf)]


class Client:
    """One TLS connection that speaks MQTT packets, or any bytes."""

    def __init__(
        self, device_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.device_id = device_id
        self.version = Version.V5
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder(268_435_460, Version.V5)

    def topic(self, leaf: str) -> str:
        """A topic of this client's device."""
        return f"pos/v1/{self.device_id}/{leaf}"

    def send(self, *packets: Packet) -> None:
        """Sends packets in one piece."""
        self.send_bytes(b"".join(encode(packet, self.version) for packet in packets))

    def send_bytes(self, data: bytes) -> None:
        """Sends anything."""
        self._writer.write(data)

    def request(self, payload: bytes = b"{}", *, packet_id: int = 1, qos: int = 1) -> None:
        """Publishes on the device's request topic."""
        self.send(Publish(self.topic("request"), payload, qos, packet_id=packet_id if qos else 0))

    async def receive(self) -> Packet:
        """The next packet; EOFError if there is none any more."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                packet = next(self._decoder, None)
                if packet is not None:
                    return packet
                data = await self._reader.read(65_536)
                if not data:
                    raise EOFError
                self._decoder.feed(data)

    async def receive_publish(self) -> Publish:
        """The next packet, which is a PUBLISH."""
        packet = await self.receive()
        assert isinstance(packet, Publish), packet
        return packet

    async def ending(self) -> list[Packet]:
        """Everything until the connection ends, as it has to soon."""
        packets: list[Packet] = []
        try:
            while True:
                packets.append(await self.receive())
        except (EOFError, ConnectionError, ssl.SSLError):
            return packets

    async def goodbye(self) -> int:
        """The reason code of the DISCONNECT that ends the connection, with nothing before it."""
        (packet,) = await self.ending()
        assert isinstance(packet, Disconnect), packet
        return packet.reason_code

    async def connect(
        self,
        version: Version = Version.V5,
        *,
        client_id: str = "any",
        clean_start: bool = True,
        keep_alive_s: int = 60,
        will: Will | None = None,
        properties: Properties | None = None,
    ) -> Connack:
        """Sends CONNECT and waits for CONNACK."""
        self.version = version
        self._decoder.version = version
        self.send(
            Connect(
                version=version,
                client_id=client_id,
                clean_start=clean_start,
                keep_alive_s=keep_alive_s,
                will=will,
                properties=properties or Properties(),
            )
        )
        packet = await self.receive()
        assert isinstance(packet, Connack), packet
        return packet

    async def subscribe(self, leaf: str = "response", qos: int = 1) -> int:
        """Subscribes to a topic of its own; the code that was granted."""
        subscription = Subscription(topic_filter=self.topic(leaf), qos=qos)
        self.send(Subscribe(9, (subscription,)))
        packet = await self.receive()
        assert isinstance(packet, Suback), packet
        return packet.reason_codes[0]

    def close(self) -> None:
        """Ends the TCP connection without a word of MQTT."""
        self._writer.transport.abort()


class Site:
    """An endpoint under test and its clients; an asynchronous context."""

    def __init__(self, authority: Authority, limits: EndpointLimits | None = None) -> None:
        self.authority = authority
        self.gateway = RecordingGateway()
        self.clock = SettableClock()
        self.registry = CollectorRegistry()
        self.endpoint = Endpoint(
            gateway=self.gateway,
            limits=limits or EndpointLimits(sweep_interval_s=0.01, close_timeout_s=0.2),
            ssl_context=authority.server_context(),
            clock=self.clock,
            registry=self.registry,
        )
        self._clients: list[Client] = []
        self._pairs: dict[str, tuple[Path, Path]] = {}

    async def __aenter__(self) -> Self:
        await self.endpoint.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        await self.endpoint.stop(0.0)

    @property
    def port(self) -> int:
        """Where the endpoint listens."""
        return self.endpoint.port

    def in_state(self, state: State) -> int:
        """How many connections the endpoint has in that state."""
        return sum(one.state is state for one in self.endpoint._connections)

    def pair(self, device_id: str) -> tuple[Path, Path]:
        """The device's certificate and key files, the same ones each time."""
        if device_id not in self._pairs:
            self._pairs[device_id] = self.authority.issue(device_id)
        return self._pairs[device_id]

    async def open(
        self,
        device_id: str,
        context: ssl.SSLContext | None = None,
        *,
        receive_buffer_bytes: int | None = None,
    ) -> Client:
        """A client that has done its TLS handshake and nothing else."""
        context = context or self.authority.client_context(self.pair(device_id))
        tcp = socket.socket()
        if receive_buffer_bytes is not None:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        tcp.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(tcp, ("127.0.0.1", self.port))
        except OSError:
            tcp.close()
            raise
        reader, writer = await asyncio.open_connection(
            sock=tcp, ssl=context, server_hostname="127.0.0.1"
        )
        client = Client(device_id, reader, writer)
        self._clients.append(client)
        return client

    async def client(
        self, device_id: str, version: Version = Version.V5, *, subscribed: bool = True
    ) -> Client:
        """A client that is connected and, as a terminal is, subscribed to its responses."""
        client = await self.open(device_id)
        connack = await client.connect(version)
        assert connack.reason_code == 0
        if subscribed:
            assert await client.subscribe() == 1
        return client

    async def works(self, client: Client, payload: bytes = b"alive") -> None:
        """Asserts that a subscribed client gets its answer and its acknowledgement."""
        client.request(payload, packet_id=77)
        answer = await client.receive_publish()
        assert answer.payload == payload
        assert await client.receive() == Puback(77)
        client.send(Puback(answer.packet_id))
