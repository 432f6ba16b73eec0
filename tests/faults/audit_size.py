"""The audit log at the size of years: how long a walk of ten million rows takes, and what memory.

Rows are chained as the daemon chains them and go in by COPY, several months of them. The walk runs
in a process of its own, so that its memory is its own. `python -m tests.faults.audit_size 1000000`.
"""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from bench.report import Result
from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.payments import audit_chain
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import AuditEntry, Head
from tests.support.keys import load_keyrings

ROWS: Final = 10_000_000
MONTHS: Final = 5
FIRST_MONTH: Final = date(2026, 1, 1)
COPY_ROWS: Final = 10_000
GROWTH_LIMIT_MIB: Final = 64.0
KIB_IN_MIB: Final = 1024.0
WALK_TIMEOUT_S: Final = 4 * 3600
COLUMNS: Final = (
    *("month", "seq", "at", "action", "actor", "certificate_sha256", "ip", "subject", "fields"),
    *("purpose", "outcome", "correlation_id", "mac", "key_version"),
)


def results(folder: Path, *, rows: int = ROWS) -> list[Result]:
    """The row of the report."""
    return uvloop.run(_measured(folder, rows))


async def _measured(folder: Path, rows: int) -> list[Result]:
    server = EmbeddedPostgres(folder)
    urls = await server.start()
    try:
        await migrate.upgrade(urls.owner)
        connection = await asyncpg.connect(urls.owner)
        try:
            await _fill(connection, urls.owner, folder, rows)
            size: int = await connection.fetchval(
                "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits"
                " WHERE inhparent = 'cde.decrypt_audit_log'::regclass"
            )
        finally:
            await connection.close()
        walked = await asyncio.to_thread(_walk_apart, urls.owner, folder)
    finally:
        await server.stop()
    whole = walked["ok"] and walked["rows"] == rows
    return [
        Result(
            name=f"audit verify, {rows:,} rows",
            value=round(walked["seconds"], 1),
            unit="s",
            bar=f"all found whole, memory grows by at most {GROWTH_LIMIT_MIB:.0f} MiB",
            holds=bool(whole and walked["growth_mib"] <= GROWTH_LIMIT_MIB),
            note=f"{rows / walked['seconds']:,.0f} rows/s, memory +{walked['growth_mib']:.1f} MiB, "
            f"{size / rows:.0f} bytes of disk a row",
        )
    ]


async def _fill(connection: asyncpg.Connection, url: str, folder: Path, rows: int) -> None:
    database = await Database.connect(url, pool_size=2)
    try:
        key = (await load_keyrings(database, folder, SystemClock())).audit.active
    finally:
        await database.close()
    head: Head | None = None
    month = FIRST_MONTH
    for number in range(MONTHS):
        await connection.execute("SELECT cde.make_audit_partition($1)", month)
        head = Head(month, 0, audit_chain.GENESIS if head is None else head.row_mac)
        count = rows // MONTHS + (rows % MONTHS if number == MONTHS - 1 else 0)
        for size in _batches(count):
            entries = [_entry(month, head.seq + n) for n in range(size)]
            made, head = audit_chain.extend(
                key.key, key_version=key.version, head=head, entries=entries
            )
            records = [_record(at, row) for (at, _), row in zip(entries, made, strict=True)]
            await connection.copy_records_to_table(
                "decrypt_audit_log", schema_name="cde", columns=COLUMNS, records=records
            )
        following = audit_chain.next_month(month)
        mac = (
            audit_chain.open_head_mac(key.key, head)
            if number == MONTHS - 1
            else audit_chain.closed_head_mac(key.key, head, successor=following)
        )
        await connection.execute(
            "INSERT INTO cde.audit_heads (month, seq, mac, key_version, updated_at)"
            " VALUES ($1, $2, $3, $4, now())",
            *(month, head.seq, mac, key.version),
        )
        month = following
    await connection.execute("ANALYZE cde.decrypt_audit_log")


def _batches(count: int) -> Iterator[int]:
    for start in range(0, count, COPY_ROWS):
        yield min(COPY_ROWS, count - start)


def _entry(month: date, number: int) -> tuple[datetime, AuditEntry]:
    at = datetime(month.year, month.month, 1, tzinfo=UTC) + timedelta(milliseconds=number)
    return at, AuditEntry(
        action="decrypt",
        actor=f"worker-{number % 7}",
        certificate_sha256=f"{number % 7:02x}" * 32,
        ip=f"192.0.2.{number % 7}",
        subject=f"ptk_{number:026d}",
        fields=("pan", "expiry"),
        purpose="settlement",
        outcome="ok" if number % 50 else "TOKEN_EXPIRED",
        correlation_id=f"0190d2f0-7c3b-7000-8000-{number:012d}",
    )


def _record(at: datetime, row: audit_chain.AuditRow) -> tuple[object, ...]:
    told = row.entry
    return (
        *(row.month, row.seq, at, told.action, told.actor, told.certificate_sha256, told.ip),
        *(told.subject, list(told.fields), told.purpose, told.outcome, told.correlation_id),
        *(row.mac, row.key_version),
    )


def _walk_apart(url: str, folder: Path) -> dict[str, float]:
    """Walk in a process of its own: how long, how many rows, and how its memory grew."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.audit_size", "--walk", url, str(folder)],
        check=True,
        capture_output=True,
        timeout=WALK_TIMEOUT_S,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


async def _walk(url: str, folder: Path) -> dict[str, float]:
    database = await Database.connect(url, pool_size=2)
    try:
        keyring = (await load_keyrings(database, folder, SystemClock())).audit
        audit = Audit(database, keyring, SystemClock())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began_s = time.perf_counter()
        report = await audit.verify()
        seconds = time.perf_counter() - began_s
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    finally:
        await database.close()
    return {
        "ok": report.ok,
        "rows": report.rows,
        "seconds": seconds,
        "growth_mib": growth / KIB_IN_MIB,
    }


def main() -> None:
    """Measure so many rows; or, with --walk, be the process that walks."""
    if sys.argv[1:2] == ["--walk"]:
        url, folder = sys.argv[2:]
        print(json.dumps(uvloop.run(_walk(url, Path(folder)))))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory(prefix="glamd-faults-") as folder:
        for result in results(Path(folder), rows=rows):
            print(f"{result.name}: {result.value} {result.unit} ({result.note}), {result.holds}")


if __name__ == "__main__":
    main()
