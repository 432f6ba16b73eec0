"""What the routes here need of the capabilities, said as narrowly as they use it.

The capabilities' own classes fit these; so do the small in-memory ones of the tests. No logic.
"""

from typing import Literal, Protocol
from uuid import UUID

from glamd.credentials.model import Accessor, Action, NewToken, Platform, Reading
from glamd.idempotency import Keep
from glamd.payments.model import Look, PaymentToken, TokenPage

LookAction = Literal["decrypt", "authorized"]
"""What a worker wanted of a token."""


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

    async def authorized(self, look: Look) -> PaymentToken:
        """Erase the sensitive authentication data, repeatable; raises as `decrypt` does."""

    async def refused(self, look: Look, code: str, *, action: LookAction = "decrypt") -> None:
        """Audit an attempt that was refused before it came here; raises `UnavailableError`."""


class Submissions(Protocol):
    """Where devices' requests go that come over HTTP: to the sessions that MQTT feeds."""

    async def admission(self, device_id: str, certificate_sha256: str) -> None:
        """Let a device in, or not, by the certificate that it shows (hex of its DER's SHA-256).

        Raises `ForbiddenError` with a code that begins with `DEVICE_`, `UnavailableError`.
        """

    async def submit(self, device_id: str, payload: bytes) -> bytes:
        """The answer of the MQTT contract to one tokenize request of it, errors included.

        Raises `InputError` `MALFORMED` or `UNSUPPORTED` for what is none, naming the field.
        """


class PlatformVault(Protocol):
    """The vault of platform tokens; every call leaves its rows in the access log."""

    async def store(
        self, new: NewToken, *, accessor: Accessor, keep: Keep[UUID] | None = None
    ) -> UUID:
        """Store in place of the former one; the token's id. Raises `UnavailableError`."""

    async def read(
        self, merchant_id: UUID, *, platform: Platform | None, accessor: Accessor
    ) -> Reading:
        """Open those of one platform or of all; raises `UnavailableError`."""

    async def delete(self, merchant_id: UUID, platform: Platform, *, accessor: Accessor) -> bool:
        """Delete, repeatable; whether there was one. Raises `UnavailableError`."""

    async def refused(
        self,
        merchant_id: UUID,
        *,
        action: Action,
        code: str,
        accessor: Accessor,
        platform: Platform | None = None,
    ) -> None:
        """Log an attempt that was refused; raises `UnavailableError`."""
