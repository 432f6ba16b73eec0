"""Every operation on a key is written down before it is answered, whatever comes of it.

Who keeps the rows is handed in, since the audit belongs to `glamd.payments`, which stands above.
What the operations do is in the rooms that do them.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from prometheus_client import Counter

from glamd.errors import GlamError

_OPERATIONS = Counter("glamd_keys_operations_total", "Operations on keys.", ["action", "outcome"])


class Record(Protocol):
    """Writes an audit row; it returns when the row is committed and raises when it is not."""

    async def __call__(self, *, action: str, subject: str, actor: str, outcome: str) -> None:
        """`outcome` is "ok" or an error's code."""


class Operations:
    """Writes operations down, and counts them."""

    def __init__(self, record: Record) -> None:
        self._record = record

    async def write_down(self, action: str, *, subject: str, actor: str, outcome: str) -> None:
        """One operation, such as `keys.rotate` on `payment-tokens:v2`.

        `actor` is an operator's name or `glamd` itself. UnavailableError where the row cannot be
        committed: then the operation must not be answered, and is best not done.
        """
        _OPERATIONS.labels(action, outcome).inc()
        await self._record(action=action, subject=subject, actor=actor, outcome=outcome)

    @asynccontextmanager
    async def recording_refusal(
        self, action: str, *, subject: str, actor: str
    ) -> AsyncIterator[None]:
        """Write down what is refused or fails in here, by its code; it goes on to the caller."""
        try:
            yield
        except GlamError as error:
            await self.write_down(action, subject=subject, actor=actor, outcome=error.code)
            raise
