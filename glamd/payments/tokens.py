"""Payment tokens as their owners see them: metadata, lists, revocation, their end. Never a PAN.

Looking at card data is `detokenize`, making tokens is `vault`.
"""

from typing import Final
from uuid import UUID, uuid4

import structlog
from prometheus_client import Counter

from glamd import cursors
from glamd.batches import in_rounds
from glamd.clock import Clock
from glamd.db import Database
from glamd.errors import NotFoundError
from glamd.outbox import Outbox
from glamd.payments import store
from glamd.payments.model import PaymentToken, TokenPage

log = structlog.get_logger()
_REVOKED = Counter("glamd_payments_revoked_tokens_total", "Tokens revoked on request.")
_EXPIRED = Counter("glamd_payments_expired_tokens_total", "Tokens whose end was announced.")

EXPIRE_ROWS: Final = 500
EXPIRE_BATCHES: Final = 100


class Tokens:
    """The metadata of payment tokens, by owner."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._outbox = Outbox("cde")

    async def show(self, token: str, *, merchant_id: UUID | None) -> PaymentToken:
        """One token; with `merchant_id`, only if it is that merchant's.

        Raises NotFoundError `TOKEN_NOT_FOUND`, alike for an unknown and for a foreign token.
        """
        found = await store.token(self._database, token, self._clock.now())
        if found is None or merchant_id not in (None, found.merchant_id):
            raise NotFoundError("There is no such payment token.", code="TOKEN_NOT_FOUND")
        return found

    async def page(
        self, merchant_id: UUID, *, limit: int, page: int | None, cursor: str | None
    ) -> TokenPage:
        """The merchant's tokens, newest first, by page number or behind a cursor."""
        now = self._clock.now()
        if cursor is None:
            offset = ((page or 1) - 1) * limit
            rows = await store.tokens_at(
                self._database, merchant_id, offset=offset, limit=limit + 1, now=now
            )
        else:
            rows = await store.tokens_after(
                self._database, merchant_id, after=cursors.decode(cursor), limit=limit + 1, now=now
            )
        items = tuple(rows[:limit])
        return TokenPage(
            items=items,
            total=await store.total(self._database, merchant_id),
            next_cursor=cursors.encode(items[-1].created_at, items[-1].token)
            if len(rows) > limit
            else None,
        )

    async def revoke(
        self, token: str, *, merchant_id: UUID | None, correlation_id: str
    ) -> PaymentToken:
        """Shred the token's ciphertext for good; a revoked one stays as it is.

        Raises NotFoundError `TOKEN_NOT_FOUND`.
        """
        found = await self.show(token, merchant_id=merchant_id)
        if found.status == "revoked":
            return found
        async with self._database.transaction() as connection:
            revoked = await store.revoke(connection, token, self._clock.now())
            if revoked is not None:
                await self._outbox.add(
                    connection,
                    subject="evt.payment.token.revoked.v1",
                    merchant_id=found.merchant_id,
                    correlation_id=correlation_id,
                    data={
                        "merchant_id": str(found.merchant_id),
                        "token": token,
                        "device_id": found.device_id,
                        "brand": found.brand,
                        "last4": found.last4,
                    },
                )
        if revoked is None:
            # Another request was faster; what it made of the token is the answer.
            return await self.show(token, merchant_id=merchant_id)
        _REVOKED.inc()
        log.info("token_revoked", token=token, merchant_id=str(found.merchant_id))
        return revoked

    async def announce_expired(self) -> int:
        """Shred tokens that are over and tell of them (`evt.payment.token.expired.v1`), each once.

        A token has ended at its time whether this has run or not, and what was revoked before does
        not expire. How many, at most EXPIRE_ROWS * EXPIRE_BATCHES; UnavailableError.
        """

        async def some() -> int:
            told = await store.expire(
                self._database,
                now=self._clock.now(),
                limit=EXPIRE_ROWS,
                correlation_id=f"token-expiry-{uuid4()}",
            )
            _EXPIRED.inc(told)
            return told

        return await in_rounds(some, full=EXPIRE_ROWS, most=EXPIRE_BATCHES)
