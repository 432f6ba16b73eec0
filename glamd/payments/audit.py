"""The audit log: one row for every look at card data and every operation on a key, chained.

A row is committed before its attempt is answered; whoever cannot have a row cannot have an answer.
The writer extends the chain from the head it knows, in one statement that does nothing when another
node was faster; then, and whenever the outcome of a commit is unknown, it takes the head's lock and
reads where the chain ends. What a MAC covers and what a walk finds stands in `audit_chain`; who may
look at what is decided before, elsewhere.
"""

import asyncio
import contextlib
import hmac
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final

import orjson
import structlog
from prometheus_client import Counter, Gauge

from glamd.clock import Clock
from glamd.db import Connection, Database, Row, UniqueViolationError
from glamd.errors import GlamError, InternalError, UnavailableError
from glamd.journal import Journal
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments import audit_chain
from glamd.payments.audit_chain import AuditEntry, AuditRow, Break, Head, Walk

BATCH_LIMIT: Final = 256
MONTHS_AHEAD: Final = 2
"""Partitions made before they are needed, besides this month's."""

HEAD_EVERY_S: Final = 600.0
"""How often the head is logged, so that a cut tail shows against the log."""

PAGE_ROWS: Final = 128
"""Rows read at once by `verify`: a few milliseconds of hashing between two turns of the loop."""

RECORD_TIMEOUT_S: Final = 10.0

_ADVISORY_LOCK: Final = "SELECT pg_advisory_xact_lock(7262617564697401)"
"""Taken by whoever makes a partition or reads the head in order to go on from it."""

_LOCK_HEAD: Final = """
SELECT seq FROM cde.audit_heads ORDER BY month DESC LIMIT 1 FOR UPDATE
"""
_END: Final = """
SELECT n.month, h.seq, h.mac, coalesce(l.seq, 0) AS last_seq, l.mac AS last_mac,
       (SELECT mac FROM cde.decrypt_audit_log WHERE month = $1 AND seq = $2) AS known_mac
FROM (SELECT greatest($1::date, (SELECT max(month) FROM cde.audit_heads),
                      (SELECT max(month) FROM cde.decrypt_audit_log)) AS month) n
LEFT JOIN cde.audit_heads h ON h.month = n.month
LEFT JOIN LATERAL (
    SELECT seq, mac FROM cde.decrypt_audit_log WHERE month = n.month ORDER BY seq DESC LIMIT 1
) l ON true
WHERE n.month IS NOT NULL
"""
"""Where the chain ends: the newest month that has a head or rows, or that this node has seen."""

_SIGN_HEAD: Final = """
INSERT INTO cde.audit_heads (month, seq, mac, updated_at) VALUES ($1, $2, $3, $4)
ON CONFLICT (month) DO UPDATE
SET seq = excluded.seq, mac = excluded.mac, updated_at = excluded.updated_at
"""
_APPEND: Final = """
WITH head AS (
    UPDATE cde.audit_heads SET seq = $4, mac = $5, updated_at = $6
    WHERE month = $1 AND seq = $2 AND mac = $3
    RETURNING month
)
INSERT INTO cde.decrypt_audit_log
    (month, seq, at, action, actor, certificate_sha256, ip, subject, fields, purpose, outcome,
     correlation_id, mac)
SELECT head.month, r.seq, r.at, r.action, r.actor, r.certificate_sha256, r.ip, r.subject,
       ARRAY(SELECT f.name
             FROM jsonb_array_elements_text(r.fields::jsonb) WITH ORDINALITY AS f (name, n)
             ORDER BY f.n),
       r.purpose, r.outcome, r.correlation_id, r.mac
FROM head, unnest(
    $7::bigint[], $8::timestamptz[], $9::text[], $10::text[], $11::text[], $12::text[],
    $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::bytea[]
) AS r (seq, at, action, actor, certificate_sha256, ip, subject, fields, purpose, outcome,
        correlation_id, mac)
"""
_PARTITION_EXISTS: Final = "SELECT to_regclass($1) IS NOT NULL"
_MAKE_PARTITION: Final = """
CREATE TABLE IF NOT EXISTS {name} PARTITION OF cde.decrypt_audit_log
    FOR VALUES FROM ('{month}') TO ('{following}')
"""
_MONTHS: Final = """
WITH RECURSIVE walked (month) AS (
    (SELECT min(l.month) FROM cde.decrypt_audit_log l)
    UNION ALL
    SELECT (SELECT min(l.month) FROM cde.decrypt_audit_log l WHERE l.month > w.month)
    FROM walked w WHERE w.month IS NOT NULL
)
SELECT month, h.seq AS head_seq, h.mac AS head_mac,
       coalesce((SELECT max(l.seq) FROM cde.decrypt_audit_log l
                 WHERE l.month = coalesce(w.month, h.month)), 0) AS last_seq
FROM (SELECT month FROM walked WHERE month IS NOT NULL) w
FULL JOIN cde.audit_heads h USING (month)
ORDER BY month
"""
_PAGE: Final = """
SELECT month, seq,
       CASE WHEN isfinite(at) THEN (extract(epoch FROM at) * 1000000)::bigint ELSE 0 END AS at_us,
       action, actor, certificate_sha256, ip, subject, fields, purpose, outcome, correlation_id,
       mac
FROM cde.decrypt_audit_log
WHERE month = $1 AND seq > $2 AND seq <= $3
ORDER BY seq
LIMIT $4
"""

log = structlog.get_logger()

_ROWS = Counter("glamd_audit_rows_total", "Audit rows committed.", ["action", "outcome"])
_FENCED = Counter("glamd_audit_fenced_total", "Commits that another node had overtaken.")
_DAMAGED = Counter("glamd_audit_damaged_total", "Times that the stored head did not verify.")
_SEQ = Gauge("glamd_audit_head_rows", "Rows of this month, as this node knows.")

Stamped = tuple[datetime, AuditEntry]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a walk found: how many rows verified in how many months, and the first break, if any."""

    rows: int
    partitions: int
    first_broken: Break | None

    @property
    def ok(self) -> bool:
        """Whether every row is the one that was written."""
        return self.first_broken is None


class Audit:
    """Writes audit rows in group commits, and walks what is stored."""

    def __init__(self, database: Database, keyring: Keyring[MacKey], clock: Clock) -> None:
        self._database = database
        self._key = keyring.active.key
        self._clock = clock
        self._head: Head | None = None
        self._last: Head | None = None
        self._partitions: frozenset[date] = frozenset()
        self._tending: asyncio.Task[None] | None = None
        self._journal: Journal[Stamped, None] = Journal(
            name="audit",
            database=database,
            commit=self._commit,
            connections=1,
            batch_limit=BATCH_LIMIT,
        )

    async def start(self) -> None:
        """Make the partitions of this month and the next two, log the head, then take entries.

        UnavailableError when the database is away.
        """
        await self.ensure_partitions()
        await self._log_stored_head()
        await self._journal.start()
        self._tending = asyncio.create_task(self._tend(), name="audit:tend")

    async def stop(self, timeout_s: float) -> None:
        """Refuse new entries, write what waits for at most `timeout_s`, log the head."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await self._journal.stop(timeout_s)
        self._log_head()

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

    async def ensure_partitions(self) -> None:
        """Make the partitions of this month and the next two where they are missing."""
        month = audit_chain.month_of(self._clock.now())
        if self._months_from(month) <= self._partitions:
            return
        async with self._database.connection() as connection:
            await self._ensure(connection, month)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(HEAD_EVERY_S)
            try:
                await self._log_stored_head()
                await self.ensure_partitions()
            except GlamError as error:
                log.warning("audit_not_tended", code=error.code)

    async def _log_stored_head(self) -> None:
        """Log where the chain ends, whichever node wrote it; without a lock, in one snapshot."""
        known = self._last
        stored = await self._database.fetchrow(_END, *_place(known))
        if stored is None:
            return
        head = self._verified(stored, known)
        if head is None:
            self._report_damage(stored)
            return
        # While it was read, a commit may have gone further.
        if self._last is known:
            self._last = head
        self._log_head()

    def _log_head(self) -> None:
        head = self._last
        if head is not None:
            log.info("audit_head", month=str(head.month), seq=head.seq, mac=head.row_mac.hex())

    def _months_from(self, month: date) -> frozenset[date]:
        months = [month]
        for _ in range(MONTHS_AHEAD):
            months.append(audit_chain.next_month(months[-1]))
        return frozenset(months)

    async def _ensure(self, connection: Connection, month: date) -> None:
        for wanted in sorted(self._months_from(month) - self._partitions):
            name = f"cde.decrypt_audit_log_{wanted:%Y_%m}"
            if not await connection.fetchval(_PARTITION_EXISTS, name):
                sql = _MAKE_PARTITION.format(
                    name=name, month=wanted, following=audit_chain.next_month(wanted)
                )
                async with connection.transaction():
                    await connection.execute(_ADVISORY_LOCK)
                    await connection.execute(sql)
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
            # It is logged where it was raised. For who waits it is the same: no row, no answer.
            raise UnavailableError("The audit row cannot be written.") from error
        self._head = self._last = end
        _SEQ.set(end.seq)
        for (action, outcome), count in Tally(
            (entry.action, entry.outcome) for _, entry in entries
        ).items():
            _ROWS.labels(action, outcome).inc(count)
        return [None] * len(entries)

    async def _write(
        self, connection: Connection, head: Head | None, entries: Sequence[Stamped]
    ) -> Head:
        month = audit_chain.month_of(entries[-1][0])
        if head is not None and head.month >= month:
            with contextlib.suppress(UniqueViolationError):  # a row beyond the head: put in by hand
                end = await self._append(connection, head, entries)
                if end is not None:
                    return end
            _FENCED.inc()
        await self._ensure(connection, month)
        async with connection.transaction():
            await connection.execute(_ADVISORY_LOCK)
            head = await self._locked_head(connection, month)
            end = await self._append(connection, head, entries)
            if end is None:
                raise InternalError("The audit chain's head changed under its lock.")
        return end

    async def _append(
        self, connection: Connection, head: Head, entries: Sequence[Stamped]
    ) -> Head | None:
        rows, end = audit_chain.extend(self._key, head=head, entries=entries)
        told = [row.entry for row in rows]
        tag = await connection.execute(
            _APPEND,
            head.month,
            head.seq,
            audit_chain.open_head_mac(self._key, head),
            end.seq,
            audit_chain.open_head_mac(self._key, end),
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
        )
        return end if tag == f"INSERT 0 {len(rows)}" else None

    async def _locked_head(self, connection: Connection, month: date) -> Head:
        """The head to go on from, locked and signed in the table as it is returned."""
        await connection.execute(_LOCK_HEAD)
        # A statement of its own: the one that waited still sees the rows as they were before.
        known = self._last
        stored = await connection.fetchrow(_END, *_place(known))
        if stored is None:
            return await self._open_month(connection, month, audit_chain.GENESIS)
        head = self._verified(stored, known)
        if head is not None and head.month >= month:
            return head
        if head is None:
            head = self._resumed(stored, known)
        if head.month >= month:
            await self._sign(connection, head, audit_chain.open_head_mac(self._key, head))
            return head
        closed = audit_chain.closed_head_mac(self._key, head, successor=month)
        await self._sign(connection, head, closed)
        return await self._open_month(connection, month, head.row_mac)

    def _verified(self, stored: Row, known: Head | None) -> Head | None:
        """The stored head, if it is open, fits the last row there is, and comes after `known`."""
        if stored["last_seq"] != stored["seq"] or stored["last_mac"] is None:
            return None
        head = Head(stored["month"], stored["seq"], stored["last_mac"])
        mac = audit_chain.open_head_mac(self._key, head)
        if not hmac.compare_digest(mac, stored["mac"]):
            return None
        # Whatever this node has seen committed was there once: a chain that lacks it was set back,
        # however well it fits together now, and also where others have written on since.
        if known is not None and (
            (head.month, head.seq) < (known.month, known.seq)
            or stored["known_mac"] != known.row_mac
        ):
            return None
        return head

    def _resumed(self, stored: Row, known: Head | None) -> Head:
        """Go on behind everything that is or was there, in a way that no later walk calls whole.

        The numbers of rows that are gone stay free: somebody may still have them.
        """
        self._report_damage(stored)
        seq = max(stored["seq"] or 0, stored["last_seq"])
        if known is not None and known.month == stored["month"]:
            seq = max(seq, known.seq)
        mac = audit_chain.resumed_mac(self._key, month=stored["month"], seq=seq + 1)
        return Head(stored["month"], seq, mac)

    def _report_damage(self, stored: Row) -> None:
        _DAMAGED.inc()
        log.error("audit_head_damaged", month=str(stored["month"]), seq=stored["seq"] or 0)

    async def _sign(self, connection: Connection, head: Head, mac: bytes) -> None:
        await connection.execute(_SIGN_HEAD, head.month, head.seq, mac, self._clock.now())

    async def _open_month(self, connection: Connection, month: date, previous: bytes) -> Head:
        head = Head(month, 0, previous)
        mac = audit_chain.open_head_mac(self._key, head)
        await self._sign(connection, head, mac)
        return head

    async def verify(self, *, head: Head | None = None) -> AuditReport:
        """Walk the whole chain in bounded memory, while others write, up to its first break.

        It must hold the row that this node knows as the last one, and that of `head`, an end that
        was logged earlier. Rows that come after the walk began are left for the next one.
        UnavailableError.
        """
        walk = Walk(self._key, seen=[seen for seen in (self._last, head) if seen is not None])
        months = await self._database.fetch(_MONTHS)
        for number, month in enumerate(months):
            successor = months[number + 1]["month"] if number + 1 < len(months) else None
            found = await self._verify_month(walk, month, successor)
            if found is not None:
                return _broken(walk, number + 1, found)
        found = walk.end()
        return (
            _broken(walk, len(months), found)
            if found
            else AuditReport(walk.rows, len(months), None)
        )

    async def _verify_month(self, walk: Walk, month: Row, successor: date | None) -> Break | None:
        head_seq = month["head_seq"]
        found = walk.begin_month(month["month"], has_head=head_seq is not None)
        seq = 0
        while found is None and seq < head_seq:
            page = await self._database.fetch(_PAGE, month["month"], seq, head_seq, PAGE_ROWS)
            if not page:
                break
            for row in page:
                found = walk.row(_row(row))
                if found is not None:
                    return found
            seq = page[-1]["seq"]
        return found or walk.end_month(
            head_seq=head_seq,
            head_mac=month["head_mac"],
            last_seq=month["last_seq"],
            successor=successor,
        )


def _place(head: Head | None) -> tuple[date | None, int | None]:
    return (None, None) if head is None else (head.month, head.seq)


def _broken(walk: Walk, months: int, found: Break) -> AuditReport:
    log.error("audit_broken", month=str(found.month), seq=found.seq, reason=found.reason)
    return AuditReport(walk.rows, months, found)


def _row(row: Row) -> AuditRow:
    entry = AuditEntry(
        action=row["action"],
        actor=row["actor"],
        certificate_sha256=row["certificate_sha256"],
        ip=row["ip"],
        subject=row["subject"],
        # Whoever tampers can store NULL or an array in here: a text that no entry has stands in.
        fields=tuple(f if isinstance(f, str) else f"\0{f!r}" for f in row["fields"]),
        purpose=row["purpose"],
        outcome=row["outcome"],
        correlation_id=row["correlation_id"],
    )
    return AuditRow(row["month"], row["seq"], row["at_us"], entry, row["mac"])
