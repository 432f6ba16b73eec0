"""Every bound of the endpoint, by name: what one terminal may hold, and what all of them may."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointLimits:
    """Seconds end in `_s`, bytes in `_bytes`; everything else is a number of things."""

    max_connections: int = 20_000
    """Beyond it a new connection is closed at once."""
    max_opening: int = 5_000
    """Connections whose CONNECT is not accepted yet; beyond it the oldest of them has to go, so
    that a crowd that never speaks cannot keep an honest terminal out."""
    listen_backlog: int = 4_096
    handshake_timeout_s: float = 10.0
    """From the TCP connection to the end of the TLS handshake."""
    connect_timeout_s: float = 5.0
    """From the end of the handshake to a whole CONNECT."""
    admit_timeout_s: float = 5.0
    """How long the gateway may think about who may connect."""
    close_timeout_s: float = 2.0
    """How long a closed connection may take to read its last packet before it is cut."""
    max_packet_bytes: int = 65_536 + 1_024
    """A `batch` of 64 KiB with its topic, properties and header."""
    max_connect_bytes: int = 8_192
    """The first packet; a last will and a client id do not need more."""
    receive_maximum: int = 32
    """Requests of one device that may wait for their commit (5:3.1.2.11.3); a 3.1.1 client, which
    cannot be told, is not read any further while so many wait."""
    max_keep_alive_s: int = 300
    """Told to a 5 client as Server Keep Alive; a 3.1.1 client's own value is honoured."""
    session_expiry_max_s: int = 7 * 24 * 3600
    """Of a session without a connection; also the lifetime of a 3.1.1 persistent session."""
    max_sessions: int = 50_000
    """Connected or not; beyond it the one that lost its connection first is forgotten."""
    downlink_queue_messages: int = 64
    """Messages that wait for a device beyond those in flight; a newer one is refused."""
    downlink_queue_bytes: int = 262_144
    downlink_inflight: int = 16
    """QoS 1 messages sent and not acknowledged, if the client does not ask for fewer."""
    max_retained: int = 50_000
    """Retained messages of all devices together."""
    write_high_water_bytes: int = 131_072
    """Unsent bytes of one connection; beyond it nothing more is read from or written to it."""
    slow_reader_timeout_s: float = 10.0
    """How long a connection may stay above the high-water mark before it is cut."""
    sweep_interval_s: float = 0.25
    """How often deadlines are looked at: each may come late by so much, never early."""
    tcp_keepalive_s: int = 60
    """Silence after which the kernel probes a peer that MQTT's keep alive does not watch."""

    def __post_init__(self) -> None:
        """Programmer errors only: the settings were judged where they were read."""
        assert 0 < self.receive_maximum <= 65_535
        assert 0 < self.max_keep_alive_s <= 65_535
        assert 0 < self.downlink_inflight <= 65_535
        assert self.max_connections <= self.max_sessions
