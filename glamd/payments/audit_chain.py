"""The audit chain as arithmetic: what a row's MAC covers, and how a head is signed.

Bytes in, bytes out: no database, no clock, no asyncio, so that the rules by which an assessor
judges seven years of rows can be read and tested by themselves. `glamd.payments.audit` stores
what is made here, `audit_walk` checks what is stored.

A row's MAC is HMAC-SHA-256 over the row and its predecessor's MAC. Every part is written with its
length before it, so that no two different rows have the same bytes. A month's first row follows
the last row of the month before; the very first row follows GENESIS.

A head says where a month's chain ends, and is signed rather than copied from the last row: whoever
cuts rows off cannot make the head that fits what is left. When the next month opens, the head is
signed anew as closed towards it, which fences writers whose clock is late and lets a walk see that
a whole month is gone.

Rows and heads name the version of the key that made their MACs. The name itself is under no MAC:
under another version's key the MAC is another one.
"""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from glamd.payments import card_numbers

MAC_BYTES = 32
"""HMAC-SHA-256, not truncated."""

GENESIS = bytes(MAC_BYTES)
"""What the first row of all follows."""

TEXT_LIMIT = 512
"""Characters of one text in a row; callers' texts are refused elsewhere, here they are cut."""

FIELDS_LIMIT = 32
"""Field names in a row."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ROW = b"glamd audit row 1"
_OPEN_HEAD = b"glamd audit head 1"
_CLOSED_HEAD = b"glamd audit closed head 1"
_RESUMED = b"glamd audit resumed 1"
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """What one row says, but for its time and place, which the chain gives it.

    `actor` is a worker's name, an operator's uid or a service; `subject` the token or the key's
    name; `outcome` is "ok" or a stable error code. No key and no card data is in any of them.
    """

    action: str
    actor: str
    certificate_sha256: str
    ip: str
    subject: str
    fields: tuple[str, ...]
    purpose: str
    outcome: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A row as it is stored. `month` is the first day of the month whose chain it belongs to.

    `at_us` is in microseconds since 1970, since the database can hold times that Python cannot.
    """

    month: date
    seq: int
    at_us: int
    entry: AuditEntry
    mac: bytes
    key_version: str


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a month's chain: its last row's number (0: none yet) and that row's MAC."""

    month: date
    seq: int
    row_mac: bytes


def at_us_of(at: datetime) -> int:
    """Microseconds since 1970 of an aware time, exactly."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def month_of(at: datetime) -> date:
    """The first day of the month of an aware time, in UTC."""
    return at.astimezone(UTC).date().replace(day=1)


def next_month(month: date) -> date:
    """The first day of the month after."""
    return (month.replace(day=1) + timedelta(days=32)).replace(day=1)


def storable(entry: AuditEntry) -> AuditEntry:
    """The entry as the database may hold it: texts cut to TEXT_LIMIT, NUL, surrogates, PANs gone.

    An attempt with an absurd purpose is an attempt all the same and must get its row, but a card
    number that somebody put into it must not get there with it.
    """
    return AuditEntry(
        action=_storable(entry.action),
        actor=_storable(entry.actor),
        certificate_sha256=_storable(entry.certificate_sha256),
        ip=_storable(entry.ip),
        subject=_storable(entry.subject),
        fields=tuple(_storable(field) for field in entry.fields[:FIELDS_LIMIT]),
        purpose=_storable(entry.purpose),
        outcome=_storable(entry.outcome),
        correlation_id=_storable(entry.correlation_id),
    )


def _storable(text: str) -> str:
    # Masked before it is cut, which could leave most of a card number; and not all of what is huge.
    text = card_numbers.masked(text[: 2 * TEXT_LIMIT])[:TEXT_LIMIT]
    return text if text.isascii() and "\0" not in text else _UNSTORABLE.sub("�", text)


def row_mac(
    key: bytes, *, month: date, seq: int, at_us: int, entry: AuditEntry, previous: bytes
) -> bytes:
    """HMAC-SHA-256 (32 bytes) over a row and the MAC of the row before it."""
    parts = [
        ROW,
        previous,
        month.isoformat().encode(),
        seq.to_bytes(8),
        at_us.to_bytes(8, signed=True),
        entry.action.encode(),
        entry.actor.encode(),
        entry.certificate_sha256.encode(),
        entry.ip.encode(),
        entry.subject.encode(),
        entry.purpose.encode(),
        entry.outcome.encode(),
        entry.correlation_id.encode(),
        *(field.encode() for field in entry.fields),
    ]
    return _mac(key, parts)


def open_head_mac(key: bytes, head: Head) -> bytes:
    """The signature (32 bytes) of a head that rows may still follow."""
    return _mac(key, [_OPEN_HEAD, *_head_parts(head)])


def closed_head_mac(key: bytes, head: Head, *, successor: date) -> bytes:
    """The signature (32 bytes) of a head whose chain goes on in the month `successor`."""
    return _mac(key, [_CLOSED_HEAD, *_head_parts(head), successor.isoformat().encode()])


def resumed_mac(key: bytes, *, month: date, seq: int) -> bytes:
    """What stands in for the predecessor (32 bytes) where a head was found not to verify.

    Writing goes on, since a service that stops is not what the damage calls for; but the chain is
    never closed over it: this value tells every later walk that something was done before `seq`.
    """
    return _mac(key, [_RESUMED, month.isoformat().encode(), seq.to_bytes(8)])


def _head_parts(head: Head) -> list[bytes]:
    return [head.month.isoformat().encode(), head.seq.to_bytes(8), head.row_mac]


def _mac(key: bytes, parts: list[bytes]) -> bytes:
    encoded = bytearray(len(parts).to_bytes(4))
    for part in parts:
        encoded += len(part).to_bytes(4)
        encoded += part
    return hmac.digest(key, bytes(encoded), "sha256")


def extend(
    key: bytes, *, key_version: str, head: Head, entries: Sequence[tuple[datetime, AuditEntry]]
) -> tuple[list[AuditRow], Head]:
    """The rows that follow `head`, in order, and the head after them."""
    rows = []
    seq, previous = head.seq, head.row_mac
    for at, entry in entries:
        seq += 1
        at_us = at_us_of(at)
        previous = row_mac(
            key, month=head.month, seq=seq, at_us=at_us, entry=entry, previous=previous
        )
        rows.append(AuditRow(head.month, seq, at_us, entry, previous, key_version))
    return rows, Head(head.month, seq, previous)
