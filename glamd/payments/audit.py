"""The audit log: one row for every look at card data and every operation on a key, chained.

A row is committed before its attempt is answered; whoever cannot have a row cannot have an answer.
The writer extends the chain from the head it knows, in one statement that does nothing when another
node was faster; then, and whenever the outcome of a commit is unknown, it takes the head's lock and
reads where the chain ends. What a MAC covers stands in `audit_chain`, what a walk finds in
`audit_walk`, reading in `auditing`; who may look at what is decided before, elsewhere.
"""

import asyncio
import contextlib
import hmac
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Final

import orjson
import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.db import Connection, Database, Row, UniqueViolationError
from glamd.errors import CryptoError, GlamError, InternalError, UnavailableError
from glamd.journal import Journal
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments import audit_chain
from glamd.payments.audit_chain import AuditEntry, Head
from glamd.payments.auditing import store
from glamd.payments.auditing.heads import HeadFile, SignedHead
from glamd.payments.auditing.reading import AuditReport, Reader

__all__ = ["Audit", "AuditReport"]

BATCH_LIMIT: Final = 256
MONTHS_AHEAD: Final = 2
"""Partitions made before they are needed, besides this month's."""

LAST_SEQ: Final = 2**62
"""A chain found damaged is not gone on with behind this number, but in the month after."""

HEAD_EVERY_S: Final = 600.0
"""How often the head is logged and exported, so that a cut tail shows against it."""

RECORD_TIMEOUT_S: Final = 10.0

log = structlog.get_logger()

_ROWS = Counter("glamd_audit_rows_total", "Audit rows committed.", ["action", "outcome"])
_FENCED = Counter("glamd_audit_fenced_total", "Commits that another node had overtaken.")
_DAMAGED = Counter("glamd_audit_damaged_total", "Times that the stored head did not verify.")
_SEQ = Gauge("glamd_audit_head_rows", "Rows of this month, as this node knows.")
_AHEAD = Gauge("glamd_audit_partitions_ahead_count", "Months made ahead, besides this one.")
_APPEND_ONLY = Gauge(
    "glamd_audit_append_only", "1 where our database role cannot change the audit log, else 0."
)

Stamped = tuple[datetime, AuditEntry]


@dataclass(frozen=True, slots=True)
class _Signed:
    """A head as it stands in the table: which version of the key signed it, and the signature."""

    head: Head
    key_version: str
    mac: bytes


class Audit(Reader):
    """Writes audit rows in group commits, and reads the log as `Reader` does.

    `head_every_s` is how often the head is logged and appended to `head_file`, where there is one;
    `observe` is told the seconds of each commit.
    """

    def __init__(
        self,
        database: Database,
        keyring: Keyring[MacKey],
        clock: Clock,
        *,
        head_every_s: float = HEAD_EVERY_S,
        head_file: Path | None = None,
        observe: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(database, keyring, clock)
        self._head_every_s = head_every_s
        self._head_file = None if head_file is None else HeadFile(head_file)
        self._head: _Signed | None = None
        self._last: _Signed | None = None
        self._partitions: frozenset[date] = frozenset()
        self._tending: asyncio.Task[None] | None = None
        self._journal: Journal[Stamped, None] = Journal(
            name="audit",
            database=database,
            commit=self._commit,
            connections=1,
            batch_limit=BATCH_LIMIT,
            observe=observe,
        )
        _AHEAD.set_function(lambda: self.months_ahead)

    async def start(self) -> None:
        """Make the months up to MONTHS_AHEAD, look at our rights, log the head, take entries.

        UnavailableError when the database is away.
        """
        await self.ensure_partitions()
        await self._look_at_rights()
        await self._log_stored_head()
        await self._journal.start()
        self._tending = asyncio.create_task(self._tend(), name="audit:tend")

    async def stop(self, timeout_s: float) -> None:
        """Refuse new entries, write what waits for at most `timeout_s`, log the head."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await self._journal.stop(timeout_s)
        await self._publish_head()

    def append(self, entry: AuditEntry) -> asyncio.Future[None]:
        """Add a row, stamped with the time of now; done when it is committed.

        UnavailableError when that failed or is not known, and then nothing may be answered.
        """
        return self._journal.submit((self._clock.now(), audit_chain.storable(entry)))

    async def record(self, *, action: str, subject: str, actor: str, outcome: str) -> None:
        """Add the row of an operation on a key, which has no caller from outside, and wait for it.

        UnavailableError as `append`, and after RECORD_TIMEOUT_S.
        """
        entry = AuditEntry(
            action=action,
            actor=actor,
            certificate_sha256="",
            ip="",
            subject=subject,
            fields=(),
            purpose="",
            outcome=outcome,
            correlation_id="",
        )
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                await asyncio.shield(self.append(entry))
        except TimeoutError:
            raise UnavailableError("The audit row was not written in time.") from None

    async def drop_month(self, month: date, *, actor: str) -> store.Dropped:
        """Drop the oldest month, once it is older than seven years, or say why not.

        That it was asked for is written down before, what came of it after. UnavailableError.
        """
        told = {"action": "audit.drop-month", "subject": f"{month:%Y-%m}", "actor": actor}
        await self.record(**told, outcome="asked")
        dropped = await store.drop_partition(self._database, month)
        await self.record(**told, outcome="ok" if dropped == "dropped" else dropped)
        return dropped

    @property
    def months_ahead(self) -> int:
        """How many months after this one have their partition, as this node knows."""
        month = audit_chain.month_of(self._clock.now())
        return sum(made > month for made in self._partitions)

    async def head(self) -> SignedHead | None:
        """Where the chain ends, signed; None before the first row.

        InternalError where the stored head does not verify.
        """
        known = self._last
        stored = await self._database.fetchrow(store.END, *_place(known))
        if stored is None:
            return None
        found = await self._verified(stored, known)
        if found is None:
            raise InternalError("The head of the audit chain does not verify.")
        return self._told(found)

    async def ensure_partitions(self) -> None:
        """Make the partitions of this month and the next two where they are missing."""
        month = audit_chain.month_of(self._clock.now())
        if self._months_from(month) <= self._partitions:
            return
        async with self._database.connection() as connection:
            await self._ensure(connection, month)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(self._head_every_s)
            try:
                await self._log_stored_head()
                await self.ensure_partitions()
            except GlamError as error:
                log.warning("audit_not_tended", code=error.code)

    async def _log_stored_head(self) -> None:
        """Log where the chain ends, whichever node wrote it; without a lock, in one snapshot."""
        known = self._last
        stored = await self._database.fetchrow(store.END, *_place(known))
        if stored is None:
            return
        found = await self._verified(stored, known)
        if found is None:
            self._report_damage(stored)
            return
        # While it was read, a commit may have gone further.
        if self._last is known:
            self._last = found
        await self._publish_head()

    async def _publish_head(self) -> None:
        """Say where the chain ends, in the log and in the file; neither may stop the daemon."""
        if self._last is None:
            return
        told = self._told(self._last)
        log.info(
            "audit_head",
            month=str(told.month),
            seq=told.seq,
            mac=told.mac.hex(),
            key_version=told.key_version,
            signature=told.signature.hex(),
        )
        if self._head_file is not None:
            await self._head_file.append(told)

    def _told(self, signed: _Signed) -> SignedHead:
        head = signed.head
        return SignedHead(
            at=self._clock.now(),
            month=head.month,
            seq=head.seq,
            mac=head.row_mac,
            key_version=signed.key_version,
            signature=signed.mac,
        )

    async def _look_at_rights(self) -> None:
        """Say so, loudly, where we could change what we have written."""
        rights = await store.rights(self._database)
        _APPEND_ONLY.set(rights.append_only)
        if not rights.append_only:
            log.warning("audit_not_append_only", role=rights.role, login=rights.login)

    def _months_from(self, month: date) -> frozenset[date]:
        months = [month]
        for _ in range(MONTHS_AHEAD):
            months.append(audit_chain.next_month(months[-1]))
        return frozenset(months)

    async def _ensure(self, connection: Connection, month: date) -> None:
        for wanted in sorted(self._months_from(month) - self._partitions):
            if await store.make_partition(connection, wanted):
                log.info("audit_partition_made", month=str(wanted))
            self._partitions |= {wanted}

    async def _commit(self, connection: Connection, entries: Sequence[Stamped]) -> Sequence[None]:
        # Forgotten first: until this commit has succeeded, nobody knows where the chain ends.
        head, self._head = self._head, None
        try:
            end = await self._write(connection, head, entries)
        except UnavailableError:
            raise
        except GlamError as error:
            # Perhaps somebody has taken a month away: then it is made again for the next entry.
            self._partitions = frozenset()
            # It is logged where it was raised. For who waits it is the same: no row, no answer.
            raise UnavailableError("The audit row cannot be written.") from error
        self._head = self._last = end
        _SEQ.set(end.head.seq)
        for (action, outcome), count in Tally(
            (entry.action, entry.outcome) for _, entry in entries
        ).items():
            _ROWS.labels(action, outcome).inc(count)
        return [None] * len(entries)

    async def _write(
        self, connection: Connection, signed: _Signed | None, entries: Sequence[Stamped]
    ) -> _Signed:
        month = audit_chain.month_of(entries[-1][0])
        if signed is not None and signed.head.month >= month:
            with contextlib.suppress(UniqueViolationError):  # a row beyond the head: put in by hand
                end = await self._append(connection, signed, entries)
                if end is not None:
                    return end
            _FENCED.inc()
        await self._ensure(connection, month)
        async with connection.transaction():
            await connection.execute(store.ADVISORY_LOCK)
            signed = await self._locked_head(connection, month)
            if signed.head.month > month:
                # A later month, which whoever damaged the head may have made up.
                await store.make_partition(connection, signed.head.month)
            end = await self._append(connection, signed, entries)
            if end is None:
                raise InternalError("The audit chain's head changed under its lock.")
        return end

    async def _append(
        self, connection: Connection, signed: _Signed, entries: Sequence[Stamped]
    ) -> _Signed | None:
        head, key = signed.head, await self._key_after(signed.key_version)
        rows, end = audit_chain.extend(key.key, key_version=key.version, head=head, entries=entries)
        told = [row.entry for row in rows]
        end_mac = audit_chain.open_head_mac(key.key, end)
        tag = await connection.execute(
            store.APPEND,
            head.month,
            head.seq,
            signed.mac,
            end.seq,
            end_mac,
            self._clock.now(),
            [row.seq for row in rows],
            [at for at, _ in entries],
            [entry.action for entry in told],
            [entry.actor for entry in told],
            [entry.certificate_sha256 for entry in told],
            [entry.ip for entry in told],
            [entry.subject for entry in told],
            [orjson.dumps(entry.fields).decode() for entry in told],
            [entry.purpose for entry in told],
            [entry.outcome for entry in told],
            [entry.correlation_id for entry in told],
            [row.mac for row in rows],
            key.version,
        )
        if tag != f"INSERT 0 {len(rows)}":
            return None
        return _Signed(end, key.version, end_mac)

    async def _key_after(self, version: str) -> MacKey:
        """The key for what follows a head of this version: never an older one than its own."""
        active = self._keyring.active
        if version == active.version:
            return active
        ages = list(self._keyring.kcvs)
        if version in ages and ages.index(version) > ages.index(active.version):
            return await self._keyring.version(version)
        return active

    async def _locked_head(self, connection: Connection, month: date) -> _Signed:
        """The head to go on from, locked and signed in the table as it is returned."""
        await connection.execute(store.LOCK_HEAD)
        # A statement of its own: the one that waited still sees the rows as they were before.
        known = self._last
        stored = await connection.fetchrow(store.END, *_place(known))
        if stored is None:
            return await self._open_month(connection, month, audit_chain.GENESIS, "")
        signed = await self._verified(stored, known)
        if signed is not None and signed.head.month >= month:
            return signed
        if signed is None:
            head, version = await self._resumed(stored, known), ""
        else:
            head, version = signed.head, signed.key_version
        key = await self._key_after(version)
        if head.month >= month:
            mac = audit_chain.open_head_mac(key.key, head)
            return await self._sign(connection, head, key.version, mac)
        closed = audit_chain.closed_head_mac(key.key, head, successor=month)
        await self._sign(connection, head, key.version, closed)
        return await self._open_month(connection, month, head.row_mac, key.version)

    async def _verified(self, stored: Row, known: _Signed | None) -> _Signed | None:
        """The stored head, if it is open, fits the last row there is, and comes after `known`."""
        if stored["last_seq"] != stored["seq"] or stored["last_mac"] is None:
            return None
        head = Head(stored["month"], stored["seq"], stored["last_mac"])
        try:
            # A version that another node has made is fetched, and is active here from then on.
            key = await self._keyring.version(stored["key_version"])
        except CryptoError:
            return None
        mac = audit_chain.open_head_mac(key.key, head)
        if not hmac.compare_digest(mac, stored["mac"]):
            return None
        # Whatever this node has seen committed was there once: a chain that lacks it was set back,
        # however well it fits together now, and also where others have written on since.
        if known is not None and (
            (head.month, head.seq) < (known.head.month, known.head.seq)
            or stored["known_mac"] != known.head.row_mac
        ):
            return None
        return _Signed(head, key.version, mac)

    async def _resumed(self, stored: Row, known: _Signed | None) -> Head:
        """Go on behind everything that is or was there, in a way that no later walk calls whole.

        The numbers of rows that are gone stay free: somebody may still have them.
        """
        self._report_damage(stored)
        month, seq = stored["month"], max(stored["seq"] or 0, stored["last_seq"])
        if known is not None and known.head.month == month:
            seq = max(seq, known.head.seq)
        if seq >= LAST_SEQ:
            # One row put in by hand takes up all the numbers of its month.
            month, seq = audit_chain.next_month(month), 0
        # The damage may be older than a version of the key that others write with already.
        with contextlib.suppress(CryptoError):
            await self._keyring.reload()
        key = self._keyring.active.key
        mac = audit_chain.resumed_mac(key, month=month, seq=seq + 1)
        return Head(month, seq, mac)

    def _report_damage(self, stored: Row) -> None:
        _DAMAGED.inc()
        log.error("audit_head_damaged", month=str(stored["month"]), seq=stored["seq"] or 0)

    async def _sign(
        self, connection: Connection, head: Head, key_version: str, mac: bytes
    ) -> _Signed:
        now = self._clock.now()
        await connection.execute(store.SIGN_HEAD, head.month, head.seq, mac, key_version, now)
        return _Signed(head, key_version, mac)

    async def _open_month(
        self, connection: Connection, month: date, previous: bytes, key_version: str
    ) -> _Signed:
        head = Head(month, 0, previous)
        key = await self._key_after(key_version)
        mac = audit_chain.open_head_mac(key.key, head)
        return await self._sign(connection, head, key.version, mac)

    async def verify(self, *, head: Head | None = None, since: date | None = None) -> AuditReport:
        """Walk the chain in bounded memory, while others write, up to its first break.

        It must hold the row that this node knows as the last one, and that of `head`, an end that
        was logged earlier. `since` leaves out the months before it. Rows that come after the walk
        began are left for the next one. UnavailableError.
        """
        known = None if self._last is None else self._last.head
        seen = [each for each in (known, head) if each is not None]
        return await self.walk(seen=seen, since=since)


def _place(signed: _Signed | None) -> tuple[date | None, int | None]:
    return (None, None) if signed is None else (signed.head.month, signed.head.seq)
