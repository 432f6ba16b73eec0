"""One MQTT session (4.1): what its device has subscribed to, and what is on its way down to it.

The downlink is bounded; a message that does not fit is refused to whoever publishes it, since what
is already there was promised first. How long a session lives is the business of `sessions`.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from device_gateway.mqtt import rights
from device_gateway.mqtt.codec import Subscription, Version, publish_bytes
from device_gateway.mqtt.counts import Counts
from device_gateway.mqtt.limits import EndpointLimits
from device_gateway.mqtt.opening import Terms

PACKET_ID_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Message:
    """One message for a device."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool


class Link(Protocol):
    """The connection that a session has at the moment."""

    version: Version
    terms: Terms

    @property
    def writable(self) -> bool:
        """False while the peer does not read."""

    def send(self, data: bytes) -> None:
        """Sends plain bytes soon."""


@dataclass(frozen=True, slots=True)
class _Granted:
    """What the subscriptions together grant for one topic."""

    qos: int
    retain_as_published: bool


class Session:
    """One device's session; `Sessions` keeps it, a `Connection` is its link while there is one."""

    __slots__ = (
        "_counts",
        "_granted",
        "_inflight",
        "_last_packet_id",
        "_limits",
        "_prefix",
        "_queue",
        "_queue_bytes",
        "_subscriptions",
        "_to_redeliver",
        "device_id",
        "link",
    )

    def __init__(self, device_id: str, limits: EndpointLimits, counts: Counts) -> None:
        self.device_id = device_id
        self.link: Link | None = None
        self._prefix = rights.prefix(device_id)
        self._limits = limits
        self._counts = counts
        self._subscriptions: dict[str, Subscription] = {}
        self._granted: dict[str, _Granted] = {}
        self._inflight: dict[int, Message] = {}
        self._to_redeliver: deque[int] = deque()
        self._queue: deque[Message] = deque()
        self._queue_bytes = 0
        self._last_packet_id = 0

    def subscribe(self, subscription: Subscription) -> bool:
        """Adds or replaces a subscription to topics of its own; True if it is a new one."""
        is_new = subscription.topic_filter not in self._subscriptions
        self._subscriptions[subscription.topic_filter] = subscription
        self._regrant()
        return is_new

    def unsubscribe(self, topic_filter: str) -> bool:
        """Ends the subscription of exactly this filter [MQTT-3.10.4-1]; False if there is none."""
        existed = self._subscriptions.pop(topic_filter, None) is not None
        self._regrant()
        return existed

    def _regrant(self) -> None:
        """One answer for each topic: the highest QoS of all matching filters [MQTT-3.3.4-2]."""
        self._granted = {}
        for topic_filter, subscription in self._subscriptions.items():
            for topic in rights.covered(self._prefix, topic_filter):
                known = self._granted.get(topic, _Granted(0, retain_as_published=False))
                self._granted[topic] = _Granted(
                    max(known.qos, min(subscription.qos, 1)),
                    known.retain_as_published or subscription.retain_as_published,
                )

    def deliver(self, message: Message) -> bool:
        """Sends or queues a message that was just published; False if it is not taken."""
        granted = self._granted.get(message.topic)
        if granted is None:
            return self._refuse("not_subscribed")
        if message.qos > granted.qos or (message.retain and not granted.retain_as_published):
            message = replace(
                message,
                qos=min(message.qos, granted.qos),  # [MQTT-3.8.4-8]
                retain=message.retain and granted.retain_as_published,  # [MQTT-3.3.1-12, -13]
            )
        return self._take(message)

    def deliver_retained(self, message: Message, subscription: Subscription) -> bool:
        """Sends or queues a retained message because of a new subscription (3.3.1.3)."""
        return self._take(replace(message, qos=min(message.qos, subscription.qos), retain=True))

    def _take(self, message: Message) -> bool:
        link = self.link
        if link is not None and not self._queue and link.writable and self._window(link, message):
            self._send(link, message)
            return True
        if link is None and not message.qos:
            return self._refuse("offline")
        if len(self._queue) >= self._limits.downlink_queue_messages:
            return self._refuse("queue_full")
        if self._queue_bytes + len(message.payload) > self._limits.downlink_queue_bytes:
            return self._refuse("queue_full")
        self._queue.append(message)
        self._queue_bytes += len(message.payload)
        return True

    def _refuse(self, reason: str) -> bool:
        self._counts.undelivered[reason] += 1
        return False

    def _window(self, link: Link, message: Message) -> bool:
        """Whether the client's receive maximum allows another message [MQTT-3.3.4-9]."""
        in_flight = len(self._inflight) - len(self._to_redeliver)
        return not message.qos or in_flight < link.terms.inflight_max

    def _send(self, link: Link, message: Message) -> None:
        packet_id = 0
        if message.qos:
            packet_id = self._unused_packet_id()
            self._inflight[packet_id] = message
        self._counts.delivered += 1
        self._write(link, message, packet_id, dup=False)

    def _write(self, link: Link, message: Message, packet_id: int, *, dup: bool) -> None:
        data = publish_bytes(
            message.topic,
            message.payload,
            qos=message.qos,
            packet_id=packet_id,
            version=link.version,
            retain=message.retain,
            dup=dup,
        )
        if len(data) > link.terms.max_packet_out_bytes:
            # As if it had been sent and acknowledged [MQTT-3.1.2-24, -25].
            self._inflight.pop(packet_id, None)
            self._refuse("too_large")
            return
        link.send(data)

    def _unused_packet_id(self) -> int:
        """The next identifier that is not in flight [MQTT-2.2.1-4]; few ever are."""
        packet_id = self._last_packet_id
        while True:
            packet_id = packet_id % PACKET_ID_MAX + 1
            if packet_id not in self._inflight:
                self._last_packet_id = packet_id
                return packet_id

    def acknowledge(self, packet_id: int) -> None:
        """Takes a PUBACK, whatever its reason code: the message is done (4.3.2)."""
        if self._inflight.pop(packet_id, None) is None:
            return  # of a connection before this one, or nobody's
        if packet_id in self._to_redeliver:
            self._to_redeliver.remove(packet_id)
        if self._queue or self._to_redeliver:
            self.pump()

    def attach(self, link: Link) -> None:
        """Gives the session a connection; everything in flight is to be sent again first.

        In its order, with its packet identifier and DUP [MQTT-4.4.0-1, MQTT-3.3.1-1].
        """
        self.link = link
        self._to_redeliver = deque(self._inflight)

    def pump(self) -> None:
        """Sends what the window and the peer's reading allow, redeliveries first."""
        link = self.link
        while link is not None and link.writable:
            if self._to_redeliver:
                message = self._inflight[self._to_redeliver[0]]
                if not self._window(link, message):
                    return
                self._counts.redelivered += 1
                self._write(link, message, self._to_redeliver.popleft(), dup=True)
            elif self._queue and self._window(link, self._queue[0]):
                message = self._queue.popleft()
                self._queue_bytes -= len(message.payload)
                self._send(link, message)
            else:
                return
