"""Admin routes that mint JWTs for trying things out, in development only."""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from glamd.admin.minting import Mint
from glamd.errors import ForbiddenError
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route

Scope = Annotated[str, Field(max_length=1024)] | None


class ClientTokenBody(Body):
    """A client's token to be made."""

    merchant_id: UUID
    shop: Annotated[str, Field(min_length=1, max_length=253)]
    scope: Scope = None


class InternalTokenBody(Body):
    """An internal service's token to be made."""

    service: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
    scope: Scope = None


class JwtRoutes:
    """Handlers of the routes about JWTs; without a mint all of them are refused."""

    def __init__(self, mint: Mint | None) -> None:
        self._mint = mint

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (("/v1/jwt/client", self._client), ("/v1/jwt/internal", self._internal))
        return tuple(
            Route(method="POST", path=path, handler=handler, access=(OPERATOR,))
            for path, handler in found
        )

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
