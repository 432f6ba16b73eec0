"""The audit log on a real database: tampering, writers at once, commits that vanish."""

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments import audit as audit_module
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import Head
from glamd.payments.audit_walk import Break
from tests.support.audit_writer import entry
from tests.support.database_proxy import DatabaseProxy
from tests.support.keys import load_keyrings
from tests.support.postgres import eventually
from tests.support.settable_clock import SettableClock

NOVEMBER, DECEMBER, JANUARY = date(2025, 11, 1), date(2025, 12, 1), date(2026, 1, 1)
PATIENCE_S = 10.0
PARTITIONS = (
    "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
    "WHERE inhparent = 'cde.decrypt_audit_log'::regclass ORDER BY 1"
)


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each: much cheaper than one each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("DELETE FROM cde.audit_heads; DELETE FROM cde.encryption_keys")
    for name in await connection.fetch(PARTITIONS):
        await connection.execute(f"DROP TABLE {name['name']}")
    await connection.close()
    return module_database_url


@pytest.fixture
async def database(daemon_url: str) -> AsyncIterator[Database]:
    """The daemon's connections: as a login that may add to the log, read it, and no more."""
    connected = await Database.connect(daemon_url, pool_size=4)
    yield connected
    await connected.close()


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock(datetime(2025, 11, 12, 10, 30, tzinfo=UTC))


@pytest.fixture
async def by_hand(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A session of somebody with every right; closed in any case, or uvloop hangs at its end."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def keyring(database: Database, tmp_path: Path, clock: SettableClock) -> Keyring[MacKey]:
    return (await load_keyrings(database, tmp_path, clock)).audit


@pytest.fixture
async def audit(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> AsyncIterator[Audit]:
    made = Audit(database, keyring, clock)
    await made.start()
    yield made
    await made.stop(PATIENCE_S)


async def write(audit: Audit, count: int, *, prefix: str = "c") -> list[str]:
    ids = [f"{prefix}-{number}" for number in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(audit.append(entry(one)) for one in ids))
    return ids


async def broken(audit: Audit) -> Break:
    report = await audit.verify()
    assert not report.ok
    assert report.first_broken is not None
    return report.first_broken


async def stored(database: Database) -> list[str]:
    rows = await database.fetch(
        "SELECT correlation_id FROM cde.decrypt_audit_log ORDER BY month, seq"
    )
    return [row["correlation_id"] for row in rows]


# ---- tampering


@pytest.fixture
async def three_months(audit: Audit, clock: SettableClock) -> Audit:
    """300 rows in November, more than a page; 5 in December; 5 in January."""
    await write(audit, 300)
    for month in (DECEMBER, JANUARY):
        clock.set(datetime(month.year, month.month, 3, tzinfo=UTC))
        await write(audit, 5)
    report = await audit.verify()
    assert (report.ok, report.rows, report.partitions) == (True, 310, 3)
    return audit


NOV, DEC, JAN = "month = '2025-11-01'", "month = '2025-12-01'", "month = '2026-01-01'"
LOG, HEADS = "cde.decrypt_audit_log", "cde.audit_heads"
COPY = (
    f"INSERT INTO {LOG} SELECT month, %s, at, action, actor, certificate_sha256, ip, subject, "
    f"fields, purpose, outcome, correlation_id, mac, key_version FROM {LOG} "
    f"WHERE {JAN} AND seq = 5"
)
SWAP = (
    f"UPDATE {LOG} SET seq = CASE seq WHEN 20 THEN 1030 ELSE 1020 END "
    f"WHERE {NOV} AND seq IN (20, 30);"
    f"UPDATE {LOG} SET seq = seq - 1000 WHERE {NOV} AND seq > 1000"
)
PUT_IN = (
    f"UPDATE {LOG} SET seq = seq + 1000 WHERE {NOV} AND seq > 20;"
    f"UPDATE {LOG} SET seq = seq - 999 WHERE {NOV} AND seq > 1000;"
    f"{(COPY % 21).replace(f'{JAN} AND seq = 5', f'{NOV} AND seq = 20')};"
    f"UPDATE {HEADS} SET seq = 301 WHERE {NOV}"
)
CUT_WITH_ITS_HEAD = (
    f"DELETE FROM {LOG} WHERE {JAN} AND seq > 3; UPDATE {HEADS} SET seq = 3, mac = "
    f"(SELECT mac FROM {LOG} WHERE {JAN} AND seq = 3) WHERE {JAN}"
)

TAMPERED = [
    (f"UPDATE {LOG} SET outcome = 'x' WHERE {NOV} AND seq = 299", NOVEMBER, 299, "changed"),
    (f"UPDATE {LOG} SET at = at + interval '1 us' WHERE {NOV} AND seq = 1", NOVEMBER, 1, "changed"),
    (f"UPDATE {LOG} SET at = 'infinity' WHERE {NOV} AND seq = 7", NOVEMBER, 7, "changed"),
    (f"UPDATE {LOG} SET at = '200000-01-01' WHERE {NOV} AND seq = 7", NOVEMBER, 7, "changed"),
    (f"UPDATE {LOG} SET fields = '{{pan}}' WHERE {DEC} AND seq = 1", DECEMBER, 1, "changed"),
    (f"UPDATE {LOG} SET fields = '{{NULL}}' WHERE {DEC} AND seq = 2", DECEMBER, 2, "changed"),
    (f"UPDATE {LOG} SET fields = '{{{{pan}}}}' WHERE {DEC} AND seq = 2", DECEMBER, 2, "changed"),
    (f"UPDATE {LOG} SET mac = '' WHERE {DEC} AND seq = 5", DECEMBER, 5, "changed"),
    (f"DELETE FROM {LOG} WHERE {NOV} AND seq = 256", NOVEMBER, 256, "missing"),
    (f"DELETE FROM {LOG} WHERE {NOV} AND seq BETWEEN 200 AND 290", NOVEMBER, 200, "missing"),
    (f"DELETE FROM {LOG} WHERE {JAN} AND seq > 3", JANUARY, 4, "tail-cut"),
    (f"DELETE FROM {LOG} WHERE {DEC}", DECEMBER, 1, "tail-cut"),
    (f"DELETE FROM {LOG} WHERE {DEC}; DELETE FROM {HEADS} WHERE {DEC}", DECEMBER, 1, "month-chain"),
    (f"DELETE FROM {LOG} WHERE {JAN}; DELETE FROM {HEADS} WHERE {JAN}", JANUARY, 1, "month-chain"),
    ("DROP TABLE cde.decrypt_audit_log_2025_12", DECEMBER, 1, "tail-cut"),
    (f"DELETE FROM {LOG} WHERE {NOV}; DELETE FROM {HEADS} WHERE {NOV}", DECEMBER, 1, "changed"),
    (COPY % 6, JANUARY, 6, "inserted"),
    (COPY % 6 + f"; UPDATE {HEADS} SET seq = 6 WHERE {JAN}", JANUARY, 6, "changed"),
    (SWAP, NOVEMBER, 20, "changed"),
    (PUT_IN, NOVEMBER, 21, "changed"),
    (CUT_WITH_ITS_HEAD, JANUARY, 3, "head-changed"),
    (f"UPDATE {HEADS} SET mac = '' WHERE {NOV}", NOVEMBER, 300, "head-changed"),
    (f"UPDATE {HEADS} SET seq = seq - 1 WHERE {JAN}", JANUARY, 5, "inserted"),
    (f"UPDATE {HEADS} SET seq = seq + 1 WHERE {JAN}", JANUARY, 6, "tail-cut"),
    (f"DELETE FROM {HEADS} WHERE {DEC}", DECEMBER, 1, "head-missing"),
]


async def test_whatever_is_done_to_the_rows_by_hand_is_found_and_named(
    by_hand: asyncpg.Connection, three_months: Audit
) -> None:
    for sql, month, seq, reason in TAMPERED:
        backup = await copy_of(by_hand)
        await by_hand.execute(sql)
        found = await broken(three_months)
        assert (found.month, found.seq, found.reason) == (month, seq, reason), sql
        await put_back(by_hand, backup)
    assert (await three_months.verify()).ok


Backup = tuple[list[asyncpg.Record], list[asyncpg.Record]]


async def copy_of(connection: asyncpg.Connection) -> Backup:
    rows = await connection.fetch(f"SELECT * FROM {LOG}")
    return rows, await connection.fetch(f"SELECT * FROM {HEADS}")


async def put_back(connection: asyncpg.Connection, backup: Backup) -> None:
    async def work() -> None:
        await connection.execute(
            f"TRUNCATE {LOG}; TRUNCATE {HEADS}; CREATE TABLE IF NOT EXISTS {LOG}_2025_12 "
            f"PARTITION OF {LOG} FOR VALUES FROM ('2025-12-01') TO ('2026-01-01')"
        )
        for table, rows in zip(("decrypt_audit_log", "audit_heads"), backup, strict=True):
            await connection.copy_records_to_table(table, schema_name="cde", records=rows)

    await by_force(connection, work)


async def by_force(connection: asyncpg.Connection, work: Callable[[], Awaitable[object]]) -> None:
    """Do it in one transaction, again where readers and it waited for one another in a circle.

    Who tampers takes the tables' locks in an order of his own, and is often the one who gives way.
    """

    async def attempt() -> bool:
        async with connection.transaction():
            await work()
        return True

    await eventually(attempt, errors=(asyncpg.DeadlockDetectedError,))


async def emptied(connection: asyncpg.Connection) -> None:
    """Leave no row and no head."""
    await by_force(connection, lambda: connection.execute(f"TRUNCATE {LOG}; TRUNCATE {HEADS}"))


async def test_a_walk_goes_on_while_others_write(audit: Audit) -> None:
    await write(audit, 600)
    for number in range(5):
        writing = asyncio.create_task(write(audit, 100, prefix=f"while-{number}"))
        assert (await audit.verify()).ok
        await writing
    assert (await audit.verify()).rows == 1100


async def test_an_empty_log_verifies(audit: Audit) -> None:
    report = await audit.verify()
    assert (report.ok, report.rows, report.partitions) == (True, 0, 0)


DAMAGED = [
    (f"UPDATE {HEADS} SET mac = ''", "after-damage", "after-damage"),
    (f"UPDATE {HEADS} SET seq = 3, mac = ''", "after-damage", "after-damage"),
    (f"DELETE FROM {LOG} WHERE seq > 3", "missing", "missing"),
    # Who has seen the rows 4 and 5 leaves their numbers free.
    (f"DELETE FROM {LOG} WHERE seq > 3; UPDATE {HEADS} SET seq = 3", "missing", "after-damage"),
    (f"DELETE FROM {HEADS}", "after-damage", "after-damage"),
    (COPY.replace(JAN, NOV) % 6, "changed", "changed"),
]
"""What is done to five rows, and what a walk calls it after a node that knew them wrote on, or one
that did not."""


@pytest.mark.parametrize("restarted", [True, False])
async def test_writing_goes_on_after_damage_and_does_not_cover_it_up(
    *,
    restarted: bool,
    database: Database,
    by_hand: asyncpg.Connection,
    keyring: Keyring[MacKey],
    clock: SettableClock,
) -> None:
    for sql, reason_if_known, reason_if_not in DAMAGED:
        reason = reason_if_not if restarted else reason_if_known
        clock.set(datetime(2025, 11, 30, tzinfo=UTC))
        async with running(database, keyring, clock) as audit:
            await write(audit, 5)
            await by_hand.execute(sql)
            if restarted:
                async with running(database, keyring, clock) as writer:
                    await write(writer, 5, prefix="later")
            await write(audit, 5, prefix="last")
            assert (await broken(audit)).reason == reason, sql
            clock.set(datetime(2025, 12, 1, tzinfo=UTC))
            await write(audit, 5, prefix="december")
            assert (await broken(audit)).reason == reason, sql
        await emptied(by_hand)


# ---- a chain set back as a whole


async def set_back(by_hand: asyncpg.Connection, audit: Audit, _clock: SettableClock) -> None:
    """Write five rows and restore what there was after three, heads and all."""
    await write(audit, 3)
    backup = await copy_of(by_hand)
    await write(audit, 2, prefix="lost")
    await put_back(by_hand, backup)


async def wipe(by_hand: asyncpg.Connection, audit: Audit, _clock: SettableClock) -> None:
    """Write five rows and leave nothing, as if there had never been any."""
    await write(audit, 5)
    await emptied(by_hand)


async def forget_the_newest_month(
    by_hand: asyncpg.Connection, audit: Audit, clock: SettableClock
) -> None:
    """Restore a month's end as it was before the next month opened."""
    await write(audit, 3)
    backup = await copy_of(by_hand)
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await write(audit, 5, prefix="lost")
    await put_back(by_hand, backup)


Doing = Callable[[asyncpg.Connection, Audit, SettableClock], Awaitable[None]]
SET_BACK: list[tuple[Doing, tuple[date, int], tuple[date, int, str]]] = [
    (set_back, (NOVEMBER, 5), (NOVEMBER, 4, "missing")),
    (wipe, (NOVEMBER, 5), (NOVEMBER, 1, "missing")),
    (forget_the_newest_month, (DECEMBER, 5), (NOVEMBER, 3, "head-changed")),
]


@pytest.mark.parametrize(("do", "last", "marked"), SET_BACK)
async def test_a_chain_set_back_is_found_by_the_daemon_that_wrote_what_is_gone(
    *,
    by_hand: asyncpg.Connection,
    clock: SettableClock,
    audit: Audit,
    do: Doing,
    last: tuple[date, int],
    marked: tuple[date, int, str],
) -> None:
    del marked
    await do(by_hand, audit, clock)
    found = await broken(audit)
    assert (found.month, found.seq, found.reason) == (*last, "set-back")


@pytest.mark.parametrize("month", [NOVEMBER, DECEMBER, JANUARY])
@pytest.mark.parametrize(("do", "last", "marked"), SET_BACK)
async def test_the_next_row_after_a_chain_was_set_back_marks_it_for_good_and_for_everybody(
    *,
    by_hand: asyncpg.Connection,
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
    audit: Audit,
    do: Doing,
    last: tuple[date, int],
    marked: tuple[date, int, str],
    month: date,
) -> None:
    await do(by_hand, audit, clock)
    clock.set(datetime(month.year, month.month, 20, tzinfo=UTC))
    before = damages()
    with capture_logs() as logs:
        await write(audit, 1, prefix="next")
        await write(audit, 2, prefix="next")
    damaged = [line for line in logs if line["event"] == "audit_head_damaged"]
    assert [line["month"] for line in damaged] == [str(last[0])]
    assert damages() == before + 1
    assert (await stored(database))[-3:] == ["next-0", "next-0", "next-1"]
    async with running(database, keyring, clock) as restarted:
        for _ in range(2):
            found = await broken(restarted)
            # Of a month that was left behind, it is the tail that is gone.
            reason = "tail-cut" if marked[2] == "missing" and month > last[0] else marked[2]
            assert (found.month, found.seq, found.reason) == (*marked[:2], reason)
            await write(restarted, 1, prefix="later")


@pytest.mark.parametrize(
    "sql",
    [
        f"UPDATE {HEADS} SET seq = 9223372036854775807",
        f"UPDATE {HEADS} SET month = '2100-01-01'",
        (
            f"INSERT INTO {LOG} SELECT month, n, at, action, actor, certificate_sha256, ip,"
            " subject, fields, purpose, outcome, correlation_id, mac, key_version"
            f" FROM {LOG}, unnest(ARRAY[4, 9223372036854775807]) n WHERE seq = 3"
        ),
    ],
)
async def test_no_damage_that_the_daemons_login_can_do_stops_the_rows_that_follow(
    database: Database, audit: Audit, sql: str
) -> None:
    await write(audit, 3)
    await database.execute(sql)
    before = damages()
    for _ in range(2):
        await write(audit, 2, prefix="after")
    assert damages() > before
    assert not (await audit.verify()).ok


@pytest.mark.parametrize("month", ["infinity", "-infinity", "0044-01-01 BC", "2025-11-17"])
async def test_a_head_of_no_month_is_refused_also_from_the_owner(
    by_hand: asyncpg.Connection, audit: Audit, month: str
) -> None:
    await write(audit, 3)
    with pytest.raises(asyncpg.CheckViolationError):
        await by_hand.execute(f"UPDATE {HEADS} SET month = '{month}'")
    assert (await audit.verify()).ok


def damages() -> float:
    return REGISTRY.get_sample_value("glamd_audit_damaged_total") or 0.0


async def test_others_who_wrote_on_after_it_was_set_back_do_not_cover_it_up(
    by_hand: asyncpg.Connection,
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
    audit: Audit,
) -> None:
    await set_back(by_hand, audit, clock)
    async with running(database, keyring, clock) as ignorant:
        await write(ignorant, 4, prefix="other")
        assert (await ignorant.verify()).ok
        found = await broken(audit)
        assert (found.seq, found.reason) == (5, "set-back")
        await write(audit, 1, prefix="mark")
        found = await broken(ignorant)
        assert (found.seq, found.reason) == (8, "after-damage")


@pytest.mark.parametrize(("do", "last", "marked"), SET_BACK)
async def test_a_chain_set_back_is_reported_when_its_head_is_to_be_logged(
    *,
    by_hand: asyncpg.Connection,
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
    do: Doing,
    last: tuple[date, int],
    marked: tuple[date, int, str],
) -> None:
    del marked
    seen = asyncio.Event()

    def watch(_logger: object, _name: str, line: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if line["event"] == "audit_head_damaged" and line["month"] == str(last[0]):
            seen.set()
        raise structlog.DropEvent

    structlog.configure(processors=[watch])
    try:
        async with running(database, keyring, clock, head_every_s=0.001) as audit:
            await do(by_hand, audit, clock)
            async with asyncio.timeout(PATIENCE_S):
                await seen.wait()
    finally:
        structlog.reset_defaults()


async def test_a_restarted_daemon_is_told_by_a_head_that_was_logged_earlier(
    by_hand: asyncpg.Connection,
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
) -> None:
    with capture_logs() as logs:
        async with running(database, keyring, clock) as writer:
            await set_back(by_hand, writer, clock)
    (line,) = [line for line in logs if line["event"] == "audit_head"]
    head = Head(date.fromisoformat(line["month"]), line["seq"], bytes.fromhex(line["mac"]))
    assert (head.month, head.seq) == (NOVEMBER, 5)
    async with running(database, keyring, clock) as restarted:
        assert (await restarted.verify()).ok
        report = await restarted.verify(head=head)
        assert report.first_broken is not None
        assert (report.first_broken.seq, report.first_broken.reason) == (5, "set-back")
        # Written on past it, the numbers are there again and the row is another one.
        await write(restarted, 5, prefix="on")
        report = await restarted.verify(head=head)
        assert report.first_broken is not None
        assert (report.first_broken.seq, report.first_broken.reason) == (5, "set-back")
        mac = await database.fetchval(f"SELECT mac FROM {LOG} WHERE seq = 2")
        assert (await restarted.verify(head=Head(NOVEMBER, 2, mac))).ok


async def test_looking_at_the_head_while_nodes_write_is_never_taken_for_damage(
    elsewhere: Database,
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
) -> None:
    before = damages()
    async with (
        running(database, keyring, clock, head_every_s=0.0001) as one,
        running(elsewhere, keyring, clock, head_every_s=0.0001) as other,
    ):
        await asyncio.gather(one_by_one(one, "a", 100), one_by_one(other, "o", 100))
        assert (await one.verify()).ok
        assert (await other.verify()).ok
    assert damages() == before


# ---- writers at once


@contextlib.asynccontextmanager
async def running(
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
    *,
    head_every_s: float = 600.0,
    head_file: Path | None = None,
) -> AsyncIterator[Audit]:
    """An audit of its own, as another node has it."""
    made = Audit(database, keyring, clock, head_every_s=head_every_s, head_file=head_file)
    await made.start()
    try:
        yield made
    finally:
        await made.stop(PATIENCE_S)


@pytest.fixture
async def elsewhere(database_url: str) -> AsyncIterator[Database]:
    """The same database as another node is connected to it."""
    connected = await Database.connect(database_url, pool_size=2)
    yield connected
    await connected.close()


async def test_two_nodes_that_write_at_once_make_one_chain(
    database: Database, elsewhere: Database, audit: Audit, keyring: Keyring[MacKey]
) -> None:
    async with running(elsewhere, keyring, SettableClock()) as other:
        written = await asyncio.gather(
            *(write(audit, 50, prefix=f"one-{n}") for n in range(6)),
            *(write(other, 50, prefix=f"other-{n}") for n in range(6)),
            *(one_by_one(node, prefix) for node, prefix in ((audit, "a"), (other, "o"))),
        )
        report = await other.verify()
    assert (report.ok, report.rows) == (True, sum(map(len, written)))
    assert sorted(await stored(database)) == sorted(one for ids in written for one in ids)


async def one_by_one(audit: Audit, prefix: str, count: int = 40) -> list[str]:
    """Each row alone, so that the two nodes overtake one another again and again."""
    return [(await write(audit, 1, prefix=f"{prefix}-{number}"))[0] for number in range(count)]


async def test_three_nodes_whose_first_rows_come_at_once_make_one_chain(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> None:
    async with (
        running(database, keyring, clock) as one,
        running(database, keyring, clock) as two,
        running(database, keyring, clock) as three,
    ):
        await asyncio.gather(*(write(node, 10) for node in (one, two, three)))
        report = await one.verify()
    assert (report.ok, report.rows) == (True, 30)


async def test_a_node_whose_clock_is_late_follows_into_the_new_month(
    database: Database, audit: Audit, keyring: Keyring[MacKey], clock: SettableClock
) -> None:
    late = SettableClock(datetime(2025, 11, 30, 23, 59, 59, tzinfo=UTC))
    async with running(database, keyring, late) as other:
        await write(other, 3)
        clock.set(datetime(2025, 12, 1, tzinfo=UTC))
        await asyncio.gather(*(write(node, 20) for node in (audit, other)))
        await write(other, 2)
        report = await other.verify()
    assert (report.ok, report.partitions) == (True, 2)
    months = await database.fetch(f"SELECT month, count(*) AS n FROM {LOG} GROUP BY 1 ORDER BY 1")
    assert sum(row["n"] for row in months) == 45
    newest = await database.fetchrow(f"SELECT month, at FROM {LOG} ORDER BY month DESC, seq DESC")
    assert newest is not None
    assert (newest["month"], newest["at"]) == (DECEMBER, late.now())


# ---- months


async def test_a_new_month_goes_on_from_the_month_before(
    audit: Audit, clock: SettableClock
) -> None:
    for _ in range(5):
        await write(audit, 2)
        clock.advance(timedelta(days=31).total_seconds())
    report = await audit.verify()
    assert (report.ok, report.rows, report.partitions) == (True, 10, 5)


async def test_rows_that_are_written_together_over_midnight_go_into_the_new_month(
    database: Database, audit: Audit, clock: SettableClock
) -> None:
    before = audit.append(entry("before"))
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await asyncio.gather(before, audit.append(entry("after")))
    months = await database.fetch(f"SELECT month, correlation_id FROM {LOG} ORDER BY seq")
    assert [tuple(row) for row in months] == [(DECEMBER, "before"), (DECEMBER, "after")]
    assert (await audit.verify()).ok


async def partitions(database: Database) -> list[str]:
    rows = await database.fetch(PARTITIONS)
    return [row["name"].rpartition("_log_")[2] for row in rows]


async def test_partitions_are_made_ahead_and_once_by_nodes_that_start_at_once(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> None:
    nodes = [Audit(database, keyring, clock) for _ in range(4)]
    await asyncio.gather(*(node.ensure_partitions() for node in nodes))
    assert await partitions(database) == ["2025_11", "2025_12", "2026_01"]
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await asyncio.gather(*(node.ensure_partitions() for node in nodes))
    assert (await partitions(database))[-1] == "2026_02"


async def test_a_month_that_nobody_prepared_is_made_by_its_first_row(
    database: Database, audit: Audit, clock: SettableClock
) -> None:
    clock.set(datetime(2027, 6, 15, tzinfo=UTC))
    await write(audit, 1)
    assert "2027_06" in await partitions(database)


async def test_a_clock_that_goes_back_into_the_month_before_breaks_nothing(
    audit: Audit, clock: SettableClock
) -> None:
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await write(audit, 2)
    clock.set(datetime(2025, 11, 30, 23, 30, tzinfo=UTC))
    await write(audit, 2)
    report = await audit.verify()
    assert (report.ok, report.rows, report.partitions) == (True, 4, 1)


# ---- a database that goes away


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[DatabaseProxy]:
    async with DatabaseProxy(database_url) as made:
        yield made


@pytest.fixture
async def by_proxy(proxy: DatabaseProxy) -> AsyncIterator[Database]:
    connected = await Database.connect(proxy.url, pool_size=1)
    yield connected
    await connected.close()


@pytest.fixture
async def fragile(
    by_proxy: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> AsyncIterator[Audit]:
    """An audit whose connections go through the proxy, warm: its statement is prepared."""
    async with running(by_proxy, keyring, clock) as made:
        await write(made, 1, prefix="first")
        await write(made, 1, prefix="second")
        yield made


async def test_without_a_database_nobody_gets_a_row_and_afterwards_everybody(
    fragile: Audit, audit: Audit, proxy: DatabaseProxy, database: Database
) -> None:
    proxy.go_down()
    futures = [fragile.append(entry(f"lost-{number}")) for number in range(5)]
    async with asyncio.timeout(PATIENCE_S):
        for result in await asyncio.gather(*futures, return_exceptions=True):
            assert isinstance(result, UnavailableError)
    proxy.is_down = False
    await write(fragile, 3, prefix="back")
    assert await stored(database) == ["first-0", "second-0", "back-0", "back-1", "back-2"]
    assert (await audit.verify()).ok


async def test_a_commit_whose_answer_was_lost_fails_and_the_chain_goes_on_behind_its_rows(
    fragile: Audit, audit: Audit, proxy: DatabaseProxy, database: Database
) -> None:
    proxy.lose_answer = 1
    with pytest.raises(UnavailableError):
        await write(fragile, 1, prefix="unknown")
    await write(fragile, 2, prefix="after")
    assert await stored(database) == ["first-0", "second-0", "unknown-0", "after-0", "after-1"]
    assert (await audit.verify()).ok


async def test_a_commit_that_never_arrived_fails_and_leaves_no_gap(
    fragile: Audit, audit: Audit, proxy: DatabaseProxy, database: Database
) -> None:
    proxy.lose_question = 1
    with pytest.raises(UnavailableError):
        await write(fragile, 1, prefix="unknown")
    await write(fragile, 1, prefix="after")
    assert await stored(database) == ["first-0", "second-0", "after-0"]
    assert (await audit.verify()).ok


@pytest.mark.parametrize("lost", ["lose_question", "lose_answer"])
async def test_a_connection_lost_at_any_step_into_a_new_month_breaks_nothing(
    *,
    lost: str,
    fragile: Audit,
    audit: Audit,
    proxy: DatabaseProxy,
    database: Database,
    clock: SettableClock,
) -> None:
    acknowledged = []
    whole = False
    for step in itertools.count(1):
        assert step < 60, "a commit does not take that many steps"
        clock.advance(timedelta(days=31).total_seconds())
        setattr(proxy, lost, step)
        with contextlib.suppress(UnavailableError):
            acknowledged += await write(fragile, 1, prefix=f"step-{step}")
            whole = getattr(proxy, lost) > 0
        setattr(proxy, lost, 0)
        acknowledged += await write(fragile, 1, prefix=f"after-{step}")
        if whole:
            break
    assert step > 5
    assert set(acknowledged) <= set(await stored(database))
    assert (await audit.verify()).ok


async def test_a_killed_process_leaves_a_whole_chain_with_every_row_it_had_acknowledged(
    database: Database, database_url: str, audit: Audit, tmp_path: Path
) -> None:
    module = ("-m", "tests.support.audit_writer", database_url, str(tmp_path))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *module, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            said = [await process.stdout.readline() for _ in range(200)]
    finally:
        process.kill()
    async with asyncio.timeout(PATIENCE_S):
        said += (await process.stdout.read()).splitlines(keepends=True)
        await process.wait()
    whole_lines = {line.decode().strip() for line in said if line.endswith(b"\n")}
    acknowledged = {line for line in whole_lines if line.startswith("k-")}
    assert len(acknowledged) > 100
    assert acknowledged <= set(await stored(database))
    assert (await audit.verify()).ok
    await write(audit, 1)
    assert (await audit.verify()).ok


# ---- what is written, and said


async def test_a_row_holds_what_was_told_even_when_that_is_absurd(
    database: Database, audit: Audit, clock: SettableClock
) -> None:
    absurd = replace(
        entry("c-1"),
        fields=("pan", 'a"b\\{}', "", "NULL", "ü,\n"),
        purpose="\0" * 10 + "x" * 1000,
        subject="\ud800",
        ip="",
    )
    await audit.append(absurd)
    row = await database.fetchrow(f"SELECT * FROM {LOG}")
    assert row is not None
    assert (row["month"], row["seq"], row["at"]) == (NOVEMBER, 1, clock.now())
    assert (row["action"], row["actor"], row["outcome"]) == ("decrypt", "settler", "ok")
    assert row["fields"] == list(absurd.fields)
    assert row["purpose"] == "\ufffd" * 10 + "x" * 502
    await audit.append(
        replace(absurd, subject="ptk_4242424242424242", purpose="4242-4242-4242-4242", ip="x" * 9)
    )
    kept = await database.fetchval(f"SELECT string_agg(l::text, ' ') FROM {LOG} l")
    assert "4242" not in kept
    assert "ptk_****************" in kept
    assert (await audit.verify()).ok


async def test_a_row_is_there_when_its_future_is_done(database: Database, audit: Audit) -> None:
    for number in range(5):
        await audit.append(entry(f"c-{number}"))
        assert (await stored(database))[-1] == f"c-{number}"


async def test_the_row_of_a_key_operation_is_waited_for_no_longer_than_its_limit(
    database: Database,
    by_hand: asyncpg.Connection,
    audit: Audit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await audit.record(action="bdk.import", subject="magtek", actor="uid:0", outcome="ok")
    row = await database.fetchrow(f"SELECT action, subject, actor FROM {LOG}")
    assert row is not None
    assert tuple(row) == ("bdk.import", "magtek", "uid:0")
    monkeypatch.setattr(audit_module, "RECORD_TIMEOUT_S", 0.05)
    async with by_hand.transaction():
        await by_hand.execute(f"SELECT 1 FROM {HEADS} FOR UPDATE")
        with pytest.raises(UnavailableError, match="not written in time"):
            await audit.record(action="bdk.import", subject="two", actor="uid:0", outcome="ok")
    await write(audit, 1)
    assert (await audit.verify()).ok


async def test_a_stopped_audit_refuses_and_has_logged_its_head(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock
) -> None:
    with capture_logs() as logs:
        async with running(database, keyring, clock) as writer:
            await write(writer, 3)
    row = await database.fetchrow(f"SELECT mac FROM {LOG} WHERE seq = 3")
    signature = await database.fetchval(f"SELECT mac FROM {HEADS}")
    assert row is not None
    heads = [line for line in logs if line["event"] == "audit_head"]
    assert heads == [
        {
            "event": "audit_head",
            "log_level": "info",
            "month": "2025-11-01",
            "seq": 3,
            "mac": row["mac"].hex(),
            "key_version": "v1",
            "signature": signature.hex(),
        }
    ]
    with pytest.raises(UnavailableError):
        await writer.append(entry("too late"))


async def test_a_start_logs_the_head_that_it_finds_or_that_it_is_damaged(
    database: Database, by_hand: asyncpg.Connection, keyring: Keyring[MacKey], clock: SettableClock
) -> None:
    async with running(database, keyring, clock) as writer:
        await write(writer, 3)
    with capture_logs() as logs:
        async with running(database, keyring, clock):
            heads = [(line["event"], line["seq"]) for line in logs if "seq" in line]
            assert heads == [("audit_head", 3)]
    await by_hand.execute(f"DELETE FROM {LOG} WHERE seq = 3")
    with capture_logs() as logs:
        async with running(database, keyring, clock):
            heads = [(line["event"], line["seq"]) for line in logs if "seq" in line]
            assert heads == [("audit_head_damaged", 3)]


async def test_the_head_is_logged_and_partitions_are_made_again_and_again(
    database: Database,
    keyring: Keyring[MacKey],
    clock: SettableClock,
) -> None:
    seen = asyncio.Event()

    def watch(_logger: object, _name: str, line: MutableMapping[str, Any]) -> Mapping[str, Any]:
        if line["event"] == "audit_partition_made" and line["month"] == "2026-04-01":
            seen.set()
        raise structlog.DropEvent

    structlog.configure(processors=[watch])
    try:
        async with running(database, keyring, clock, head_every_s=0.001):
            clock.set(datetime(2026, 2, 1, tzinfo=UTC))
            async with asyncio.timeout(PATIENCE_S):
                await seen.wait()
    finally:
        structlog.reset_defaults()
