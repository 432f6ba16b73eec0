"""The end of tokens and of merchants, as the admin routes see it: answers for a test to change."""

from dataclasses import replace
from uuid import UUID

from glamd.erasure import Erased
from glamd.errors import NotFoundError
from glamd.payments.life.service import Purged
from glamd.payments.model import Grant

NOBODY = UUID(int=404)


class FakeTokenLife:
    """Purges nothing, and has two grants."""

    def __init__(self) -> None:
        self.purged = Purged(
            expired=3, answers=2, metadata=1, dropped=("d1",), rewritten=("d2", "d3"), waiting=()
        )
        everything = Grant(
            worker="settler",
            purposes=frozenset({"settlement", "refund"}),
            fields=frozenset({"expiry", "pan"}),
            merchants=frozenset(),
            rate_per_s=5.0,
        )
        self.grants = (
            replace(everything, worker="auditor", merchants=frozenset({UUID(int=7)})),
            everything,
        )

    async def purge_now(self) -> Purged:
        """What was set."""
        return self.purged


class FakeErasure:
    """Erases everybody but NOBODY, and remembers for whom."""

    def __init__(self) -> None:
        self.asked: list[tuple[UUID, str]] = []

    async def erase(self, merchant_id: UUID, *, actor: str, correlation_id: str) -> Erased:
        """Done at once."""
        assert correlation_id
        if merchant_id == NOBODY:
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        self.asked.append((merchant_id, actor))
        return Erased(
            merchant_id=merchant_id,
            payment_tokens=4,
            stored_answers=3,
            platform_tokens=1,
            done=True,
        )
