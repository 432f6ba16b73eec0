"""The endpoint that terminals connect to in direct mode: a listener, its connections, its clock.

Everything happens on one event loop, between awaits nothing changes. It knows who is connected;
what a packet does is `connection`'s, what a message means the `Gateway`'s.
"""

import asyncio
import socket
import ssl
from typing import Final

import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from device_gateway.mqtt import opening, rights
from device_gateway.mqtt.codec import Connect, ReasonCode, Will
from device_gateway.mqtt.connection import Connection, State
from device_gateway.mqtt.counts import Counts, EndpointCollector, EndpointStats
from device_gateway.mqtt.gateway import Gateway, Refusal
from device_gateway.mqtt.limits import EndpointLimits
from device_gateway.mqtt.session import Message
from device_gateway.mqtt.sessions import Sessions
from device_gateway.mqtt.tls import TlsProtocol, harden
from device_gateway.mqtt.uplink import Answer, Load
from device_gateway.mqtt.wheel import Wheel
from glamd.clock import Clock
from glamd.errors import TransientError

__all__ = ["Endpoint", "EndpointLimits", "EndpointStats", "Gateway", "Refusal"]

log = structlog.get_logger()

_KEEPALIVE_PROBES: Final = 4
_KEEPALIVE_PROBE_S: Final = 10


class Endpoint:
    """An MQTT 3.1.1 and 5 server for devices with client certificates.

    `ssl_context` has the server's certificate and trusts the devices' CA; what the endpoint relies
    on beyond that (TLS 1.2, a certificate from each client, no resumption) it sets itself.
    """

    def __init__(
        self,
        *,
        gateway: Gateway,
        limits: EndpointLimits,
        ssl_context: ssl.SSLContext,
        clock: Clock,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self.gateway = gateway
        self.limits = limits
        self.counts = Counts()
        self.wheel = Wheel(clock, tick_s=limits.sweep_interval_s)
        self.load = Load()
        self.port = 0
        """The TCP port that it listens on, once it is started."""
        self.draining = False
        self._ssl_context = harden(ssl_context)
        self._sessions = Sessions(limits, self.counts, self.wheel, self._publish_will)
        self._connections: set[Connection] = set()
        self._opening: dict[Connection, None] = {}  # the oldest first
        self._connected: dict[str, Connection] = {}
        self._admissions: set[asyncio.Task[None]] = set()
        self._to_flush: list[TlsProtocol] = []
        self._registry = registry
        self._collector = EndpointCollector(self.counts, self.stats)
        self._loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._all_lost = asyncio.Event()

    # Life -------------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> None:
        """Listens on `host` and `port` (0: any free one, see `port`)."""
        self._loop = asyncio.get_running_loop()
        self._server = await self._loop.create_server(
            lambda: Connection(self, self._ssl_context),
            host,
            port,
            backlog=self.limits.listen_backlog,
            reuse_address=True,
        )
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._registry.register(self._collector)
        self._sweep()
        log.info("mqtt_listening", host=host, port=self.port)

    def replace_tls(self, ssl_context: ssl.SSLContext) -> None:
        """Uses other certificates from the next connection on; open ones keep theirs."""
        self._ssl_context = harden(ssl_context)

    async def stop(self, drain_timeout_s: float) -> None:
        """Takes no more, waits for the requests that are with the gateway, says goodbye, closes.

        What is not committed after `drain_timeout_s` stays unacknowledged. A will is not published
        for a shutdown of ours (5:3.1.2.5 lets a server wait with it); `disconnected` is called.
        """
        if self._server is None:
            return
        self._server.close()
        self.draining = True
        for connection in list(self._connections):
            if connection.state is State.OPEN:
                connection.start()  # stops reading
            elif connection.state is not State.CLOSED:
                connection.cut("server_shutting_down")
        if self.load.in_flight:
            self.load.drained = asyncio.Event()
            await _within(drain_timeout_s, self.load.drained)
        for connection in list(self._connected.values()):
            connection.will = None
            connection.close(ReasonCode.SERVER_SHUTTING_DOWN, "server_shutting_down")
        if self._connections:
            await _within(self.limits.close_timeout_s, self._all_lost)
        for connection in list(self._connections):
            connection.abort()
        for task in self._admissions:
            task.cancel()
        await asyncio.gather(*self._admissions, return_exceptions=True)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._registry.unregister(self._collector)
        self._server = None

    def stats(self) -> EndpointStats:
        """How many of everything there are at this moment."""
        return EndpointStats(
            connected=len(self._connected),
            opening=len(self._opening),
            sessions=len(self._sessions),
            requests_in_flight=self.load.in_flight,
            retained=self._sessions.retained_count,
        )

    # For the gateway --------------------------------------------------------------------------

    def publish(
        self, device_id: str, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False
    ) -> bool:
        """Sends a message down to a device, on one of its own downlink topics.

        True if it is on its way: the device is subscribed, and connected or with a session that
        waits for it. A retained message is kept for later subscribers whatever the result; without
        a payload it clears the one that was kept.
        """
        assert rights.may_receive(rights.prefix(device_id), topic)
        assert qos in (0, 1)
        message = Message(topic, payload, qos, retain)
        if retain and not self._sessions.retain(device_id, message):
            log.warning("mqtt_retained_full", device_id=device_id)
        session = self._sessions.get(device_id)
        return session is not None and session.deliver(message)

    def disconnect(self, device_id: str, reason: str) -> None:
        """Cuts the device off at once, in whatever state its connections are; ends its session.

        Also one that is just being admitted: its gateway may have looked a moment too early.
        """
        for opening_one in [one for one in self._opening if one.device_id == device_id]:
            opening_one.cut("disconnected_by_operator")
        connection = self._connected.get(device_id)
        if connection is not None:
            connection.expiry_s = 0
            connection.close(ReasonCode.ADMINISTRATIVE_ACTION, reason)
        self._sessions.forget(device_id)

    def disconnect_others(self, device_id: str, certificate_sha256: str, reason: str) -> None:
        """Cuts the device's connections under any certificate but this one (hex of its SHA-256).

        Its session is stored as after any other loss of a connection: it is still the device's.
        """
        for opening_one in [one for one in self._opening if one.device_id == device_id]:
            if opening_one.certificate_sha256 != certificate_sha256:
                opening_one.cut("disconnected_by_operator")
        connection = self._connected.get(device_id)
        if connection is not None and connection.certificate_sha256 != certificate_sha256:
            connection.close(ReasonCode.ADMINISTRATIVE_ACTION, reason)

    def is_connected(self, device_id: str) -> bool:
        """Whether the device has an accepted connection."""
        return device_id in self._connected

    # For the connections ----------------------------------------------------------------------

    def flush_soon(self, connection: TlsProtocol) -> None:
        """Sends what the connection has to send at the end of this tick of the loop."""
        if not self._to_flush:
            self._loop.call_soon(self._flush)
        self._to_flush.append(connection)

    def _flush(self) -> None:
        to_flush, self._to_flush = self._to_flush, []
        for connection in to_flush:
            connection.flush()

    def opened(self, connection: Connection) -> bool:
        """A TCP connection is there; False if there is no room for it."""
        self.counts.connections += 1
        if self.draining or len(self._connections) >= self.limits.max_connections:
            return False
        if len(self._opening) >= self.limits.max_opening:
            next(iter(self._opening)).cut("made_room")
        self._connections.add(connection)
        self._opening[connection] = None
        transport_socket = connection.socket()
        transport_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, self.limits.tcp_keepalive_s),
            (socket.TCP_KEEPINTVL, _KEEPALIVE_PROBE_S),
            (socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
        ):
            transport_socket.setsockopt(socket.IPPROTO_TCP, option, value)
        return True

    def lost(self, connection: Connection) -> None:
        """The TCP connection is gone."""
        self._opening.pop(connection, None)
        self._connections.discard(connection)
        if self.draining and not self._connections:
            self._all_lost.set()

    def refused(self, connection: Connection, reason: str) -> None:
        """A connection has ended before its CONNECT was accepted."""
        self._opening.pop(connection, None)
        self.counts.refused[reason] += 1
        # At this level only: a crowd of strangers must not fill the log.
        log.debug("mqtt_connection_refused", device_id=connection.device_id, reason=reason)

    def admit(self, connection: Connection, connect: Connect) -> None:
        """Starts asking the gateway; ends in `accept` or `reject` of the connection."""
        task = self._loop.create_task(
            self._admit(connection, connect), name=f"mqtt-admit-{connection.device_id}"
        )
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)

    async def _admit(self, connection: Connection, connect: Connect) -> None:
        device_id = connection.device_id
        assert device_id is not None
        rejected = None
        try:
            async with asyncio.timeout(self.limits.admit_timeout_s):
                refusal = await self.gateway.admit(device_id, connection.certificate_sha256)
            if refusal is not None:
                rejected = opening.not_admitted(refusal.reason)
        except (TransientError, TimeoutError):
            rejected = opening.UNAVAILABLE
        except Exception:
            log.exception("mqtt_admission_failed", device_id=device_id)
            rejected = opening.UNAVAILABLE
        if connection.state is not State.ADMIT:
            return  # it went away, or was cut off, in the meantime
        if rejected is not None:
            log.info("mqtt_device_refused", device_id=device_id, reason=rejected.reason)
            connection.reject(connect, rejected)
        else:
            self._accept(connection, connect, device_id)

    def _accept(self, connection: Connection, connect: Connect, device_id: str) -> None:
        terms = opening.agree(connect, self.limits)
        before = self._connected.get(device_id)
        if before is not None:
            before.taken_over()
        session, present = self._sessions.open(device_id, clean_start=connect.clean_start)
        self._opening.pop(connection, None)
        self._connected[device_id] = connection
        self.counts.accepted += 1
        connection.accept(connect, terms, session, session_present=present)
        log.info(
            "mqtt_device_connected",
            device_id=device_id,
            version=connect.version.name,
            session_present=present,
            take_over=before is not None,
        )
        try:
            if before is None:
                self.gateway.connected(device_id)
        finally:
            connection.start()

    def ended(self, connection: Connection, reason: str) -> None:
        """An accepted connection has ended, and no other has taken it over."""
        session, device_id = connection.session, connection.device_id
        assert session is not None
        assert device_id is not None
        self.counts.ended[reason] += 1
        del self._connected[device_id]
        log.info("mqtt_device_disconnected", device_id=device_id, reason=reason)
        self._sessions.close(session, expiry_s=connection.expiry_s, will=connection.will)
        self.gateway.disconnected(device_id, reason)

    def retained(self, device_id: str) -> dict[str, Message]:
        """The device's retained messages by topic."""
        return self._sessions.retained(device_id)

    # Deadlines and wills ----------------------------------------------------------------------

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(self.limits.sweep_interval_s, self._sweep)
        self.wheel.turn()

    def _publish_will(self, device_id: str, will: Will) -> None:
        self.counts.wills += 1
        try:
            answer = self.gateway.receive(device_id, will.topic, will.payload)
        except Exception:
            log.exception("mqtt_will_failed", device_id=device_id)
            return
        if answer is not None:
            answer.add_done_callback(_will_done)


def _will_done(answer: Answer) -> None:
    """Nobody can be answered; only what went wrong is worth a word."""
    if not answer.cancelled() and (error := answer.exception()) is not None:
        log.error("mqtt_will_failed", error=type(error).__name__)


async def _within(timeout_s: float, event: asyncio.Event) -> None:
    """Waits for the event, but no longer than `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass  # whoever asked goes on without it
