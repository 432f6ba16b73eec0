"""Admin routes about JWTs: revoking them, and minting some to try things out with.

Minting is for development only; what is revoked is revoked on every node, for good.
"""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from glamd.admin.minting import Mint
from glamd.admin.query import wrong
from glamd.admin.services import RevokedJwts
from glamd.errors import ForbiddenError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.revocations.service import MAX_VALUE_CHARS
from glamd.revocations.store import Revocation

Scope = Annotated[str, Field(max_length=1024)] | None
Claim = Annotated[str, Field(min_length=1, max_length=MAX_VALUE_CHARS)]


class ClientTokenBody(Body):
    """A client's token to be made."""

    merchant_id: UUID
    shop: Annotated[str, Field(min_length=1, max_length=253)]
    scope: Scope = None


class InternalTokenBody(Body):
    """An internal service's token to be made."""

    service: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
    scope: Scope = None


class RevocationBody(Body):
    """What a JWT that is not to be believed any more has: its own id, or its key's."""

    jti: Claim | None = None
    kid: Claim | None = None


class JwtRoutes:
    """Handlers of the routes about JWTs; without a mint none are made."""

    def __init__(self, mint: Mint | None, *, revocations: RevokedJwts) -> None:
        self._mint = mint
        self._revocations = revocations

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("POST", "/v1/jwt/client", self._client),
            ("POST", "/v1/jwt/internal", self._internal),
            ("POST", "/v1/jwt/revocations", self._revoke),
            ("GET", "/v1/jwt/revocations", self._revoked),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _revoke(self, call: Call) -> Answer:
        body = await call.json(RevocationBody)
        by = call.operator.name
        if body.jti is not None and body.kid is None:
            made = await self._revocations.revoke("jti", body.jti, by=by)
        elif body.kid is not None and body.jti is None:
            made = await self._revocations.revoke("kid", body.kid, by=by)
        else:
            raise wrong("jti", "Either a jti or a kid is needed, not both.")
        return Answer(data=_as_json(made), status=201)

    async def _revoked(self, _call: Call) -> Answer:
        found = await self._revocations.listed()
        return Answer(data={"revocations": [_as_json(revocation) for revocation in found]})

    async def _client(self, call: Call) -> Answer:
        mint = self._minting()
        body = await call.json(ClientTokenBody)
        token = mint.client(merchant_id=str(body.merchant_id), shop=body.shop, scope=body.scope)
        return Answer(data={"token": token}, status=201)

    async def _internal(self, call: Call) -> Answer:
        mint = self._minting()
        body = await call.json(InternalTokenBody)
        token = mint.internal(service=body.service, scope=body.scope)
        return Answer(data={"token": token}, status=201)

    def _minting(self) -> Mint:
        if self._mint is None:
            raise ForbiddenError("JWTs are minted in development only.")
        return self._mint


def _as_json(revocation: Revocation) -> dict[str, object]:
    return {
        "kind": revocation.kind,
        "value": revocation.value,
        "revoked_at": revocation.revoked_at,
        "revoked_by": revocation.revoked_by,
        "expires_at": revocation.expires_at,
    }
