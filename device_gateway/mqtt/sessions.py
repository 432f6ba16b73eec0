"""All MQTT sessions, with and without a connection, and the messages retained for devices.

Nothing here is durable (spec 9: a process holds nothing that another needs): after a restart a
device gets a new session, and whoever published a retained message publishes it again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from device_gateway.mqtt.codec import Will
from device_gateway.mqtt.counts import Counts
from device_gateway.mqtt.limits import EndpointLimits
from device_gateway.mqtt.session import Message, Session
from device_gateway.mqtt.wheel import NOWHERE, Wheel

PublishWill = Callable[[str, Will], None]


@dataclass(slots=True, eq=False)
class _Stored:
    """A session without a connection; times are monotonic seconds."""

    session: Session
    ends_at_s: float
    will: Will | None
    will_at_s: float
    owner: "Sessions"
    wheel_slot: int = NOWHERE

    def due(self, now_s: float) -> float | None:
        """The wheel's call: the will's delay has passed, or the session's time."""
        if now_s >= self.ends_at_s:
            self.owner.forget(self.session.device_id)
            return None
        if now_s >= self.will_at_s:
            self.owner.send_will(self)
        return self.ends_at_s if self.will is None else self.will_at_s


class Sessions:
    """Finds, makes, stores and forgets sessions; one for each device id."""

    def __init__(
        self, limits: EndpointLimits, counts: Counts, wheel: Wheel, publish_will: PublishWill
    ) -> None:
        self._limits = limits
        self._counts = counts
        self._wheel = wheel
        self._publish_will = publish_will
        self._live: dict[str, Session] = {}
        self._stored: dict[str, _Stored] = {}  # the one that lost its connection first is first
        self._retained: dict[str, dict[str, Message]] = {}
        self.retained_count = 0

    def __len__(self) -> int:
        return len(self._live) + len(self._stored)

    def get(self, device_id: str) -> Session | None:
        """The device's session, connected or not."""
        stored = self._stored.get(device_id)
        return self._live.get(device_id) if stored is None else stored.session

    def open(self, device_id: str, *, clean_start: bool) -> tuple[Session, bool]:
        """The session for a new connection, and whether it was there before (3.2.2.1.1).

        A session that is resumed before its will's delay has passed keeps quiet [MQTT-3.1.3-9];
        one that is started anew [MQTT-3.1.2-4] has ended, and its will is due.
        """
        if clean_start:
            self.forget(device_id)
            self._live.pop(device_id, None)
        stored = self._stored.pop(device_id, None)
        if stored is not None:
            self._wheel.drop(stored)
            self._live[device_id] = stored.session
            return stored.session, True
        session = self._live.get(device_id)
        if session is not None:
            return session, True
        while len(self) >= self._limits.max_sessions and self._stored:
            self.forget(next(iter(self._stored)))
        session = self._live[device_id] = Session(device_id, self._limits, self._counts)
        return session, False

    def close(self, session: Session, *, expiry_s: int, will: Will | None) -> None:
        """The session's connection has ended: it is stored for `expiry_s`, or over at once."""
        session.link = None
        device_id = session.device_id
        if self._live.get(device_id) is session:
            del self._live[device_id]
        delay_s = 0
        if will is not None:
            delay_s = min(will.properties.will_delay_interval or 0, expiry_s)
            if not delay_s:
                self._publish_will(device_id, will)
                will = None
        if expiry_s:
            stored = _Stored(session, 0.0, will, 0.0, self)
            self._stored[device_id] = stored
            stored.ends_at_s = self._wheel.set_after(stored, expiry_s)
            if will is not None:
                stored.will_at_s = self._wheel.set_after(stored, delay_s)

    def forget(self, device_id: str) -> None:
        """Ends a session that has no connection; a will that still waits is due (5:3.1.2.5)."""
        stored = self._stored.pop(device_id, None)
        if stored is not None:
            self._wheel.drop(stored)
            self.send_will(stored)

    def send_will(self, stored: _Stored) -> None:
        """Publishes a stored session's will, once."""
        will, stored.will = stored.will, None
        if will is not None:
            self._publish_will(stored.session.device_id, will)

    def retain(self, device_id: str, message: Message) -> bool:
        """Keeps the device's last message of a topic; an empty one clears it [MQTT-3.3.1-6, -7].

        False if there is no room for another.
        """
        of_device = self._retained.setdefault(device_id, {})
        self.retained_count -= of_device.pop(message.topic, None) is not None
        fits = self.retained_count < self._limits.max_retained
        if message.payload and fits:
            of_device[message.topic] = message
            self.retained_count += 1
        if not of_device:
            del self._retained[device_id]
        return fits

    def retained(self, device_id: str) -> dict[str, Message]:
        """The device's retained messages by topic."""
        return self._retained.get(device_id, {})
