"""A device's requests on one connection: handed to the gateway, answered, then acknowledged.

The order of the acknowledgements is the order of the requests [MQTT-4.6.0-2], and each is sent
after its answer, which exists only after the commit. So "at least once" reaches from the terminal
to the database: what was not committed was not acknowledged and is sent again.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import structlog

from device_gateway.mqtt import rights
from device_gateway.mqtt.codec import (
    NO_PROPERTIES,
    ProtocolError,
    Puback,
    Publish,
    ReasonCode,
    Version,
    encode,
    puback_success,
    violation,
)
from device_gateway.mqtt.counts import Counts
from device_gateway.mqtt.gateway import Gateway
from device_gateway.mqtt.session import Message, Session
from glamd.errors import TransientError

log = structlog.get_logger()

Answer = asyncio.Future[bytes | None]
_Waiting = tuple[Publish, ReasonCode, Answer | None]
"""A request, the code of its acknowledgement, and what has to be done before that."""


@dataclass(slots=True)
class Load:
    """How many requests of all connections are with the gateway."""

    in_flight: int = 0
    drained: asyncio.Event | None = None
    """Set when the last of them is done, once somebody waits for that."""

    def done(self) -> None:
        """One request fewer."""
        self.in_flight -= 1
        if self.drained is not None and not self.in_flight:
            self.drained.set()


class Owner(Protocol):
    """The connection, as its uplink sees it."""

    version: Version

    @property
    def is_open(self) -> bool:
        """Whether an acknowledgement can still be sent."""

    def send(self, data: bytes) -> None:
        """Sends plain bytes soon."""

    def close(self, code: ReasonCode, reason: str) -> None:
        """Ends the connection, telling an MQTT 5 client the code."""

    def settled(self) -> None:
        """Requests were acknowledged: there may be room to read on."""


class Uplink:
    """The requests of one connection that are not acknowledged yet, oldest first."""

    __slots__ = (
        "_counts",
        "_full_at",
        "_gateway",
        "_load",
        "_owner",
        "_prefix",
        "_receive_maximum",
        "_response_topic",
        "_session",
        "_unacknowledged",
        "_waiting",
    )

    def __init__(
        self,
        owner: Owner,
        session: Session,
        *,
        gateway: Gateway,
        counts: Counts,
        load: Load,
        receive_maximum: int,
    ) -> None:
        self._owner = owner
        self._session = session
        self._gateway = gateway
        self._counts = counts
        self._load = load
        self._receive_maximum = receive_maximum
        self._prefix = rights.prefix(session.device_id)
        self._response_topic = self._prefix + "response"
        # A 5 client was told the limit for QoS 1, so that it is let beyond it to be caught; its
        # QoS 0, which nothing limits, is held up at twice as many.
        self._full_at = receive_maximum if owner.version is Version.V311 else 2 * receive_maximum
        self._waiting: deque[_Waiting] = deque()
        self._unacknowledged = 0

    @property
    def full(self) -> bool:
        """Whether to read no further."""
        return len(self._waiting) >= self._full_at

    def take(self, packet: Publish) -> None:
        """Handles a PUBLISH; ProtocolError if the connection cannot go on after it."""
        if packet.qos == 2:
            raise ProtocolError(ReasonCode.QOS_NOT_SUPPORTED, "QoS 2 is not supported")
        if packet.properties is not NO_PROPERTIES:
            if packet.properties.topic_alias is not None:  # 5:3.2.2.3.8, [MQTT-3.2.2-18]
                raise ProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, "topic aliases are not used")
            if packet.properties.subscription_identifiers:  # [MQTT-3.3.4-6]
                raise violation("a client's PUBLISH has a subscription identifier")
        five = self._owner.version is Version.V5
        if packet.qos:
            if five and self._unacknowledged >= self._receive_maximum:  # 5:3.3.4
                raise ProtocolError(
                    ReasonCode.RECEIVE_MAXIMUM_EXCEEDED,
                    f"more than {self._receive_maximum} unacknowledged",
                )
            self._unacknowledged += 1
        if not rights.may_publish(self._prefix, packet.topic):
            if not five or not packet.qos:
                raise ProtocolError(ReasonCode.NOT_AUTHORIZED, "not a topic of this device")
            self._wait(packet, ReasonCode.NOT_AUTHORIZED, None)
        else:
            self._hand_over(packet)

    def _hand_over(self, packet: Publish) -> None:
        self._counts.requests += 1
        try:
            answer = self._gateway.receive(self._session.device_id, packet.topic, packet.payload)
        except Exception as error:  # a gateway's fault is one connection's, not the process's
            log.exception("mqtt_gateway_failed", device_id=self._session.device_id)
            self._failed(error)
            return
        if answer is not None:
            self._load.in_flight += 1
            if not answer.done():
                answer.add_done_callback(self._settle)
        self._wait(packet, ReasonCode.SUCCESS, answer)

    def _wait(self, packet: Publish, code: ReasonCode, answer: Answer | None) -> None:
        self._waiting.append((packet, code, answer))
        self._settle()

    def _settle(self, _: Answer | None = None) -> None:
        """Acknowledges from the oldest on, up to the first that is still with the gateway."""
        waiting = self._waiting
        while waiting:
            packet, code, answer = waiting[0]
            if answer is not None:
                if not answer.done():
                    break
                self._load.done()
            waiting.popleft()
            if answer is not None and not self._respond(packet, answer):
                continue
            if packet.qos:
                self._unacknowledged -= 1
                if self._owner.is_open:
                    self._acknowledge(packet.packet_id, code)
        self._owner.settled()

    def _respond(self, packet: Publish, answer: Answer) -> bool:
        """Passes the answer on; False if the gateway failed and has none for that either.

        The session takes it even when this connection is gone, for the one that comes after it.
        """
        error = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if error is None:
            payload = answer.result()
        else:
            payload = self._gateway.refusal(packet.topic, packet.payload, error)
            if payload is None:
                self._failed(error)
                return False
        if payload is not None:
            self._session.deliver(Message(self._response_topic, payload, qos=1, retain=False))
        return True

    def _acknowledge(self, packet_id: int, code: ReasonCode) -> None:
        self._counts.acknowledged += 1
        if code is ReasonCode.SUCCESS:
            self._owner.send(puback_success(packet_id))
        else:
            self._owner.send(encode(Puback(packet_id, code), self._owner.version))

    def _failed(self, error: BaseException) -> None:
        """Leaves the request unacknowledged; the device sends it again on its next connection."""
        self._counts.requests_failed += 1
        log.error(
            "mqtt_request_failed",
            device_id=self._session.device_id,
            error=type(error).__name__,
        )
        busy = isinstance(error, TransientError | asyncio.CancelledError)
        code = ReasonCode.SERVER_BUSY if busy else ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR
        self._owner.close(code, "request_failed")
