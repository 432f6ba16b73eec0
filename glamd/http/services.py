"""What the routes here need of the capabilities, said as narrowly as they use it.

The payment part's own classes fit these; so do the small in-memory ones of the tests. No logic.
"""

from typing import Protocol
from uuid import UUID

from glamd.payments.model import Look, PaymentToken, TokenPage


class Tokens(Protocol):
    """Metadata of payment tokens. `merchant_id` None means: whoever's it is."""

    async def show(self, token: str, *, merchant_id: UUID | None) -> PaymentToken:
        """One token; raises `NotFoundError` `TOKEN_NOT_FOUND`, another merchant's included."""

    async def page(
        self, merchant_id: UUID, *, limit: int, page: int | None, cursor: str | None
    ) -> TokenPage:
        """One page, newest first; raises `InputError` for a cursor that is not ours."""

    async def revoke(
        self, token: str, *, merchant_id: UUID | None, correlation_id: str
    ) -> PaymentToken:
        """Revoke for good, repeatable; raises `NotFoundError` `TOKEN_NOT_FOUND`."""


class Detokenizer(Protocol):
    """Opens tokens for workers, each attempt audited before it is answered."""

    async def decrypt(self, look: Look) -> dict[str, str | None]:
        """The fields asked for, by name.

        Raises `ForbiddenError` (outside the grant), `NotFoundError` `TOKEN_NOT_FOUND`,
        `GoneError` `TOKEN_EXPIRED` or `TOKEN_REVOKED`, `RateLimitedError`, `UnavailableError`.
        """

    async def refused(self, look: Look, code: str) -> None:
        """Audit an attempt that was refused before it came here; raises `UnavailableError`."""
