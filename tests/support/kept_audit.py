"""An audit that keeps its entries in memory, for tests that are about who writes them.

The real one, on a real PostgreSQL, is tried in `tests/integration/audit/`.
"""

import asyncio

from glamd.errors import UnavailableError
from glamd.payments.audit import Audit
from glamd.payments.audit_chain import AuditEntry


class KeptAudit(Audit):
    """Keeps the entries, or refuses them."""

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self.fails = False

    def append(self, entry: AuditEntry) -> asyncio.Future[None]:
        """Commit at once."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.fails:
            future.set_exception(UnavailableError("The audit row cannot be written."))
        else:
            self.entries.append(entry)
            future.set_result(None)
        return future

    @property
    def outcomes(self) -> list[str]:
        """What came of each attempt."""
        return [entry.outcome for entry in self.entries]
