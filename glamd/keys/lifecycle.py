"""The life of a data key's versions: rotate, retire, destroy, and how far all of that is.

    active ──rotate──> decrypt-only ──retire──> retired ──destroy──> destroyed

Each step is one transaction, decided under the lock of the rows that it is about, and written down
in the audit log before it commits; a refusal is written down too. What brings the rows along is
`reencryption`; that no row needs a version is asked anew here, of all rows at one moment, while
nobody can seal with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog
from prometheus_client import Gauge

from glamd.clock import Clock
from glamd.db import Connection
from glamd.errors import ConflictError, FieldError, GlamError, NotFoundError, UnavailableError
from glamd.keys import store
from glamd.keys.keyrings import FINGERPRINTS, AnyKeyring, DataKey, Keyring
from glamd.keys.operations import Operations
from glamd.keys.sealed_rows import CountedRows
from glamd.keys.store import KeyVersion, Progress
from glamd.keys.version_names import is_name, next_name

LOOK_TIMEOUT_S: Final = 300
"""How long it may take to look at all rows; nobody seals with the version meanwhile."""
COUNT_LIMIT: Final = 100_000
"""Rows in use are counted so far: who is refused wants to know whether it is few or many."""
STATUS_TIMEOUT_S: Final = 20
"""How long a count for an operator who looks on may take."""
WARN_EVERY: Final = timedelta(hours=1)
ITSELF: Final = "glamd"
"""The actor of what the daemon does by itself."""

log = structlog.get_logger()

_AGE_S = Gauge("glamd_keys_active_age_seconds", "Age of the active version.", ["keyring"])
_OVERDUE = Gauge(
    "glamd_keys_cryptoperiod_over", "1 where the active version is past it.", ["keyring"]
)


class Job(Protocol):
    """The re-encryption of one keyring."""

    @property
    def keyring(self) -> Keyring[DataKey]:
        """Whose rows it brings to the active version."""

    @property
    def rows(self) -> CountedRows:
        """Those rows."""

    def wake(self) -> None:
        """Look at once whether there is something to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyringStatus:
    """Where a keyring stands; `remaining` rows are not sealed with its active version yet.

    `rate` is in rows a second since the rotation, `eta_s` None where it cannot be told. `damaged`
    rows do not open; they stay as they are, and so does the version that they name.
    """

    active: str
    remaining: int
    rate: float
    eta_s: float | None
    done: int
    damaged: int
    started_at: datetime | None
    finished_at: datetime | None
    cryptoperiod_ends_at: datetime | None
    warnings: tuple[str, ...]
    versions: tuple[KeyVersion, ...]


class KeyLife:
    """What operators do to keyrings, and what a cryptoperiod does."""

    def __init__(
        self,
        keyrings: Sequence[AnyKeyring],
        *,
        jobs: Sequence[Job],
        operations: Operations,
        clock: Clock,
        cryptoperiods: Mapping[str, timedelta],
        rotate_automatically: bool,
    ) -> None:
        """`jobs` re-encrypt those keyrings whose rows can be; `cryptoperiods` are by keyring."""
        self._keyrings = {keyring.name: keyring for keyring in keyrings}
        self._jobs = {job.keyring.name: job for job in jobs}
        self._operations = operations
        self._clock = clock
        self._cryptoperiods = dict(cryptoperiods)
        self._rotate_automatically = rotate_automatically
        self._warned: dict[tuple[str, str], datetime] = {}

    async def rotate(self, keyring: str, *, actor: str) -> KeyVersion:
        """Make the next version active at once, and have the rows follow; the new version.

        NotFoundError KEYRING_NOT_FOUND; ConflictError KEYRING_NEVER_ROTATES for fingerprints, and
        KEY_ROTATED_MEANWHILE where somebody else was faster; CryptoError, UnavailableError.
        """
        async with self._operations.recording_refusal(
            "keys.rotate", subject=self._subject(keyring), actor=actor
        ):
            ring = self._ring(keyring)
            if keyring == FINGERPRINTS:
                raise ConflictError(
                    "The fingerprint key is never rotated: the same card would get another"
                    " fingerprint, and nothing that was kept by one would be found again.",
                    code="KEYRING_NEVER_ROTATES",
                    fields=(FieldError("keyring", "fingerprints is never rotated"),),
                )
            versions = await store.keys(ring.database, ring.schema, keyring)
            return await self._rotate(ring, versions, actor)

    async def retire(self, keyring: str, version: str, *, actor: str) -> KeyVersion:
        """Say for good that no row needs this version and none may be sealed with it.

        NotFoundError KEYRING_NOT_FOUND, KEY_VERSION_NOT_FOUND; ConflictError KEY_STATUS unless it
        is decrypt-only, KEY_IN_USE while a row needs it, which has the re-encryption start again;
        UnavailableError.
        """
        async with self._operations.recording_refusal(
            "keys.retire", subject=self._subject(keyring, version), actor=actor
        ):
            ring = self._ring(keyring)
            _want(await self._found(ring, version), _RETIRE)
            job = self._job(keyring)
            # Asked twice: first without a lock, so that a refusal holds up nobody.
            async with ring.database.transaction() as connection:
                in_use = await _using(connection, job, version)
            await self._want_unused(ring, version, in_use)
            await self._end(ring, job, version, _RETIRE, actor)
        await self._reload(ring)
        log.info("key_retired", keyring=keyring, version=version, actor=actor)
        return await self._found(ring, version)

    async def destroy(self, keyring: str, version: str, *, actor: str) -> KeyVersion:
        """Erase the wrapped key of a retired version, for good.

        Errors as `retire`, with KEY_STATUS unless it is retired.
        """
        async with self._operations.recording_refusal(
            "keys.destroy", subject=self._subject(keyring, version), actor=actor
        ):
            ring = self._ring(keyring)
            _want(await self._found(ring, version), _DESTROY)
            await self._end(ring, self._job(keyring), version, _DESTROY, actor)
        await self._reload(ring)
        log.warning("key_destroyed", keyring=keyring, version=version, actor=actor)
        return await self._found(ring, version)

    async def status(self) -> Mapping[str, KeyringStatus]:
        """Where each keyring stands; CryptoError, UnavailableError."""
        return {name: await self._status(ring) for name, ring in self._keyrings.items()}

    async def check_periods(self) -> None:
        """Warn of every keyring that is past its cryptoperiod, or rotate it; to be called often."""
        failed: GlamError | None = None
        for ring in self._keyrings.values():
            try:
                await self._check_period(ring)
            except GlamError as error:
                failed = error  # the others have their turn all the same
        if failed is not None:
            raise failed

    async def _check_period(self, ring: AnyKeyring) -> None:
        name = ring.name
        versions = await store.keys(ring.database, ring.schema, name)
        active = _active(versions)
        since = active.activated_at or active.created_at
        now = self._clock.now()
        _AGE_S.labels(name).set((now - since).total_seconds())
        ends_at = self._ends_at(name, active)
        is_over = ends_at is not None and ends_at <= now
        _OVERDUE.labels(name).set(is_over)
        if is_over:
            self._warn(name, active, now)
            if self._rotate_automatically:
                await self._rotate_by_itself(ring, versions)

    async def _rotate_by_itself(self, ring: AnyKeyring, versions: Sequence[KeyVersion]) -> None:
        try:
            async with self._operations.recording_refusal(
                "keys.rotate", subject=ring.name, actor=ITSELF
            ):
                await self._rotate(ring, versions, ITSELF)
        except ConflictError:
            log.info("key_rotated_by_another_node", keyring=ring.name)

    async def _rotate(
        self, ring: AnyKeyring, versions: Sequence[KeyVersion], actor: str
    ) -> KeyVersion:
        """Put a next version in place of the one that is active among these."""
        before = _active(versions)
        key = await ring.make(next_name(before.version, {one.version for one in versions}))
        at = self._clock.now()
        async with ring.database.transaction() as connection:
            locked = await store.lock_keyring(connection, ring.schema, ring.name)
            # Who waited for the lock sees the one that was active, and what it is now.
            if not any(one.version == before.version and one.status == "active" for one in locked):
                raise ConflictError(
                    "Somebody else has just rotated this keyring.", code="KEY_ROTATED_MEANWHILE"
                )
            after = max(one.created_at for one in locked)
            made = await store.replace_active(connection, ring.schema, key, at=at, after=after)
            if ring.name in self._jobs:
                await store.begin_reencryption(connection, ring.schema, ring.name, key.version)
            await self._done("keys.rotate", f"{ring.name}:{key.version}", actor)
        await self._reload(ring)
        self._wake(ring.name)
        log.info("key_rotated", keyring=ring.name, version=key.version, kcv=key.kcv, actor=actor)
        return made

    async def _end(
        self, ring: AnyKeyring, job: Job, version: str, ending: "_Ending", actor: str
    ) -> None:
        """Take the version so far, unless rows need it."""
        async with ring.database.transaction() as connection:
            # From here on whoever would seal with it waits, and then learns that it has ended.
            locked = await store.lock_version(connection, ring.schema, ring.name, version)
            _want(_there(locked), ending)
            in_use = await _using(connection, job, version)
            if not in_use:
                at = self._clock.now()
                await store.end(connection, ring.schema, ring.name, version, ending.after, at=at)
                await self._done(ending.action, f"{ring.name}:{version}", actor)
        await self._want_unused(ring, version, in_use)

    async def _want_unused(self, ring: AnyKeyring, version: str, in_use: int) -> None:
        """Refuse where rows need the version, and have their re-encryption start again."""
        if not in_use:
            return
        async with ring.database.transaction() as connection:
            await store.resume_reencryption(connection, ring.schema, ring.name)
        self._wake(ring.name)
        raise _in_use(version, in_use)

    def _wake(self, keyring: str) -> None:
        job = self._jobs.get(keyring)
        if job is not None:
            job.wake()

    async def _status(self, ring: AnyKeyring) -> KeyringStatus:
        versions = await store.keys(ring.database, ring.schema, ring.name)
        active = _active(versions)
        progress = await store.progress(ring.database, ring.schema, ring.name)
        remaining = await self._remaining(ring, active.version, progress)
        rate = progress.done / progress.busy_s if progress and progress.busy_s else 0.0
        ends_at = self._ends_at(ring.name, active)
        damaged = 0 if progress is None else progress.damaged
        warnings = []
        if ends_at is not None and ends_at <= self._clock.now():
            warnings.append(f"{active.version} is past its cryptoperiod: rotate it")
        if damaged:
            warnings.append(f"{damaged} rows do not open; the log names them (row_unsealable)")
        return KeyringStatus(
            active=active.version,
            remaining=remaining,
            rate=round(rate, 1),
            eta_s=round(remaining / rate, 1) if rate else (None if remaining else 0.0),
            done=0 if progress is None else progress.done,
            damaged=damaged,
            started_at=None if progress is None else progress.started_at,
            finished_at=None if progress is None else progress.finished_at,
            cryptoperiod_ends_at=ends_at,
            warnings=tuple(warnings),
            versions=versions,
        )

    async def _remaining(self, ring: AnyKeyring, active: str, progress: Progress | None) -> int:
        """As the job has counted; where it has not yet, as many as there are, up to a limit."""
        job = self._jobs.get(ring.name)
        if job is None or progress is None:
            return 0
        if progress.remaining is not None and progress.target == active:
            return progress.remaining
        async with ring.database.transaction() as connection:
            await store.lengthen(connection, STATUS_TIMEOUT_S)
            return await job.rows.stale(
                connection, active, limit=COUNT_LIMIT, timeout_s=STATUS_TIMEOUT_S + 1
            )

    def _ends_at(self, keyring: str, active: KeyVersion) -> datetime | None:
        period = self._cryptoperiods.get(keyring)
        if period is None or keyring == FINGERPRINTS:
            return None
        return (active.activated_at or active.created_at) + period

    def _warn(self, keyring: str, active: KeyVersion, now: datetime) -> None:
        warned = self._warned.get((keyring, active.version))
        if warned is None or now - warned >= WARN_EVERY:
            self._warned[keyring, active.version] = now
            log.warning("key_cryptoperiod_over", keyring=keyring, version=active.version)

    def _job(self, keyring: str) -> Job:
        job = self._jobs.get(keyring)
        if job is None:
            raise _not_retirable(keyring)
        return job

    def _ring(self, name: str) -> AnyKeyring:
        ring = self._keyrings.get(name)
        if ring is None:
            known = ", ".join(self._keyrings)
            raise NotFoundError(
                "There is no such keyring.",
                code="KEYRING_NOT_FOUND",
                fields=(FieldError("keyring", f"it is one of {known}"),),
            )
        return ring

    async def _found(self, ring: AnyKeyring, version: str) -> KeyVersion:
        versions = await store.keys(ring.database, ring.schema, ring.name)
        return _there(next((one for one in versions if one.version == version), None))

    async def _reload(self, ring: AnyKeyring) -> None:
        """Know here at once what is done; where that fails the watch learns it, as everywhere."""
        try:
            await ring.reload()
        except GlamError as error:
            log.warning("keyring_not_reloaded", keyring=ring.name, code=error.code)

    async def _done(self, action: str, subject: str, actor: str) -> None:
        """Written down before the commit: an audit row too many is better than one too few."""
        await self._operations.write_down(action, subject=subject, actor=actor, outcome="ok")

    def _subject(self, keyring: str, version: str | None = None) -> str:
        """What it is about, for the audit log, which takes no text that anybody may have typed."""
        ring = keyring if keyring in self._keyrings else "unknown"
        if version is None:
            return ring
        return f"{ring}:{version if is_name(version) else 'unknown'}"


def _active(versions: Sequence[KeyVersion]) -> KeyVersion:
    for one in versions:
        if one.status == "active":
            return one
    raise UnavailableError("The keyring has no active version.")


def _there(found: KeyVersion | None) -> KeyVersion:
    if found is None:
        raise NotFoundError(
            "There is no such version of this key.",
            code="KEY_VERSION_NOT_FOUND",
            fields=(FieldError("version", "there is no such version; see keys list"),),
        )
    return found


@dataclass(frozen=True, slots=True)
class _Ending:
    """A step at the end of a version's life, which no row may need."""

    action: str
    before: store.KeyStatus
    after: store.EndStatus


_RETIRE: Final = _Ending("keys.retire", "decrypt-only", "retired")
_DESTROY: Final = _Ending("keys.destroy", "retired", "destroyed")


def _want(found: KeyVersion, ending: _Ending) -> None:
    if found.status != ending.before:
        raise ConflictError(
            f"Only a version that is {ending.before} can be {ending.after}; {found.version} is"
            f" {found.status}.",
            code="KEY_STATUS",
            fields=(FieldError("version", f"it is {found.status}"),),
        )


async def _using(connection: Connection, job: Job, version: str) -> int:
    await store.lengthen(connection, LOOK_TIMEOUT_S)
    return await job.rows.using(
        connection, version, limit=COUNT_LIMIT, timeout_s=LOOK_TIMEOUT_S + 1
    )


def _in_use(version: str, rows: int) -> ConflictError:
    at_least = "at least " if rows >= COUNT_LIMIT else ""
    return ConflictError(
        f"The version {version} is needed by {at_least}{rows} rows; they are being re-encrypted,"
        " see keys status.",
        code="KEY_IN_USE",
        fields=(FieldError("version", f"{at_least}{rows} rows need it"),),
    )


def _not_retirable(keyring: str) -> ConflictError:
    return ConflictError(
        f"A version of {keyring} is needed for as long as what was made with it is kept: it is"
        " never re-encrypted.",
        code="KEY_IN_USE",
        fields=(FieldError("keyring", "its rows are not re-encrypted"),),
    )
