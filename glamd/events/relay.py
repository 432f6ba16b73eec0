"""From the outboxes to JetStream: at least once, in order for each merchant, never in the way.

**What orders a merchant's events.** Rows are sent by id among those that are committed. Whoever
writes for a merchant holds a lock on the merchant's row (the account, the billing record) before it
writes to the outbox, so the later transaction gets its id after the earlier one has committed, and
who sees the later row sees the earlier one. Transactions that share no lock are no cause of one
another; of those the one that is seen first goes first, whichever id it has.

**What is not fooled by out-of-order commits.** A row is sent because it is not marked, never
because it lies behind a position. The floor below which the usual look does not go is a help
against dead index entries only: it stays half a minute behind, and once a second a look goes
without it.

**Several nodes.** One of them relays an outbox at a time, the one whose session holds the advisory
lock; when it dies PostgreSQL frees the lock and another goes on. This only spares work: two relays
that work at once publish nothing out of order (see `publisher`), only twice.

**LISTEN/NOTIFY** is not used: a transaction that notifies takes a lock of the whole server until it
has committed, which would put an end to concurrent group commits. Writers of this process call
`wake`, all others are found by the poll.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import GlamError
from glamd.events.bus import Bus, BusLostError
from glamd.events.outbox_upkeep import REPLAY_WINDOW, OutboxLag, OutboxUpkeep
from glamd.events.publisher import Failure, Outcome, Publisher
from glamd.events.store import OutboxRow, OutboxTable, Schema

BATCH_ROWS: Final = 256
"""Rows read, sent and marked together; as many merchants' events are in flight at most."""

POLL_S: Final = 0.2
"""How long a row of another process waits at most to be seen."""

LEAD_CHECK_S: Final = 1.0
WHOLE_EVERY_S: Final = 1.0
LATE_COMMIT_S: Final = 30.0
"""A transaction that commits so late after its row got its id is found by the next whole look."""

FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 5.0
"""Between attempts while nothing at all is taken: doubled each time."""

FIRST_STUCK_S: Final = 1.0
LAST_STUCK_S: Final = 60.0
"""Between attempts for one merchant whose event is not taken while others' are."""

STUCK_LIMIT: Final = 1000
"""Merchants that may be passed over; with more, it is not the events that are wrong."""

log = structlog.get_logger()

_PUBLISHED = Counter(
    "glamd_events_published_total", "Events that JetStream has acknowledged.", ["outbox"]
)
_FAILED = Counter(
    "glamd_events_publish_failures_total", "Events that were not taken.", ["outbox", "code"]
)
_STUCK = Gauge(
    "glamd_events_stuck_merchants",
    "Merchants whose events wait behind one that is not taken.",
    ["outbox"],
)


@dataclass(slots=True)
class _Stuck:
    until_s: float
    pause_s: float


class Relay:
    """Publishes the outboxes of both schemas, each of its own database, which may be the same."""

    def __init__(
        self,
        bus: Bus,
        *,
        databases: Mapping[Schema, Database],
        clock: Clock,
        replay_window: timedelta = REPLAY_WINDOW,
        poll_s: float = POLL_S,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self._relays = {
            schema: OutboxRelay(
                OutboxTable(schema),
                database,
                bus,
                clock=clock,
                poll_s=poll_s,
                batch_rows=batch_rows,
            )
            for schema, database in databases.items()
        }
        self._upkeep = {
            schema: OutboxUpkeep(
                relay.table,
                databases[schema],
                clock=clock,
                replay_window=replay_window,
                is_leading=relay.is_leading,
                look_back=relay.look_back,
            )
            for schema, relay in self._relays.items()
        }

    def wake(self, *outboxes: Schema) -> None:
        """Something was committed into these outboxes, or any: look now, do not wait for the poll.

        Who commits often names the outbox: every wake is a look, also where nothing is new.
        """
        for schema in outboxes or self._relays:
            if schema in self._relays:
                self._relays[schema].wake()

    async def run(self) -> None:
        """Relay and keep the outboxes small, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for schema, relay in self._relays.items():
                group.create_task(relay.run(), name=f"relay:{schema}")
                group.create_task(self._upkeep[schema].run(), name=f"outbox-upkeep:{schema}")

    async def stop(self, timeout_s: float) -> None:
        """Return when all that was committed before is sent, or cannot be now; `run` goes on."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(relay.flushed() for relay in self._relays.values()))
        except TimeoutError:
            log.warning("relay_not_flushed", timeout_s=timeout_s)

    async def lag(self) -> tuple[OutboxLag, ...]:
        """What waits in each outbox, and who sends it. UnavailableError."""
        return tuple([await upkeep.lag() for upkeep in self._upkeep.values()])

    async def replay(
        self,
        *,
        since: datetime,
        subject: str | None = None,
        merchant_id: UUID | None = None,
        outboxes: Iterable[Schema] = ("cde", "glam"),
    ) -> int:
        """Send again what was sent since then, as far as it is still there; how many events.

        Returns when all are sent. Of what JetStream still has, it drops what is younger than its
        duplicate window, and whoever consumes drops repeated ids. UnavailableError when nothing is
        taken for a while: what is left is sent as soon as something is.
        """
        return sum(
            [
                await self._upkeep[schema].replay(
                    since=since, subject=subject, merchant_id=merchant_id
                )
                for schema in outboxes
                if schema in self._upkeep
            ]
        )


class OutboxRelay:
    """Sends the rows of one outbox, as long as this node is the one that does."""

    def __init__(
        self,
        table: OutboxTable,
        database: Database,
        bus: Bus,
        *,
        clock: Clock,
        poll_s: float,
        batch_rows: int,
    ) -> None:
        self.table = table
        self._database = database
        self._bus = bus
        self._clock = clock
        self._poll_s = poll_s
        self._batch_rows = batch_rows
        self._publisher: Publisher | None = None
        self._woken = asyncio.Event()
        self._leading = False
        self._lead_asked_s = float("-inf")
        self._pause_s = 0.0
        self._trouble = ""
        self._stuck: dict[str, _Stuck] = {}
        self._suspects: dict[str, int] = {}
        self._floor = 0
        self._steps: deque[tuple[float, int]] = deque()
        self._whole_at_s = float("-inf")
        self._flushing: asyncio.Future[None] | None = None
        self._published = _PUBLISHED.labels(table.schema)
        _STUCK.labels(table.schema).set_function(lambda: len(self._stuck))

    def wake(self) -> None:
        """Look now."""
        self._woken.set()

    def is_leading(self) -> bool:
        """Whether this node sends this outbox."""
        return self._leading

    def look_back(self) -> None:
        """Old rows wait again: let the next look be one at all of them."""
        self._whole_at_s = float("-inf")
        self._woken.set()

    async def flushed(self) -> None:
        """Return when a look that begins from now on finds nothing that can be sent."""
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_future()
        self._woken.set()
        await asyncio.wait((self._flushing,))

    async def run(self) -> None:
        """Take turns until cancelled; no error ends it."""
        async with self._database.dedicated() as connection:
            while True:
                flushing = self._flushing
                try:
                    more = await self._turn(connection)
                except BusLostError:
                    more = False
                except GlamError as error:
                    more = False
                    self._lead_asked_s = float("-inf")
                    self._hold(error.code)
                except Exception:
                    # Whatever is wrong with us, the events are safe where they are.
                    log.exception("relay_crashed", outbox=self.table.schema)
                    more = False
                    self._hold("CRASHED")
                if flushing is not None and not more:
                    self._flushing = None
                    if not flushing.done():
                        flushing.set_result(None)
                await self._rest(more=more)

    async def _rest(self, *, more: bool) -> None:
        if self._pause_s:
            await asyncio.sleep(self._pause_s)
        elif not more:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._woken.wait()
            except TimeoutError:
                pass  # the poll

    async def _turn(self, connection: Connection) -> bool:
        """Read, send and mark one batch; whether there is more to be sent at once."""
        self._woken.clear()
        if not await self._leads(connection):
            self._go_on()
            return False
        link = self._bus.current
        if link is None or link.is_lost:
            return False
        if self._publisher is None or self._publisher.link is not link:
            self._publisher = await Publisher.on(link)
        now_s = self._clock.monotonic_s()
        rows = await self.table.unpublished(
            connection,
            above=self._lowest(now_s),
            without=[m for m, stuck in self._stuck.items() if stuck.until_s > now_s],
            limit=self._batch_rows,
        )
        if not rows:
            self._go_on()
            return False
        outcome = await self._publisher.send(rows)
        if outcome.acked:
            self._published.inc(len(outcome.acked))
            await self.table.mark(connection, outcome.acked)
        self._judge(rows, outcome, now_s)
        return not self._pause_s and not outcome.lost and len(rows) == self._batch_rows

    async def _leads(self, connection: Connection) -> bool:
        now_s = self._clock.monotonic_s()
        if now_s - self._lead_asked_s >= LEAD_CHECK_S:
            led, self._leading = self._leading, False
            self._leading = await self.table.lead(connection)
            self._lead_asked_s = now_s
            if self._leading and not led:
                # What another node has left undone may lie anywhere.
                self._floor, self._whole_at_s = 0, float("-inf")
                self._steps.clear()
                log.info("relay_leads", outbox=self.table.schema)
        return self._leading

    # ---- what a batch says about the next one

    def _judge(self, rows: list[OutboxRow], outcome: Outcome, now_s: float) -> None:
        """Learn from a batch: who is passed over for a while, whether to pause, where to look."""
        if self._stuck:
            acked = set(outcome.acked)
            for row in rows:
                if row.row_id in acked:
                    self._stuck.pop(row.merchant_id, None)
        held, suspects = "", {}
        for failure in outcome.failures:
            _FAILED.labels(self.table.schema, failure.code).inc()
            merchant_id, row_id = failure.row.merchant_id, failure.row.row_id
            # A stream that is just getting full takes some and refuses others, once.
            again = bool(outcome.acked) and self._suspects.get(merchant_id) == row_id
            if failure.lasting or again or merchant_id in self._stuck:
                self._pass_over(failure, now_s)
            else:
                held, suspects[merchant_id] = failure.code, row_id
        self._suspects = suspects
        if held == "NO_STREAM" and self._publisher is not None:
            # With the next link the stream is made anew.
            self._publisher.link.drop()
        if held or len(self._stuck) > STUCK_LIMIT:
            self._stuck.clear()
            self._hold(held or "TOO_MANY_STUCK")
        elif outcome.acked:
            self._go_on()
        if not outcome.failures and not outcome.lost:
            self._step(rows[-1].row_id, now_s)

    def _pass_over(self, failure: Failure, now_s: float) -> None:
        """Leave this merchant out for a while, so that the others go on; told each time."""
        row = failure.row
        before = self._stuck.get(row.merchant_id)
        pause_s = FIRST_STUCK_S if before is None else min(before.pause_s * 2, LAST_STUCK_S)
        self._stuck[row.merchant_id] = _Stuck(now_s + pause_s, pause_s)
        log.error(
            "event_not_taken",
            outbox=self.table.schema,
            event_id=row.event_id,
            subject=row.subject,
            merchant_id=row.merchant_id,
            code=failure.code,
            again_in_s=pause_s,
        )

    def _hold(self, code: str) -> None:
        self._pause_s = min(self._pause_s * 2, LAST_PAUSE_S) or FIRST_PAUSE_S
        if code != self._trouble:
            log.warning("relay_held", outbox=self.table.schema, code=code)
        self._trouble = code

    def _go_on(self) -> None:
        if self._trouble:
            log.info("relay_goes_on", outbox=self.table.schema)
        self._pause_s, self._trouble = 0.0, ""

    def _lowest(self, now_s: float) -> int:
        """The id behind which to look this time."""
        if not self._stuck and now_s - self._whole_at_s < WHOLE_EVERY_S:
            return self._floor
        self._whole_at_s = now_s
        return 0

    def _step(self, row_id: int, now_s: float) -> None:
        """Raise the floor to what was the newest row sent some time ago."""
        if not self._steps or now_s - self._steps[-1][0] >= 1.0:
            self._steps.append((now_s, row_id))
        while self._steps and now_s - self._steps[0][0] >= LATE_COMMIT_S:
            self._floor = max(self._floor, self._steps.popleft()[1])
