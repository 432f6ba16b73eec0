"""A merchant's events about money as they come over the bus, so many of a kind told as one.

It hears what every other service hears, published by the relay, and keeps nothing. How it looks on
a terminal is the screen's business.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import orjson

from glamd.events.bus import Bus, BusLostError
from glamd.events.envelope import CE_SOURCE, OUR_NAME
from glamd.events.message import Message

SUBJECTS: Final = ("evt.credits.>", "evt.billing.>")
MANY: Final = frozenset({"evt.credits.consumed.v1", "evt.credits.insufficient.v1"})
"""Subjects of which many come at once."""

GATHER_S: Final = 1.0
"""How long events of such a subject are gathered; another event ends that at once."""

CE_SUBJECT: Final = "ce-subject"
"""The header that says whom it is about."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Events of one subject that came after one another; `data` is the last one's.

    `amount` is the sum of theirs, 0 where they have none.
    """

    subject: str
    times: int
    amount: int
    data: Mapping[str, object]


class Gathering:
    """Makes happenings of events; pure."""

    def __init__(self) -> None:
        self._gathered: Happening | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be told."""
        return self._gathered is None

    def add(self, subject: str, data: Mapping[str, object]) -> list[Happening]:
        """Take an event in; what is to be told now, in order."""
        amount = data.get("amount")
        now = Happening(subject, 1, amount if isinstance(amount, int) else 0, data)
        before = self._gathered
        if before is not None and before.subject == subject:
            self._gathered = Happening(subject, before.times + 1, before.amount + now.amount, data)
            return []
        told = self.take()
        if subject in MANY:
            self._gathered = now
        else:
            told.append(now)
        return told

    def take(self) -> list[Happening]:
        """What is gathered, at most one; nothing is afterwards."""
        gathered, self._gathered = self._gathered, None
        return [] if gathered is None else [gathered]


class Watch:
    """Tells `show` of a merchant's events for as long as `run` runs."""

    def __init__(self, bus: Bus, merchant_id: UUID, show: Callable[[Happening], None]) -> None:
        self._bus = bus
        self._merchant_id = str(merchant_id)
        self._show = show
        self._gathering = Gathering()
        self._timer: asyncio.TimerHandle | None = None
        self.listening = asyncio.Event()
        """Set once events are heard; those of the time before are not told."""

    async def run(self) -> None:
        """Listen until cancelled, again after every loss of the connection."""
        while True:
            link = await self._bus.link()
            try:
                for subject in SUBJECTS:
                    await link.subscribe(subject, self._on_message)
            except BusLostError:
                continue
            self.listening.set()
            try:
                await link.wait_lost()
            finally:
                self._tell_gathered()

    def _on_message(self, message: Message) -> None:
        headers = message.headers
        if headers.get(CE_SOURCE) != OUR_NAME or headers.get(CE_SUBJECT) != self._merchant_id:
            return
        data = orjson.loads(message.body)["data"]
        told = self._gathering.add(message.subject, data)
        if told:
            self._stop_timer()
        self._tell(told)
        if self._timer is None and not self._gathering.is_empty:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(GATHER_S, self._tell_gathered)

    def _tell_gathered(self) -> None:
        self._stop_timer()
        self._tell(self._gathering.take())

    def _tell(self, told: list[Happening]) -> None:
        for each in told:
            self._show(each)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
