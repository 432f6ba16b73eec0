"""What keeps an outbox small and known: its lag, the purge behind the replay window, the replay.

None of it is in the way of the relay: it runs on connections of the pool, in bounded batches.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import GlamError, UnavailableError
from glamd.events.store import OutboxTable

REPLAY_WINDOW: Final = timedelta(hours=72)
"""How long rows stay that were sent: JetStream acknowledges before its disk has them."""

LAG_EVERY_S: Final = 5.0
LAG_COUNT_LIMIT: Final = 100_000
"""No more are counted, so that counting costs the same however long NATS is away."""

PURGE_EVERY_S: Final = 60.0
PURGE_ROWS: Final = 1000
PURGE_BATCHES: Final = 2000
"""Of one purge; what is left goes with the next."""

REPLAY_ROWS: Final = 2000
"""Looked at, and sent again, before the next are: what happens meanwhile waits behind these."""

REPLAY_PATIENCE_S: Final = 30.0
REPLAY_LOOK_S: Final = 0.05

_LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)

log = structlog.get_logger()

_LAG_ROWS = Gauge(
    "glamd_events_lag_rows",
    f"Events that wait to be sent, counted up to {LAG_COUNT_LIMIT}, by the node that sends them.",
    ["outbox"],
)
_LAG_S = Gauge(
    "glamd_events_lag_seconds", "Since the oldest of them waits, by the same node.", ["outbox"]
)
_PURGED = Counter("glamd_events_purged_total", "Rows deleted after the window.", ["outbox"])


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxLag:
    """How much waits in an outbox, counted up to LAG_COUNT_LIMIT, and for how long already."""

    outbox: str
    rows: int
    oldest_s: float
    sent_here: bool


class OutboxUpkeep:
    """The upkeep of one outbox; purges and tells its lag only where it is sent from."""

    def __init__(
        self,
        table: OutboxTable,
        database: Database,
        *,
        clock: Clock,
        replay_window: timedelta,
        is_leading: Callable[[], bool],
        look_back: Callable[[], None],
    ) -> None:
        self._table = table
        self._database = database
        self._clock = clock
        self._replay_window = replay_window
        self._is_leading = is_leading
        self._look_back = look_back
        self._purged_at_s = float("-inf")
        self._lag_rows = _LAG_ROWS.labels(table.schema)
        self._lag_s = _LAG_S.labels(table.schema)

    async def run(self) -> None:
        """Measure and purge until cancelled; no error ends it."""
        while True:
            try:
                await self._look()
            except GlamError as error:
                log.warning("outbox_upkeep_failed", outbox=self._table.schema, code=error.code)
            except Exception:
                log.exception("outbox_upkeep_crashed", outbox=self._table.schema)
            await asyncio.sleep(LAG_EVERY_S)

    async def _look(self) -> None:
        if not self._is_leading():
            self._lag_rows.set(0)
            self._lag_s.set(0)
            return
        lag = await self.lag()
        self._lag_rows.set(lag.rows)
        self._lag_s.set(lag.oldest_s)
        if self._clock.monotonic_s() - self._purged_at_s >= PURGE_EVERY_S:
            self._purged_at_s = self._clock.monotonic_s()
            await self.purge()

    async def lag(self) -> OutboxLag:
        """What waits now. UnavailableError."""
        rows, oldest_at = await self._table.waiting(self._database, most=LAG_COUNT_LIMIT)
        oldest_s = 0.0
        if oldest_at is not None:
            oldest_s = max(0.0, (self._clock.now() - oldest_at).total_seconds())
        return OutboxLag(
            outbox=self._table.schema, rows=rows, oldest_s=oldest_s, sent_here=self._is_leading()
        )

    async def purge(self) -> int:
        """Delete what was sent before the window, in batches; how many. UnavailableError."""
        now = self._clock.now()
        above: datetime | None = _LONG_AGO
        purged = 0
        for _ in range(PURGE_BATCHES):
            if above is None:
                break
            count, last_at = await self._table.purge(
                self._database,
                above=above,
                now=now,
                window=self._replay_window,
                limit=PURGE_ROWS,
            )
            purged += count
            above = last_at if count == PURGE_ROWS else None
        if purged:
            _PURGED.labels(self._table.schema).inc(purged)
            log.info("outbox_purged", outbox=self._table.schema, rows=purged)
        return purged

    async def replay(
        self, *, since: datetime, subject: str | None, merchant_id: UUID | None
    ) -> int:
        """Have sent again what was sent since then; how many. UnavailableError (see `Relay`)."""
        until = await self._table.now(self._database)
        replayed, after = 0, max(since, _LONG_AGO) - timedelta(microseconds=1)
        while found := await self._table.send_again(
            self._database,
            after=after,
            until=until,
            subject=subject,
            merchant_id=merchant_id,
            limit=REPLAY_ROWS,
        ):
            after, ids = found
            if ids:
                replayed += len(ids)
                self._look_back()
                await self._until_sent(ids)
        log.info("events_replayed", outbox=self._table.schema, events=replayed)
        return replayed

    async def _until_sent(self, ids: list[int]) -> None:
        began_s = self._clock.monotonic_s()
        while await self._table.still_waiting(self._database, ids):
            if self._clock.monotonic_s() - began_s >= REPLAY_PATIENCE_S:
                raise UnavailableError("The events wait to be sent again, and are not taken now.")
            await asyncio.sleep(REPLAY_LOOK_S)
