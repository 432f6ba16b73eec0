"""Taking over what the older token service kept, batch by batch.

A batch is one transaction: its tokens sealed under our keys with their ids, the access log, and how
far the import has come. Whatever ends it early, the next batch goes on where the last one that was
committed ended. A row that cannot be taken is counted and named and stops nothing.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, get_args
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.clock import Clock
from glamd.credentials.importing import store
from glamd.credentials.importing.older import (
    UNDECRYPTABLE,
    OlderKey,
    OlderRow,
    platform_of,
    read_row,
    uuid_of,
)
from glamd.credentials.importing.store import LogEntry, ProgressRow, SealedToken
from glamd.credentials.model import Accessor
from glamd.credentials.sealing import seal, with_usable_key
from glamd.db import Connection, Database
from glamd.errors import ConflictError, CryptoError, FieldError, InputError
from glamd.keys.keyrings import DataKey, Keyring

NAME: Final = "platform-tokens"
"""The import's row in `glam.imports`."""

BATCH_LIMIT: Final = 500
"""Rows in a batch: what one transaction may hold, and one body of 256 KiB mostly does."""

DOUBT_ROWS: Final = 10
"""As many rows that do not open, before any did, are a wrong key and no damage."""

POSITION_LIMIT: Final = 128
SOURCE_LIMIT: Final = 128

HOLD_H: Final = 24
HOLD_LIMIT_H: Final = 144
"""Hours for which no imported token is renewed, where nothing is said and at most: with a refresh
the older service's copy of the token may die. A longer pause than `refresh.store.BACK_OFF_MAX`
would be taken for a wrong clock's."""

Outcome = Literal["taken", "updated", "already", "superseded", "undecryptable", "invalid"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

log = structlog.get_logger()

_ROWS = Counter("glamd_credentials_imported_rows_total", "Older rows, by outcome.", ["outcome"])


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderBatch:
    """1 to BATCH_LIMIT rows in the order of the import.

    `source` is a fingerprint of where they come from, `after` the position in there that they come
    after, as the batch before was answered with it, None for none; with `restart` they are the
    first ones again, whatever there was. For as long as `hold_renewal`, HOLD_LIMIT_H at most, no
    token is renewed that is as an import brought it. With `dry_run` nothing is written, and nobody
    asks after what.
    """

    rows: Sequence[OlderRow]
    after: str | None
    source: str = ""
    hold_renewal: timedelta = timedelta(hours=HOLD_H)
    restart: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that could not be taken: its id, a code, and what is wrong, without any value."""

    id: str
    code: str
    message: str
    fields: tuple[FieldError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the import has come: counts of all of it, those of this batch, who was refused.

    `position` is the id of the last row, None before the first, `source` what it is one of.
    """

    source: str | None
    position: str | None
    counts: Mapping[Outcome, int]
    batch: Mapping[Outcome, int]
    refused: tuple[Refused, ...] = ()


@dataclass(slots=True)
class _Row:
    """One row on its way; `sealed` is None where it is refused."""

    raw: OlderRow
    outcome: Outcome
    sealed: SealedToken | None = None
    code: str | None = None
    message: str = ""
    fields: tuple[FieldError, ...] = ()


class Importer:
    """Takes batches; only one at a time gets anywhere, on however many nodes."""

    def __init__(
        self, database: Database, *, keyring: Keyring[DataKey], key_text: str | None, clock: Clock
    ) -> None:
        """`key_text` is TOKEN_ENCRYPTION_KEY of the older service; without it all is refused."""
        self._database = database
        self._keyring = keyring
        self._key_text = key_text
        self._clock = clock
        self._key: OlderKey | None = None
        self._deriving = asyncio.Lock()

    async def progress(self) -> Progress:
        """How far the import has come.

        ConflictError IMPORT_KEY_MISSING where no import is possible, UnavailableError.
        """
        await self._older_key()
        return _told(await store.progress(self._database, NAME), [])

    async def take(self, batch: OlderBatch, *, accessor: Accessor) -> Progress:
        """Take a batch: all of it is committed, or, where this raises, nothing.

        ConflictError IMPORT_KEY_MISSING; IMPORT_KEY_WRONG where nothing opened so far and nothing
        in DOUBT_ROWS rows or more; IMPORT_MOVED where the import is not at `after` in this source,
        for another one is at work. UnavailableError, after which the position has to be asked for.
        """
        assert 1 <= len(batch.rows) <= BATCH_LIMIT
        return await with_usable_key(self._keyring, lambda: self._take(batch, accessor))

    async def _take(self, batch: OlderBatch, accessor: Accessor) -> Progress:
        key = await self._older_key()
        # Ciphers of hundreds of rows would hold up everybody else for tens of milliseconds.
        rows = await asyncio.to_thread(self._read, batch.rows, key)
        if batch.dry_run:
            return await self._try(rows, restart=batch.restart)
        now = self._clock.now()
        async with self._database.transaction() as connection:
            before = await store.lock_progress(connection, NAME, at=now)
            if batch.restart:
                before = ProgressRow(
                    source="", position="", counts={}, started_at=now, updated_at=now
                )
            elif not _goes_on(batch, before):
                raise ConflictError(
                    f"The import is at another place, {before.position}: is there a second one?",
                    code="IMPORT_MOVED",
                )
            _refuse_a_wrong_key(rows, before.counts)
            await store.lock(connection, [row.sealed.older for row in rows if row.sealed])
            await _settle(connection, rows)
            await _write(connection, rows, not_before=_held_until(batch, now))
            await store.log_imports(connection, _entries(rows), at=now, accessor=accessor)
            after = _moved_on(before, rows, source=batch.source, now=now)
            await store.set_progress(connection, NAME, after)
        for outcome, count in _counts(rows).items():
            _ROWS.labels(outcome).inc(count)
        log.info("older_tokens_imported", position=after.position, **_counts(rows))
        return _told(after, rows)

    async def _try(self, rows: list[_Row], *, restart: bool) -> Progress:
        """What would become of these rows, without a trace."""
        async with self._database.connection() as connection:
            before = await store.progress(connection, NAME)
            _refuse_a_wrong_key(rows, {} if before is None or restart else before.counts)
            await _settle(connection, rows)
        return _told(before, rows)

    async def _older_key(self) -> OlderKey:
        if self._key_text is None:
            raise ConflictError(
                "The key of the older service is not set: credentials.import_key (or"
                " TOKEN_ENCRYPTION_KEY, its older name).",
                code="IMPORT_KEY_MISSING",
            )
        async with self._deriving:
            if self._key is None:
                self._key = await asyncio.to_thread(OlderKey, self._key_text)
        return self._key

    def _read(self, rows: Sequence[OlderRow], key: OlderKey) -> list[_Row]:
        return [self._read_one(row, key) for row in rows]

    def _read_one(self, raw: OlderRow, key: OlderKey) -> _Row:
        try:
            older = read_row(raw, key)
        except InputError as error:
            return _Row(raw, "invalid", None, error.code, error.message, error.fields)
        except CryptoError as error:
            field = FieldError("encrypted_token", error.message)
            return _Row(raw, "undecryptable", None, error.code, error.message, (field,))
        token = older.token
        ciphertext, version = seal(self._keyring, token.secret, token)
        return _Row(raw, "taken", SealedToken(older, ciphertext, version))


def _told(progress: ProgressRow | None, rows: list[_Row]) -> Progress:
    counts = {} if progress is None else progress.counts
    return Progress(
        source=None if progress is None else progress.source or None,
        position=None if progress is None else progress.position or None,
        counts={outcome: counts.get(outcome, 0) for outcome in OUTCOMES},
        batch=_counts(rows),
        refused=tuple(
            Refused(id=_id(row), code=row.code, message=row.message, fields=row.fields)
            for row in rows
            if row.code is not None
        ),
    )


def _goes_on(batch: OlderBatch, before: ProgressRow) -> bool:
    """Whether the batch begins where the import is."""
    return before.position == (batch.after or "") and before.source in ("", batch.source)


def _held_until(batch: OlderBatch, now: datetime) -> datetime | None:
    return now + batch.hold_renewal if batch.hold_renewal else None


async def _settle(connection: Connection, rows: list[_Row]) -> None:
    """Find out what is to become of the rows that are whole."""
    whole = _newest_of_each(rows)
    standings = await store.standings(connection, [sealed.older for _, sealed in whole])
    for (row, _), standing in zip(whole, standings, strict=True):
        if standing == "new":
            row.outcome = "taken"
        elif standing == "changed":
            row.outcome = "updated"
        elif standing == "id-taken":
            row.outcome, row.code = "invalid", "OLDER_TOKEN_ID_TAKEN"
            row.message = "Another merchant's token, or another platform's, has this id here."
            row.fields = (FieldError("id", row.message),)
        else:
            row.outcome = standing


async def _write(connection: Connection, rows: list[_Row], *, not_before: datetime | None) -> None:
    """Keep what is new or newer, and let what is here already wait as well."""
    for outcome, keep in (("taken", store.add), ("updated", store.change)):
        chosen = [(row, row.sealed) for row in rows if row.sealed and row.outcome == outcome]
        sealed = [token for _, token in chosen]
        kept = await keep(connection, sealed, not_before=not_before) if sealed else frozenset()
        for row, token in chosen:
            if token.older.token_id not in kept:
                row.outcome = "superseded"  # stored through the API in this very moment
    ids = [row.sealed.older.token_id for row in rows if row.sealed and row.outcome == "already"]
    if ids:
        await store.hold(connection, ids, not_before=not_before)


def _newest_of_each(rows: list[_Row]) -> list[tuple[_Row, SealedToken]]:
    """The rows that are whole; of two for one token in a batch the newer one, or the first."""
    found: list[tuple[_Row, SealedToken]] = []
    ids: set[UUID] = set()
    places: set[tuple[UUID, str]] = set()
    whole = [(row, row.sealed) for row in rows if row.sealed is not None]
    for row, sealed in sorted(whole, key=lambda one: one[1].older.updated_at, reverse=True):
        older = sealed.older
        place = (older.token.merchant_id, older.token.platform)
        if older.token_id in ids:
            row.outcome = "already"
        elif place in places:
            row.outcome = "superseded"
        else:
            found.append((row, sealed))
            ids.add(older.token_id)
            places.add(place)
    return found


def _refuse_a_wrong_key(rows: list[_Row], before: Mapping[str, int]) -> None:
    opened = sum(before.get(name, 0) for name in ("taken", "updated", "already", "superseded"))
    closed = sum(row.code == UNDECRYPTABLE for row in rows)
    if not opened and closed >= DOUBT_ROWS and not any(row.sealed for row in rows):
        raise ConflictError(
            f"None of {closed} rows opens: credentials.import_key is not the key that they were"
            " sealed under. None was taken.",
            code="IMPORT_KEY_WRONG",
        )


def _moved_on(before: ProgressRow, rows: list[_Row], *, source: str, now: datetime) -> ProgressRow:
    return ProgressRow(
        source=source,
        position=_id(rows[-1]) or before.position,
        counts={name: before.counts.get(name, 0) + count for name, count in _counts(rows).items()},
        started_at=before.started_at,
        updated_at=now,
    )


def _entries(rows: list[_Row]) -> list[LogEntry]:
    """The access log's rows: those kept, and those refused as far as it is known whose they are.

    The secret of a row that is here already, or left alone, is not touched.
    """
    entries = []
    for row in rows:
        merchant_id = uuid_of(row.raw, "merchant_id")
        if merchant_id is not None and (
            row.outcome in ("taken", "updated") or row.code is not None
        ):
            entry = LogEntry(
                merchant_id=merchant_id,
                platform=platform_of(row.raw),
                token_id=uuid_of(row.raw, "id"),
                error=row.code,
            )
            entries.append(entry)
    return entries


def _id(row: _Row) -> str:
    found = row.raw.get("id")
    return found[:POSITION_LIMIT] if isinstance(found, str) and found.isprintable() else ""


def _counts(rows: list[_Row]) -> dict[Outcome, int]:
    return {outcome: sum(row.outcome == outcome for row in rows) for outcome in OUTCOMES}
