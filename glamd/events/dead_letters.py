"""Dead letters: events that could not be applied, kept with the reason until they are.

A letter is stored before its message is given up at JetStream, so that no moment exists in which it
is nowhere; a crash in between makes a second letter of the same event, which does no harm, since
the reference of an effect is used once. Kept are the payload and those headers that reading it
again needs. What looks like a card number is hidden first, and such a letter cannot be replayed:
it is not any more what was sent.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from glamd import card_numbers
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import (
    ConflictError,
    FieldError,
    GlamError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.events import envelope, store
from glamd.events.store import DeadLetter
from glamd.events.subscription import Job, Subscription

PAGE_LIMIT: Final = 200
MAX_ID: Final = 2**63 - 1

KEPT_BYTES: Final = envelope.MAX_BODY_BYTES
"""Of a payload; only one that is too large to be taken is longer."""

MARGIN_BYTES: Final = 64
"""Longer than any card number with what stands between its digits."""

KEPT_HEADERS: Final = (envelope.MSG_ID, envelope.CE_SOURCE)
KEPT_HEADER_CHARS: Final = 256
REASON_CHARS: Final = 500
REPLAY_PAGE: Final = 100
REPLAY_TIMEOUT_S: Final = 10.0
"""For the handling of one letter."""

OPEN_COUNT_LIMIT: Final = 10_000
RESOLVED_KEPT: Final = timedelta(days=30)
"""Open letters are kept until somebody resolves them."""

PURGE_ROWS: Final = 1_000

log = structlog.get_logger()

_KEPT = Counter("glamd_events_dead_letters_total", "Events given up, by subject.", ["subject"])
_OPEN = Gauge(
    "glamd_events_dead_letters_open",
    f"Dead letters that are not resolved, counted up to {OPEN_COUNT_LIMIT}.",
)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of replaying all: letters resolved, and letters that failed again."""

    resolved: int
    failed: int


class DeadLetters:
    """Keeps letters, lists them, and has their events handled again."""

    def __init__(
        self, database: Database, *, subscriptions: Sequence[Subscription], clock: Clock
    ) -> None:
        self._database = database
        self._subscriptions = {each.subject: each for each in subscriptions}
        self._clock = clock

    async def keep(
        self,
        *,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str],
        reason: str,
        attempts: int,
    ) -> int:
        """Store a letter, committed when this returns; its id. UnavailableError."""
        event_id = envelope.id_of(payload, headers)
        letter_id = await store.keep_letter(
            self._database,
            subject=subject,
            event_id=None if event_id is None else _hidden(event_id),
            # Hidden before it is cut: half a number would not be found.
            payload=card_numbers.hidden(payload[: KEPT_BYTES + MARGIN_BYTES])[:KEPT_BYTES],
            headers={
                name: _hidden(headers[name][:KEPT_HEADER_CHARS].replace("\x00", "?"))
                for name in KEPT_HEADERS
                if name in headers
            },
            reason=_hidden(reason[:REASON_CHARS]),
            attempts=attempts,
            at=self._clock.now(),
        )
        _KEPT.labels(subject).inc()
        log.warning("dead_letter", letter_id=letter_id, subject=subject, attempts=attempts)
        return letter_id

    async def listed(
        self,
        *,
        limit: int = 50,
        before: int | None = None,
        subject: str | None = None,
        resolved_too: bool = False,
    ) -> tuple[DeadLetter, ...]:
        """The newest letters (with an id below `before`); `limit` 1 to 200. UnavailableError."""
        if not 1 <= limit <= PAGE_LIMIT:
            fields = (FieldError("limit", f"it is 1 to {PAGE_LIMIT}"),)
            raise InputError("The limit is out of range.", fields=fields)
        return await store.letters_before(
            self._database,
            before=MAX_ID if before is None else before,
            subject=subject,
            resolved_too=resolved_too,
            limit=limit,
        )

    async def show(self, letter_id: int) -> DeadLetter:
        """One letter; NotFoundError DEAD_LETTER_NOT_FOUND."""
        found = None
        if 0 < letter_id <= MAX_ID:
            found = await store.letter(self._database, letter_id)
        if found is None:
            raise NotFoundError("There is no such dead letter.", code="DEAD_LETTER_NOT_FOUND")
        return found

    async def replay(self, letter_id: int) -> None:
        """Have the letter's event handled again and, where that succeeds, resolve the letter.

        Raises what the handler raises, after it is stored; NotFoundError DEAD_LETTER_NOT_FOUND,
        ConflictError DEAD_LETTER_RESOLVED, DEAD_LETTER_CHANGED, DEAD_LETTER_NO_HANDLER.
        """
        letter = await self.show(letter_id)
        if letter.resolved_at is not None:
            raise ConflictError("The letter is resolved already.", code="DEAD_LETTER_RESOLVED")
        if card_numbers.MASK in letter.payload:
            raise ConflictError(
                "A card number was hidden in it, so it is not what was sent.",
                code="DEAD_LETTER_CHANGED",
            )
        subscription = self._subscriptions.get(letter.subject)
        if subscription is None:
            raise ConflictError("Nobody handles this subject.", code="DEAD_LETTER_NO_HANDLER")
        try:
            job = subscription.read(letter.payload, letter.headers)
            if job is not None:
                await _run(job)
        except GlamError as error:
            await store.letter_failed_again(
                self._database,
                letter_id,
                at=self._clock.now(),
                reason=_hidden(reason_of(error)[:REASON_CHARS]),
            )
            raise
        await store.letter_resolved(self._database, letter_id, self._clock.now())
        log.info("dead_letter_resolved", letter_id=letter_id, subject=letter.subject)

    async def discard(self, letter_id: int) -> None:
        """Resolve a letter without its event's effect, for an operator who has looked at it.

        NotFoundError DEAD_LETTER_NOT_FOUND, ConflictError DEAD_LETTER_RESOLVED.
        """
        letter = await self.show(letter_id)
        if letter.resolved_at is not None:
            raise ConflictError("The letter is resolved already.", code="DEAD_LETTER_RESOLVED")
        await store.letter_discarded(self._database, letter_id, self._clock.now())

    async def replay_all(self, *, subject: str | None = None) -> Replayed:
        """Replay every letter that is open now, oldest first, each once. UnavailableError."""
        until = await store.newest_letter(self._database)
        after, resolved, failed = 0, 0, 0
        while ids := await store.open_letters_after(
            self._database, after=after, until=until, subject=subject, limit=REPLAY_PAGE
        ):
            for letter_id in ids:
                try:
                    await self.replay(letter_id)
                    resolved += 1
                except GlamError as error:
                    failed += 1
                    log.info("dead_letter_failed_again", letter_id=letter_id, code=error.code)
            after = ids[-1]
        return Replayed(resolved, failed)

    async def purge(self) -> int:
        """Delete letters that were resolved RESOLVED_KEPT ago; at most PURGE_ROWS of them."""
        before = self._clock.now() - RESOLVED_KEPT
        return await store.purge_resolved(self._database, before=before, limit=PURGE_ROWS)

    async def measure(self) -> int:
        """How many are open, counted up to OPEN_COUNT_LIMIT; the metric too. UnavailableError."""
        found = await store.open_letters(self._database, most=OPEN_COUNT_LIMIT)
        _OPEN.set(found)
        return found


def reason_of(error: GlamError) -> str:
    """The error as a reason: its code and message, and the fields with what is wrong with each."""
    fields = "; ".join(f"{each.field}: {each.message}" for each in error.fields)
    return f"{error.code}: {error.message}" + (f" ({fields})" if fields else "")


async def _run(job: Job) -> None:
    try:
        async with asyncio.timeout(REPLAY_TIMEOUT_S):
            await job.run()
    except TimeoutError:
        raise UnavailableError("The handler took too long.", code="HANDLER_TIMEOUT") from None


def _hidden(text: str) -> str:
    return card_numbers.hidden(text.encode("utf-8", "replace")).decode()
