"""The audit log on a real database: writers at once, months, commits that vanish."""

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments import audit as audit_module
from glamd.payments.audit import Audit
from tests.support.audit_log import (
    DECEMBER,
    HEADS,
    LOG,
    NOVEMBER,
    PARTITIONS,
    PATIENCE_S,
    one_by_one,
    running,
    stored,
    write,
)
from tests.support.audit_writer import entry
from tests.support.database_proxy import DatabaseProxy
from tests.support.settable_clock import SettableClock

# ---- writers at once


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
