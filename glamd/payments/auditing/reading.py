"""Reading the audit log: walks along the chain, pages for people and files, heads held against it.

Nothing is written here, and no rule of the chain stands here: those are in `audit_walk`.
"""

import asyncio
import hmac
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

import structlog

from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import CryptoError, FieldError, InputError
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments import audit_chain
from glamd.payments.audit_chain import Head
from glamd.payments.audit_walk import Break, StoredHead, Walk
from glamd.payments.auditing import store
from glamd.payments.auditing.heads import SignedHead

PAGE_ROWS: Final = 1000
"""Rows read at once by a walk, some 700 KiB."""

SLICE_ROWS: Final = 200
"""Rows hashed between two turns of the loop: about a millisecond."""

SCAN_ROWS: Final = 2000
SCAN_PAGES: Final = 50
"""Pages of SCAN_ROWS that a search for the newest rows looks through before it gives up."""

USES_TIMEOUT_S: Final = 600.0
KEEP_YEARS: Final = 7

log = structlog.get_logger()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """Which rows are sought; None takes any."""

    actor: str | None = None
    subject: str | None = None
    outcome: str | None = None

    def fits(self, row: Mapping[str, object]) -> bool:
        """Whether this is such a row."""
        wanted = (("actor", self.actor), ("subject", self.subject), ("outcome", self.outcome))
        return all(value is None or row[name] == value for name, value in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Rows in words that JSON has, oldest first, and where a next page goes on.

    `position` is the month and number of the last row that was looked at, None where there is none.
    """

    rows: list[dict[str, object]]
    position: tuple[date, int] | None
    more: bool


class Reader:
    """Reads the audit log of one database."""

    def __init__(self, database: Database, keyring: Keyring[MacKey], clock: Clock) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock

    async def walk(self, *, seen: Sequence[Head], since: date | None) -> AuditReport:
        """Walk the chain up to its first break; it must hold the rows of `seen`.

        InputError (`since`) where the chain never came as far as that month.
        """
        months = await store.months(self._database)
        # After the months: every version that a head of theirs names is there by now.
        await self._keyring.reload()
        keys = {name: (await self._keyring.version(name)).key for name in self._keyring.kcvs}
        walk = Walk(keys, seen=seen)
        found, months = await self._begin(walk, months, since)
        if found is None and since is not None and not months:
            _refuse_to_walk_nothing(since, seen)
        walked = 0
        for month, following in itertools.pairwise([*months, None]):
            if found is not None or month is None:
                break
            walked += 1
            successor = None if following is None else _month(following)
            found = await self._walk_month(walk, month, successor)
        found = found or walk.end()
        if found is not None:
            log.error("audit_broken", month=str(found.month), seq=found.seq, reason=found.reason)
        return AuditReport(walk.rows, walked, found)

    async def _begin(
        self, walk: Walk, months: list[StoredHead | date], since: date | None
    ) -> tuple[Break | None, list[StoredHead | date]]:
        """Where the walk begins: behind a month that was dropped, or that is to be left out."""
        before = [month for month in months if since is not None and _month(month) < since]
        if not before and months and isinstance(months[0], StoredHead) and months[0].last_mac:
            before = months[:1]
        rest = months[len(before) :]
        if not before or not rest:
            return None, rest
        head = before[-1]
        if not isinstance(head, StoredHead):
            return Break(head, 1, "head-missing", "the month has rows and no head"), rest
        last_mac = head.last_mac
        if last_mac is None:
            last_mac = await store.last_mac(self._database, head.month, head.seq)
        elif not self._may_be_dropped(head.month):
            detail = "its rows are gone, and are to be kept for seven years"
            return Break(head.month, 1, "dropped-early", detail), rest
        if last_mac is None:
            return Break(head.month, head.seq, "tail-cut", "its last row is not there"), rest
        return walk.begin_behind(head, last_mac=last_mac, successor=_month(rest[0])), rest

    def _may_be_dropped(self, month: date) -> bool:
        end = audit_chain.next_month(month)
        today = self._clock.now().date()
        return end.replace(year=end.year + KEEP_YEARS) <= today

    async def _walk_month(
        self, walk: Walk, month: StoredHead | date, successor: date | None
    ) -> Break | None:
        found = walk.begin_month(_month(month), has_head=isinstance(month, StoredHead))
        if found is not None or not isinstance(month, StoredHead):
            return found
        if month.last_mac is not None:
            detail = "its rows are said to have been dropped, after months that are there"
            return Break(month.month, 1, "dropped-early", detail)
        seq = 0
        while seq < month.seq:
            page = await store.page(
                self._database, month=month.month, after=seq, until=month.seq, limit=PAGE_ROWS
            )
            if not page:
                break
            for start in range(0, len(page), SLICE_ROWS):
                found = walk.follow(page[start : start + SLICE_ROWS])
                if found is not None:
                    return found
                await asyncio.sleep(0)
            seq = page[-1].seq
        return walk.end_month(month, successor=successor)

    async def after(
        self, position: tuple[date, int] | None, *, limit: int, sought: Sought | None = None
    ) -> Page:
        """The rows after one, or from the first; those that are not `sought` are left out."""
        month, seq = position or (date.min, 0)
        rows = await store.shown_after(self._database, month=month, seq=seq, limit=limit)
        last = position if not rows else _position(rows[-1])
        return Page(rows=_fitting(rows, sought), position=last, more=len(rows) == limit)

    async def newest(self, count: int, *, sought: Sought | None = None) -> Page:
        """The last `count` rows that are sought, looking back no further than SCAN_PAGES pages."""
        found: list[dict[str, object]] = []
        newest: tuple[date, int] | None = None
        month, seq, more = date.max, 0, True
        for _ in range(SCAN_PAGES):
            limit = max(count - len(found), 1) if sought is None else SCAN_ROWS
            rows = await store.shown_before(self._database, month=month, seq=seq, limit=limit)
            if rows:
                month, seq = _position(rows[-1])
                newest = newest or _position(rows[0])
            found += _fitting(rows, sought)
            more = len(rows) == limit
            if len(found) >= count or not more:
                break
        return Page(rows=found[:count][::-1], position=newest, more=more)

    async def faults_of(self, heads: Sequence[SignedHead]) -> list[tuple[int, str]]:
        """Which of these heads, by their place, the chain does not hold, and why.

        `not-signed`: it is not our audit key's word; `gone`: its row is not there; `changed`: the
        row is another one. A head of a month that has been dropped since is not asked for its row.
        """
        chain = [Head(head.month, head.seq, head.mac) for head in heads]
        stored = await store.macs(self._database, chain)
        faults: list[tuple[int, str]] = []
        for number, (head, end, (mac, dropped)) in enumerate(
            zip(heads, chain, stored, strict=True)
        ):
            if not await self._signed(head, end):
                faults.append((number, "not-signed"))
            elif mac is None and not dropped:
                faults.append((number, "gone"))
            elif mac is not None and not hmac.compare_digest(mac, head.mac):
                faults.append((number, "changed"))
        return faults

    async def _signed(self, head: SignedHead, end: Head) -> bool:
        try:
            key = await self._keyring.version(head.key_version)
        except CryptoError:
            return False
        return hmac.compare_digest(audit_chain.open_head_mac(key.key, end), head.signature)

    async def audit_uses(self, version: str) -> bool:
        """Whether a row or a head names this version of the audit key.

        The whole log may have to be read for a no. UnavailableError.
        """
        return await store.uses_version(self._database, version, timeout_s=USES_TIMEOUT_S)

    async def rights(self) -> store.Rights:
        """What our database role may do to the log."""
        return await store.rights(self._database)


def _refuse_to_walk_nothing(since: date, seen: Sequence[Head]) -> None:
    # A row that was seen there and is gone is no slip of the operator's: the walk tells of it.
    if all(head.month < since for head in seen):
        message = "The audit log has no rows since then."
        raise InputError(
            message, fields=[FieldError("since", "the chain ends in an earlier month")]
        )


def _month(month: StoredHead | date) -> date:
    return month.month if isinstance(month, StoredHead) else month


def _position(row: Mapping[str, object]) -> tuple[date, int]:
    month, seq = row["month"], row["seq"]
    assert isinstance(month, str)
    assert isinstance(seq, int)
    return date.fromisoformat(f"{month}-01"), seq


def _fitting(rows: Iterable[dict[str, object]], sought: Sought | None) -> list[dict[str, object]]:
    return [row for row in rows if sought is None or sought.fits(row)]
