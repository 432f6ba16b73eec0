"""A process that writes audit rows until it is killed: `python -m tests.support.audit_writer`.

Takes a database URL and a directory with a KEK. Prints each correlation id once its row is
committed, and nothing before that.
"""

import asyncio
import itertools
import sys
from pathlib import Path

from glamd.clock import SystemClock
from glamd.db import Database
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import AuditEntry
from tests.support.keys import load_keyrings

IN_FLIGHT = 20


def entry(correlation_id: str, *, outcome: str = "ok") -> AuditEntry:
    """A look at a card, told apart by its correlation id."""
    return AuditEntry(
        action="decrypt",
        actor="settler",
        certificate_sha256="ab" * 32,
        ip="192.0.2.7",
        subject="ptk_0123456789ABCDEFGHJKMNPQRS",
        fields=("pan", "expiry"),
        purpose="settlement",
        outcome=outcome,
        correlation_id=correlation_id,
    )


async def main(url: str, directory: Path) -> None:
    """Write until somebody ends this process."""
    clock = SystemClock()
    database = await Database.connect(url, pool_size=2)
    keyrings = await load_keyrings(database, directory, clock)
    audit = Audit(database, keyrings.audit, clock)
    await audit.start()
    for group in itertools.count():
        ids = [f"k-{group}-{number}" for number in range(IN_FLIGHT)]
        await asyncio.gather(*(audit.append(entry(one)) for one in ids))
        sys.stdout.write("".join(f"{one}\n" for one in ids))
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
