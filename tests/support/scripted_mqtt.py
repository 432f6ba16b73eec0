"""A small MQTT server over real TLS that does what a test tells it, also what no server should.

It stands on the codec's server role and takes part in nothing else: glamd's own endpoint keeps its
promises, and a terminal has to be tested against one that does not.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from typing import cast

from device_gateway.mqtt import codec
from device_gateway.mqtt.codec import Version

Fields = dict[str, object]
WAIT_S = 5.0


def ok(request: Fields, *, replayed: bool = False) -> Fields:
    """The answer that a happy glamd would give."""
    return {
        "v": 1,
        "id": request["id"],
        "status": "ok",
        "token": f"ptk_{request['id']}",
        "brand": "visa",
        "last4": "4242",
        "exp_month": 12,
        "exp_year": 2049,
        "expires_at": "2049-12-31T00:00:00Z",
        "replayed": replayed,
    }


def refusal(request: Fields, code: str, *, retryable: bool) -> Fields:
    """An error as glamd would answer it."""
    return {
        "v": 1,
        "id": request["id"],
        "status": "error",
        "code": code,
        "message": "no",
        "retryable": retryable,
    }


class ScriptedServer:
    """Records what terminals say; `respond` gives the answer to a request, None for silence."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.respond: Callable[[Fields], Fields | None] = ok
        self.acknowledges = True
        self.connack = codec.Connack()
        self.suback_code = 1
        self.connects: list[codec.Connect] = []
        self.disconnects = 0
        self.requests: list[Fields] = []
        self.statuses: list[tuple[Fields, bool]] = []
        self.pings = 0
        self.most_in_flight = 0
        self._unacknowledged = 0
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._changed = asyncio.Condition()
        self.port = 0

    async def start(self, port: int = 0) -> None:
        """Listen on loopback."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Vanish, as after kill -9: nobody is told."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await self.until(lambda: not self._connections)

    def cut(self) -> None:
        """Cut every connection."""
        for connection in tuple(self._connections):
            connection.transport.abort()

    def push(self, packet: codec.Packet) -> None:
        """Send a packet to every terminal."""
        for connection in self._connections:
            connection.write(codec.encode(packet, connection.version))

    def push_bytes(self, data: bytes) -> None:
        """Send bytes that need not be a packet."""
        for connection in self._connections:
            connection.write(data)

    def release(self) -> None:
        """Acknowledge everything that was held back, and go on doing so."""
        self.acknowledges = True
        for connection in self._connections:
            connection.release()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to have happened here; TimeoutError when it does not."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(condition)

    # What connections tell.

    def connected(self, connection: "_Connection") -> None:
        """A TLS connection stands."""
        self._connections.add(connection)

    def gone(self, connection: "_Connection") -> None:
        """A connection ended."""
        self._connections.discard(connection)
        self.told()

    def told(self) -> None:
        """Let `until` look again."""
        asyncio.get_running_loop().create_task(self._notify(), name="notify")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def in_flight(self, change: int) -> None:
        """Count what was not acknowledged yet."""
        self._unacknowledged += change
        self.most_in_flight = max(self.most_in_flight, self._unacknowledged)


class _Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._decoder = codec.Decoder(64 * 1024)
        self.transport: asyncio.Transport
        self._packet_id = 0
        self._held: list[int] = []

    @property
    def version(self) -> Version:
        return self._decoder.version or Version.V311

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._server.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.in_flight(-len(self._held))
        self._server.gone(self)

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def release(self) -> None:
        for packet_id in self._held:
            self.write(codec.puback_success(packet_id))
        self._server.in_flight(-len(self._held))
        self._held.clear()

    def data_received(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            self._packet(packet)
        self._server.told()

    def _packet(self, packet: codec.Packet) -> None:
        server = self._server
        match packet:
            case codec.Connect():
                server.connects.append(packet)
                self._send(server.connack)
                if server.connack.reason_code:
                    self.transport.close()
            case codec.Subscribe():
                self._send(codec.Suback(packet.packet_id, (server.suback_code,)))
            case codec.Publish():
                server.in_flight(1)
                self._held.append(packet.packet_id)
                self._publish(packet)
                if server.acknowledges:
                    self.release()
            case codec.Pingreq():
                server.pings += 1
                self._send(codec.PINGRESP)
            case codec.Disconnect():
                server.disconnects += 1
            case _:
                pass

    def _publish(self, packet: codec.Publish) -> None:
        server = self._server
        fields = json.loads(packet.payload)
        if packet.topic.endswith("/status"):
            server.statuses.append((fields, packet.retain))
            return
        server.requests.append(fields)
        answer = server.respond(fields)
        if answer is not None:
            self.answer(packet.topic.replace("/request", "/response"), answer)

    def answer(self, topic: str, fields: Fields) -> None:
        self._packet_id = self._packet_id % 0xFFFF + 1
        self.write(
            codec.publish_bytes(
                topic,
                json.dumps(fields).encode(),
                qos=1,
                packet_id=self._packet_id,
                version=self.version,
            )
        )

    def _send(self, packet: codec.Packet) -> None:
        self.write(codec.encode(packet, self.version))
