"""Taking a merchant's cards away for good: its tokens with their metadata, its devices' answers.

From the moment of the request no token is made: its devices are revoked in the same transaction,
behind which no commit slips. The rest goes in batches and can be resumed anywhere, on any node.
What stays: the settings with the date of the erasure, the devices' rows and counters, so that no
counter is ever begun again, and the audit log, which holds no card data.
"""

from dataclasses import dataclass
from typing import Final
from uuid import UUID, uuid4

import structlog
from prometheus_client import Counter

from glamd.batches import in_rounds
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import NotFoundError
from glamd.payments.life import store

ROWS: Final = 500
ROUNDS: Final = 100_000
"""Batches for one merchant in one turn: 50 million tokens."""
MERCHANTS: Final = 100
"""Merchants in one turn."""

log = structlog.get_logger()
_ERASED = Counter("glamd_payments_erased_rows_total", "Rows of erased merchants.", ["what"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasedCards:
    """How many rows an erasure deleted; `done` is False while another node holds some of them.

    `is_news` says that it was done by this one, and not noted before.
    """

    tokens: int
    answers: int
    done: bool
    is_news: bool


class CardErasure:
    """The card-data half of erasing a merchant."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def request(self, merchant_id: UUID, *, correlation_id: str) -> int:
        """Revoke the merchant's devices and refuse new tokens from now on; how many devices.

        Repeatable. NotFoundError `MERCHANT_NOT_FOUND`, UnavailableError.
        """
        async with self._database.transaction() as connection:
            stopped = await store.request_erasure(
                connection, merchant_id, now=self._clock.now(), correlation_id=correlation_id
            )
        if stopped is None:
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        log.info("erasure_requested", merchant_id=str(merchant_id), devices=stopped)
        return stopped

    async def pending(self) -> tuple[UUID, ...]:
        """The merchants whose erasure is not done, at most MERCHANTS; UnavailableError."""
        return await store.to_erase(self._database, limit=MERCHANTS)

    async def erase(self, merchant_id: UUID) -> ErasedCards:
        """Delete what is left of the merchant's cards, and note it when nothing is.

        Only after `request`; whatever of it was done before is not done again. UnavailableError.
        """
        correlation_id = f"erasure-{uuid4()}"

        async def some_tokens() -> int:
            rows = await store.erase_tokens(
                self._database, merchant_id, limit=ROWS, correlation_id=correlation_id
            )
            _ERASED.labels("tokens").inc(rows)
            return rows

        async def some_answers() -> int:
            rows = await store.erase_answers(self._database, merchant_id, limit=ROWS)
            _ERASED.labels("answers").inc(rows)
            return rows

        tokens = await in_rounds(some_tokens, full=ROWS, most=ROUNDS)
        answers = await in_rounds(some_answers, full=ROWS, most=ROUNDS)
        is_news = await store.erased(self._database, merchant_id, self._clock.now())
        if is_news:
            log.info("merchant_erased", merchant_id=str(merchant_id))
        done = is_news or await store.is_erased(self._database, merchant_id)
        return ErasedCards(tokens=tokens, answers=answers, done=done, is_news=is_news)
