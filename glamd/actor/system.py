"""A system of actors: addresses, the sweeper of idle instances, and the drain at the end.

How a message gets from a mailbox to an instance is in `glamd.actor.cell`. Nothing here waits for
anything but the drain, and nothing here is for another thread: a system belongs to the loop that
was running when it was made.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import suppress
from contextvars import copy_context
from itertools import chain, islice
from typing import Final, Generic, TypeVar, cast

import structlog

from glamd.actor.actor import ActorSpec
from glamd.actor.cell import INSIDE, Cell, Common, Kind
from glamd.actor.mailbox import NO_DEADLINE, Deadlines, fail
from glamd.actor.reports import DrainReport, SystemStats
from glamd.clock import Clock, SystemClock

log = structlog.get_logger()

M = TypeVar("M")
R = TypeVar("R")

SWEEP_EVERY_S: Final = 1.0
"""Pause of the sweeper: an instance is passivated at most so much later than its `idle_s`."""
SWEEP_SLICE: Final = 500
"""Keys the sweeper looks at until it lets the loop run."""
BUSY_LIMIT: Final = 1000
"""Busy actors at which the sweeper and the drain start no further passivation."""
ACTORS_SHOWN_LIMIT: Final = 1000
"""Actors that `stats` names unless told otherwise."""
HARD_STOP_LIMIT_S: Final = 1.0
"""Of a drain's time, what is kept for those that must be cancelled; never more than a quarter."""


class Ref(Generic[M, R]):
    """The address of one key: cheap to make, always valid, whether or not anything is there."""

    __slots__ = ("_deadlines", "_key", "_kind", "_loop")

    def __init__(self, kind: Kind, key: str) -> None:
        self._kind = kind
        self._key = key
        self._loop = kind.common.loop
        self._deadlines = kind.common.deadlines

    def __repr__(self) -> str:
        return f"Ref({self._kind.spec.kind!r}, {self._key!r})"

    def ask(self, message: M, *, timeout_s: float) -> asyncio.Future[R]:
        """Send a message; the future has its answer, or an error within `timeout_s` + 50 ms.

        Never raises. The future's exception is the actor's own GlamError, InternalError after a
        crash, or UnavailableError: MAILBOX_FULL, ACTOR_FAILING or DRAINING, which mean that
        nothing was done (unless a drain cut it off in the middle), or ASK_TIMEOUT, which does
        not: the message is still handled. Giving up the future, by cancelling it or by forgetting
        it, changes nothing for the actor.
        """
        future = self._loop.create_future()
        bucket = self._deadlines.bucket(timeout_s)
        refusal = self._kind.post(self._key, (message, future, bucket))
        if refusal is None:
            bucket[future] = self._kind
        else:
            fail(future, refusal)
        return future

    def tell(self, message: M) -> None:
        """Send a message and want no answer; an error of the actor's is logged by its code.

        Raises UnavailableError with MAILBOX_FULL, ACTOR_FAILING or DRAINING: nothing was done.
        """
        refusal = self._kind.post(self._key, (message, None, NO_DEADLINE))
        if refusal is not None:
            raise refusal


class System:
    """One table of actors. Make it where a loop runs; end it with `drain`."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._common = Common(
            clock=clock or SystemClock(),
            loop=loop,
            deadlines=Deadlines(loop),
            context=copy_context(),
        )
        self._common.context.run(INSIDE.set, self._common)
        self._kinds: dict[str, Kind] = {}
        loop.call_later(SWEEP_EVERY_S, self._sweep)

    def ref(self, spec: ActorSpec[M, R], key: str) -> Ref[M, R]:
        """The address of a key; ValueError if another spec already has this kind's name."""
        kind = self._kinds.get(spec.kind)
        if kind is None:
            # Within the table a message is an object; the types of a Ref are those of its spec.
            kind = Kind(cast("ActorSpec[object, object]", spec), self._common)
            self._kinds[spec.kind] = kind
        elif kind.spec is not spec and kind.spec != spec:
            raise ValueError(f"two specs for actor kind {spec.kind!r}")
        return Ref(kind, key)

    def stop(self, kind: str, key: str) -> None:
        """Passivate the instance after what is in its mailbox; the next message makes a new one.

        Nothing happens where there is no such instance.
        """
        cell = self._kinds[kind].cells.get(key) if kind in self._kinds else None
        if cell is not None:
            cell.stop()

    def stats(
        self, *, kind: str | None = None, key: str | None = None, limit: int = ACTORS_SHOWN_LIMIT
    ) -> SystemStats:
        """The counts of all kinds, or of one, and up to `limit` of their actors, busy ones first.

        With `key`, only actors of that key. `limit=0` costs nothing per idle actor.
        """
        now_s = self._common.clock.monotonic_s()
        kinds = [each for name, each in self._kinds.items() if kind in {None, name}]
        busy = list(self._common.busy) if limit else []
        idle = (cell for each in kinds for cell in each.cells.values() if cell.pump is None)
        wanted = (
            cell
            for cell in chain(busy, idle)
            if cell.kind in kinds and (key is None or cell.key == key)
        )
        return SystemStats(
            draining=self._common.draining,
            kinds=tuple(each.stats() for each in kinds),
            actors=tuple(cell.stats(now_s) for cell in islice(wanted, limit)),
        )

    async def drain(self, timeout_s: float) -> DrainReport:
        """End: take nothing new, handle what was taken, passivate everybody; `timeout_s` at most.

        Actors may still ask each other, so that what was accepted can be finished. Mailboxes get
        half of the time to become empty before idle actors are passivated regardless of stuck
        ones. Whoever is busy when the time is up is cancelled; its messages get DRAINING.
        """
        common = self._common
        started_s = common.clock.monotonic_s()
        passivated_before = sum(kind.passivations for kind in self._kinds.values())
        common.draining = True
        hard_stop_s = min(HARD_STOP_LIMIT_S, timeout_s / 4)
        await _within(timeout_s / 2, self._until_fewer_busy_than(1))
        elapsed_s = common.clock.monotonic_s() - started_s
        await _within(timeout_s - hard_stop_s - elapsed_s, self._passivate_all())
        leftovers = list(common.busy)
        refused = sum(cell.abandon() for cell in leftovers)
        pumps = {cell: cell.pump for cell in leftovers if cell.pump is not None}
        if pumps:
            await asyncio.wait(pumps.values(), timeout=hard_stop_s)
        report = DrainReport(
            passivated=sum(each.passivations for each in self._kinds.values()) - passivated_before,
            leftovers=_names(leftovers),
            refused_messages=refused,
            stuck=_names([cell for cell, pump in pumps.items() if not pump.done()]),
            elapsed_s=common.clock.monotonic_s() - started_s,
        )
        if not report.clean:
            log.error(
                "actors_not_drained",
                leftovers=len(leftovers),
                first=report.leftovers[:10],
                refused_messages=refused,
                stuck=len(report.stuck),
            )
        return report

    async def _until_fewer_busy_than(self, limit: int) -> None:
        while len(self._common.busy) >= limit:
            self._common.rested.clear()
            await self._common.rested.wait()

    async def _passivate_all(self) -> None:
        # One that is passivated may be woken once more by another one's last message. Whoever is
        # still here either rests, and then `stop` makes it busy, or is busy: so this loop waits.
        while cells := [cell for cell in self._all_cells() if cell.actor or cell.pump]:
            for cell in cells:
                cell.stop()
                await self._until_fewer_busy_than(BUSY_LIMIT)
            await self._until_fewer_busy_than(1)

    def _all_cells(self) -> list[Cell]:
        return [cell for kind in self._kinds.values() for cell in kind.cells.values()]

    def _sweep(self) -> None:
        self._sweep_slice(iter(self._all_cells()))

    def _sweep_slice(self, cells: Iterator[Cell]) -> None:
        common = self._common
        if common.draining:
            return
        slice_ = list(islice(cells, SWEEP_SLICE)) if len(common.busy) < BUSY_LIMIT else []
        now_s = common.clock.monotonic_s()
        for cell in slice_:
            cell.sweep(now_s)
        if slice_:
            common.loop.call_soon(self._sweep_slice, cells)
        else:
            common.loop.call_later(SWEEP_EVERY_S, self._sweep)


async def _within(timeout_s: float, work: Coroutine[None, None, None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await work


def _names(cells: Iterable[Cell]) -> tuple[tuple[str, str], ...]:
    return tuple((cell.kind.spec.kind, cell.key) for cell in cells)
