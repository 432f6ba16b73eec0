"""Every route, with every kind of caller, on its own merchant's things and on another's.

The requests come out of the route tables, so that a new route is in here by being there. What is
expected of each is worked out here anew from what the table declares.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final
from uuid import UUID, uuid4

import aiohttp
import jwt
import orjson
import pytest

from device_gateway.terminal_device import Device
from glamd.embedded.settings import jwt_secrets
from glamd.http.detokenizing import DECRYPT_PATH
from glamd.http.openapi import api_routes, worker_routes
from glamd.http.routes import Access, Route
from tests.support.looks import GOOD, Reply, read, tap, taps, worker_named, worker_with
from tests.support.site import DOMAIN, Site

READER: Final = "platform-connector"
STRANGER: Final = "coffee-machine"
SCOPES: Final = " ".join(
    sorted({s for r in (*api_routes(), *worker_routes()) for a in r.access for s in a.scopes})
)
STORED: Final[dict[str, object]] = {
    "platform_name": "shopify",
    "platform_shop_id": "1",
    "token_data": {"access_token": "shpat_0"},
    "token_type": "oauth",
}
BOUGHT: Final[dict[str, object]] = {
    "pack": "small",
    "platform": "custom",
    "return_url": f"https://{DOMAIN}/thanks",
}
NUMBERS: Final = count()
LIST: Final = ("GET", "/api/v1/payment-tokens")


@dataclass(frozen=True, slots=True)
class Shop:
    """A merchant with a thing of every kind."""

    merchant_id: UUID
    domain: str
    token: str
    purchase: str
    device: Device


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody with a header; `kind` None is nobody that the daemon knows."""

    name: str
    header: str | None
    kind: str | None = None
    scopes: frozenset[str] = frozenset()
    service: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class World:
    """A site, a merchant that the callers belong to, and one that they do not."""

    site: Site
    own: Shop
    foreign: Shop

    def callers(self) -> Iterator[Caller]:
        """Everybody who may come to the api listener."""
        made = jwt_secrets(self.site.state_dir)
        client = {"merchant_id": str(self.own.merchant_id), "shop": self.own.domain}
        scopes = frozenset(SCOPES.split())
        yield Caller("nobody", None)
        yield Caller("no JWT", "Bearer ptk_0")
        yield Caller("basic", "Basic Zm9vOmJhcg==")
        yield Caller("forged client", signed(client, "x" * 64))
        yield Caller("expired client", signed(client, made.client, lives_s=-120))
        yield Caller("everlasting client", signed(client, made.client, lives_s=90_000))
        yield Caller("client for others", signed(client | {"aud": "other"}, made.client))
        yield Caller("client", signed(client | {"scope": SCOPES}, made.client), "client", scopes)
        yield Caller("client without scopes", signed(client, made.client), "client")
        for service in (READER, STRANGER):
            claims = {"service": service}
            yield Caller(
                service,
                signed(claims | {"scope": SCOPES}, made.internal),
                "internal",
                scopes,
                service,
            )
            yield Caller(
                f"{service} without scopes",
                signed(claims, made.internal),
                "internal",
                service=service,
            )

    async def ask(self, route: Route, header: str | None, shop: Shop) -> Reply:
        """Call the route about this shop's things."""
        values = {
            "token": shop.token,
            "merchant_id": str(shop.merchant_id),
            "platform": str(STORED["platform_name"]),
            "file": "docs.js",
            "id": shop.purchase,
        }
        query = {} if "merchant_id" in route.names else {"merchant_id": str(shop.merchant_id)}
        return await read(
            await self.site.http.request(
                route.method,
                route.path.format_map(values),
                params=query if (route.method, route.path) == LIST else {},
                json=body_for(route, shop),
                headers={} if header is None else {"Authorization": header},
            )
        )

    async def rows(self) -> list[object]:
        """All that a call could change."""
        tokens = await self.site.database.fetch(
            "SELECT token, status FROM cde.payment_tokens ORDER BY token"
        )
        platforms = await self.site.database.fetch(
            "SELECT merchant_id, generation FROM glam.platform_tokens ORDER BY merchant_id"
        )
        money = [
            await self.site.database.fetch(f"SELECT * FROM glam.{table} ORDER BY 1")
            for table in ("credit_accounts", "billing_records", "credit_purchases", "webhooks")
        ]
        return [tuple(row) for rows in (tokens, platforms, *money) for row in rows]


def signed(claims: dict[str, str], secret: str, *, lives_s: int = 600) -> str:
    now = int(time.time())
    token = jwt.encode({"aud": "glamd", "exp": now + lives_s, **claims}, secret, algorithm="HS256")
    return f"Bearer {token}"


def stored(shop: Shop) -> dict[str, object]:
    return STORED | {"merchant_id": str(shop.merchant_id), "domain": shop.domain}


def body_for(route: Route, shop: Shop) -> dict[str, object] | None:
    """What is sent there about this shop, right in itself."""
    if route.method != "POST":
        return None
    if route.path in ("/api/credits/consume", "/api/credits/grant"):
        return {
            "merchant_id": str(shop.merchant_id),
            "amount": 1,
            "reference_type": "test",
            "reference_id": str(next(NUMBERS)),
        }
    if route.path == "/api/billing/purchases":
        return {**BOUGHT}
    if route.path == LIST[1]:
        return {**orjson.loads(taps(shop.device)), "device_id": shop.device.device_id}
    return stored(shop) if route.path == "/api/v1/tokens" else {}


def expected(route: Route, caller: Caller, *, own: bool) -> tuple[int, str]:
    """What the table means, said a second time."""
    assert route.operation is not None
    good = (route.operation.status, "ok")
    if route.path.startswith("/webhooks/"):
        return 401, "UNAUTHENTICATED"  # nobody's signature is there
    if not route.access or caller.kind is None:
        return (401, "UNAUTHENTICATED") if route.access else good
    fitting: list[Access] = [each for each in route.access if each.kind == caller.kind]
    if not fitting or not fitting[0].scopes <= caller.scopes:
        return 403, "FORBIDDEN"
    if fitting[0].services is not None and caller.service not in fitting[0].services:
        return 403, "SERVICE_NOT_ALLOWED"
    if own or fitting[0].owner == "any":
        return good
    return not_there(route, good)


def not_there(route: Route, good: tuple[int, str]) -> tuple[int, str]:
    """The answer about what belongs to another merchant."""
    if route.path == "/api/v1/tokens":
        return 401, "DOMAIN_MISMATCH"
    codes = {"token": "TOKEN_NOT_FOUND", "id": "PURCHASE_NOT_FOUND", "merchant_id": "NOT_FOUND"}
    told = [code for name, code in codes.items() if name in route.names]
    if (route.method, route.path) == LIST:
        told = ["NOT_FOUND"]
    # Where no merchant is named the caller's own is meant.
    return (404, told[0]) if told else good


@pytest.fixture
async def world(site: Site) -> World:
    """Two merchants, each with a payment token, a platform token, credits and a purchase."""
    other = uuid4()
    await site.daemon.onboarding.create(
        platform="custom", shop_id="2", domain="other.example", merchant_id=other
    )
    shops = []
    secret = jwt_secrets(site.state_dir).client
    for merchant_id, domain in ((site.merchant_id, DOMAIN), (other, "other.example")):
        device = await site.enroll(merchant_id=merchant_id)
        token = await tap(site, device)
        claims = {"merchant_id": str(merchant_id), "shop": domain, "scope": SCOPES}
        header = signed(claims, secret)
        bought = BOUGHT | {"return_url": f"https://{domain}/"}
        async with site.http.post(
            "/api/billing/purchases", json=bought, headers={"Authorization": header}
        ) as answer:
            assert answer.status == 201, await answer.text()
            purchase = (await answer.json())["data"]["purchase_id"]
            shop = Shop(merchant_id, domain, token, purchase, device)
        granted = {"merchant_id": str(merchant_id), "amount": 100, "reference_type": "test"}
        async with site.http.post(
            "/api/credits/grant",
            json=granted | {"reference_id": "first"},
            headers=site.internal("credits:write"),
        ) as answer:
            assert answer.status == 200, await answer.text()
        async with site.http.post(
            "/api/v1/tokens", json=stored(shop), headers={"Authorization": header}
        ) as answer:
            assert answer.status == 201, await answer.text()
        shops.append(shop)
    return World(site, *shops)


async def test_every_route_answers_every_caller_as_the_table_says(world: World) -> None:
    cases = [
        (route, caller, shop, expected(route, caller, own=shop is world.own))
        for route in api_routes()
        for caller in world.callers()
        for shop in (world.own, world.foreign)
    ]
    refused = [case for case in cases if case[3][0] >= 400]
    allowed = [case for case in cases if case[3][0] < 400]
    assert len(refused) > 100
    before = await world.rows()
    wrong = []
    for route, caller, shop, should in refused:
        found = (await world.ask(route, caller.header, shop)).outcome
        if found != should:
            wrong.append((route.method, route.path, str(caller), shop.domain, found, should))
    assert not wrong
    assert await world.rows() == before, "a refused call must change nothing"
    # What takes away comes last.
    begun = False
    for route, caller, shop, should in sorted(allowed, key=lambda case: case[0].method == "DELETE"):
        if (route.method, route.path) == ("POST", "/api/billing/trials"):
            # It is the caller's own both times, and a merchant has one.
            should, begun = (409, "TRIAL_ALREADY_USED") if begun else should, True  # noqa: PLW2901
        found = (await world.ask(route, caller.header, shop)).outcome
        if found != should:
            wrong.append((route.method, route.path, str(caller), shop.domain, found, should))
    assert not wrong


async def test_another_merchants_token_and_an_unknown_one_are_answered_alike(world: World) -> None:
    header = world.site.client()["Authorization"]
    own = world.own.device
    unknown = Shop(uuid4(), "nowhere.example", "ptk_" + "0" * 26, str(uuid4()), own)
    for route in api_routes():
        if not any(each.kind == "client" for each in route.access) or route.method == "POST":
            continue
        answers = []
        for shop in (world.foreign, unknown):
            body = (await world.ask(route, header, shop)).json
            answers.append({name: body[name] for name in body if name != "meta"})
        assert answers[0] == answers[1], route.path


async def test_the_workers_listener_is_for_whom_the_table_says(world: World) -> None:
    async with worker_with(world.site, None) as session:
        for route in worker_routes():
            with pytest.raises(aiohttp.ClientError):
                await on_workers_listener(world, session, route)
    device = world.own.device
    async with worker_with(world.site, device.cert, device.key) as session:
        for route in worker_routes():
            reply = await on_workers_listener(world, session, route)
            assert reply.status == status_for(route, "device"), (route.path, reply.body)
    for name in ("worker/coffee-machine", "service/worker"):
        async with worker_named(world.site, f"spiffe://glamd/{name}") as session:
            for route in worker_routes():
                reply = await on_workers_listener(world, session, route)
                assert reply.status == (200 if route.public else 403), (name, route.path)
    for route in worker_routes():
        reply = await on_workers_listener(world, world.site.worker, route)
        assert reply.status == status_for(route, "worker"), (route.path, reply.body)


def status_for(route: Route, kind: str) -> int:
    """What a good request of somebody of this kind gets there."""
    assert route.operation is not None
    fits = route.public or any(each.kind == kind for each in route.access)
    return route.operation.status if fits else 403


async def on_workers_listener(world: World, session: aiohttp.ClientSession, route: Route) -> Reply:
    """Call a route there, with a JWT that means nothing there."""
    body = body_for(route, world.own)
    if route.path == DECRYPT_PATH:
        body = dict(GOOD)
    return await read(
        await session.request(
            route.method,
            route.path.format(token=world.own.token),
            json=body,
            headers=world.site.client(),
        )
    )
