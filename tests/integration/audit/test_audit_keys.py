"""The audit log while its key is rotated, its months end and its heads are kept elsewhere."""

import asyncio
import json
import stat
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import asyncpg
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.keys.keyrings import Keyring, MacKey
from glamd.keys.lifecycle import KeyLife
from glamd.keys.operations import Operations
from glamd.payments.audit import Audit
from glamd.payments.auditing.reading import Sought
from tests.support.audit_log import HEADS, LOG, NOVEMBER, broken, running, write
from tests.support.audit_writer import entry
from tests.support.keys import load_keyrings
from tests.support.settable_clock import SettableClock


async def rotated(database: Database, directory: Path, clock: SettableClock) -> Keyring[MacKey]:
    """Another node's keyring, on which somebody has just rotated the audit key."""
    clock.advance(1)
    keyring = (await load_keyrings(database, directory, clock)).audit
    before = keyring.active.version

    async def record(**_row: str) -> None:
        """Key operations are told elsewhere."""

    lifecycle = KeyLife(
        [keyring],
        jobs=[],
        operations=Operations(record),
        clock=clock,
        cryptoperiods={},
        rotate_automatically=False,
    )
    await lifecycle.rotate("audit", actor="test")
    await keyring.reload()
    assert keyring.active.version != before
    return keyring


async def versions(database: Database) -> list[tuple[str, int]]:
    """Key versions along the chain, with the number of rows of each."""
    rows = await database.fetch(
        f"SELECT key_version, count(*) AS n, min((month, seq)::text) FROM {LOG} GROUP BY 1"
        " ORDER BY min(month), min(seq)"
    )
    return [(row["key_version"], row["n"]) for row in rows]


# ---- versions of the key


async def test_a_node_that_does_not_know_the_new_version_yet_follows_and_never_goes_back(
    database: Database, audit: Audit, keyring: Keyring[MacKey], clock: SettableClock, tmp_path: Path
) -> None:
    await write(audit, 3)
    newer = await rotated(database, tmp_path, clock)
    assert keyring.active.version == "v1"
    await write(audit, 2)
    async with running(database, newer, clock) as other:
        await write(other, 2)
        await write(audit, 2)
        await write(other, 2)
        assert keyring.active.version == newer.active.version
        report = await other.verify()
    assert (report.ok, report.rows) == (True, 11)
    assert await versions(database) == [("v1", 5), (newer.active.version, 6)]


async def test_nodes_that_write_at_once_while_the_key_is_rotated_make_one_chain(
    database: Database, audit: Audit, keyring: Keyring[MacKey], clock: SettableClock, tmp_path: Path
) -> None:
    stale = (await load_keyrings(database, tmp_path, clock)).audit
    async with running(database, stale, clock) as other:
        writing = [
            asyncio.create_task(write(node, 40, prefix=f"{name}-{n}"))
            for n in range(4)
            for name, node in (("one", audit), ("other", other))
        ]
        newer = await rotated(database, tmp_path, clock)
        await stale.reload()
        async with running(database, newer, clock) as third:
            await asyncio.gather(*writing, write(third, 40), write(audit, 40), write(other, 40))
            clock.set(datetime(2025, 12, 1, tzinfo=UTC))
            await asyncio.gather(*(write(node, 20) for node in (audit, other, third)))
            report = await third.verify()
    assert (report.ok, report.rows, report.partitions) == (True, 500, 2)
    assert sum(count for _, count in await versions(database)) == 500
    assert keyring.active.version == newer.active.version


async def test_rows_made_with_a_stolen_older_key_are_a_break(
    database: Database,
    audit: Audit,
    by_hand: asyncpg.Connection,
    clock: SettableClock,
    tmp_path: Path,
) -> None:
    await write(audit, 2)
    newer = await rotated(database, tmp_path, clock)
    async with running(database, newer, clock) as other:
        await write(other, 2)
        await by_hand.execute(f"UPDATE {LOG} SET key_version = 'v1' WHERE seq = 4")
        found = await broken(other)
        assert (found.seq, found.reason) == (4, "key-went-back")
        await by_hand.execute(f"UPDATE {LOG} SET key_version = 'v77' WHERE seq = 4")
        found = await broken(other)
        assert (found.seq, found.reason) == (4, "key-unknown")
        # The head is what the next row goes on from: it is damaged, and writing goes on.
        await by_hand.execute(
            f"UPDATE {LOG} SET key_version = '{newer.active.version}' WHERE seq = 4;"
            f"UPDATE {HEADS} SET key_version = 'v77'"
        )
        assert (await broken(other)).reason == "key-unknown"
        async with running(database, newer, clock) as restarted:
            await write(restarted, 1)
            found = await broken(restarted)
            assert (found.seq, found.reason) == (5, "after-damage")


async def test_a_version_that_a_row_or_a_head_names_is_in_use(
    database: Database, audit: Audit, clock: SettableClock, tmp_path: Path
) -> None:
    await write(audit, 1)
    newer = await rotated(database, tmp_path, clock)
    assert await audit.audit_uses("v1")
    assert not await audit.audit_uses(newer.active.version)
    async with running(database, newer, clock) as other:
        await write(other, 1)
    assert await audit.audit_uses(newer.active.version)


# ---- months that end


async def seven_years_on(audit: Audit, clock: SettableClock) -> None:
    """Rows of three months of 2015, then of now as the database's clock has it."""
    for month in (1, 2, 3):
        clock.set(datetime(2015, month, 3, tzinfo=UTC))
        await write(audit, 4, prefix=f"m{month}")
    clock.set(datetime.now(UTC))
    await write(audit, 2, prefix="now")


async def test_the_oldest_months_are_dropped_once_they_are_seven_years_old_and_no_others(
    database: Database, audit: Audit, clock: SettableClock
) -> None:
    await seven_years_on(audit, clock)
    now = clock.now().date().replace(day=1)
    assert await audit.drop_month(now, actor="uid:0") == "too-young"
    assert await audit.drop_month(date(2015, 2, 1), actor="uid:0") == "not-the-oldest"
    assert await audit.drop_month(date(2014, 2, 1), actor="uid:0") == "not-there"
    for month in (1, 2):
        assert await audit.drop_month(date(2015, month, 1), actor="uid:0") == "dropped"
        report = await audit.verify()
        assert (report.ok, report.partitions) == (True, 4 - month)
    rows = await database.fetch(
        f"SELECT subject, outcome FROM {LOG} WHERE action = 'audit.drop-month' ORDER BY seq"
    )
    assert [tuple(row) for row in rows[-4:]] == [
        ("2015-01", "asked"),
        ("2015-01", "ok"),
        ("2015-02", "asked"),
        ("2015-02", "ok"),
    ]
    assert await database.fetchval(f"SELECT count(*) FROM {HEADS} WHERE month < '2015-03-01'") == 1


async def test_the_month_in_which_the_chain_ends_is_never_dropped(
    audit: Audit, database: Database, clock: SettableClock
) -> None:
    clock.set(datetime(2015, 1, 3, tzinfo=UTC))
    await write(audit, 1)
    assert await audit.drop_month(date(2015, 1, 1), actor="uid:0") == "the-newest"
    assert await database.fetchval(f"SELECT count(*) FROM {LOG}") == 3


FEBRUARY_GONE = (
    f"DELETE FROM {LOG} WHERE month = '2015-02-01'; DELETE FROM {HEADS} WHERE month = '2015-02-01'"
)
FEBRUARY_AS_IF_DROPPED = (
    f"UPDATE {HEADS} h SET dropped_at = now(), last_mac = (SELECT mac FROM {LOG} l WHERE"
    f" l.month = h.month ORDER BY seq DESC LIMIT 1) WHERE month = '2015-02-01';"
    f"DELETE FROM {LOG} WHERE month = '2015-02-01'"
)


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        (f"UPDATE {HEADS} SET last_mac = mac WHERE last_mac IS NOT NULL", "head-changed"),
        (f"UPDATE {HEADS} SET seq = 3 WHERE last_mac IS NOT NULL", "head-changed"),
        (f"DELETE FROM {HEADS} WHERE last_mac IS NOT NULL", "changed"),
        (f"DELETE FROM {LOG} WHERE month = '2015-02-01'", "tail-cut"),
        (FEBRUARY_GONE, "head-changed"),
        (FEBRUARY_AS_IF_DROPPED, "dropped-early"),
    ],
)
async def test_a_month_that_was_dropped_covers_nothing_up(
    audit: Audit, by_hand: asyncpg.Connection, clock: SettableClock, sql: str, reason: str
) -> None:
    await seven_years_on(audit, clock)
    assert await audit.drop_month(date(2015, 1, 1), actor="uid:0") == "dropped"
    assert (await audit.verify()).ok
    await by_hand.execute(sql)
    assert (await broken(audit)).reason == reason


async def test_a_month_taken_away_too_early_as_if_it_had_been_dropped_is_found(
    audit: Audit, by_hand: asyncpg.Connection, clock: SettableClock
) -> None:
    await write(audit, 3)
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await write(audit, 3)
    await by_hand.execute(
        f"UPDATE {HEADS} h SET dropped_at = now(), last_mac = (SELECT mac FROM {LOG} l WHERE"
        f" l.month = h.month ORDER BY seq DESC LIMIT 1) WHERE month = '2025-11-01';"
        f"DROP TABLE {LOG}_2025_11"
    )
    found = await broken(audit)
    assert (found.month, found.reason) == (NOVEMBER, "dropped-early")


async def test_a_walk_may_leave_out_months_and_does_not_see_what_is_wrong_there(
    audit: Audit, by_hand: asyncpg.Connection, clock: SettableClock
) -> None:
    await seven_years_on(audit, clock)
    await by_hand.execute(f"UPDATE {LOG} SET actor = 'x' WHERE month = '2015-01-01'")
    assert (await broken(audit)).month == date(2015, 1, 1)
    report = await audit.verify(since=date(2015, 2, 1))
    assert (report.ok, report.rows, report.partitions) == (True, 10, 3)
    await by_hand.execute(f"DELETE FROM {LOG} WHERE month = '2015-01-01' AND seq = 4")
    found = await broken(audit, since=date(2015, 2, 1))
    assert (found.month, found.reason) == (date(2015, 1, 1), "tail-cut")


async def test_a_detached_month_is_missed(
    audit: Audit, by_hand: asyncpg.Connection, clock: SettableClock
) -> None:
    await seven_years_on(audit, clock)
    await by_hand.execute(f"ALTER TABLE {LOG} DETACH PARTITION {LOG}_2015_02")
    found = await broken(audit)
    assert (found.month, found.reason) == (date(2015, 2, 1), "tail-cut")
    await by_hand.execute(f"DROP TABLE {LOG}_2015_02")


async def test_a_log_that_was_truncated_is_missed_also_by_who_has_seen_nothing(
    database: Database,
    keyring: Keyring[MacKey],
    by_hand: asyncpg.Connection,
    clock: SettableClock,
) -> None:
    async with running(database, keyring, clock) as writer:
        await write(writer, 3)
    await by_hand.execute(f"TRUNCATE {LOG}")
    async with running(database, keyring, clock) as restarted:
        found = await broken(restarted)
        assert (found.seq, found.reason) == (1, "tail-cut")


async def test_rows_of_two_tokens_that_changed_places_are_found(
    audit: Audit, by_hand: asyncpg.Connection
) -> None:
    for number in range(4):
        await audit.append(replace(entry(f"c-{number}"), subject=f"ptk_{number}"))
    await by_hand.execute(
        f"UPDATE {LOG} SET subject = CASE seq WHEN 2 THEN 'ptk_2' ELSE 'ptk_1' END"
        " WHERE seq IN (2, 3)"
    )
    found = await broken(audit)
    assert (found.seq, found.reason) == (2, "changed")


async def test_a_month_that_somebody_dropped_under_the_writer_is_made_again(
    audit: Audit, by_hand: asyncpg.Connection
) -> None:
    await write(audit, 2)
    await by_hand.execute(f"DROP TABLE {LOG}_2025_11")
    with pytest.raises(UnavailableError):
        await write(audit, 1)
    await write(audit, 2, prefix="again")
    assert not (await audit.verify()).ok


# ---- heads that are kept elsewhere


async def test_heads_go_to_a_file_line_by_line_for_its_owner_only(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock, tmp_path: Path
) -> None:
    path = tmp_path / "heads.jsonl"
    for _ in range(2):
        async with running(database, keyring, clock, head_file=path) as audit:
            await write(audit, 2)
    # A crash in the midst of a line.
    with path.open("ab") as file:
        file.write(b'{"at": ')
    async with running(database, keyring, clock, head_file=path) as audit:
        head = await audit.head()
        assert head is not None
        assert await audit.faults_of([head]) == []
    lines = path.read_text().splitlines()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = [json.loads(line) for line in lines if line != '{"at": ']
    assert len(told) == len(lines) - 1
    assert [line["seq"] for line in told] == [2, 2, 4, 4, 4]
    assert told[-1] == head.as_json() | {"at": told[-1]["at"]}


async def test_the_head_is_told_while_rows_are_written_and_is_never_taken_for_damaged(
    audit: Audit,
) -> None:
    await write(audit, 1)
    writing = asyncio.create_task(write(audit, 400))
    while not writing.done():
        head = await audit.head()
        assert head is not None
        assert await audit.faults_of([head]) == []
    await writing


async def test_a_file_that_cannot_be_written_is_told_and_stops_nothing(
    database: Database, keyring: Keyring[MacKey], clock: SettableClock, tmp_path: Path
) -> None:
    def failures() -> float:
        return REGISTRY.get_sample_value("glamd_audit_head_file_failures_total") or 0.0

    before = failures()
    with capture_logs() as logs:
        async with running(database, keyring, clock, head_file=tmp_path / "no" / "f") as audit:
            await write(audit, 2)
    assert failures() > before
    assert "audit_head_not_exported" in [line["event"] for line in logs]


async def test_heads_of_a_chain_that_was_set_back_or_forged_are_named(
    database: Database,
    keyring: Keyring[MacKey],
    by_hand: asyncpg.Connection,
    clock: SettableClock,
) -> None:
    async with running(database, keyring, clock) as audit:
        await write(audit, 3)
        first = await audit.head()
        await write(audit, 2)
        second = await audit.head()
        assert first is not None
        assert second is not None
        forged = replace(second, mac=bytes(32))
        unknown = replace(first, key_version="v9")
        found = await audit.faults_of([first, forged, second, unknown])
        assert found == [(1, "not-signed"), (3, "not-signed")]
        await by_hand.execute(f"TRUNCATE {LOG}, {HEADS}")
    async with running(database, keyring, clock) as restarted:
        await write(restarted, 4, prefix="other")
        assert (await restarted.verify()).ok
        assert await restarted.faults_of([first, second]) == [(0, "changed"), (1, "gone")]


# ---- reading


async def test_rows_come_in_pages_and_the_newest_of_those_that_are_sought(
    audit: Audit, clock: SettableClock
) -> None:
    await write(audit, 5)
    clock.set(datetime(2025, 12, 1, tzinfo=UTC))
    await audit.append(replace(entry("odd"), actor="other", outcome="FORBIDDEN"))
    await write(audit, 5, prefix="late")
    first = await audit.after(None, limit=4)
    second = await audit.after(first.position, limit=4)
    third = await audit.after(second.position, limit=4)
    assert [len(page.rows) for page in (first, second, third)] == [4, 4, 3]
    assert [first.more, second.more, third.more] == [True, True, False]
    odd = second.rows[1]
    assert (odd["month"], odd["seq"], odd["at"]) == ("2025-12", 1, "2025-12-01T00:00:00.000000Z")
    assert (odd["actor"], odd["outcome"], odd["correlation_id"]) == ("other", "FORBIDDEN", "odd")
    assert (odd["fields"], odd["key_version"]) == (["pan", "expiry"], "v1")
    assert len(str(odd["mac"])) == 64
    newest = await audit.newest(2)
    assert [row["seq"] for row in newest.rows] == [5, 6]
    assert newest.position == (date(2025, 12, 1), 6)
    sought = await audit.newest(2, sought=Sought(actor="other"))
    assert [row["correlation_id"] for row in sought.rows] == ["odd"]
    assert (await audit.newest(2, sought=Sought(outcome="x"))).rows == []
    assert (await audit.after(third.position, limit=4)).rows == []
