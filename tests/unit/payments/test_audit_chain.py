"""The audit chain without a database: what a walk must find, and what it must not call broken."""

import hashlib
import hmac
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glamd.payments import audit_chain
from glamd.payments.audit_chain import AuditEntry, AuditRow, Head
from glamd.payments.audit_walk import Break, StoredHead, StoredRow, Walk

KEY = bytes(range(32))
NEWER = bytes(range(32, 64))
KEYS = {"v1": KEY, "v2": NEWER}
OCTOBER, NOVEMBER, DECEMBER = date(2025, 10, 1), date(2025, 11, 1), date(2025, 12, 1)
AT = datetime(2025, 10, 7, 12, tzinfo=UTC)


def entry(subject: str = "ptk_1") -> AuditEntry:
    return AuditEntry(
        action="decrypt",
        actor="settler",
        certificate_sha256="ab" * 32,
        ip="192.0.2.7",
        subject=subject,
        fields=("pan", "expiry"),
        purpose="settlement",
        outcome="ok",
        correlation_id="c-1",
    )


@dataclass
class Month:
    """One month as the database holds it, to be tampered with."""

    month: date
    rows: list[AuditRow]
    head_seq: int
    head_mac: bytes
    has_head: bool = True
    key_version: str = "v1"

    def resign(self, mac: bytes, key_version: str) -> None:
        self.head_mac, self.key_version = mac, key_version

    @property
    def head(self) -> StoredHead:
        return StoredHead(
            month=self.month,
            seq=self.head_seq,
            mac=self.head_mac,
            key_version=self.key_version,
            last_seq=self.rows[-1].seq if self.rows else 0,
        )


def as_read(row: AuditRow) -> StoredRow:
    """A row as a walk reads it from the database."""
    told = row.entry
    return StoredRow(
        seq=row.seq,
        at_us=row.at_us,
        key_version=row.key_version,
        action=told.action,
        actor=told.actor,
        certificate_sha256=told.certificate_sha256,
        ip=told.ip,
        subject=told.subject,
        purpose=told.purpose,
        outcome=told.outcome,
        correlation_id=told.correlation_id,
        fields=told.fields,
        mac=row.mac,
    )


@dataclass
class Stored:
    """A whole chain, written as the daemon writes it, without a database."""

    months: list[Month] = field(default_factory=list)
    end: Head | None = None

    def write(self, month: date, count: int, *, version: str = "v1") -> None:
        key, head = KEYS[version], self.end
        if head is None or head.month != month:
            if head is not None:
                closed = audit_chain.closed_head_mac(key, head, successor=month)
                self.months[-1].resign(closed, version)
            head = Head(month, 0, head.row_mac if head else audit_chain.GENESIS)
            self.months.append(Month(month, [], 0, b""))
        entries = [(AT + timedelta(seconds=n), entry(f"ptk_{n}")) for n in range(count)]
        rows, self.end = audit_chain.extend(key, key_version=version, head=head, entries=entries)
        last = self.months[-1]
        last.rows += rows
        last.head_seq = self.end.seq
        last.resign(audit_chain.open_head_mac(key, self.end), version)


def breaks(months: Sequence[Month]) -> Iterator[Break | None]:
    walk = Walk(KEYS)
    for month, following in itertools.pairwise([*months, None]):
        assert month is not None
        yield walk.begin_month(month.month, has_head=month.has_head)
        for row in month.rows:
            if row.seq <= month.head_seq:
                yield walk.follow([as_read(row)])
        yield walk.end_month(month.head, successor=following.month if following else None)


def first_break(stored: Stored) -> Break | None:
    return next((found for found in breaks(stored.months) if found), None)


@pytest.fixture
def stored() -> Stored:
    made = Stored()
    made.write(OCTOBER, 5)
    made.write(NOVEMBER, 3)
    made.write(NOVEMBER, 2)
    made.write(DECEMBER, 4)
    return made


def test_a_chain_that_nobody_touched_verifies(stored: Stored) -> None:
    assert first_break(stored) is None


def test_no_rows_at_all_are_a_whole_chain() -> None:
    assert first_break(Stored()) is None


def test_a_month_without_any_event_between_two_others_is_no_break() -> None:
    stored = Stored()
    stored.write(OCTOBER, 2)
    stored.write(date(2026, 3, 1), 2)
    assert first_break(stored) is None


CHANGED_ENTRIES = [
    replace(entry(), action="x"),
    replace(entry(), actor="x"),
    replace(entry(), certificate_sha256="x"),
    replace(entry(), ip="x"),
    replace(entry(), subject="x"),
    replace(entry(), purpose="x"),
    replace(entry(), outcome="x"),
    replace(entry(), correlation_id="x"),
    replace(entry(), fields=()),
    replace(entry(), fields=("expiry", "pan")),
    replace(entry(), fields=("panexpiry",)),
]


@pytest.mark.parametrize(
    "change",
    [
        lambda row: replace(row, at_us=row.at_us + 1),
        lambda row: replace(row, mac=bytes([row.mac[0] ^ 1]) + row.mac[1:]),
        lambda row: replace(row, mac=b""),
        *(partial(lambda changed, row: replace(row, entry=changed), e) for e in CHANGED_ENTRIES),
    ],
)
def test_a_change_of_any_column_is_found_at_its_row(
    stored: Stored, change: Callable[[AuditRow], AuditRow]
) -> None:
    november = stored.months[1]
    november.rows[2] = change(november.rows[2])
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (NOVEMBER, 3, "changed")


def test_a_row_that_is_gone_is_missed(stored: Stored) -> None:
    del stored.months[1].rows[2]
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (NOVEMBER, 3, "missing")


def test_a_row_that_is_gone_is_found_when_the_others_moved_up(stored: Stored) -> None:
    november = stored.months[1]
    del november.rows[2]
    november.rows = [replace(row, seq=n) for n, row in enumerate(november.rows, start=1)]
    found = first_break(stored)
    assert found is not None
    assert (found.seq, found.reason) == (3, "changed")


def test_two_rows_that_changed_places_are_found_at_the_first(stored: Stored) -> None:
    rows = stored.months[1].rows
    rows[1], rows[3] = replace(rows[3], seq=2), replace(rows[1], seq=4)
    found = first_break(stored)
    assert found is not None
    assert (found.seq, found.reason) == (2, "changed")


def test_a_row_put_into_the_middle_is_found(stored: Stored) -> None:
    rows = stored.months[1].rows
    later = [replace(row, seq=row.seq + 1) for row in rows[2:]]
    stored.months[1].rows = [*rows[:2], replace(rows[0], seq=3), *later]
    stored.months[1].head_seq += 1
    found = first_break(stored)
    assert found is not None
    assert (found.seq, found.reason) == (3, "changed")


def test_a_row_beyond_the_head_is_found(stored: Stored) -> None:
    rows = stored.months[2].rows
    rows.append(replace(rows[0], seq=5))
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (DECEMBER, 5, "inserted")


def test_a_tail_cut_under_its_head_is_found(stored: Stored) -> None:
    del stored.months[2].rows[2:]
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (DECEMBER, 3, "tail-cut")


def test_a_tail_cut_with_the_head_set_back_to_the_last_row_left_is_found(stored: Stored) -> None:
    december = stored.months[2]
    del december.rows[2:]
    december.head_seq, december.head_mac = 2, december.rows[-1].mac
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (DECEMBER, 2, "head-changed")


def test_a_whole_month_cut_out_of_the_middle_is_found(stored: Stored) -> None:
    del stored.months[1]
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.reason) == (NOVEMBER, "month-chain")


def test_the_newest_month_cut_off_with_its_head_is_found(stored: Stored) -> None:
    del stored.months[2]
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.reason) == (DECEMBER, "month-chain")


def test_the_first_months_cut_off_are_found(stored: Stored) -> None:
    del stored.months[0]
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (NOVEMBER, 1, "changed")
    assert "months before are gone" in found.detail


def test_a_head_that_is_gone_is_missed(stored: Stored) -> None:
    stored.months[1].has_head = False
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.reason) == (NOVEMBER, "head-missing")


def test_rows_written_after_damage_never_verify(stored: Stored) -> None:
    december = stored.months[2]
    del december.rows[2:]
    assert stored.end is not None
    resumed = audit_chain.resumed_mac(KEY, month=DECEMBER, seq=3)
    rows, end = audit_chain.extend(
        KEY, key_version="v1", head=Head(DECEMBER, 2, resumed), entries=[(AT, entry())]
    )
    december.rows += rows
    december.head_seq, december.head_mac = 3, audit_chain.open_head_mac(KEY, end)
    found = first_break(stored)
    assert found is not None
    assert (found.month, found.seq, found.reason) == (DECEMBER, 3, "after-damage")


def test_another_key_verifies_nothing(stored: Stored) -> None:
    walk = Walk({"v1": bytes(32)})
    walk.begin_month(OCTOBER, has_head=True)
    assert walk.follow([as_read(stored.months[0].rows[0])]) is not None


# ---- versions of the key


def test_a_chain_goes_on_under_the_next_version_in_the_midst_of_a_month() -> None:
    stored = Stored()
    stored.write(OCTOBER, 3)
    stored.write(OCTOBER, 3, version="v2")
    stored.write(NOVEMBER, 3, version="v2")
    assert first_break(stored) is None


def test_a_row_under_an_older_version_than_the_one_before_it_is_a_break() -> None:
    stored = Stored()
    stored.write(OCTOBER, 2)
    stored.write(OCTOBER, 2, version="v2")
    # Whoever got hold of the old key makes a chain that fits in all but this.
    stored.write(OCTOBER, 2, version="v1")
    found = first_break(stored)
    assert found is not None
    assert (found.seq, found.reason) == (5, "key-went-back")


def test_a_head_signed_by_an_older_version_than_its_rows_is_a_break() -> None:
    stored = Stored()
    stored.write(OCTOBER, 2, version="v2")
    assert stored.end is not None
    stored.months[0].resign(audit_chain.open_head_mac(KEY, stored.end), "v1")
    found = first_break(stored)
    assert found is not None
    assert found.reason == "key-went-back"


@pytest.mark.parametrize("named", ["v2", "v3", ""])
def test_a_row_or_head_that_names_another_version_than_made_it_is_a_break(named: str) -> None:
    for what in ("row", "head"):
        stored = Stored()
        stored.write(OCTOBER, 2)
        october = stored.months[0]
        if what == "row":
            october.rows[1] = replace(october.rows[1], key_version=named)
        else:
            october.key_version = named
        found = first_break(stored)
        assert found is not None
        assert found.seq == 2
        known = "changed" if what == "row" else "head-changed"
        assert found.reason == (known if named == "v2" else "key-unknown")


# ---- a walk that begins later


def test_a_walk_may_begin_behind_a_month_whose_closed_head_vouches_for_its_last_row(
    stored: Stored,
) -> None:
    october, november = stored.months[:2]
    walk = Walk(KEYS, seen=[Head(OCTOBER, 2, october.rows[1].mac)])
    last_mac = october.rows[-1].mac
    assert walk.begin_behind(october.head, last_mac=last_mac, successor=NOVEMBER) is None
    assert walk.begin_month(NOVEMBER, has_head=True) is None
    assert walk.follow([as_read(row) for row in november.rows]) is None
    assert walk.end_month(november.head, successor=DECEMBER) is None
    assert walk.end() is None
    assert walk.rows == 5


@pytest.mark.parametrize("what", ["last row", "successor", "number", "version"])
def test_a_head_that_does_not_fit_lets_no_walk_begin_behind_it(stored: Stored, what: str) -> None:
    head, last_mac, successor = stored.months[0].head, stored.months[0].rows[-1].mac, NOVEMBER
    if what == "last row":
        last_mac = stored.months[0].rows[-2].mac
    elif what == "successor":
        successor = DECEMBER
    elif what == "number":
        head = replace(head, seq=4)
    else:
        head = replace(head, key_version="v2")
    found = Walk(KEYS).begin_behind(head, last_mac=last_mac, successor=successor)
    assert found is not None
    assert (found.month, found.reason) == (OCTOBER, "head-changed")


def test_months_are_counted_in_utc() -> None:
    last_second = datetime.fromisoformat("2025-12-01T00:30:00+01:00")
    assert audit_chain.month_of(last_second) == NOVEMBER
    assert audit_chain.next_month(DECEMBER) == date(2026, 1, 1)
    assert audit_chain.next_month(date(2026, 1, 31)) == date(2026, 2, 1)


def test_a_text_that_the_database_cannot_hold_is_made_storable_not_refused() -> None:
    hostile = replace(
        entry(), purpose="a\0b\ud800c", correlation_id="ü" * 10_000, fields=("x",) * 1000
    )
    stored = audit_chain.storable(hostile)
    assert stored.purpose == "a�b�c"
    assert stored.correlation_id == "ü" * audit_chain.TEXT_LIMIT
    assert len(stored.fields) == audit_chain.FIELDS_LIMIT
    assert audit_chain.storable(stored) == stored


def test_a_card_number_in_any_text_does_not_get_into_a_row() -> None:
    pan = "4242424242424242"
    hostile = AuditEntry(
        action=pan,
        actor=f"w-{pan}",
        certificate_sha256=pan,
        ip=pan,
        subject=f"ptk_{pan}",
        fields=("pan", "4242 4242 4242 4242"),
        purpose=f"settle.{pan}",
        outcome=pan,
        # Cut first, it would leave all but one of the digits.
        correlation_id="x" * (audit_chain.TEXT_LIMIT - 15) + pan,
    )
    stored = audit_chain.storable(hostile)
    assert "4242" not in repr(stored)
    assert stored.subject == "ptk_" + "*" * 16
    assert stored.fields == ("pan", "**** **** **** ****")
    assert stored.correlation_id.endswith("x" + "*" * 15)
    assert len(stored.correlation_id) == audit_chain.TEXT_LIMIT
    assert audit_chain.storable(stored) == stored


def test_ids_that_machines_make_are_kept_whole() -> None:
    kept = replace(
        entry("ptk_01HQ7V3K9M2N4P5R6S7T8V9W0X"),
        certificate_sha256="4242424242424242" * 3 + "ab" * 8,
        correlation_id="4242424242424242" + "deadbeef" * 2,
    )
    assert audit_chain.storable(kept) == kept


def test_a_chain_is_whole_only_with_every_end_that_was_known_earlier(stored: Stored) -> None:
    def walked(*seen: Head) -> Break | None:
        walk = Walk(KEYS, seen=seen)
        for month in stored.months:
            assert walk.begin_month(month.month, has_head=True) is None
            assert walk.follow([as_read(row) for row in month.rows]) is None
        return walk.end()

    november = stored.months[1]
    assert stored.end is not None
    known = Head(NOVEMBER, 3, november.rows[2].mac)
    assert walked() is None
    assert walked(stored.end, known, known) is None
    for gone in (
        replace(known, row_mac=bytes(32)),
        replace(known, seq=4),
        replace(known, seq=6),
        replace(known, month=date(2025, 9, 1)),
        replace(known, month=date(2026, 1, 1)),
    ):
        found = walked(stored.end, gone)
        assert found is not None
        assert (found.month, found.seq, found.reason) == (gone.month, gone.seq, "set-back")
    empty = Walk(KEYS, seen=[known]).end()
    assert empty is not None
    assert (empty.month, empty.seq, empty.reason) == (NOVEMBER, 3, "set-back")


def test_a_mac_is_what_the_documentation_says() -> None:
    """Seven years of rows hang on this encoding: computed here by other means, as docs/audit.md."""

    def parts(*texts: bytes) -> bytes:
        lengths_first = b"".join(struct.pack(">I", len(text)) + text for text in texts)
        return struct.pack(">I", len(texts)) + lengths_first

    def mac(encoded: bytes) -> bytes:
        return hmac.new(KEY, encoded, hashlib.sha256).digest()

    previous = bytes(range(100, 132))
    row = mac(
        parts(
            b"glamd audit row 1",
            previous,
            b"2025-10-01",
            struct.pack(">Q", 7),
            struct.pack(">q", 1_759_838_400_000_123),
            b"decrypt",
            b"settler",
            b"ab" * 32,
            b"192.0.2.7",
            b"ptk_1",
            b"settlement",
            b"ok",
            b"c-1",
            b"pan",
            b"expiry",
        )
    )
    at_us = audit_chain.at_us_of(AT + timedelta(microseconds=123))
    assert row == audit_chain.row_mac(
        KEY, month=OCTOBER, seq=7, at_us=at_us, entry=entry(), previous=previous
    )
    head = Head(OCTOBER, 7, row)
    where = (b"2025-10-01", struct.pack(">Q", 7), row)
    assert mac(parts(b"glamd audit head 1", *where)) == audit_chain.open_head_mac(KEY, head)
    closed = mac(parts(b"glamd audit closed head 1", *where, b"2025-12-01"))
    assert closed == audit_chain.closed_head_mac(KEY, head, successor=DECEMBER)
    resumed = mac(parts(b"glamd audit resumed 1", *where[:2]))
    assert resumed == audit_chain.resumed_mac(KEY, month=OCTOBER, seq=7)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ENTRIES = st.builds(
    AuditEntry,
    action=TEXTS,
    actor=TEXTS,
    certificate_sha256=TEXTS,
    ip=TEXTS,
    subject=TEXTS,
    fields=st.lists(TEXTS, max_size=3).map(tuple),
    purpose=TEXTS,
    outcome=TEXTS,
    correlation_id=TEXTS,
)


@given(told=st.lists(ENTRIES, min_size=1, max_size=4), at_us=st.integers(-(2**63), 2**63 - 1))
def test_a_walk_puts_together_the_very_bytes_that_a_writer_does(
    told: list[AuditEntry], at_us: int
) -> None:
    walk = Walk(KEYS)
    walk.begin_month(OCTOBER, has_head=True)
    previous = audit_chain.GENESIS
    rows = []
    for seq, made in enumerate(told, start=1):
        previous = audit_chain.row_mac(
            KEY, month=OCTOBER, seq=seq, at_us=at_us, entry=made, previous=previous
        )
        rows.append(AuditRow(OCTOBER, seq, at_us, made, previous, "v1"))
    assert walk.follow([as_read(row) for row in rows]) is None
    assert walk.rows == len(told)


@given(one=ENTRIES, other=ENTRIES)
def test_no_two_different_entries_share_a_mac(one: AuditEntry, other: AuditEntry) -> None:
    def mac(made: AuditEntry) -> bytes:
        return audit_chain.row_mac(
            KEY, month=OCTOBER, seq=1, at_us=0, entry=made, previous=audit_chain.GENESIS
        )

    assert (mac(one) == mac(other)) == (one == other)


def test_text_moved_between_neighbouring_columns_changes_the_mac() -> None:
    def mac(made: AuditEntry) -> bytes:
        return audit_chain.row_mac(
            KEY, month=OCTOBER, seq=1, at_us=0, entry=made, previous=audit_chain.GENESIS
        )

    assert mac(replace(entry(), action="ab", actor="c")) != mac(
        replace(entry(), action="a", actor="bc")
    )
    assert mac(replace(entry(), fields=("a", "b"))) != mac(replace(entry(), fields=("ab",)))
    last_text = replace(entry(), correlation_id="x", fields=())
    assert mac(last_text) != mac(replace(entry(), correlation_id="", fields=("x",)))
