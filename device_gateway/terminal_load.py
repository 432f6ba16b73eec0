"""A load of many virtual terminals at once, and what it found: counts and latencies.

It shares its cores with the daemon that it measures, so each request costs as little as can be: it
is encrypted ahead of time, one TLS context serves a device for good, answers are callbacks and not
tasks. Nothing is shown to anybody here.
"""

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from device_gateway.mqtt.codec import Version
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_card import TEST_CARDS, CardReader, clear_form
from device_gateway.terminal_device import Counters, Device
from device_gateway.terminal_histogram import Histogram
from device_gateway.terminal_link import Ending
from device_gateway.terminal_record import Record
from glamd.clock import Clock
from glamd.errors import GlamError, UnavailableError

CONNECTING_LIMIT: Final = 64
CONNECT_ALL_TIMEOUT_S: Final = 60.0
DRAIN_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 10.0
COUNTER_BLOCK: Final = 4096
PREPARED_LIMIT: Final = 150_000
PREPARE_CHUNK: Final = 500
SATURATED_GUESS_PER_S: Final = 15_000
TERMINAL_QUEUE_LIMIT: Final = 64
TIMER_GRAIN_S: Final = 0.002
CLEARS: Final = tuple(clear_form(card, "track2") for card in TEST_CARDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """`rate_per_s` over all terminals, 0: as fast as answers come, `in_flight` a terminal."""

    rate_per_s: float
    seconds: float
    in_flight: int = 1
    seed: int = 0
    version: Version = Version.V5


@dataclass(slots=True)
class LoadReport:
    """What a load did and met. `answered_in_time` counts final answers before the time was up."""

    terminals: int = 0
    connect_s: float = 0.0
    sent: int = 0
    ok: int = 0
    answered_in_time: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    retryable: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    resent: int = 0
    partings: int = 0
    shed: int = 0
    unanswered: int = 0
    seconds: float = 0.0
    latency: Histogram = field(default_factory=Histogram)

    @property
    def rate_per_s(self) -> float:
        """Final answers a second while the load lasted."""
        return self.answered_in_time / self.seconds if self.seconds else 0.0


class _Tapper:
    """One terminal of the load with its reader and the requests that are ready to go."""

    __slots__ = ("_counters", "_picks", "_reader", "_run", "_taps", "prepared", "terminal")

    def __init__(self, device: Device, terminal: Terminal, run: str, seed: int) -> None:
        self._counters = Counters(device, block=COUNTER_BLOCK)
        self._reader = CardReader(device, self._counters)
        self._run = run
        self._taps = 0
        self._picks = seed & 0xFFFFFFFF
        self.prepared: deque[tuple[str, bytes]] = deque()
        self.terminal = terminal

    def prepare(self, count: int) -> None:
        """Encrypt `count` requests now instead of later."""
        for _ in range(count):
            request_id, payload = self._make()
            # A copy, because what orjson makes holds on to a kilobyte or more behind its end.
            self.prepared.append((request_id, bytes(memoryview(payload))))

    def next_request(self) -> tuple[str, bytes]:
        """The id and payload of the next tap."""
        return self.prepared.popleft() if self.prepared else self._make()

    def _make(self) -> tuple[str, bytes]:
        self._taps += 1
        request_id = f"{self._run}-{self._taps}"
        # A linear congruential generator: the same seed taps the same cards, and no more is needed.
        self._picks = (self._picks * 1664525 + 1013904223) & 0xFFFFFFFF
        clear = CLEARS[(self._picks >> 16) % len(CLEARS)]
        return request_id, self._reader.request(request_id, clear, "track2")

    def give_back(self) -> None:
        """Return the counters that were set aside and not used."""
        self._counters.give_back()


class Load:
    """Runs one plan over some devices, once; `report` grows while it runs."""

    def __init__(
        self,
        plan: LoadPlan,
        devices: Sequence[Device],
        *,
        clock: Clock,
        record: Record | None = None,
        locate: Callable[[], tuple[str, int]] | None = None,
    ) -> None:
        """Wants a running loop. Raises InputError for a device whose initial key does not fit."""
        self.report = LoadReport(terminals=len(devices))
        self.phase = "preparing"
        self.last_ending = "no answer"
        self._plan = plan
        self._record = record
        # The loop's own time is whole milliseconds under uvloop, which is too coarse to measure by.
        self._clock = clock
        self._open = False
        self.outstanding = 0
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()
        self._failure: GlamError | None = None
        gate = asyncio.Semaphore(CONNECTING_LIMIT)
        # Ids are unique beyond their device and their run, so that a record needs no other key.
        run = uuid.uuid4().hex[:12]
        self._tappers = [
            _Tapper(
                device,
                Terminal(
                    device, clock=clock, version=plan.version, watch=self, locate=locate, gate=gate
                ),
                f"{run}-{number}",
                plan.seed + number,
            )
            for number, device in enumerate(devices)
        ]

    async def run(self) -> LoadReport:
        """Connect, tap, wait for what is outstanding, disconnect.

        Raises, in an ExceptionGroup, UnavailableError when not all terminals could connect in
        CONNECT_ALL_TIMEOUT_S, ConfigError and ConflictError when a counter cannot be had.
        """
        try:
            await self._prepare()
            async with asyncio.TaskGroup() as group:
                running = [
                    group.create_task(each.terminal.run(), name=f"terminal-{number}")
                    for number, each in enumerate(self._tappers)
                ]
                try:
                    await self._connect_all()
                    await self._tap()
                    await self._drain()
                finally:
                    for each in self._tappers:
                        each.terminal.close()
                await asyncio.wait(running, timeout=CLOSE_TIMEOUT_S)
                for task in running:
                    task.cancel()
        finally:
            for each in self._tappers:
                each.give_back()
        return self.report

    # What Terminal tells (see `terminal.Watch`).

    def answered(self, device_id: str, answer: Answer, /) -> None:
        """Count an answer and write it down."""
        if self._record is not None:
            self._record.answer(device_id, answer)
        if answer.replayed:
            self.report.replayed += 1
        if not answer.final:
            self.report.retryable[answer.code] += 1

    def resent(self, device_id: str, request_id: str, /) -> None:
        """Count a resend and write it down."""
        if self._record is not None:
            self._record.sent(device_id, request_id, again=True)
        self.report.resent += 1

    def parted(self, _device_id: str, ending: Ending, /) -> None:
        """Count a lost connection, or one that could not be made."""
        self.report.partings += 1
        self.last_ending = ending.reason

    # The phases.

    async def _prepare(self) -> None:
        plan = self._plan
        total = (plan.rate_per_s or SATURATED_GUESS_PER_S) * plan.seconds
        each_count = int(min(total, PREPARED_LIMIT)) // len(self._tappers) + 1
        for each in self._tappers:
            for done in range(0, each_count, PREPARE_CHUNK):
                each.prepare(min(PREPARE_CHUNK, each_count - done))
                # Progress is shown and an interrupt is heard in between.
                await asyncio.sleep(0)

    async def _connect_all(self) -> None:
        self.phase = "connecting"
        started_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(CONNECT_ALL_TIMEOUT_S):
                for each in self._tappers:
                    await each.terminal.connected.wait()
        except TimeoutError:
            there = sum(each.terminal.connected.is_set() for each in self._tappers)
            raise UnavailableError(
                f"only {there} of {len(self._tappers)} terminals could connect: {self.last_ending}"
            ) from None
        self.report.connect_s = self._clock.monotonic_s() - started_s

    async def _tap(self) -> None:
        self.phase = "tapping"
        self._open = True
        started_s = self._clock.monotonic_s()
        if self._plan.rate_per_s:
            await self._tap_at_rate(started_s)
        else:
            for each in self._tappers:
                for _ in range(self._plan.in_flight):
                    self._send(each, self._clock.monotonic_s())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._plan.seconds):
                    await self._ended.wait()
        self._open = False
        self.report.seconds = self._clock.monotonic_s() - started_s

    async def _tap_at_rate(self, started_s: float) -> None:
        """At fixed moments, however slow the answers are: a slow server gets no rest from us."""
        rate_per_s, tappers = self._plan.rate_per_s, self._tappers
        issued, total = 0, int(rate_per_s * self._plan.seconds)
        while issued < total and self._open:
            now_s = self._clock.monotonic_s()
            due = min(int((now_s - started_s) * rate_per_s) + 1, total)
            for number in range(issued, due):
                each = tappers[number % len(tappers)]
                if each.terminal.outstanding >= TERMINAL_QUEUE_LIMIT:
                    self.report.shed += 1
                    continue
                meant_s = started_s + number / rate_per_s
                # What the timer's grain makes late is not the server's; being held up is.
                self._send(each, meant_s if now_s - meant_s > TIMER_GRAIN_S else now_s)
            issued = due
            await asyncio.sleep(
                max(0.0, started_s + issued / rate_per_s - self._clock.monotonic_s())
            )

    def _send(self, tapper: _Tapper, from_s: float) -> None:
        try:
            request_id, payload = tapper.next_request()
        except GlamError as error:
            # We may be in the middle of somebody's answer, which is not the place to fail.
            self._failure = self._failure or error
            self._open = False
            self._ended.set()
            return
        if self._record is not None:
            self._record.sent(tapper.terminal.device_id, request_id)
        self.report.sent += 1
        self.outstanding += 1
        tapper.terminal.send(request_id, payload, partial(self._done, tapper, from_s))

    def _done(self, tapper: _Tapper, from_s: float, answer: Answer) -> None:
        now_s = self._clock.monotonic_s()
        report = self.report
        self.outstanding -= 1
        report.latency.record(int((now_s - from_s) * 1e6))
        if answer.ok:
            report.ok += 1
        else:
            report.refused[answer.code] += 1
        if self._open:
            report.answered_in_time += 1
            if not self._plan.rate_per_s:
                self._send(tapper, now_s)
        else:
            self._settle()

    async def _drain(self) -> None:
        """Everything that was sent gets its answer, if that can be within DRAIN_TIMEOUT_S."""
        self.phase = "draining"
        self._settle()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._settled.wait()
        self.report.unanswered = self.outstanding
        if self._failure is not None:
            raise self._failure

    def _settle(self) -> None:
        if not self._open and not self.outstanding:
            self._settled.set()
