"""glamctl audit on a real log: what is told, what is exported, what does not fit in memory."""

import asyncio
import json
import signal
import stat
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from bench.harness import PROGRAMS
from glamd.db import Database
from glamd.payments.audit import Audit
from tests.support.admin_world import AdminWorld, FakeAudit
from tests.support.audit_writer import entry
from tests.support.keys import load_keyrings
from tests.support.settable_clock import SettableClock

LOG = "cde.decrypt_audit_log"
FOLLOW_TIMEOUT_S = 15.0


@pytest.fixture
async def audit(database: Database, tmp_path: Path) -> AsyncIterator[Audit]:
    clock = SettableClock(datetime(2025, 11, 12, 10, 30, tzinfo=UTC))
    keyrings = await load_keyrings(database, tmp_path, clock)
    made = Audit(database, keyrings.audit, clock, head_file=tmp_path / "heads")
    await made.start()
    for number in range(5):
        await made.append(entry(f"c-{number}", outcome="FORBIDDEN" if number == 1 else "ok"))
        clock.advance(60)
    yield made
    await made.stop(5)


@pytest.fixture
async def world(admin: AdminWorld, audit: Audit) -> AsyncIterator[AdminWorld]:
    admin.audit = cast("FakeAudit", audit)
    async with admin.running():
        yield admin


async def test_a_file_of_heads_that_the_chain_holds_and_one_that_it_does_not(
    world: AdminWorld, audit: Audit, database: Database, tmp_path: Path
) -> None:
    head = (await world.glamctl("audit", "head")).stdout
    assert json.loads(head)["seq"] == 5
    heads = tmp_path / "kept"
    # One was cut short by a crash.
    heads.write_text(head + '{"at": \n' + head)
    told = json.loads(
        (await world.glamctl("--json", "audit", "verify", "--heads", str(heads))).stdout
    )
    assert told["ok"] is True
    assert (told["heads"]["checked"], told["heads"]["unreadable"]) == (2, 1)
    await database.execute(f"DELETE FROM {LOG} WHERE seq > 3")
    result = await world.glamctl("audit", "verify", "--heads", str(heads))
    assert result.exit_code == 1
    assert "BROKEN: the head in line 3 (2025-11, row 5) is gone" in result.stdout
    assert "tail-cut" in result.stdout


async def test_a_forged_line_among_the_heads_is_an_exit_status_though_the_chain_is_whole(
    world: AdminWorld, tmp_path: Path
) -> None:
    head = json.loads((await world.glamctl("audit", "head")).stdout)
    heads = tmp_path / "kept"
    heads.write_text(json.dumps(head | {"seq": 4}) + "\n")
    result = await world.glamctl("audit", "verify", "--heads", str(heads))
    assert result.exit_code == 1
    assert "is not-signed" in result.stdout
    assert "All as written: 5 rows" in result.stdout


async def test_an_export_has_every_row_and_ends_with_the_signed_head(
    world: AdminWorld, audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glamd.admin.cli_audit.EXPORT_PAGE", 2)
    out = tmp_path / "export"
    result = await world.glamctl("--json", "audit", "export", "--out", str(out))
    assert json.loads(result.stdout)["rows"] == 5
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    *rows, last = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    assert (last["head"]["seq"], last["head"]["mac"]) == (5, rows[-1]["mac"])
    assert last["rows"] == 5
    refused = await world.glamctl("audit", "export", "--out", str(out))
    assert refused.exit_code == 1
    assert "CANNOT_WRITE" in refused.stderr
    some = await world.glamctl(
        *("audit", "export", "--since", "2025-11-12 10:31:00"),
        *("--until", "2025-11-12 10:33:00"),
    )
    assert [json.loads(line).get("seq") for line in some.stdout.splitlines()] == [2, 3, None]


async def test_an_export_begins_and_ends_at_the_times_of_rows_as_they_are_shown(
    world: AdminWorld,
) -> None:
    rows = json.loads((await world.glamctl("--json", "audit", "tail")).stdout)
    result = await world.glamctl(
        *("audit", "export", "--since", rows[1]["at"], "--until", rows[3]["at"])
    )
    exported = [json.loads(line).get("seq") for line in result.stdout.splitlines()]
    assert exported == [2, 3, None]


async def test_a_month_that_the_chain_never_reached_is_a_mistake_and_no_broken_chain(
    world: AdminWorld, audit: Audit, database: Database
) -> None:
    result = await world.glamctl("audit", "verify", "--since", "2031-01")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "(since: the chain ends in an earlier month)" in result.stderr
    later = (await world.glamctl("audit", "verify", "--since", "2025-11")).stdout
    assert "All as written: 5 rows" in later
    # Rows that this daemon has seen in that month and that are gone are no mistake.
    await database.execute(f"DELETE FROM {LOG}; DELETE FROM cde.audit_heads")
    broken = await world.glamctl("audit", "verify", "--since", "2025-11")
    assert (broken.exit_code, "set-back" in broken.stdout) == (1, True)


async def test_a_head_of_a_month_that_is_left_out_is_refused_and_not_passed_over(
    world: AdminWorld,
) -> None:
    head = f"2025-10:5:{'ab' * 32}"
    result = await world.glamctl("audit", "verify", "--since", "2025-11", "--head", head)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "head: It is of a month that --since leaves out." in result.stderr


def following(world: AdminWorld, *words: str) -> "subprocess.Popen[str]":
    """`glamctl audit tail --follow` as a process, whose lines can be read as they come."""
    return subprocess.Popen(
        [PROGRAMS / "glamctl", "--socket", world.path, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def lines_of(process: "subprocess.Popen[str]", count: int) -> list[str]:
    """The next so many lines, within a bound."""
    assert process.stdout is not None
    async with asyncio.timeout(FOLLOW_TIMEOUT_S):
        return [await asyncio.to_thread(process.stdout.readline) for _ in range(count)]


@pytest.mark.parametrize("sought", [(), ("--outcome", "FORBIDDEN")])
async def test_following_shows_each_row_once_as_it_comes_until_it_is_interrupted(
    world: AdminWorld, audit: Audit, sought: tuple[str, ...]
) -> None:
    process = following(world, "--json", "audit", "tail", "-n", "1", "--follow", *sought)
    try:
        [newest] = await lines_of(process, 1)
        assert json.loads(newest)["seq"] == (2 if sought else 5)
        for number in range(6, 9):
            await audit.append(entry(f"c-{number}", outcome="FORBIDDEN"))
        await audit.append(entry("c-9", outcome="ok"))
        assert [json.loads(line)["seq"] for line in await lines_of(process, 3)] == [6, 7, 8]
        process.send_signal(signal.SIGINT)
        rest, said = await asyncio.to_thread(process.communicate, timeout=FOLLOW_TIMEOUT_S)
        assert (process.returncode, said) == (0, "")
        # Each once: at most the row that is not sought here stands behind them.
        assert [json.loads(line)["seq"] for line in rest.splitlines()] in ([], [9])
    finally:
        process.kill()
        process.communicate()


async def test_following_a_daemon_that_goes_away_ends_with_one_line(
    admin: AdminWorld, audit: Audit
) -> None:
    admin.audit = cast("FakeAudit", audit)
    async with admin.running():
        process = following(admin, "audit", "tail", "-n", "1", "--follow")
        [line] = await lines_of(process, 1)
        assert line.endswith("ok\n")
    _, said = await asyncio.to_thread(process.communicate, timeout=FOLLOW_TIMEOUT_S)
    assert (process.returncode, said.count("\n")) == (1, 1)
    assert said.startswith("UNREACHABLE: ")


async def test_the_newest_rows_are_shown_of_those_that_are_sought(world: AdminWorld) -> None:
    def seqs(stdout: str) -> list[int]:
        return [row["seq"] for row in json.loads(stdout)]

    assert seqs((await world.glamctl("--json", "audit", "tail", "-n", "2")).stdout) == [4, 5]
    sought = await world.glamctl("--json", "audit", "tail", "--outcome", "FORBIDDEN")
    assert seqs(sought.stdout) == [2]
    assert "FORBIDDEN" in (await world.glamctl("audit", "tail")).stdout
    none = await world.glamctl("--json", "audit", "tail", "--worker", "nobody")
    assert json.loads(none.stdout) == []


async def test_a_month_that_must_stay_is_not_dropped_and_the_attempt_is_a_row(
    world: AdminWorld, database: Database
) -> None:
    asked = await world.glamctl("audit", "drop-month", "2025-11")
    assert asked.exit_code == 2
    refused = await world.glamctl("audit", "drop-month", "2025-11", "--yes")
    assert (refused.exit_code, "seven years" in refused.stderr) == (1, True)
    missing = await world.glamctl("audit", "drop-month", "1999-11", "--yes")
    assert "MONTH_NOT_FOUND" in missing.stderr
    wrong = await world.glamctl("audit", "drop-month", "2025-13", "--yes")
    assert wrong.exit_code == 2
    rows = await database.fetch(
        f"SELECT outcome FROM {LOG} WHERE action = 'audit.drop-month' ORDER BY seq"
    )
    assert [row["outcome"] for row in rows] == ["asked", "too-young", "asked", "not-there"]


async def test_the_status_says_whether_the_log_could_be_changed(
    world: AdminWorld, database: Database
) -> None:
    told = json.loads((await world.glamctl("--json", "audit", "status")).stdout)
    # The tests' own login made the tables.
    assert (told["append_only"], told["login_owns_the_log"]) == (False, True)
    assert (told["months_ahead"], told["head"]["seq"]) == (2, 5)
    await database.execute("UPDATE cde.audit_heads SET mac = ''")
    told = json.loads((await world.glamctl("--json", "audit", "status")).stdout)
    assert (told["head_verifies"], told["head"]) == (False, None)
    asked = await world.glamctl("audit", "head")
    assert (asked.exit_code, asked.stdout) == (1, "")
    assert "AUDIT_DAMAGED" in asked.stderr
