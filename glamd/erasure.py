"""A merchant from being there to being gone: its cards, and its platform tokens.

The one way out, for `glamctl merchant erase`. Above the rooms whose things it deletes, since they
do not know one another; no rule and no SQL of its own. What books must be kept stays: billing
records, credit accounts and their transactions, and the audit log.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

from glamd.errors import GlamError
from glamd.keys.operations import Record
from glamd.payments.life.erasure import CardErasure

REQUEST = "merchant.erase"
DONE = "merchant.erased"
"""How the audit log names the request and its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What an erasure has deleted by now; `done` is False where the job has to go on with it."""

    merchant_id: UUID
    payment_tokens: int
    stored_answers: int
    platform_tokens: int
    done: bool


class Erasure:
    """Erases merchants.

    `forget_platform_tokens` deletes those of a merchant, repeatably, and says how many they were;
    `record` writes an audit row and raises where it cannot.
    """

    def __init__(
        self,
        *,
        cards: CardErasure,
        forget_platform_tokens: Callable[[UUID], Awaitable[int]],
        record: Record,
    ) -> None:
        self._cards = cards
        self._forget_platform_tokens = forget_platform_tokens
        self._record = record

    async def erase(self, merchant_id: UUID, *, actor: str, correlation_id: str) -> Erased:
        """Stop the merchant's devices for good, then delete what there is of it.

        Repeatable. From the first moment on no token is made; whatever fails after it is gone on
        with by `resume`. NotFoundError `MERCHANT_NOT_FOUND`, UnavailableError.
        """
        subject = str(merchant_id)
        try:
            await self._cards.request(merchant_id, correlation_id=correlation_id)
        except GlamError as error:
            await self._record(action=REQUEST, subject=subject, actor=actor, outcome=error.code)
            raise
        await self._record(action=REQUEST, subject=subject, actor=actor, outcome="ok")
        return await self._go_on(merchant_id)

    async def resume(self) -> int:
        """Go on with every erasure that is not done, whoever began it; how many were finished.

        UnavailableError.
        """
        finished = 0
        for merchant_id in await self._cards.pending():
            finished += (await self._go_on(merchant_id)).done
        return finished

    async def _go_on(self, merchant_id: UUID) -> Erased:
        # The cards last: that they are gone is what marks the erasure as done.
        platform_tokens = await self._forget_platform_tokens(merchant_id)
        cards = await self._cards.erase(merchant_id)
        if cards.is_news:
            subject = str(merchant_id)
            await self._record(action=DONE, subject=subject, actor="glamd", outcome="ok")
        return Erased(
            merchant_id=merchant_id,
            payment_tokens=cards.tokens,
            stored_answers=cards.answers,
            platform_tokens=platform_tokens,
            done=cards.done,
        )
