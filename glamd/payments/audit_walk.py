"""The walk along a stored audit chain: what it finds, and what it calls it.

Rows in, the first Break out: no database, no clock, no asyncio. What a MAC covers stands in
`audit_chain`; here the same bytes are put together without an object for every row, since a walk
goes along millions of them, and `tests/unit/payments/test_audit_chain.py` holds the two to be one.
"""

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final, Literal, NamedTuple

from glamd.payments.audit_chain import (
    GENESIS,
    ROW,
    Head,
    closed_head_mac,
    next_month,
    open_head_mac,
    resumed_mac,
)

BreakReason = Literal[
    "changed",
    "missing",
    "inserted",
    "tail-cut",
    "head-missing",
    "head-changed",
    "month-chain",
    "after-damage",
    "set-back",
    "key-unknown",
    "key-went-back",
    "dropped-early",
]

MONTHS_TRIED: Final = 120
"""How far ahead a walk looks for the month that a closed head goes on to: ten years."""

ENCODED_LIMIT: Final = 4096
"""Groups of texts whose encoding is remembered: workers, addresses, purposes, outcomes are few."""

_BLOCK_BYTES: Final = 64
"""Of SHA-256, as HMAC needs it (RFC 2104)."""

_PARTS: Final = 13
"""Parts of a row's MAC besides its fields."""

_NUMBERS: Final = struct.Struct(">IQIq")


@dataclass(frozen=True, slots=True)
class Break:
    """The first place where the stored rows are not the ones that were written."""

    month: date
    seq: int
    reason: BreakReason
    detail: str


class StoredRow(NamedTuple):
    """A row as a walk reads it; any sequence of these values serves as well.

    `at_us` is in microseconds since 1970 and of 64 bits; a text that no entry has stands in where
    somebody stored what is no text.
    """

    seq: int
    at_us: int
    key_version: str
    action: str
    actor: str
    certificate_sha256: str
    ip: str
    subject: str
    purpose: str
    outcome: str
    correlation_id: str
    fields: Sequence[str]
    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A month's head as it is stored; `last_seq` is the highest row there is (0: none).

    `last_mac` is that of the last row of a month that was dropped, None of one that is there.
    """

    month: date
    seq: int
    mac: bytes
    key_version: str
    last_seq: int
    last_mac: bytes | None = None


class Walk:
    """Checks a stored chain row by row, month by month, holding no more than one MAC.

    Feed it `begin_month`, then every row of that month in order, then `end_month`, and `end` when
    there are no more months; each of them returns the Break it finds, after which the walk is over.
    `begin_behind` comes first where the walk does not begin with the first row of all. `rows`
    counts those that verified. `keys` are those of every version there is, oldest first; `seen` are
    ends of the chain that were known earlier.
    """

    def __init__(self, keys: Mapping[str, bytes], *, seen: Sequence[Head] = ()) -> None:
        self._keys = dict(keys)
        self._ages = {version: age for age, version in enumerate(self._keys)}
        self._version = ""
        self._key = b""
        self._inner = self._outer = hashlib.sha256()
        self._seen = sorted(seen, key=lambda head: (head.month, head.seq))
        self._end = Head(date.min, 0, GENESIS)
        self._months = 0
        self._encoded: dict[tuple[str, ...], bytes] = {}
        self.rows = 0

    def begin_behind(self, head: StoredHead, *, last_mac: bytes, successor: date) -> Break | None:
        """Begin with the month after this one, whose closed head vouches for its last row."""
        if found := self._use(head.key_version, head.month, head.seq):
            return found
        end = Head(head.month, head.seq, last_mac)
        self._seen = [seen for seen in self._seen if seen.month > head.month]
        self._end = end
        expected = closed_head_mac(self._key, end, successor=successor)
        if hmac.compare_digest(expected, head.mac):
            return None
        detail = "the head before the first month there is does not fit: months are gone"
        return Break(head.month, head.seq, "head-changed", detail)

    def begin_month(self, month: date, *, has_head: bool) -> Break | None:
        """Go on to the next month there is; its first row follows the last one before it."""
        if not has_head:
            return Break(month, 1, "head-missing", "the month has rows and no head")
        self._months += 1
        self._end = Head(month, 0, self._end.row_mac)
        return None

    def follow(self, rows: Sequence[StoredRow]) -> Break | None:
        """Check the next rows of the month."""
        month = self._end.month
        seq, previous = self._end.seq, self._end.row_mac
        month_part = _encode(month.isoformat())
        row_part = len(ROW).to_bytes(4) + ROW + (32).to_bytes(4)
        seen_seq = self._next_seen()
        for row in rows:
            if row[0] != seq + 1:
                return self._missing(seq + 1, row[0])
            if row[2] != self._version and (found := self._use(row[2], month, row[0])):
                return found
            rest = month_part + self._rest(row)
            count = (_PARTS + len(row[11])).to_bytes(4)
            mac = self._hmac(count + row_part + previous + rest)
            if not hmac.compare_digest(mac, row[12]):
                return self._why_row_differs(row, count + row_part, rest)
            seq, previous = row[0], mac
            self.rows += 1
            if seq == seen_seq:
                self._pass_seen(Head(month, seq, previous))
                seen_seq = self._next_seen()
        self._end = Head(month, seq, previous)
        return None

    def end(self) -> Break | None:
        """Say whether every end that was known earlier has been passed."""
        if not self._seen:
            return None
        gone = self._seen[0]
        detail = "this row was the last one once and is not there: the chain was set back"
        return Break(gone.month, gone.seq, "set-back", detail)

    def end_month(self, head: StoredHead, *, successor: date | None) -> Break | None:
        """Compare the rows with their head; `successor` is the next month there is."""
        end = self._end
        if end.seq < head.seq:
            detail = f"the head says {head.seq} rows, the last one there is {end.seq}"
            return Break(end.month, end.seq + 1, "tail-cut", detail)
        if head.last_seq > head.seq:
            return Break(end.month, head.seq + 1, "inserted", "it stands beyond the head")
        if found := self._use(head.key_version, end.month, end.seq):
            return found
        expected = (
            closed_head_mac(self._key, end, successor=successor)
            if successor
            else open_head_mac(self._key, end)
        )
        if hmac.compare_digest(expected, head.mac):
            return None
        if away := self._month_it_was_closed_towards(head.mac):
            detail = f"the chain goes on to {away}, which is not there"
            return Break(away, 1, "month-chain", detail)
        return Break(end.month, end.seq, "head-changed", "the head does not fit the last row")

    def _use(self, version: str, month: date, seq: int) -> Break | None:
        """Take the key of this version, which is never older than the one before it."""
        if version == self._version:
            return None
        key = self._keys.get(version)
        if key is None:
            return Break(month, seq, "key-unknown", "the version of the key it names is not there")
        if self._version and self._ages[version] < self._ages[self._version]:
            detail = f"its key is {version}, older than {self._version} of what is before it"
            return Break(month, seq, "key-went-back", detail)
        self._version, self._key = version, key
        padded = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))
        return None

    def _hmac(self, message: bytes) -> bytes:
        """HMAC-SHA-256, in under half the time of the library's, which begins anew each time."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()

    def _rest(self, row: StoredRow) -> bytes:
        """A row's part of its MAC that comes after the month."""
        fields = tuple(row[11])
        known = self._encoded
        return b"".join(
            (
                _NUMBERS.pack(8, row[0], 8, row[1]),
                known.get(row[3:7]) or self._remember(row[3:7]),
                _encode(row[7]),
                known.get(row[8:10]) or self._remember(row[8:10]),
                _encode(row[10]),
                known.get(fields) or self._remember(fields),
            )
        )

    def _remember(self, texts: tuple[str, ...]) -> bytes:
        if len(self._encoded) >= ENCODED_LIMIT:
            self._encoded.clear()
        encoded = self._encoded[texts] = b"".join(map(_encode, texts))
        return encoded

    def _next_seen(self) -> int:
        """The number in this month of the next row that was an end once, 0 where there is none."""
        seen = self._seen
        return seen[0].seq if seen and seen[0].month == self._end.month else 0

    def _pass_seen(self, end: Head) -> None:
        while self._seen and self._seen[0] == end:
            del self._seen[0]

    def _missing(self, expected: int, seq: int) -> Break:
        gone = f"rows {expected} to {seq - 1} are" if seq > expected + 1 else "it is"
        return Break(self._end.month, expected, "missing", f"{gone} not there")

    def _why_row_differs(self, row: StoredRow, before: bytes, rest: bytes) -> Break:
        month, seq = self._end.month, row[0]
        mark = resumed_mac(self._key, month=month, seq=seq)
        mac = hmac.digest(self._key, before + mark + rest, "sha256")
        if hmac.compare_digest(mac, row[12]):
            detail = "written when the head was found damaged; rows before it may have been cut"
            return Break(month, seq, "after-damage", detail)
        detail = "it does not fit its MAC and the row before: changed, swapped or put in"
        if self._months == 1 and seq == 1:
            detail += ", or the months before are gone"
        return Break(month, seq, "changed", detail)

    def _month_it_was_closed_towards(self, head_mac: bytes) -> date | None:
        month = self._end.month
        for _ in range(MONTHS_TRIED):
            month = next_month(month)
            mac = closed_head_mac(self._key, self._end, successor=month)
            if hmac.compare_digest(mac, head_mac):
                return month
        return None


def _encode(text: str) -> bytes:
    """A part as it stands in a MAC: its length in 4 bytes, then UTF-8."""
    encoded = text.encode()
    return len(encoded).to_bytes(4) + encoded
