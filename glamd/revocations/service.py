"""The revoked JWTs in memory: asked about at every request, as fresh as the last poll.

Every node reads what is new once a second on a connection of its own, and knows at once what was
revoked through itself. While the database is away it keeps what it knows; how old that is, is a
metric. Nothing is forgotten before it is gone from the table.
"""

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import ConflictError, FieldError, InputError, TransientError
from glamd.revocations import store
from glamd.revocations.store import Kind, Revocation

INTERVAL_S: Final = 1.0
LOOK_TIMEOUT_S: Final = 2.0
"""For each statement of a poll, so that a database that hangs is noticed and asked anew."""

WHOLE_EVERY_S: Final = 600.0
"""How often expired rows are deleted and everything is read anew, which forgets them here too."""

PURGE_AFTER: Final = timedelta(days=1)
"""Kept for so much longer than needed, lest a node whose clock is wrong by hours end one early."""

MAX_VALUE_CHARS: Final = 256
MAX_ROWS: Final = 100_000
"""At about 150 bytes each in the memory of every node."""

PAGE_ROWS: Final = 2_000
MAX_LISTED: Final = 1_000

log = structlog.get_logger()

_AGE = Gauge(
    "glamd_http_revocations_age_seconds",
    "Since this node last knew every revoked JWT for certain.",
)
_FAILED = Counter("glamd_http_revocations_failed_polls_total", "Polls that the database failed.")


def is_revocable(value: str) -> bool:
    """Whether a `jti` or `kid` is one that can be stored and typed: 1 to 256 printable characters.

    What is not, no token may carry, or there would be tokens that nobody can revoke.
    """
    return 0 < len(value) <= MAX_VALUE_CHARS and value.isprintable()


class Revocations:
    """Which `jti` and `kid` are not believed any more."""

    def __init__(self, database: Database, *, clock: Clock, interval_s: float = INTERVAL_S) -> None:
        self._database = database
        self._clock = clock
        self._interval_s = interval_s
        self._jtis: set[str] = set()
        self._kids: set[str] = set()
        self._position = store.START
        # Revoked through this node while a reading of everything was under way, which may have
        # passed their place already.
        self._meanwhile: list[Revocation] = []
        self._known_at_s = clock.monotonic_s()
        self._whole_at_s = float("-inf")
        _AGE.set_function(lambda: self._clock.monotonic_s() - self._known_at_s)

    def is_revoked(self, *, jti: str | None, kid: str | None) -> bool:
        """Whether a token with these is not believed any more; from memory alone."""
        return jti in self._jtis or kid in self._kids

    async def load(self) -> None:
        """Read everything, once, before the first request. UnavailableError without a database."""
        async with self._database.connection() as connection:
            await self._read(connection, whole=True)
        self._whole_at_s = self._clock.monotonic_s()

    async def run(self) -> None:
        """Keep up with all nodes' revocations until cancelled."""
        # A connection of its own: a pool that is used up must not keep a stolen token alive.
        async with self._database.dedicated() as connection:
            while True:
                try:
                    await self._look(connection)
                except TransientError as error:
                    _FAILED.inc()
                    log.warning("revocations_unread", code=error.code)
                    # Another server may have taken over, with less than we had read.
                    self._whole_at_s = float("-inf")
                await asyncio.sleep(self._interval_s)

    async def revoke(
        self, kind: Kind, value: str, *, by: str, expires_at: datetime | None = None
    ) -> Revocation:
        """Believe no token with this `jti` or `kid` any more: here at once, elsewhere by the poll.

        `expires_at`, aware, is when the last token that it is about has expired; without it the
        revocation holds for good. Again is as good as once, and the later end counts. InputError
        where no token can carry the value, ConflictError (`REVOCATIONS_FULL`) beyond MAX_ROWS,
        UnavailableError.
        """
        if not is_revocable(value):
            reason = f"should be 1 to {MAX_VALUE_CHARS} printable characters"
            raise InputError(f"The {kind} {reason}.", fields=(FieldError(kind, reason),))
        async with self._database.transaction() as connection:
            await store.take_turns(connection)
            if await store.count(connection) >= MAX_ROWS:
                raise ConflictError(
                    "There are too many revocations; take the key itself away.",
                    code="REVOCATIONS_FULL",
                )
            revocation = await store.add(
                connection,
                kind=kind,
                value=value,
                at=self._clock.now(),
                by=by,
                expires_at=expires_at,
            )
        self._meanwhile.append(revocation)
        self._sets[kind].add(value)
        return revocation

    async def listed(self, *, limit: int = MAX_LISTED) -> tuple[Revocation, ...]:
        """The newest, at most MAX_LISTED of them. UnavailableError."""
        return await store.newest(self._database, limit=min(limit, MAX_LISTED))

    @property
    def _sets(self) -> Mapping[Kind, set[str]]:
        return {"jti": self._jtis, "kid": self._kids}

    async def _look(self, connection: Connection) -> None:
        now_s = self._clock.monotonic_s()
        if now_s < self._whole_at_s + WHOLE_EVERY_S:
            await self._read(connection, whole=False)
            return
        await self._read(connection, whole=True)
        self._whole_at_s = now_s
        await store.purge(
            connection, before=self._clock.now() - PURGE_AFTER, timeout_s=LOOK_TIMEOUT_S
        )

    async def _read(self, connection: Connection, *, whole: bool) -> None:
        """Follow the table to its end, from its start or from where we were."""
        asked_at_s = self._clock.monotonic_s()
        self._meanwhile.clear()
        position = store.START if whole else self._position
        found: Mapping[Kind, set[str]] = {"jti": set(), "kid": set()} if whole else self._sets
        more = True
        while more:
            page = await store.after(
                connection, position, limit=PAGE_ROWS, timeout_s=LOOK_TIMEOUT_S
            )
            for revocation in (*page, *self._meanwhile):
                found[revocation.kind].add(revocation.value)
            if page:
                position = page[-1].position
            more = len(page) == PAGE_ROWS
        # No await between the last page and here, so that no revocation falls in between.
        self._jtis, self._kids = found["jti"], found["kid"]
        self._position = position
        self._known_at_s = asked_at_s
