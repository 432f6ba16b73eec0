"""Shopify as far as it sells our packs, in its real HTTP; it misbehaves when it is told to.

The demo's platform with a real GraphQL engine on an excerpt of Shopify's schema, so that a document
that Shopify would refuse is refused. Each charge is paid on the page that its `confirmationUrl`
names, after which it is told by a signed webhook. A webhook that a test wants to deliver itself is
made by `webhook`.

By hand: `python -m tests.support.shopify --port 8091 --webhooks URL/webhooks/shopify` prints a shop
and its token; open a purchase's `checkout_url` in a browser, or `curl -X POST -d act=approve` it
(or `decline`). `curl -X POST 'localhost:8091/stand-in/misbehave?answer=throttled'` is for the next
request.
"""

import argparse
import asyncio
import re
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace, TracebackType
from typing import Any, Final, Literal, get_args

import orjson
from aiohttp import web
from graphql import graphql_sync

from glamd.embedded.demo_shopify import DemoShop, DemoShopify, as_json
from tests.support.shopify_schema import admin_api

API_VERSIONS: Final = ("2026-07", "2026-10", "2027-01")
HUGE_BYTES: Final = 1024 * 1024
PATIENCE_S: Final = 10.0
COST: Final = 10

Answer = Literal[
    "proper",
    "cut",
    "500",
    "503",
    "error-page",
    "429",
    "throttled",
    "internal-error",
    "denied",
    "user-error",
    "401",
    "402",
    "not-json",
    "huge",
    "redirect",
]

_SCHEMA: Final = admin_api()
_ERROR_PAGE: Final = "<html><body><h1>Something went wrong</h1>{}</body></html>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """How one request is treated.

    `takes_effect` says that it is executed whatever the answer is; `is_late` that the answer waits
    for `release`. `changes` replace attributes of a charge that is made, as it is shown.
    """

    answer: Answer = "proper"
    takes_effect: bool = False
    is_late: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    retry_after: str = "2.0"


class ShopifyStandIn(DemoShopify):
    """The stand-in; an asynchronous context manager that listens on a free port of loopback."""

    def __init__(self, *, port: int = 0, webhooks: str | None = None, latency_s: float = 0) -> None:
        super().__init__(port=port, webhooks_url=webhooks)
        self.requests: list[str] = []
        """What was asked for, in order."""
        self.versions: set[str] = set()
        self.elsewhere = 0
        """Requests that came after a redirect."""
        self._latency_s = latency_s
        self._acts: deque[Act] = deque()
        self._act = Act()
        self._arrived = asyncio.Event()
        self._released = asyncio.Event()

    def add_routes(self, app: web.Application) -> None:
        """Where it is told to misbehave, and where nobody should come."""
        app.router.add_post("/stand-in/misbehave", self._told)
        app.router.add_route("*", "/elsewhere", self._other)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        await super().__aexit__(kind, error, traceback)

    @property
    def secrets(self) -> set[str]:
        """Everything that must never be seen anywhere."""
        return {self.api_secret} | {shop.access_token for shop in self.shops}

    def misbehave(self, *acts: Act) -> None:
        """Treat the next requests so, one each; then all is well again."""
        self._acts.extend(acts)

    def hold(self) -> None:
        """Make answers late again, after a `release`."""
        self._released.clear()

    def release(self) -> None:
        """Let go the answers that are late, now and from now on."""
        self._released.set()

    async def asked(self, times: int) -> None:
        """Return when so many requests have come in."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.requests) < times:
                self._arrived.clear()
                await self._arrived.wait()

    # ---- the API

    async def _graphql(self, request: web.Request) -> web.StreamResponse:
        self.versions.add(request.match_info["version"])
        asked: dict[str, Any] = await request.json()
        found = re.search(r"appPurchaseOneTimeCreate|node\(|oneTimePurchases", asked["query"])
        assert found is not None, asked
        self.requests.append(found[0].rstrip("("))
        act = self._acts.popleft() if self._acts else Act()
        self._arrived.set()
        await asyncio.sleep(self._latency_s)
        is_executed = act.answer in {"proper", "user-error"}
        shop = self.shop_of(request)
        executed: dict[str, object] = {}
        if shop is not None and (is_executed or act.takes_effect):
            self._act = act  # no await until the engine is done
            executed = self.execute(shop, asked["query"], asked.get("variables") or {})
        if act.is_late:
            await self._released.wait()
        if not is_executed:
            return _misbehaving(request, act)
        if request.match_info["version"] not in API_VERSIONS:
            return as_json({"errors": "Not Found"}, 404)
        if shop is None:
            said = "[API] Invalid API key or access token (unrecognized login or wrong password)"
            return as_json({"errors": said}, 401)
        return as_json(executed)

    def execute(
        self, shop: DemoShop, document: str, variables: Mapping[str, Any]
    ) -> dict[str, object]:
        """The answer to a document, by the engine."""
        installation = SimpleNamespace(
            id="gid://shopify/AppInstallation/1",
            oneTimePurchases=lambda _info, **given: _listed(shop, given),
        )
        root = SimpleNamespace(
            currentAppInstallation=installation,
            node=lambda _info, **given: shop.node(given["id"]),
            appPurchaseOneTimeCreate=lambda _info, **given: self._created(shop, given),
        )
        result = graphql_sync(_SCHEMA, document, root, variable_values=dict(variables))
        body: dict[str, object] = {"extensions": {"cost": _cost(available=990.0)}}
        if result.errors:
            body["errors"] = [
                {"message": error.message, "extensions": {"code": "argumentLiteralsIncompatible"}}
                for error in result.errors
            ]
        if result.data is not None:
            body["data"] = result.data
        return body

    def _created(self, shop: DemoShop, given: Mapping[str, Any]) -> dict[str, object]:
        if self._act.answer == "user-error":
            # What it says must not come out anywhere.
            said = f"cannot be charged by {shop.access_token}"
            return {"userErrors": [{"field": ["base"], "message": said}]}
        charge, page = self.make(shop, given)
        shown = replace(charge, **self._act.changes)
        return {"appPurchaseOneTime": shown.node(), "confirmationUrl": page, "userErrors": []}

    async def _other(self, _request: web.Request) -> web.Response:
        self.elsewhere += 1
        return web.json_response({})

    async def _told(self, request: web.Request) -> web.Response:
        wanted = request.query.get("answer", "proper")
        for answer in get_args(Answer):
            if answer == wanted:
                self.misbehave(Act(answer=answer, takes_effect="takes_effect" in request.query))
                return web.Response(text="so be it\n")
        return web.Response(status=400, text=f"answer: one of {', '.join(get_args(Answer))}\n")


def _misbehaving(request: web.Request, act: Act) -> web.StreamResponse:
    # What an error page shows of the request must not come out anywhere.
    shown = request.headers.get("X-Shopify-Access-Token", "")
    page = _ERROR_PAGE.format(shown)
    match act.answer:
        case "cut":
            assert request.transport is not None
            request.transport.abort()
            answer = web.Response()
        case "500" | "503":
            answer = web.Response(status=int(act.answer), text=page)
        case "error-page":
            answer = web.Response(text=page, content_type="text/html")
        case "429":
            answer = web.Response(status=429, headers={"Retry-After": act.retry_after})
        case "401" | "402":
            answer = as_json({"errors": f"not for {shown}"}, int(act.answer))
        case "throttled":
            answer = as_json(_error("THROTTLED", "Throttled", available=COST - 1.0))
        case "internal-error":
            answer = as_json(_error("INTERNAL_SERVER_ERROR", f"Internal error. {shown}"))
        case "denied":
            answer = as_json(_error("ACCESS_DENIED", f"Access denied for {shown}"))
        case "not-json":
            answer = web.Response(text=f"{{'data': {shown}", content_type="application/json")
        case "huge":
            answer = web.Response(body=b" " * HUGE_BYTES, content_type="application/json")
        case _:
            # A status that keeps the method: whoever follows it takes the token along.
            answer = web.Response(status=307, headers={"Location": "/elsewhere"})
    return answer


def _listed(shop: DemoShop, given: Mapping[str, Any]) -> dict[str, object]:
    assert given["reverse"], "the newest come first"
    assert given["sortKey"] == "CREATED_AT"
    return shop.page(given)


def _cost(*, available: float) -> dict[str, object]:
    return {
        "requestedQueryCost": COST,
        "actualQueryCost": None,
        "throttleStatus": {
            "maximumAvailable": 2000.0,
            "currentlyAvailable": available,
            "restoreRate": 100.0,
        },
    }


def _error(code: str, message: str, *, available: float = 990.0) -> dict[str, object]:
    return {
        "errors": [{"message": message, "extensions": {"code": code}}],
        "extensions": {"cost": _cost(available=available)},
    }


async def _serve(port: int, webhooks: str | None, latency_ms: int) -> None:
    stand_in = ShopifyStandIn(port=port, webhooks=webhooks, latency_s=latency_ms / 1000)
    async with stand_in:
        shop = stand_in.install("by-hand.myshopify.com", 548_380_009)
        told = {
            "url": stand_in.url,
            "api_secret": stand_in.api_secret,
            "shop": shop.domain,
            "shop_id": f"gid://shopify/Shop/{shop.number}",
            "access_token": shop.access_token,
        }
        sys.stdout.write(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().create_future()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A stand-in for Shopify's billing.")
    parser.add_argument("--port", type=int, default=8091)
    parser.add_argument("--webhooks", help="where webhooks go to")
    parser.add_argument("--latency-ms", type=int, default=0)
    given = parser.parse_args()
    try:
        asyncio.run(_serve(given.port, given.webhooks, given.latency_ms))
    except KeyboardInterrupt:
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
