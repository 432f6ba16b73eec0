"""A shop platform for the demo: as much of Shopify as it takes to sell a pack, on loopback.

It speaks Shopify's HTTP: charges are made by GraphQL with the shop's access token, paid on the page
that `confirmationUrl` names, and told by signed webhooks. It knows the documents that glamd sends
and no others, keeps nothing, and is no part of a real installation. The stand-in of the tests is
made of it, with a real GraphQL engine and with everything that goes wrong.
"""

import base64
import hmac
import html
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import aiohttp
import orjson
import structlog
from aiohttp import web

GID: Final = "gid://shopify/AppPurchaseOneTime/"
TOPIC: Final = "app_purchases_one_time/update"
API_VERSION: Final = "2026-10"
FIRST_CHARGE: Final = 1_017_262_349
WEBHOOK_TIMEOUT_S: Final = 5.0
"""As long as Shopify waits for an answer to a webhook."""

_PAGE: Final = """<!doctype html><meta charset="utf-8"><title>Approve charge</title>
<h1>{name}</h1><p>{amount} {currency}: {status}</p>
<form method="post"><button name="act" value="approve">Approve</button>
<button name="act" value="decline">Decline</button></form>"""

log = structlog.get_logger()


@dataclass(slots=True)
class Charge:
    """A one-time charge."""

    number: int
    name: str
    amount: str
    currency: str
    test: bool
    return_url: str
    status: str = "PENDING"
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def id(self) -> str:
        """As the GraphQL API writes it."""
        return f"{GID}{self.number}"

    def node(self) -> dict[str, object]:
        """As the GraphQL API shows it."""
        return {
            "__typename": "AppPurchaseOneTime",
            "id": self.id,
            "name": self.name,
            "price": {"amount": self.amount, "currencyCode": self.currency},
            "status": self.status,
            "test": self.test,
            "createdAt": self.created_at.isoformat(),
        }


@dataclass(slots=True)
class DemoShop:
    """A shop that has installed our app."""

    domain: str
    number: int
    access_token: str = field(default_factory=lambda: f"shpat_{secrets.token_hex(16)}", repr=False)
    charges: list[Charge] = field(default_factory=list)

    def page(self, variables: Mapping[str, Any]) -> dict[str, object]:
        """Some of its charges, newest first, as the GraphQL API shows them."""
        begin = int(variables.get("after") or 0)
        end = begin + int(variables["first"])
        newest = sorted(self.charges, key=lambda charge: -charge.number)
        info = {
            "hasNextPage": end < len(newest),
            "hasPreviousPage": begin > 0,
            "endCursor": str(end),
        }
        return {"nodes": [charge.node() for charge in newest[begin:end]], "pageInfo": info}

    def node(self, charge_id: str) -> dict[str, object] | None:
        """One of its charges, as the GraphQL API shows it."""
        return next((one.node() for one in self.charges if one.id == charge_id), None)


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook as it goes over the wire."""

    body: bytes
    headers: Mapping[str, str]


class DemoShopify:
    """The platform; an asynchronous context manager that listens on loopback.

    `webhooks_url` is where it sends webhooks to; None: nowhere. Who knew an earlier one is given
    its `api_secret`, and `numbers_after` that are above all charges which that one made.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        webhooks_url: str | None = None,
        api_secret: str | None = None,
        numbers_after: int = FIRST_CHARGE,
    ) -> None:
        self.api_secret = api_secret or f"shpss_{secrets.token_hex(16)}"
        self.shops: list[DemoShop] = []
        self.webhooks_url = webhooks_url
        self._port = port
        self._numbers = numbers_after
        app = web.Application()
        app.router.add_post("/admin/api/{version}/graphql.json", self._graphql)
        app.router.add_get("/admin/charges/{number}/confirm", self._shown)
        app.router.add_post("/admin/charges/{number}/confirm", self._decided)
        self.add_routes(app)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)

    def add_routes(self, app: web.Application) -> None:
        """For whoever makes more of it."""

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Where it listens: a `base_url` of `ShopifySettings`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def charges(self) -> list[Charge]:
        """All charges, in the order of their making."""
        found = (charge for shop in self.shops for charge in shop.charges)
        return sorted(found, key=lambda charge: charge.number)

    def install(self, domain: str, number: int) -> DemoShop:
        """A shop installs our app, which gets its access token by that."""
        shop = DemoShop(domain, number)
        self.shops.append(shop)
        return shop

    def charge(self, charge_id: str | None) -> Charge:
        """The charge with this id."""
        return next(charge for charge in self.charges if charge.id == charge_id)

    def make(self, shop: DemoShop, variables: Mapping[str, Any]) -> tuple[Charge, str]:
        """Make a charge out of the mutation's arguments; the charge, and where it is paid."""
        self._numbers += 1
        charge = Charge(
            self._numbers,
            variables["name"],
            variables["price"]["amount"],
            variables["price"]["currencyCode"],
            bool(variables.get("test")),
            variables["returnUrl"],
        )
        shop.charges.append(charge)
        signature = secrets.token_urlsafe(16)
        page = f"{self.url}/admin/charges/{charge.number}/confirm?signature={signature}"
        return charge, page

    def execute(
        self, shop: DemoShop, document: str, variables: Mapping[str, Any]
    ) -> dict[str, object]:
        """The answer to a document."""
        if "appPurchaseOneTimeCreate" in document:
            charge, page = self.make(shop, variables)
            made = {
                "appPurchaseOneTime": charge.node(),
                "confirmationUrl": page,
                "userErrors": [],
            }
            return {"data": {"appPurchaseOneTimeCreate": made}}
        if "oneTimePurchases" in document:
            found = {"oneTimePurchases": shop.page(variables)}
            return {"data": {"currentAppInstallation": found}}
        return {"data": {"node": shop.node(variables["id"])}}

    def webhook(self, charge: Charge, status: str | None = None, **changes: Any) -> Webhook:
        """A signed webhook about a charge.

        `changes`: `secret`, `shop_number`, `body`; or headers by their names without `X-Shopify-`.
        """
        shop = next(shop for shop in self.shops if charge in shop.charges)
        number = changes.pop("shop_number", shop.number)
        now = datetime.now(UTC).isoformat()
        said = {
            "app_purchase_one_time": {
                "admin_graphql_api_id": charge.id,
                "name": charge.name,
                "status": status or charge.status,
                "admin_graphql_api_shop_id": f"gid://shopify/Shop/{number}",
                "created_at": charge.created_at.isoformat(),
                "updated_at": now,
            }
        }
        body: bytes = changes.pop("body", orjson.dumps(said))
        secret: str = changes.pop("secret", self.api_secret)
        signature = hmac.digest(secret.encode(), body, "sha256")
        headers = {
            "X-Shopify-Topic": TOPIC,
            "X-Shopify-Hmac-Sha256": base64.b64encode(signature).decode(),
            "X-Shopify-Shop-Domain": shop.domain,
            "X-Shopify-API-Version": API_VERSION,
            "X-Shopify-Webhook-Id": str(uuid4()),
            "X-Shopify-Event-Id": str(uuid4()),
            "X-Shopify-Triggered-At": now,
        }
        headers |= {f"X-Shopify-{name}": value for name, value in changes.items()}
        return Webhook(body, headers)

    async def decide(self, charge: Charge, *, approve: bool) -> None:
        """The merchant approves or declines an open charge; the app hears of it by webhook."""
        if charge.status == "PENDING":
            charge.status = "ACTIVE" if approve else "DECLINED"
        if self.webhooks_url is None:
            return
        told = self.webhook(charge)
        timeout = aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(self.webhooks_url, data=told.body, headers=told.headers) as answer,
            ):
                log.info("demo_webhook_sent", charge=charge.name, status=answer.status)
        except (aiohttp.ClientError, TimeoutError):
            # As at Shopify, where a lost webhook is found by asking.
            log.warning("demo_webhook_lost", charge=charge.name)

    async def _graphql(self, request: web.Request) -> web.StreamResponse:
        shop = self.shop_of(request)
        if shop is None:
            said = "[API] Invalid API key or access token (unrecognized login or wrong password)"
            return as_json({"errors": said}, 401)
        asked: dict[str, Any] = await request.json()
        return as_json(self.execute(shop, asked["query"], asked.get("variables") or {}))

    def shop_of(self, request: web.Request) -> DemoShop | None:
        """The shop whose access token this is."""
        token = request.headers.get("X-Shopify-Access-Token")
        return next((shop for shop in self.shops if shop.access_token == token), None)

    async def _shown(self, request: web.Request) -> web.Response:
        charge = self._charge_at(request)
        page = _PAGE.format(
            name=html.escape(charge.name),
            amount=charge.amount,
            currency=charge.currency,
            status=charge.status,
        )
        return web.Response(text=page, content_type="text/html")

    async def _decided(self, request: web.Request) -> web.Response:
        charge = self._charge_at(request)
        await self.decide(charge, approve=(await request.post()).get("act") == "approve")
        separator = "&" if "?" in charge.return_url else "?"
        raise web.HTTPFound(f"{charge.return_url}{separator}charge_id={charge.number}")

    def _charge_at(self, request: web.Request) -> Charge:
        number = request.match_info["number"]
        for charge in self.charges:
            if str(charge.number) == number:
                return charge
        raise web.HTTPNotFound


def as_json(body: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
