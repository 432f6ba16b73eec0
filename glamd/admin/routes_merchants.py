"""Admin routes about merchants."""

from dataclasses import asdict
from typing import Annotated, Literal, Protocol
from uuid import UUID

from pydantic import Field

from glamd.admin.query import limit_of, merchant_in_path, uuid_in_query
from glamd.admin.services import Merchants, NewMerchants
from glamd.erasure import Erased
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route
from glamd.merchants.store import Merchant, SensitiveData, Settings

Text = Annotated[str, Field(min_length=1, max_length=255)]


class MerchantBody(Body):
    """A merchant to be made; the id is made where none is given."""

    platform: Text
    shop_id: Text
    domain: Text
    merchant_id: UUID | None = None


class SettingsBody(Body):
    """Settings to be changed; what is absent stays."""

    token_ttl_s: int | Literal["default"] | None = None
    sensitive_data: SensitiveData | None = None


class Erasure(Protocol):
    """The way out for merchants."""

    async def erase(self, merchant_id: UUID, *, actor: str, correlation_id: str) -> Erased:
        """Delete what there is of one; raises `NotFoundError`, `UnavailableError`."""


class MerchantRoutes:
    """Handlers of the routes about merchants."""

    def __init__(self, merchants: Merchants, *, onboarding: NewMerchants, erasure: Erasure) -> None:
        self._merchants = merchants
        self._onboarding = onboarding
        self._erasure = erasure

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("POST", "/v1/merchants", self._create),
            ("GET", "/v1/merchants", self._list),
            ("GET", "/v1/merchants/{merchant_id}", self._show),
            ("POST", "/v1/merchants/{merchant_id}/settings", self._configure),
            ("POST", "/v1/merchants/{merchant_id}/erase", self._erase),
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
        merchant = await self._merchants.show(merchant_in_path(call))
        settings = await self._merchants.settings(merchant.merchant_id)
        return Answer(data=_as_json(merchant) | _settings(settings))

    async def _configure(self, call: Call) -> Answer:
        merchant_id = merchant_in_path(call)
        body = await call.json(SettingsBody)
        changed = await self._merchants.configure(
            merchant_id, token_ttl_s=body.token_ttl_s, sensitive_data=body.sensitive_data
        )
        return Answer(data={"merchant_id": merchant_id, **_settings(changed)})

    async def _erase(self, call: Call) -> Answer:
        erased = await self._erasure.erase(
            merchant_in_path(call),
            actor=call.operator.name,
            correlation_id=call.correlation_id,
        )
        return Answer(data=asdict(erased))


def _settings(settings: Settings) -> dict[str, object]:
    ttl_s = settings.token_ttl_s
    return {
        "token_ttl_s": "default" if ttl_s is None else ttl_s,
        "sensitive_data": settings.sensitive_data,
        "erase_requested_at": settings.erase_requested_at,
        "erased_at": settings.erased_at,
    }


def _as_json(merchant: Merchant) -> dict[str, object]:
    return {
        "merchant_id": merchant.merchant_id,
        "platform": merchant.platform,
        "shop_id": merchant.shop_id,
        "domain": merchant.domain,
        "created_at": merchant.created_at,
    }
