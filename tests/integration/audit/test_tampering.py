"""The audit log under somebody's hands: rows, heads and months changed, cut and set back."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, date, datetime
from typing import Any

import asyncpg
import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import Head
from tests.support.audit_log import (
    DECEMBER,
    HEADS,
    JANUARY,
    LOG,
    NOVEMBER,
    PATIENCE_S,
    broken,
    one_by_one,
    running,
    stored,
    write,
)
from tests.support.postgres import eventually
from tests.support.settable_clock import SettableClock

# ---- rows and heads


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
