"""One MQTT connection of a virtual terminal: the client's side of the codec on one TLS transport.

From CONNECT to the end of the connection and nothing beyond it: a link never reconnects, never
resends and does not know what is in a payload. `device_gateway.terminal` does.
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from device_gateway.mqtt import codec
from device_gateway.mqtt.codec import ReasonCode, ReturnCode, Version
from device_gateway.terminal_tls import ClientTls

PACKET_LIMIT_BYTES: Final = 64 * 1024
KEEP_ALIVE_S: Final = 60
# In 3.1.1 a server cannot say how much it takes at once, so a terminal asks for little.
IN_FLIGHT_LIMIT: Final = 32
REASON_LIMIT_CHARS: Final = 200
_LAST_PACKET_ID: Final = 0xFFFF

# What will be the same however often it is tried; anything else may pass.
_FINAL_5: Final = frozenset(
    {
        ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
        ReasonCode.CLIENT_IDENTIFIER_NOT_VALID,
        ReasonCode.BAD_USER_NAME_OR_PASSWORD,
        ReasonCode.NOT_AUTHORIZED,
        ReasonCode.BANNED,
        ReasonCode.BAD_AUTHENTICATION_METHOD,
        ReasonCode.ADMINISTRATIVE_ACTION,
    }
)
_FINAL_311: Final = frozenset(
    {
        ReturnCode.UNACCEPTABLE_PROTOCOL_VERSION,
        ReturnCode.IDENTIFIER_REJECTED,
        ReturnCode.BAD_USER_NAME_OR_PASSWORD,
        ReturnCode.NOT_AUTHORIZED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a connection ended. `final`: trying again will end the same way.

    `wordless`: closed after the handshake and before any answer, which is all that a client sees
    when a server on asyncio's or uvloop's own TLS 1.3 does not take its certificate.
    """

    reason: str
    final: bool = False
    taken_over: bool = False
    wordless: bool = False


_WORDLESS: Final = Ending(
    reason="the server closed the connection before it said anything; it may not take the"
    " device's certificate",
    wordless=True,
)


class Link(ClientTls):
    """Connects, subscribes, publishes at QoS 1, acknowledges what comes, and tells its owner.

    `ready` is done once the subscription is acknowledged; `closed` when the connection is gone, and
    it always gets there, and `ending` says why. Neither ever holds an exception.
    """

    def __init__(
        self,
        tls: ssl.SSLContext,
        server_name: str,
        connect: codec.Connect,
        subscribe_to: str,
        *,
        on_message: Callable[[bytes], None],
        on_room: Callable[[], None],
    ) -> None:
        """`on_message` gets the payloads; `on_room` is called when `publish` has room again."""
        super().__init__(tls, server_name)
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.ending = Ending(reason="closed")
        self.keep_alive_s = connect.keep_alive_s
        self._connect = connect
        self._version = connect.version
        self._subscribe_to = subscribe_to
        self._on_message = on_message
        self._on_room = on_room
        self._decoder = codec.Decoder(PACKET_LIMIT_BYTES, connect.version)
        self._told = False
        self._gone = False
        self._unacknowledged: set[int] = set()
        self._in_flight_limit = IN_FLIGHT_LIMIT
        self._last_packet_id = 0
        self._heard = True
        self._starved = False

    # What the owner calls.

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Send at QoS 1; False where it cannot be sent now (`on_room` says when to come back)."""
        if self._gone or len(self._unacknowledged) >= self._in_flight_limit:
            self._starved = True
            return False
        packet_id = self._free_packet_id()
        self._unacknowledged.add(packet_id)
        self.write(
            codec.publish_bytes(
                topic, payload, qos=1, packet_id=packet_id, version=self._version, retain=retain
            )
        )
        return True

    def check_alive(self) -> None:
        """Called twice a keep-alive: a peer that did not answer the last ping is given up."""
        if not self._heard:
            self._end(Ending(reason="the server has gone silent"))
            return
        self._heard = False
        self.write(codec.encode(codec.PINGREQ, self._version))

    def disconnect(self) -> None:
        """Say goodbye (the will is not sent) and close; `closed` follows."""
        self.write(codec.encode(codec.Disconnect(), self._version))
        self._told = True
        self.close_gently()

    # What TLS tells.

    def on_established(self) -> None:
        """TLS stands: open the MQTT connection."""
        self.write(codec.encode(self._connect, self._version))

    def on_plain(self, data: bytes) -> None:
        """Every packet that is whole."""
        self._heard = True
        try:
            for packet in self._decoder.feed(data):
                self._packet(packet)
        except codec.ProtocolError as error:
            self._end(Ending(reason=f"the server broke the protocol: {error.message}"))
        if self._starved and len(self._unacknowledged) < self._in_flight_limit:
            self._starved = False
            self._on_room()

    def on_lost(self, error: Exception | None) -> None:
        """The end, for whatever reason; the first reason known counts."""
        self._gone = True
        if not self._told:
            wordless = error is None and self._established and not self.ready.done()
            self.ending = _WORDLESS if wordless else ending_of(error)
        if not self.closed.done():
            self.closed.set_result(None)

    # Inside.

    def _packet(self, packet: codec.Packet) -> None:
        match packet:
            case codec.Publish():
                if packet.qos:
                    self.write(codec.puback_success(packet.packet_id))
                self._on_message(packet.payload)
            case codec.Puback():
                self._unacknowledged.discard(packet.packet_id)
            case codec.Pingresp():
                pass
            case codec.Connack():
                self._connected(packet)
            case codec.Suback():
                self._subscribed(packet)
            case codec.Disconnect():
                self._end(_disconnected(packet))
            case _:
                self._end(Ending(reason="the server sent what only a client may send"))

    def _connected(self, packet: codec.Connack) -> None:
        if packet.reason_code:
            self._end(_refused(packet, self._version))
            return
        limits = packet.properties
        self._in_flight_limit = min(IN_FLIGHT_LIMIT, limits.receive_maximum or IN_FLIGHT_LIMIT)
        if limits.server_keep_alive is not None:
            self.keep_alive_s = limits.server_keep_alive
        subscription = codec.Subscription(topic_filter=self._subscribe_to, qos=1)
        packet_id = self._free_packet_id()
        self.write(codec.encode(codec.Subscribe(packet_id, (subscription,)), self._version))

    def _subscribed(self, packet: codec.Suback) -> None:
        if any(code >= 0x80 for code in packet.reason_codes):
            self._end(Ending(reason="the server refused the subscription", final=True))
        elif not self.ready.done():
            self.ready.set_result(None)

    def _end(self, ending: Ending) -> None:
        if not self._told:
            self.ending, self._told = ending, True
        self.abort()

    def _free_packet_id(self) -> int:
        # At most IN_FLIGHT_LIMIT of 65,535 are taken, so this ends.
        packet_id = self._last_packet_id % _LAST_PACKET_ID + 1
        while packet_id in self._unacknowledged:
            packet_id = packet_id % _LAST_PACKET_ID + 1
        self._last_packet_id = packet_id
        return packet_id


def ending_of(error: Exception | None) -> Ending:
    """Why there is no connection, in words: what the network, TLS or a certificate said."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Ending(
            reason=f"the server's certificate is not trusted: {error.verify_message}", final=True
        )
    if isinstance(error, ssl.SSLError):
        # An alert is the server's verdict over our certificate; a cut handshake is not.
        text = (error.reason or "TLS failed").lower().replace("_", " ")
        return Ending(reason=f"TLS: {text}", final="alert" in text)
    if isinstance(error, TimeoutError):
        return Ending(reason="the connection timed out")
    if isinstance(error, OSError) and error.strerror:
        return Ending(reason=error.strerror.lower())
    return Ending(reason="the connection was closed")


def _refused(packet: codec.Connack, version: Version) -> Ending:
    code = packet.reason_code
    modern = version is Version.V5
    name = _named(ReasonCode if modern else ReturnCode, code, packet.properties)
    return Ending(
        reason=f"the server refused the connection: {name}",
        final=code in (_FINAL_5 if modern else _FINAL_311),
    )


def _disconnected(packet: codec.Disconnect) -> Ending:
    code = packet.reason_code
    return Ending(
        reason=f"the server ended the connection: {_named(ReasonCode, code, packet.properties)}",
        final=code in _FINAL_5,
        taken_over=code == ReasonCode.SESSION_TAKEN_OVER,
    )


def _named(
    kind: type[ReasonCode] | type[ReturnCode], code: int, properties: codec.Properties
) -> str:
    """The code in words, and what the server added to it."""
    try:
        name = kind(code).name.lower().replace("_", " ")
    except ValueError:
        name = f"code {code:#04x}"
    added = (properties.reason_string or "")[:REASON_LIMIT_CHARS]
    return f"{name} ({added})" if added and added.isprintable() else name
