"""Group commit: many callers' entries in one statement, each answered after the commit.

A capability hands over how one batch is written; this file decides when. It flushes whenever one
of its connections is idle and never waits for company: while a commit is under way the next batch
fills by itself, so batches grow with the load and a lone caller pays no linger time. Where several
connections are idle they share what waits, so that the server works on one part while the answers
of another are dealt with.

No SQL and no rule of any capability stands here.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeAlias, TypeVar

import structlog
from prometheus_client import Counter, Gauge, Histogram

from glamd.db import Connection, Database
from glamd.errors import GlamError, InternalError, UnavailableError

E = TypeVar("E")
R = TypeVar("R")
Commit: TypeAlias = Callable[[Connection, Sequence[E]], Awaitable[Sequence[R]]]
_Waiting: TypeAlias = tuple[E, asyncio.Future[R]]

SHARE_ENTRIES: Final = 8
"""Idle connections share what waits where each gets so many; smaller parts cost more than they
win (measured at 16 and 64 in flight: 1.2 times as fast with it)."""

QUEUE_LIMIT: Final = 8192
"""Entries that may wait; one more is refused at once, which the caller may retry."""

log = structlog.get_logger()

_BATCH_ENTRIES = Histogram(
    "glamd_journal_batch_entries",
    "Entries committed together.",
    ["journal"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
_COMMIT_S = Histogram(
    "glamd_journal_commit_seconds",
    "Time of one group commit.",
    ["journal"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5),
)
_QUEUED = Gauge("glamd_journal_queued_entries", "Entries waiting for a connection.", ["journal"])
_FAILED = Counter("glamd_journal_failed_total", "Group commits that failed.", ["journal", "code"])


class Journal(Generic[E, R]):
    """Commits entries in groups over a few connections of its own.

    `commit(connection, entries)` writes a batch in one transaction and returns one result an entry,
    in order. When it raises, every entry of the batch gets that error, except that a batch which
    fails for a reason of its own (not a database that is away) is taken apart and tried entry by
    entry, so that one bad entry does not fail its neighbours. `committed` is called after each
    commit, before anybody is answered, `observe` with the seconds that each one took.
    """

    def __init__(
        self,
        *,
        name: str,
        database: Database,
        commit: Commit[E, R],
        connections: int = 2,
        batch_limit: int = 256,
        queue_limit: int = QUEUE_LIMIT,
        committed: Callable[[], None] | None = None,
        observe: Callable[[float], None] | None = None,
    ) -> None:
        self._name = name
        self._database = database
        self._commit = commit
        self._connections = connections
        self._batch_limit = batch_limit
        self._queue_limit = queue_limit
        self._committed = committed
        self._observe = observe
        self._queue: deque[_Waiting[E, R]] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._busy = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = True
        self._batch_entries = _BATCH_ENTRIES.labels(name)
        self._commit_s = _COMMIT_S.labels(name)
        _QUEUED.labels(name).set_function(lambda: len(self._queue))

    def submit(self, entry: E) -> asyncio.Future[R]:
        """Queue an entry; the future is done when its transaction is, or has failed.

        The future holds UnavailableError at once when the queue is full or the journal is closed.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(UnavailableError("The journal is closed.", code="DRAINING"))
        elif len(self._queue) >= self._queue_limit:
            future.set_exception(UnavailableError("Too many entries wait for the database."))
        else:
            self._queue.append((entry, future))
            while self._idle:
                waiter = self._idle.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    break
        return future

    async def start(self) -> None:
        """Start one writer a connection."""
        self._closed = False
        self._tasks = [
            asyncio.create_task(self._write(), name=f"journal:{self._name}:{n}")
            for n in range(self._connections)
        ]

    async def stop(self, timeout_s: float) -> None:
        """Refuse new entries, write what waits for at most `timeout_s`, then end the writers."""
        self._closed = True
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._queue:
            _, future = self._queue.popleft()
            if not future.done():
                future.set_exception(UnavailableError("The journal was stopped.", code="DRAINING"))

    async def _write(self) -> None:
        async with self._database.dedicated() as connection:
            while True:
                while not self._queue:
                    if self._closed:
                        return
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._idle.append(waiter)
                    await waiter
                batch = [self._queue.popleft() for _ in range(self._share())]
                self._busy += 1
                try:
                    await self._flush(connection, batch)
                finally:
                    self._busy -= 1

    def _share(self) -> int:
        """How much of what waits one connection takes."""
        waiting = len(self._queue)
        free = self._connections - self._busy
        parts = max(1, min(free, waiting // SHARE_ENTRIES))
        return min(-(-waiting // parts), self._batch_limit)

    async def _flush(self, connection: Connection, batch: Sequence[_Waiting[E, R]]) -> None:
        """Answer everybody in the batch, whatever happens; who has an answer keeps it."""
        try:
            await self._commit_all(connection, batch)
        except GlamError as error:
            self._fail(batch, error)
        except Exception:
            # A bug in a commit function must not leave anybody waiting.
            log.exception("journal_commit_crashed", journal=self._name)
            self._fail(batch, InternalError("A commit failed for a reason of our own."))
        except asyncio.CancelledError:
            self._fail(batch, UnavailableError("The journal was stopped.", code="DRAINING"))
            raise

    async def _commit_all(self, connection: Connection, batch: Sequence[_Waiting[E, R]]) -> None:
        try:
            await self._commit_batch(connection, batch)
        except GlamError as error:
            if isinstance(error, UnavailableError) or len(batch) == 1:
                raise
        else:
            return
        log.warning("journal_batch_taken_apart", journal=self._name, entries=len(batch))
        for one in batch:
            try:
                await self._commit_batch(connection, [one])
            except UnavailableError:
                # Those that come after it would each wait for the same server in vain.
                raise
            except GlamError as error:
                self._fail([one], error)

    async def _commit_batch(self, connection: Connection, batch: Sequence[_Waiting[E, R]]) -> None:
        began_s = time.perf_counter()
        results = await self._commit(connection, [entry for entry, _ in batch])
        # Checked before anybody is told: nobody could say whose result is missing.
        assert len(results) == len(batch), "a commit returns one result an entry"
        took_s = time.perf_counter() - began_s
        self._commit_s.observe(took_s)
        if self._observe is not None:
            self._observe(took_s)
        self._batch_entries.observe(len(batch))
        if self._committed is not None:
            self._committed()
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _fail(self, batch: Sequence[_Waiting[E, R]], error: GlamError) -> None:
        _FAILED.labels(self._name, error.code).inc()
        for _, future in batch:
            if not future.done():
                future.set_exception(error)
                # An asker that went away must not become a warning about an unheard error.
                future.exception()
