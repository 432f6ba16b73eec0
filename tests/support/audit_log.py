"""An audit log for tests on a real database: written to, read, and found broken."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path

from glamd.db import Database
from glamd.keys.keyrings import Keyring, MacKey
from glamd.payments.audit import Audit
from glamd.payments.audit_walk import Break
from tests.support.audit_writer import entry
from tests.support.settable_clock import SettableClock

LOG, HEADS = "cde.decrypt_audit_log", "cde.audit_heads"
NOVEMBER, DECEMBER, JANUARY = date(2025, 11, 1), date(2025, 12, 1), date(2026, 1, 1)
PATIENCE_S = 10.0
PARTITIONS = (
    "SELECT inhrelid::regclass::text AS name FROM pg_inherits "
    f"WHERE inhparent = '{LOG}'::regclass ORDER BY 1"
)


@asynccontextmanager
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


async def write(audit: Audit, count: int, *, prefix: str = "c") -> list[str]:
    """So many rows at once; their correlation ids."""
    ids = [f"{prefix}-{number}" for number in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(audit.append(entry(one)) for one in ids))
    return ids


async def one_by_one(audit: Audit, prefix: str, count: int = 40) -> list[str]:
    """Each row alone, so that two nodes overtake one another again and again."""
    return [(await write(audit, 1, prefix=f"{prefix}-{number}"))[0] for number in range(count)]


async def broken(audit: Audit, since: date | None = None) -> Break:
    """Where a walk finds it broken, which it has to."""
    report = await audit.verify(since=since)
    assert not report.ok
    assert report.first_broken is not None
    return report.first_broken


async def stored(database: Database) -> list[str]:
    """The correlation ids of all rows, in their order."""
    rows = await database.fetch(f"SELECT correlation_id FROM {LOG} ORDER BY month, seq")
    return [row["correlation_id"] for row in rows]
