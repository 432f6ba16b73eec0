"""`/api/billing`: a merchant's trial and its purchases, for its own back end.

The rules of trials and purchases are billing's; whose they are is the token's word, which no body
and no path can change.
"""

from typing import Final
from uuid import UUID

from glamd.billing.model import Purchase, PurchaseNotFoundError, TrialStarted
from glamd.billing.service import Billing
from glamd.http.billing_models import (
    BillingOverview,
    CheckoutBegun,
    PurchaseBody,
    PurchaseQuery,
    PurchaseState,
    TrialBegun,
    TrialBody,
    TrialState,
    overview_as_json,
    purchase_as_json,
    trial_as_json,
)
from glamd.http.bodies import parse_json, read_body
from glamd.http.call import Answer, Call
from glamd.http.idempotent import Once
from glamd.http.identity import Client
from glamd.http.operation import Operation, Param, Refusal
from glamd.http.routes import Route, client
from glamd.idempotency import Keep
from glamd.ids import as_uuid


class BillingRoutes:
    """Handlers of the billing routes on the api listener."""

    def __init__(self, billing: Billing, *, once: Once) -> None:
        self._billing = billing
        self._once = once

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        trials, purchases = "/api/billing/trials", "/api/billing/purchases"
        found = (
            ("GET", "/api/billing", self._overview, _OVERVIEW),
            ("POST", trials, self._start_trial, _START_TRIAL),
            ("GET", trials, self._trial, _TRIAL),
            ("POST", purchases, self._purchase, _PURCHASE),
            ("GET", purchases, self._purchases, _PURCHASES),
            ("GET", f"{purchases}/{{id}}", self._purchase_of, _PURCHASE_OF),
        )
        return tuple(
            Route(
                method=method,
                path=path,
                handler=handler,
                access=(client(),),
                operation=operation,
            )
            for method, path, handler, operation in found
        )

    async def _overview(self, call: Call) -> Answer:
        return Answer(data=overview_as_json(await self._billing.overview(_merchant(call))))

    async def _trial(self, call: Call) -> Answer:
        return Answer(data=trial_as_json(await self._billing.trial(_merchant(call))))

    async def _start_trial(self, call: Call) -> Answer:
        body = await _trial_body(call)

        async def work(keep: Keep[TrialStarted] | None) -> TrialStarted:
            return await self._billing.start_trial(
                _merchant(call), correlation_id=call.correlation_id, keep=keep
            )

        return await self._once(call, body=body, work=work, answer=_begun)

    async def _purchase(self, call: Call) -> Answer:
        body = await call.json(PurchaseBody)

        async def work(keep: Keep[Purchase] | None) -> Purchase:
            return await self._billing.purchase(
                _merchant(call),
                pack=body.pack,
                platform=body.platform,
                return_url=body.return_url,
                correlation_id=call.correlation_id,
                keep=keep,
            )

        return await self._once(call, body=body, work=work, answer=_offered)

    async def _purchases(self, call: Call) -> Answer:
        query = call.query(PurchaseQuery)
        found = await self._billing.purchases(
            _merchant(call), limit=query.limit, page=query.number(), cursor=query.cursor
        )
        return Answer(
            data=[purchase_as_json(each) for each in found.items],
            pagination=query.pagination(total=found.total, next_cursor=found.next_cursor),
        )

    async def _purchase_of(self, call: Call) -> Answer:
        purchase_id = as_uuid(call.params["id"])
        if purchase_id is None:
            raise PurchaseNotFoundError
        found = await self._billing.purchase_of(_merchant(call), purchase_id)
        return Answer(data=purchase_as_json(found))


async def _trial_body(call: Call) -> TrialBody | None:
    """The body where there is one; without one, nobody has to say of what type it is."""
    call.raw = await read_body(call.request, call.limits)
    return parse_json(call.request, call.raw, TrialBody) if call.raw else None


def _merchant(call: Call) -> UUID:
    caller = call.caller
    assert isinstance(caller, Client)
    return caller.merchant_id


def _begun(started: TrialStarted) -> Answer:
    data: TrialBegun = {
        "success": True,
        "ends_at": started.ends_at,
        "credits_granted": started.credits_granted,
    }
    return Answer(status=201, data=data)


def _offered(purchase: Purchase) -> Answer:
    assert purchase.checkout_url is not None, "a purchase that is offered says where to pay"
    data: CheckoutBegun = {
        "purchase_id": purchase.purchase_id,
        "checkout_url": purchase.checkout_url,
        "expires_at": purchase.expires_at,
    }
    return Answer(status=201, data=data)


_TAG: Final = "Billing"
_ID: Final = "019b1f6e-7d1c-7a52-9c0f-3a5d1e8b2f40"
_NO_RECORD: Final = Refusal(
    code="MERCHANT_NOT_FOUND", status=404, when="The merchant has no billing record."
)
_TRIAL_EXAMPLE: Final = {
    "available": False,
    "active": True,
    "started_at": "2026-11-21T12:28:47.818622Z",
    "ends_at": "2026-12-05T12:28:47.818622Z",
}
_PURCHASE_EXAMPLE: Final = {
    "id": _ID,
    "merchant_id": "6f1d0a52-5b0e-4a54-9f0a-0d7c0a1f2b3c",
    "credits": 500,
    "amount": "39.99",
    "status": "completed",
    "platform": "shopify",
    "platform_charge_id": "gid://shopify/AppPurchaseOneTime/1017262349",
    "created_at": "2026-11-21T12:28:47.818622Z",
    "completed_at": "2026-11-21T12:31:02.104417Z",
    "expires_at": "2026-11-22T12:28:47.818622Z",
}

_OVERVIEW: Final = Operation(
    id="showBilling",
    tag=_TAG,
    summary="The merchant's trial and what it has bought",
    answer=BillingOverview,
    example={
        "trial": _TRIAL_EXAMPLE,
        "credits_purchased": 500,
        "last_purchase_at": "2026-11-21T12:31:02.104417Z",
        "recent_purchases": [_PURCHASE_EXAMPLE],
    },
    refusals=(_NO_RECORD,),
)
_START_TRIAL: Final = Operation(
    id="startTrial",
    tag=_TAG,
    summary="Start the merchant's trial",
    description="Once a merchant. The trial, its credits and its events are one transaction.",
    body=TrialBody,
    body_required=False,
    body_example={"idempotency_key": "trial-1"},
    answer=TrialBegun,
    example={
        "success": True,
        "ends_at": "2026-12-05T12:28:47.818622Z",
        "credits_granted": 500,
    },
    status=201,
    refusals=(
        Refusal(
            code="CREDIT_ACCOUNT_NOT_FOUND", status=404, when="The merchant has no credit account."
        ),
        _NO_RECORD,
        Refusal(code="TRIAL_ALREADY_USED", status=409, when="The merchant has had its trial."),
    ),
    idempotent=True,
)
_TRIAL: Final = Operation(
    id="showTrial",
    tag=_TAG,
    summary="The merchant's trial",
    answer=TrialState,
    example=_TRIAL_EXAMPLE,
    refusals=(_NO_RECORD,),
)
_PURCHASE: Final = Operation(
    id="beginPurchase",
    tag=_TAG,
    summary="Begin to buy a pack",
    description="The merchant pays at `checkout_url`; its credits come when the platform says that "
    "it has. After a 503 nobody may know yet whether there is a charge: the purchase stays pending "
    "and tells later, and another one may be begun at once.",
    body=PurchaseBody,
    body_example={
        "pack": "medium",
        "platform": "shopify",
        "return_url": "https://shop.example.com/apps/credits",
    },
    answer=CheckoutBegun,
    example={
        "purchase_id": _ID,
        "checkout_url": "https://shop.example.com/admin/charges/1017262349/confirm",
        "expires_at": "2026-11-22T12:28:47.818622Z",
    },
    status=201,
    refusals=(
        _NO_RECORD,
        Refusal(code="INVALID_PACK", status=422, when="There is no pack of this name."),
        Refusal(
            code="PLATFORM_ERROR",
            status=502,
            when="The platform refused or is not configured; the purchase is kept as `failed`.",
        ),
    ),
    idempotent=True,
)
_PURCHASES: Final = Operation(
    id="listPurchases",
    tag=_TAG,
    summary="The merchant's purchases, newest first",
    query=PurchaseQuery,
    answer=list[PurchaseState],
    example=[_PURCHASE_EXAMPLE],
    paginated=True,
)
_PURCHASE_OF: Final = Operation(
    id="showPurchase",
    tag=_TAG,
    summary="One of the merchant's purchases",
    params={"id": Param(description="The purchase's id.", example=_ID, format="uuid")},
    answer=PurchaseState,
    example=_PURCHASE_EXAMPLE,
    refusals=(
        Refusal(code="PURCHASE_NOT_FOUND", status=404, when="This merchant has no such purchase."),
    ),
)
