"""The jobs that tidy up after payment tokens: in bounded rounds, on any number of nodes.

A token's secret stands in the partition of the day on which it ends. Deleting it leaves its bytes
in the table's pages, also after VACUUM: they are gone when the partition is dropped, which is as
soon as its day is over and nothing in it lives, or, where that would be too late, when what lives
of it is written into new files.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge, Histogram

from glamd.batches import in_rounds
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import TransientError
from glamd.payments.life import store
from glamd.payments.life.store import Dirty
from glamd.payments.tokens import Tokens

ROWS: Final = 1000
"""Rows that one statement deletes."""
ROUNDS: Final = 100
"""Statements in a row that a job runs; the rest is for its next turn."""

DAYS_AHEAD_LIMIT: Final = 40
"""Days ahead that have a partition, however long tokens may live: every read plans for all of them.
What ends later stands in `token_secrets_other` until its day gets its partition."""
SPARE_DAYS: Final = 2
"""Days ahead beyond the longest life of a token, for a node whose jobs stand still."""

CHANGE_TIMEOUT_S: Final = 30.0
REWRITE_TIMEOUT_S: Final = 60.0
"""Seconds that writing a partition anew may block who needs it; the docs have its rate."""

PURGE_ROUNDS: Final = 10_000
"""For `purge_now`, which an operator waits for."""

log = structlog.get_logger()
_DELETED = Counter("glamd_payments_deleted_rows_total", "Rows deleted at their end.", ["what"])
_PARTITIONS = Counter("glamd_payments_partitions_total", "Partitions changed.", ["change"])
_AHEAD = Gauge("glamd_payments_partitions_ahead_days", "Days ahead that have a partition.")
_UNSHREDDED = Gauge(
    "glamd_payments_unshredded_age_seconds", "Age of the oldest bytes that are to be shredded."
)
_BLOCKED = Histogram(
    "glamd_payments_rewrite_seconds",
    "How long writing a partition anew took.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """What `purge_now` did: rows by what they were, and partitions by what became of them.

    `waiting` are partitions that could not be had: somebody reads them for long, such as a dump.
    """

    expired: int
    answers: int
    metadata: int
    dropped: tuple[str, ...]
    rewritten: tuple[str, ...]
    waiting: tuple[str, ...]


class TokenLife:
    """What becomes of tokens after their end; `tokens` announces the ends themselves."""

    def __init__(
        self,
        database: Database,
        *,
        tokens: Tokens,
        clock: Clock,
        default_ttl: timedelta,
        shred_within: timedelta,
        keep_metadata: timedelta,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._clock = clock
        self._default_ttl = default_ttl
        self._shred_within = shred_within
        self._keep_metadata = keep_metadata

    async def purge_answers(self, *, rounds: int = ROUNDS) -> int:
        """Delete the answers to requests whose 24 hours are over; how many. UnavailableError."""

        async def some() -> int:
            return await store.purge_answers(self._database, now=self._clock.now(), limit=ROWS)

        return _counted("answers", await in_rounds(some, full=ROWS, most=rounds))

    async def purge_metadata(self, *, rounds: int = ROUNDS) -> int:
        """Delete what is left of tokens that ended long ago; how many. UnavailableError."""

        async def some() -> int:
            return await store.purge_metadata(
                self._database, now=self._clock.now(), keep=self._keep_metadata, limit=ROWS
            )

        return _counted("metadata", await in_rounds(some, full=ROWS, most=rounds))

    async def begin(self) -> None:
        """Tend the partitions at a start, which does not fail for one that is busy.

        Somebody may be dumping the database for hours. The job tries again; tokens of a day that
        has no partition yet are kept elsewhere meanwhile.
        """
        with suppress(TransientError):
            await self.tend_partitions()

    async def tend_partitions(self) -> tuple[str, ...]:
        """Make the partitions of the days to come, drop those that are over; which were dropped.

        UnavailableError where one was busy; the others have had their turn.
        """
        today, longest = await store.today_and_longest_ttl(self._database)
        there = await store.days(self._database)
        ahead = max(self._default_ttl, longest or self._default_ttl).days + 1 + SPARE_DAYS
        wanted = [today + timedelta(days=n) for n in range(min(ahead, DAYS_AHEAD_LIMIT) + 1)]
        busy: TransientError | None = None
        for day in wanted:
            if day not in there:
                try:
                    await self._make(day)
                except TransientError as error:
                    busy = error
                    break
        if busy is None:
            _AHEAD.set((wanted[-1] - today).days)
        # Over by both clocks.
        over = min(today, self._clock.now().astimezone(UTC).date())
        dropped = []
        for day in there:
            if day < over:
                try:
                    dropped += await self._drop(day)
                except TransientError as error:
                    busy = error
        if busy is not None:
            raise busy
        return tuple(dropped)

    async def shred(self) -> tuple[str, ...]:
        """Write anew the partitions whose shredded bytes would stay for too long; which ones.

        UnavailableError where one was busy; the others have had their turn.
        """
        found = await store.dirty(self._database)
        _UNSHREDDED.set(found[0].age.total_seconds() if found else 0.0)
        rewritten, waiting = await self._rewrite([one for one in found if self._is_due(one)])
        if waiting:
            raise waiting[0][1]
        return rewritten

    async def purge_now(self) -> Purged:
        """Do everything that is due now or will be, without waiting for the jobs.

        Partitions are written anew however young their shredded bytes are. UnavailableError.
        """
        expired = 0
        while some := await self._tokens.announce_expired():
            expired += some
        answers = await self.purge_answers(rounds=PURGE_ROUNDS)
        metadata = await self.purge_metadata(rounds=PURGE_ROUNDS)
        before = await store.days(self._database)
        busy: list[str] = []
        try:
            await self.tend_partitions()
        except TransientError:
            busy.append("days")
        after = await store.days(self._database)
        rewritten, waiting = await self._rewrite(await store.dirty(self._database))
        left = await store.dirty(self._database)
        _UNSHREDDED.set(left[0].age.total_seconds() if left else 0.0)
        return Purged(
            expired=expired,
            answers=answers,
            metadata=metadata,
            dropped=tuple(_name(day) for day in before if day not in after),
            rewritten=rewritten,
            waiting=(*busy, *(name for name, _ in waiting)),
        )

    def _is_due(self, dirty: Dirty) -> bool:
        """Whether to write it anew; a quarter of the time is kept for when it is busy.

        One that will be dropped in time is left for that.
        """
        if dirty.age < self._shred_within * 0.75:
            return False
        day = _day(dirty.partition)
        if day is None or dirty.age >= self._shred_within:
            return True
        ends = datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
        return ends > dirty.since + self._shred_within

    async def _make(self, day: date) -> None:
        async with self._database.connection() as connection:
            made = await store.make(connection, day, timeout_s=CHANGE_TIMEOUT_S)
        if made:
            _PARTITIONS.labels("made").inc()
            log.info("secrets_partition_made", day=str(day))

    async def _drop(self, day: date) -> list[str]:
        async with self._database.connection() as connection:
            outcome = await store.drop(connection, day, timeout_s=CHANGE_TIMEOUT_S)
        if outcome == "has-rows":
            # The end of its last tokens is not announced yet, or their rows were tampered with.
            log.warning("secrets_partition_not_empty", day=str(day))
        if outcome != "dropped":
            return []
        _PARTITIONS.labels("dropped").inc()
        log.info("secrets_partition_dropped", day=str(day))
        return [_name(day)]

    async def _rewrite(
        self, found: list[Dirty] | tuple[Dirty, ...]
    ) -> tuple[tuple[str, ...], list[tuple[str, TransientError]]]:
        """Write partitions anew: those that were, and those that were busy, with the error."""
        rewritten: list[str] = []
        waiting: list[tuple[str, TransientError]] = []
        for one in found:
            began_s = self._clock.monotonic_s()
            try:
                async with self._database.connection() as connection:
                    rows = await store.rewrite(
                        connection, one.partition, timeout_s=REWRITE_TIMEOUT_S
                    )
            except TransientError as error:
                log.warning("secrets_partition_busy", partition=one.partition, code=error.code)
                waiting.append((one.partition, error))
                continue
            if rows is None:
                continue  # another node was faster, or dropped it
            took_s = self._clock.monotonic_s() - began_s
            _BLOCKED.observe(took_s)
            _PARTITIONS.labels("rewritten").inc()
            log.info(
                "secrets_partition_rewritten", partition=one.partition, rows=rows, took_s=took_s
            )
            rewritten.append(one.partition)
        return tuple(rewritten), waiting


def _counted(what: str, rows: int) -> int:
    _DELETED.labels(what).inc(rows)
    return rows


def _name(day: date) -> str:
    return f"token_secrets_{day:%Y%m%d}"


def _day(partition: str) -> date | None:
    """The day of a partition; None of `token_secrets_other`, which is never over."""
    text = partition.removeprefix("token_secrets_")
    return datetime.strptime(text, "%Y%m%d").replace(tzinfo=UTC).date() if text.isdigit() else None
