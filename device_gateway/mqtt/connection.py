"""One terminal's connection: the state machine between its TLS bytes and its session.

It judges what a packet means at this moment; how packets look is the codec's, what waits on its
way up or down the uplink's and the session's, and who is connected the endpoint's (its `Hub`).
"""

import hashlib
import math
import ssl
from enum import Enum, unique
from typing import cast

from device_gateway import topics
from device_gateway.mqtt import opening, subscriptions
from device_gateway.mqtt.codec import (
    PINGRESP_BYTES,
    Connect,
    Decoder,
    Disconnect,
    Packet,
    Pingreq,
    Properties,
    ProtocolError,
    Puback,
    Publish,
    ReasonCode,
    Subscribe,
    Unsubscribe,
    Version,
    Will,
    encode,
    violation,
)
from device_gateway.mqtt.hub import Hub
from device_gateway.mqtt.opening import Rejected, Terms
from device_gateway.mqtt.session import Session
from device_gateway.mqtt.tls import TlsProtocol
from device_gateway.mqtt.uplink import Uplink
from device_gateway.mqtt.wheel import NOWHERE

_Subject = tuple[tuple[tuple[str, str], ...], ...]


@unique
class State(Enum):
    """Where a connection is; it only ever goes forward."""

    HANDSHAKE = 1
    CONNECT = 2
    ADMIT = 3
    OPEN = 4
    CLOSED = 5
    """Its end is told; the transport may still be there to bring the last packet across."""


class Connection(TlsProtocol):
    """A terminal's connection from its first byte to its last."""

    __slots__ = (
        "_decoder",
        "_heard_s",
        "_hub",
        "_pumping",
        "_read_paused",
        "_stalled_s",
        "certificate_sha256",
        "device_id",
        "expiry_s",
        "session",
        "state",
        "terms",
        "uplink",
        "version",
        "wheel_slot",
        "will",
    )

    def __init__(self, hub: Hub, context: ssl.SSLContext) -> None:
        super().__init__(context, hub)
        self._hub = hub
        self.state = State.HANDSHAKE
        self.wheel_slot = NOWHERE
        self.device_id: str | None = None
        self.certificate_sha256 = ""
        self.version = Version.V5
        self.session: Session | None = None
        self.will: Will | None = None
        self.expiry_s = 0
        self.terms: Terms
        self.uplink: Uplink
        self._decoder = Decoder(hub.limits.max_connect_bytes)
        self._pumping = False
        self._read_paused = False
        self._stalled_s: float | None = None
        self._heard_s = 0.0

    @property
    def is_open(self) -> bool:
        """Accepted and not ended."""
        return self.state is State.OPEN

    @property
    def writable(self) -> bool:
        """False while the peer does not read what was sent."""
        return self._stalled_s is None

    # From the socket up -----------------------------------------------------------------------

    def on_opened(self) -> None:
        """The TCP connection is there: the handshake has to come soon."""
        if not self._hub.opened(self):
            self.cut("too_many_connections")
            return
        self._transport.set_write_buffer_limits(high=self._hub.limits.write_high_water_bytes)
        self._hub.wheel.set_after(self, self._hub.limits.handshake_timeout_s)

    def on_established(self, tls: ssl.SSLObject) -> None:
        """The certificate is verified: whose is it? Then a CONNECT has to come soon."""
        self.state = State.CONNECT
        self._hub.wheel.set_after(self, self._hub.limits.connect_timeout_s)
        self.device_id = _device_id(tls)
        self.certificate_sha256 = hashlib.sha256(
            tls.getpeercert(binary_form=True) or b""
        ).hexdigest()

    def on_plain(self, data: bytes) -> None:
        """Decrypted bytes: as many packets as may be read now."""
        self._decoder.feed(data)
        self._pump()

    def on_broken(self, reason: str) -> None:
        """The peer has gone, or TLS has: no DISCONNECT, so the will is due."""
        if self.state is State.CLOSED:
            return
        self._end(reason)
        if reason == "not_tls":
            self.abort()
        else:
            self._linger()

    def on_lost(self) -> None:
        """The TCP connection is gone."""
        if self.state is not State.CLOSED:
            self._end("closed_by_peer")
        self._hub.wheel.drop(self)
        self._hub.lost(self)

    def pause_writing(self) -> None:
        """asyncio's: the write buffer is above the high-water mark."""
        limit_s = self._hub.limits.slow_reader_timeout_s
        self._stalled_s = self._hub.wheel.now_s
        if self.state is not State.CLOSED:
            self._hub.wheel.set_sooner(self, self._stalled_s + limit_s + self._hub.wheel.tick_s)
        self._regulate()

    def resume_writing(self) -> None:
        """asyncio's: the peer reads again."""
        self._stalled_s = None
        if self.session is not None and self.state is State.OPEN:
            self.session.pump()
        self._pump()

    # Reading ----------------------------------------------------------------------------------

    def _may_read(self) -> bool:
        if self.state is State.OPEN:
            return self._stalled_s is None and not self._hub.draining and not self.uplink.full
        return self.state is State.CONNECT

    def _pump(self) -> None:
        """Handles packets as long as they may be read; then stops or restarts the reading."""
        if self._pumping:
            return
        self._pumping = True
        try:
            if self._may_read():
                self._take_packets()
        except ProtocolError as error:
            self._broke_protocol(error)
        finally:
            self._pumping = False
        self._regulate()

    def _take_packets(self) -> None:
        session, now_s = self.session, self._hub.wheel.now_s
        for packet in self._decoder:
            self._heard_s = now_s
            if type(packet) is Puback and session is not None:
                session.acknowledge(packet.packet_id)
                continue
            if type(packet) is Publish and session is not None:
                self.uplink.take(packet)
            else:
                self._handle_rare(packet)
            if not self._may_read():
                break

    def settled(self) -> None:
        """The uplink's call: requests were acknowledged, there may be room again."""
        if self._read_paused:
            self._pump()

    def _regulate(self) -> None:
        """Makes the transport read if and only if packets may be handled."""
        if self.state is State.CLOSED or self.state is State.HANDSHAKE:
            return
        paused = not self._may_read()
        if paused is not self._read_paused:
            self._read_paused = paused
            if paused:
                self._transport.pause_reading()
            else:
                self._heard_s = self._hub.wheel.now_s
                self._transport.resume_reading()

    def _handle_rare(self, packet: Packet) -> None:
        session = self.session
        if session is None:
            assert isinstance(packet, Connect)  # the decoder lets nothing else come first
            self._connect(packet)
            return
        match packet:
            case Pingreq():
                self.send(PINGRESP_BYTES)  # [MQTT-3.12.4-1]
            case Subscribe():
                self._subscribe(packet, session)
            case Unsubscribe():
                self.send(encode(subscriptions.unsubscribe(session, packet), self.version))
            case Disconnect():
                self._disconnect(packet)
            case _:  # a server's packet, QoS 2's, or AUTH without a method (5:4.12)
                raise violation(f"a client may not send {type(packet).__name__} here")

    def _connect(self, connect: Connect) -> None:
        self.version = connect.version
        refused = opening.judge(connect, self.device_id)
        if refused is not None:
            self.reject(connect, refused)
            return
        self.state = State.ADMIT
        self._hub.wheel.drop(self)  # the asking has its own timeout
        self._hub.admit(self, connect)

    def _subscribe(self, packet: Subscribe, session: Session) -> None:
        answer, retained = subscriptions.subscribe(
            session, packet, self.version, self._hub.retained(session.device_id)
        )
        self.send(encode(answer, self.version))
        for message, subscription in retained:
            session.deliver_retained(message, subscription)

    def _disconnect(self, packet: Disconnect) -> None:
        expiry_s = packet.properties.session_expiry_interval
        if expiry_s is not None:
            if expiry_s and not self.expiry_s:  # 5:3.14.2.2.2
                raise violation("a session that ends with its connection cannot be kept")
            self.expiry_s = min(expiry_s, self._hub.limits.session_expiry_max_s)
        if packet.reason_code == ReasonCode.SUCCESS:
            self.will = None  # [MQTT-3.14.4-3]
        self._end("disconnected")
        self._linger()

    # Decisions from above ---------------------------------------------------------------------

    def reject(self, connect: Connect, why: Rejected) -> None:
        """Answers CONNECT with a refusal and closes [MQTT-3.2.2-7]."""
        data = opening.rejected(connect, why)
        if data:
            self.send(data)
        self._end(why.reason)
        self._linger()

    def accept(
        self, connect: Connect, terms: Terms, session: Session, *, session_present: bool
    ) -> None:
        """Answers CONNECT with success and gives the session its new connection."""
        self.state = State.OPEN
        self.terms = terms
        self.expiry_s = terms.expiry_s
        self.will = connect.will
        self.session = session
        hub = self._hub
        self.uplink = Uplink(
            self,
            session,
            gateway=hub.gateway,
            counts=hub.counts,
            load=hub.load,
            receive_maximum=hub.limits.receive_maximum,
        )
        self._decoder.max_packet_bytes = hub.limits.max_packet_bytes
        self.send(
            opening.accepted(
                connect,
                terms,
                hub.limits,
                device_id=session.device_id,
                session_present=session_present,
            )
        )
        session.attach(self)
        session.pump()
        self._heard_s = hub.wheel.now_s
        if terms.keep_alive_s:
            hub.wheel.set_after(self, self._silence_s())

    def start(self) -> None:
        """Handles what the client sent without waiting for its CONNACK, and reads on."""
        self._pump()

    def taken_over(self) -> None:
        """Another connection has the session now [MQTT-3.1.4-3]: nothing has gone offline."""
        self._hub.counts.take_overs += 1
        if self.version is Version.V5:
            self.send(self._goodbye(ReasonCode.SESSION_TAKEN_OVER, ""))
        if self.session is not None:
            self.session.link = None  # if it goes on, it is the newcomer's
        self.state = State.CLOSED
        self._linger()

    def close(self, code: ReasonCode, reason: str, text: str = "") -> None:
        """Ends an accepted connection; an MQTT 5 client is told the code and the text."""
        if self.state is not State.OPEN:
            return
        if self.version is Version.V5:
            self.send(self._goodbye(code, text))
        self._end(reason)
        self._linger()

    def cut(self, reason: str) -> None:
        """Ends the connection in whatever state it is, without a word."""
        if self.state is not State.CLOSED:
            self._end(reason)
        self.abort()

    def due(self, now_s: float) -> float | None:
        """The wheel's call: something took too long, or just has to be looked at."""
        if self.state is State.CLOSED:
            self.abort()
        elif self.state is State.HANDSHAKE:
            self.cut("handshake_timeout")
        elif self.state is not State.OPEN:
            self.cut("connect_timeout")
        elif now_s >= (stalled_until_s := self._stalled_until_s()):
            self.cut("slow_reader")
        elif now_s >= (silent_until_s := self._silent_until_s(now_s)):
            self.close(ReasonCode.KEEP_ALIVE_TIMEOUT, "keep_alive_timeout")
        else:
            next_s = min(stalled_until_s, silent_until_s)
            return None if math.isinf(next_s) else next_s
        return None

    # Endings ----------------------------------------------------------------------------------

    def _stalled_until_s(self) -> float:
        if self._stalled_s is None:
            return math.inf
        return self._stalled_s + self._hub.limits.slow_reader_timeout_s + self._hub.wheel.tick_s

    def _silence_s(self) -> float:
        """One and a half keep alives (5: [MQTT-3.1.2-22], 3: [MQTT-3.1.2-24]).

        And a tick, since the time of the last packet is known to a tick.
        """
        return 1.5 * self.terms.keep_alive_s + self._hub.wheel.tick_s

    def _silent_until_s(self, now_s: float) -> float:
        if not self.terms.keep_alive_s:
            return math.inf
        # While we do not read, the silence is ours.
        return (now_s if self._read_paused else self._heard_s) + self._silence_s()

    def _broke_protocol(self, error: ProtocolError) -> None:
        reason = error.reason_code.name.lower()
        if self.state is State.OPEN:
            self.close(error.reason_code, reason, error.message)
            return
        data = opening.broken(self._decoder.version, error.reason_code)
        if data:
            self.send(data)
        self._end(reason)
        self._linger()

    def _goodbye(self, code: ReasonCode, text: str) -> bytes:
        """DISCONNECT, with words if the client wants them and takes so long a packet."""
        if text and self.terms.problem_information:
            told = Disconnect(code, Properties(reason_string=text))
            data = encode(told, Version.V5)
            if len(data) <= self.terms.max_packet_out_bytes:  # [MQTT-3.14.2-3]
                return data
        return encode(Disconnect(code), Version.V5)

    def _end(self, reason: str) -> None:
        """Tells the end to whoever has to know, once; the transport may live on for a while."""
        was_open = self.state is State.OPEN
        self.state = State.CLOSED
        if was_open:
            self._hub.ended(self, reason)
        else:
            self._hub.refused(self, reason)

    def _linger(self) -> None:
        """Lets the last packet arrive, but not for ever."""
        self._hub.wheel.set_after(self, self._hub.limits.close_timeout_s)
        self.finish()


def _device_id(tls: ssl.SSLObject) -> str | None:
    """The certificate's one common name, if it can be a device id."""
    subject = cast("_Subject", (tls.getpeercert() or {}).get("subject", ()))
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 and topics.is_device_id(names[0]) else None
