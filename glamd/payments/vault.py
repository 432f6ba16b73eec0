"""The vault: issuing payment tokens. What is committed here may be acknowledged; nothing else may.

One `Spend` is everything a request leaves behind: the counter it used up, the answer it will get
again, and, where it succeeded, its token and its event. A spend is applied whole or not at all, and
only on the version of the device's counters that the caller decided on: a second gateway that moved
them meanwhile makes this one reload and decide again.

Deciding (which counter, which answer) is the session's part, sealing the cipher's, SQL the store's.
"""

import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Final

from glamd.db import Database
from glamd.journal import Journal
from glamd.payments import store
from glamd.payments.model import Spend, StoredAnswer

TOKEN_RANDOM_BITS: Final = 130
_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = tuple(a + b for a in _CROCKFORD for b in _CROCKFORD)


def new_token() -> str:
    """`ptk_` and 130 random bits in Crockford's base32 (26 characters)."""
    value = secrets.randbits(TOKEN_RANDOM_BITS)
    return "ptk_" + "".join([_PAIRS[value >> shift & 1023] for shift in range(0, 130, 10)])


class Vault:
    """Commits spends in groups and remembers the answers of the last 24 hours."""

    def __init__(
        self,
        database: Database,
        *,
        connections: int,
        batch_limit: int,
        observe: Callable[[float], None] | None = None,
    ) -> None:
        """`observe` is told the seconds of each commit."""
        self._database = database
        self.journal: Journal[Spend, bool] = Journal(
            name="vault",
            database=database,
            commit=store.commit_spends,
            connections=connections,
            batch_limit=batch_limit,
            observe=observe,
        )

    async def answer_of(self, scope: str, request_id: str, *, now: datetime) -> StoredAnswer | None:
        """The answer that this id got within its 24 hours, or None; UnavailableError."""
        row = await store.stored_answer(self._database, scope, request_id, now)
        return None if row is None else StoredAnswer(*row)
