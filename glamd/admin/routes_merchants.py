"""Admin routes about merchants."""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from glamd.admin.query import limit_of, merchant_in_path, uuid_in_query
from glamd.admin.services import Merchants, NewMerchants
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.merchants.store import Merchant

Text = Annotated[str, Field(min_length=1, max_length=255)]


class MerchantBody(Body):
    """A merchant to be made; the id is made where none is given."""

    platform: Text
    shop_id: Text
    domain: Text
    merchant_id: UUID | None = None


class MerchantRoutes:
    """Handlers of the routes about merchants."""

    def __init__(self, merchants: Merchants, *, onboarding: NewMerchants) -> None:
        self._merchants = merchants
        self._onboarding = onboarding

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("POST", "/v1/merchants", self._create),
            ("GET", "/v1/merchants", self._list),
            ("GET", "/v1/merchants/{merchant_id}", self._show),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _create(self, call: Call) -> Answer:
        body = await call.json(MerchantBody)
        made = await self._onboarding.create(
            platform=body.platform,
            shop_id=body.shop_id,
            domain=body.domain,
            merchant_id=body.merchant_id,
        )
        return Answer(data=_as_json(made), status=201)

    async def _list(self, call: Call) -> Answer:
        limit = limit_of(call)
        found = await self._merchants.list(limit=limit, after=uuid_in_query(call, "after"))
        following = found[-1].merchant_id if len(found) == limit else None
        return Answer(data={"merchants": [_as_json(m) for m in found], "next": following})

    async def _show(self, call: Call) -> Answer:
        return Answer(data=_as_json(await self._merchants.show(merchant_in_path(call))))


def _as_json(merchant: Merchant) -> dict[str, object]:
    return {
        "merchant_id": merchant.merchant_id,
        "platform": merchant.platform,
        "shop_id": merchant.shop_id,
        "domain": merchant.domain,
        "created_at": merchant.created_at,
    }
