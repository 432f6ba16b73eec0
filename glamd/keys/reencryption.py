"""Re-encryption: the background job that has every row of a keyring sealed with its active version.

It walks the rows in the order in which they lie on the disk and keeps its place in the database, so
that whoever comes next goes on there; one node works at a time. What the rows are and where they
lie is said by a `SealedRows`, which the rooms that own them implement; how fast it goes by
`throttle`. SQL stands in `store`. When a version may be retired is for `lifecycle`: this job says
how much is left, and that is never taken for proof.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final, Generic

import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.errors import CryptoError, GlamError
from glamd.keys import store
from glamd.keys.keyrings import DataKey, Keyring
from glamd.keys.sealed_rows import R, SealedRows, Span
from glamd.keys.store import Progress, Step
from glamd.keys.throttle import Throttle

POLL_S: Final = 5.0
"""How often a node looks whether there is something to do."""
LEASE_S: Final = 15.0
"""How long after the last word of the node that works another one takes over."""
KEEP_EVERY_S: Final = 1.0
"""How often the place is kept: what was done since is found done by whoever goes on."""
SLICE_ROWS: Final = 128
"""Rows that are sealed before the event loop has its turn: about a millisecond."""
WALK_PAGES_FIRST: Final = 16
WALK_PAGES_MOST: Final = 256
SURVEY_PAGES: Final = 1024
"""Pages of 8 KiB that are counted by one statement."""
DAMAGED_KNOWN: Final = 10_000
"""Damaged rows that are remembered, so that each is logged once by a process."""

log = structlog.get_logger()

_DONE = Counter("glamd_keys_reencrypted_rows_total", "Rows sealed anew.", ["keyring"])
_REMAINING = Gauge(
    "glamd_keys_reencryption_remaining_rows", "Rows still to be sealed anew.", ["keyring"]
)
_SPEED = Gauge(
    "glamd_keys_reencryption_speed_ratio", "How fast it goes, of the full speed.", ["keyring"]
)
_UNSEALABLE = Counter(
    "glamd_keys_unsealable_rows_total", "Rows that do not open, and so stay.", ["keyring"]
)


@dataclass(frozen=True, slots=True)
class _Sealed(Generic[R]):
    """What is to be written: the old and the new of a span's rows that open."""

    span: Span
    found: int
    changes: Sequence[tuple[R, R]] = field(repr=False)


class _LostError(Exception):
    """The lease is another's, or there is a newer version to seal with."""


class Reencryption(Generic[R]):
    """Brings the rows of one keyring to its active version, whenever there is one to come to."""

    def __init__(
        self,
        keyring: Keyring[DataKey],
        rows: SealedRows[R],
        *,
        throttle: Throttle,
        clock: Clock,
        node_id: str,
        settled_after_s: float,
        poll_s: float = POLL_S,
        lease_s: float = LEASE_S,
    ) -> None:
        """`settled_after_s` after a rotation every node has to know of it: twice their reload."""
        self.keyring = keyring
        self.rows = rows
        self._throttle = throttle
        self._clock = clock
        # A process that was killed is another owner than the one that is started in its place.
        self._owner = f"{node_id}:{os.urandom(4).hex()}"
        self._settled_after_s = settled_after_s
        self._poll_s = poll_s
        self._lease_s = lease_s
        self._woken = asyncio.Event()
        self._damaged: set[tuple[str, str]] = set()

    def wake(self) -> None:
        """Look at once whether there is something to do."""
        self._woken.set()

    async def run(self) -> None:
        """Work whenever there is something to do, until cancelled."""
        name = self.keyring.name
        while True:
            try:
                await self.work()
            except GlamError as error:
                log.warning("reencryption_interrupted", keyring=name, code=error.code)
            except Exception:
                # A bug in here must not end the daemon, which serves without it.
                log.exception("reencryption_crashed", keyring=name)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._woken.wait()
            self._woken.clear()

    async def work(self) -> None:
        """Do what there is to do, if nobody else does it; raises what the database raises."""
        keyring = self.keyring
        leased = await store.lease(
            keyring.database,
            keyring.schema,
            keyring.name,
            owner=self._owner,
            for_s=self._lease_s,
            settled_after_s=self._settled_after_s,
        )
        if leased is None:
            return
        progress, is_settled = leased
        try:
            await self._bring(progress, is_settled=is_settled)
        except _LostError:
            self.wake()
        finally:
            with suppress(GlamError):
                await store.release(
                    keyring.database, keyring.schema, keyring.name, owner=self._owner
                )

    async def _bring(self, progress: Progress, *, is_settled: bool) -> None:
        if progress.remaining == 0:
            if not is_settled:
                return  # a node that did not know yet may still seal with what it has
            progress = replace(progress, remaining=None, position="")
        walk = _Walk(progress, await self.keyring.version(progress.target), self._clock)
        has_walked = False
        while True:
            if walk.remaining is None:
                walk.remaining = await self._survey(walk)
                await self._keep(walk)
            if walk.remaining == 0:
                break
            if has_walked and not walk.has_advanced:
                if walk.has_left or walk.remaining > walk.damaged:
                    return  # somebody holds on to a row, or moved some; the next look tries again
                break  # what does not open now will not open later
            # One that began in the middle says nothing of rows that lie before, perhaps since then.
            has_walked = not walk.position
            await self._pass(walk)
        if is_settled:
            await self._keep(walk, is_finished=True)
            log.info(
                "reencryption_finished",
                keyring=self.keyring.name,
                version=progress.target,
                passes=walk.pass_number,
                damaged=walk.damaged,
            )

    async def _survey(self, walk: "_Walk") -> int:
        """How many rows there are to do."""
        found = 0
        for part in await self.rows.parts():
            for first in range(0, part.pages, SURVEY_PAGES):
                span = Span(part.name, first, min(first + SURVEY_PAGES, part.pages))
                async with self._throttled():
                    found += await self.rows.count(span, target=walk.target)
                await self._keep_if_due(walk)
        return found

    async def _pass(self, walk: "_Walk") -> None:
        """Walk over all parts once, from the place where somebody stopped."""
        begun_part, _, begun_page = walk.position.rpartition(" ")
        if not walk.position:
            walk.begin_pass()
        log.info(
            "reencryption_pass",
            keyring=self.keyring.name,
            version=walk.target,
            number=walk.pass_number,
            remaining=walk.remaining,
        )
        pages = WALK_PAGES_FIRST
        sealed: _Sealed[R] | None = None
        for part in sorted(await self.rows.parts(), key=lambda part: part.name):
            if part.name < begun_part:
                continue
            first = int(begun_page) if part.name == begun_part else 0
            while first < part.pages:
                span = Span(part.name, first, min(first + pages, part.pages))
                sealed = await self._step(sealed, span, walk)
                if sealed.found > self._throttle.rows:
                    pages = max(1, pages // 2)
                elif 2 * sealed.found < self._throttle.rows:
                    pages = min(2 * pages, WALK_PAGES_MOST)
                first = span.end
                await self._keep_if_due(walk)
        if sealed is not None:
            async with self._throttled():
                await self._write(sealed, walk)
        walk.end_pass()
        await self._keep(walk)

    async def _step(self, sealed: "_Sealed[R] | None", span: Span, walk: "_Walk") -> "_Sealed[R]":
        """Write what is sealed, and at the same time read and seal what comes next.

        The server works on the one while this process works on the other, unless there is traffic.
        """
        if sealed is not None and not self._throttle.is_idle:
            # Beside traffic one core is left to it.
            async with self._throttled():
                await self._write(sealed, walk)
            sealed = None
        async with self._throttled():
            if sealed is None:
                return await self._read(span, walk)
            name = f"reencryption-write:{self.keyring.name}"
            writing = asyncio.create_task(self._write(sealed, walk), name=name)
            try:
                following = await self._read(span, walk)
            except BaseException:
                writing.cancel()
                await asyncio.wait((writing,))
                raise
            await writing
            return following

    async def _read(self, span: Span, walk: "_Walk") -> "_Sealed[R]":
        rows = await self.rows.fetch(span, target=walk.target)
        return _Sealed(span, len(rows), await self._resealed(rows, walk))

    async def _write(self, sealed: "_Sealed[R]", walk: "_Walk") -> None:
        rows = self._throttle.rows
        for at in range(0, len(sealed.changes), rows):
            changes = sealed.changes[at : at + rows]
            done = await self.rows.write(sealed.span, changes, target=walk.target)
            walk.did(done, of=len(changes))
            _DONE.labels(self.keyring.name).inc(done)
        walk.position = f"{sealed.span.part} {sealed.span.end}"

    async def _resealed(self, rows: Sequence[R], walk: "_Walk") -> list[tuple[R, R]]:
        keys: dict[str, DataKey | CryptoError] = {}
        for version in {row.key_version for row in rows}:
            try:
                keys[version] = await self.keyring.version(version)
            except CryptoError as error:
                keys[version] = error
        changes: list[tuple[R, R]] = []
        for at in range(0, len(rows), SLICE_ROWS):
            for row in rows[at : at + SLICE_ROWS]:
                try:
                    changes.append((row, self._reseal(row, keys[row.key_version], walk.key)))
                except CryptoError as error:
                    walk.damaged += 1
                    self._report(row, error)
            await asyncio.sleep(0)
        return changes

    def _reseal(self, row: R, old: DataKey | CryptoError, new: DataKey) -> R:
        if isinstance(old, CryptoError):
            raise old
        return self.rows.reseal(row, old=old, new=new)

    def _report(self, row: R, error: CryptoError) -> None:
        known = (row.row_id, row.key_version)
        if known in self._damaged:
            return
        if len(self._damaged) < DAMAGED_KNOWN:
            self._damaged.add(known)
        _UNSEALABLE.labels(self.keyring.name).inc()
        log.error(
            "row_unsealable",
            keyring=self.keyring.name,
            row=row.row_id,
            key_version=row.key_version,
            why=error.message,
        )

    @asynccontextmanager
    async def _throttled(self) -> AsyncIterator[None]:
        """One step of the work, and the rest after it."""
        self._throttle.begin()
        try:
            yield
        finally:
            pause_s = self._throttle.end()
        _SPEED.labels(self.keyring.name).set(self._throttle.speed)
        if pause_s > 0:
            await asyncio.sleep(pause_s)

    async def _keep_if_due(self, walk: "_Walk") -> None:
        if self._clock.monotonic_s() - walk.kept_at_s >= KEEP_EVERY_S:
            await self._keep(walk)

    async def _keep(self, walk: "_Walk", *, is_finished: bool = False) -> None:
        keyring = self.keyring
        kept = await store.keep_step(
            keyring.database,
            keyring.schema,
            keyring.name,
            walk.step(is_finished=is_finished),
            owner=self._owner,
            target=walk.target,
            for_s=self._lease_s,
        )
        if not kept:
            raise _LostError
        walk.kept()
        if walk.remaining is not None:
            _REMAINING.labels(keyring.name).set(walk.remaining)


class _Walk:
    """How far the work of one lease is, and what of it is not kept yet."""

    def __init__(self, progress: Progress, key: DataKey, clock: Clock) -> None:
        self.key = key
        self.target = progress.target
        self.position = progress.position
        self.pass_number = progress.pass_number
        self.remaining = progress.remaining
        self.damaged = progress.damaged
        self._clock = clock
        self.kept_at_s = clock.monotonic_s()
        self._began_pass_s: float | None = None
        self._busy_s = 0.0
        self._newly_done = 0
        self._done = 0
        self._left = 0
        if self.position:
            self._began_pass_s = self.kept_at_s

    def begin_pass(self) -> None:
        """From the first page on."""
        self.pass_number += 1
        self.damaged = 0
        self._done = self._left = 0
        self._began_pass_s = self._clock.monotonic_s()

    def end_pass(self) -> None:
        """What is left must be counted again: rows move while they are walked over."""
        self._count_busy()
        self._began_pass_s = None
        self.position = ""
        self.remaining = None

    def did(self, done: int, *, of: int) -> None:
        """So many rows were written, of those that were sealed anew."""
        self._newly_done += done
        self._done += done
        self._left += of - done
        if self.remaining is not None:
            # Not zero before a count has said so.
            self.remaining = max(1, self.remaining - done)

    @property
    def has_advanced(self) -> bool:
        """Whether the pass has brought a row further."""
        return self._done > 0

    @property
    def has_left(self) -> bool:
        """Whether it has left rows that open, since they changed or were locked."""
        return self._left > 0

    def step(self, *, is_finished: bool) -> Step:
        """What is not kept yet."""
        self._count_busy()
        return Step(
            position=self.position,
            pass_number=self.pass_number,
            remaining=self.remaining,
            newly_done=self._newly_done,
            damaged=self.damaged,
            newly_busy_s=self._busy_s,
            is_finished=is_finished,
        )

    def kept(self) -> None:
        """All of it is kept."""
        self.kept_at_s = self._clock.monotonic_s()
        self._newly_done = 0
        self._busy_s = 0.0

    def _count_busy(self) -> None:
        if self._began_pass_s is not None:
            now_s = self._clock.monotonic_s()
            self._busy_s += now_s - self._began_pass_s
            self._began_pass_s = now_s
