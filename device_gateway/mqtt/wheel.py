"""One clock hand for all deadlines of the endpoint, instead of a timer for each connection.

A deadline is found late by up to one tick and never early. Moving one costs two dictionary
operations, so that a connection moves its own only when it has to come sooner; when it is found
before its time it is just put back.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import structlog

from glamd.clock import Clock

log = structlog.get_logger()


class Timed(Protocol):
    """Something with a deadline, which keeps for the wheel where on it it stands."""

    wheel_slot: int

    def due(self, now_s: float) -> float | None:
        """Called at the deadline or after it; gives the next one, None for none."""


NOWHERE = -1
"""The `wheel_slot` of what is on no wheel."""


class Wheel:
    """Deadlines in monotonic seconds, kept in slots of `tick_s`."""

    def __init__(self, clock: Clock, *, tick_s: float) -> None:
        self._clock = clock
        self.tick_s = tick_s
        self._slots: dict[int, dict[Timed, None]] = {}
        self.now_s = clock.monotonic_s()
        """The time of the last turn: cheap to read, behind by up to one tick."""
        self._hand = math.floor(self.now_s / tick_s)

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def set_after(self, item: Timed, delay_s: float) -> float:
        """Gives `item` its one deadline `delay_s` from now; returns when that is."""
        at_s = self._clock.monotonic_s() + delay_s
        self.set(item, at_s)
        return at_s

    def set(self, item: Timed, at_s: float) -> None:
        """Gives `item` its one deadline, in place of an earlier or later one."""
        self.drop(item)
        slot = max(math.ceil(at_s / self.tick_s), self._hand + 1)
        item.wheel_slot = slot
        self._slots.setdefault(slot, {})[item] = None

    def set_sooner(self, item: Timed, at_s: float) -> None:
        """Moves the deadline of `item` to `at_s` unless it is earlier already."""
        if item.wheel_slot == NOWHERE or at_s < item.wheel_slot * self.tick_s:
            self.set(item, at_s)

    def drop(self, item: Timed) -> None:
        """Takes `item` off the wheel, if it is on it."""
        slot = self._slots.get(item.wheel_slot)
        if slot is not None:
            slot.pop(item, None)
            if not slot:
                del self._slots[item.wheel_slot]
        item.wheel_slot = NOWHERE

    def turn(self) -> None:
        """Calls everything whose deadline has come, the earlier slots first."""
        self.now_s = now_s = self._clock.monotonic_s()
        hand = math.floor(now_s / self.tick_s)
        slots: Sequence[int] = range(self._hand + 1, hand + 1)
        if len(slots) > len(self._slots):  # after a long pause
            slots = sorted(slot for slot in self._slots if slot <= hand)
        for slot in slots:
            self._hand = slot
            for item in list(self._slots.get(slot, ())):
                # An earlier one in this slot may have moved or dropped this one.
                if item.wheel_slot == slot:
                    self._call(item, now_s)
        self._hand = max(hand, self._hand)

    def _call(self, item: Timed, now_s: float) -> None:
        self.drop(item)
        try:
            next_s = item.due(now_s)
        except Exception:  # one item's fault must not cost the others their deadlines
            log.exception("mqtt_deadline_failed")
            return
        if next_s is not None:
            self.set(item, next_s)
