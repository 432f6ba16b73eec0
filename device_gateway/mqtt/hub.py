"""What a connection asks of the endpoint that it belongs to."""

from typing import TYPE_CHECKING, Protocol

from device_gateway.mqtt.codec import Connect
from device_gateway.mqtt.counts import Counts
from device_gateway.mqtt.gateway import Gateway
from device_gateway.mqtt.limits import EndpointLimits
from device_gateway.mqtt.session import Message
from device_gateway.mqtt.tls import Flusher
from device_gateway.mqtt.uplink import Load
from device_gateway.mqtt.wheel import Wheel

if TYPE_CHECKING:
    from device_gateway.mqtt.connection import Connection


class Hub(Flusher, Protocol):
    """The endpoint, as a connection sees it."""

    limits: EndpointLimits
    counts: Counts
    wheel: Wheel
    gateway: Gateway
    load: Load
    draining: bool

    def opened(self, connection: "Connection") -> bool:
        """A TCP connection is there; False if there is no room for it."""

    def admit(self, connection: "Connection", connect: Connect) -> None:
        """Starts asking the gateway; ends in `accept` or `reject` of the connection."""

    def ended(self, connection: "Connection", reason: str) -> None:
        """An accepted connection has ended, unless another has taken it over."""

    def refused(self, connection: "Connection", reason: str) -> None:
        """A connection has ended before its CONNECT was accepted."""

    def lost(self, connection: "Connection") -> None:
        """The TCP connection is gone."""

    def retained(self, device_id: str) -> dict[str, Message]:
        """The device's retained messages by topic."""
