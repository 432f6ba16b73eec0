"""Somebody who wants another merchant's money, or money twice, or the books in disorder.

A whole daemon on real wires, as in `test_money`. What each room refuses by itself is tried there;
here it is what gets past one room and has to be stopped by the next.
"""

import asyncio
import base64
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from nats.aio.client import Client

from tests.support.nats import NatsServer, delete_stream, nats_client
from tests.support.postgres import eventually
from tests.support.site import DOMAIN, SHOPIFY_SECRET, Site, running_site

TIMEOUT_S = 20.0
VICTIM = "kilo.example"
CHARGE = "gid://shopify/AppPurchaseOneTime/77"
MATCH = "evt.ai.match.completed.v1"


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of the test's own, on a server without a stream."""
    async with nats_client(nats_server.url) as client:
        await delete_stream(client)
        yield client


async def victim(site: Site) -> UUID:
    """Another merchant, with 77 credits."""
    made = await site.daemon.onboarding.create(platform="custom", shop_id="2", domain=VICTIM)
    assert (await grant(site, made.merchant_id, 77, "first"))[0] == 200
    return made.merchant_id


async def grant(site: Site, merchant_id: UUID, amount: int, reference: str) -> tuple[int, Any]:
    """What the daemon says to a grant."""
    return await move(site, "grant", merchant_id, amount, reference)


async def move(
    site: Site, what: str, merchant_id: UUID, amount: int, reference: str, kind: str = "t"
) -> tuple[int, Any]:
    """What the daemon says to another service that moves credits."""
    body = {"merchant_id": str(merchant_id), "amount": amount}
    body |= {"reference_type": kind, "reference_id": reference}
    headers = site.internal("credits:write")
    async with site.http.post(f"/api/credits/{what}", json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def seen(site: Site, path: str, *headers: tuple[str, str], **claims: Any) -> tuple[int, Any]:
    """What a client with this token and these headers is told."""
    token = site.mint.client(scope="bff:call", **claims)
    every = [("Authorization", f"Bearer {token}"), *headers]
    async with site.http.get(path, headers=every) as answer:
        return answer.status, await answer.json()


async def balance(site: Site, merchant_id: UUID) -> int:
    """What the database holds for the merchant."""
    sql = "SELECT balance FROM glam.credit_accounts WHERE merchant_id = $1"
    found: int = await site.database.fetchval(sql, merchant_id)
    return found


async def books_are_right(site: Site) -> bool:
    """What `glamctl ledger verify` finds."""
    async with site.admin.post("/v1/ledger/verify", json={}) as answer:
        return bool((await answer.json())["ok"])


async def test_nobody_gets_at_another_shops_credits_by_its_name(site: Site) -> None:
    await victim(site)
    shop = "X-Shop-Domain"
    for path in ("/api/credits", "/api/credits/transactions"):
        nobody: dict[str, Any] = {"merchant_id": str(uuid4()), "shop": DOMAIN}
        for headers in (
            [(shop, VICTIM)],
            [(shop, DOMAIN), (shop, VICTIM)],
            [(shop, VICTIM), (shop, DOMAIN)],
            [(shop, f"{DOMAIN}, {VICTIM}")],
            [(shop, "\u212ailo.example")],
            [(shop, f"{VICTIM}.")],
            [(shop, f"{VICTIM}:443")],
            [("X-Forwarded-Host", VICTIM), ("Forwarded", f"host={VICTIM}")],
        ):
            status, told = await seen(site, path, *headers, **nobody)
            assert (status, told["code"]) == (404, "CREDIT_ACCOUNT_NOT_FOUND"), headers
        # A name that becomes the victim's in lower case, or with what parsers leave out.
        for domain in ("\u212ailo.example", f"{VICTIM}.", f" {VICTIM}", f"{VICTIM}, {DOMAIN}"):
            claims = nobody | {"shop": domain}
            status, _ = await seen(site, path, (shop, VICTIM), **claims)
            assert status in {401, 404}, domain
        # Whoever has an account sees that one, whatever they name.
        own = {"merchant_id": str(site.merchant_id), "shop": DOMAIN}
        status, told = await seen(site, path, (shop, VICTIM), **own)
        assert status == 200
        assert VICTIM not in str(told["data"])


async def test_a_webhook_again_under_other_names_is_no_second_payment(site: Site) -> None:
    purchase_id = await _bought(site)
    body = _paid(status="ACTIVE")
    for names in ({}, {"X-Shopify-Webhook-Id": "a"}, {"X-Shopify-Webhook-Id": "b"}):
        for topic in ("app_purchases_one_time/update", "App_Purchases_One_Time/UPDATE"):
            assert await _hook(site, body, {**names, "X-Shopify-Topic": topic}) == 200
    # Signed, and for another shop; for a charge that nobody has; a body that says nothing.
    for wrong in (_paid(shop=2), _paid(charge=f"{CHARGE}8"), b"{}", b"[]", b"\xff", b""):
        headers = {"X-Shopify-Topic": "app_purchases_one_time/update"}
        assert await _hook(site, wrong, headers) == 200
    stored = await site.database.fetchval("SELECT count(*) FROM glam.webhooks")
    for forged in ("", "AAAA", _signed(b"", body), _signed(b"\0", body), "\u00e9", "=" * 5000):
        assert await _hook(site, body, {}, signature=forged) == 401
    assert await _hook(site, b"x" * 300_000, {}) == 413
    assert await site.database.fetchval("SELECT count(*) FROM glam.webhooks") == stored

    async def is_paid() -> bool:
        return await balance(site, site.merchant_id) == 100

    await eventually(is_paid, timeout_s=TIMEOUT_S)
    waiting = "SELECT count(*) FROM glam.webhooks WHERE outcome IS NULL"

    async def is_done() -> bool:
        return bool(await site.database.fetchval(waiting) == 1)  # that of the unknown charge

    await eventually(is_done, timeout_s=TIMEOUT_S)
    assert await is_paid()
    path = f"/api/billing/purchases/{purchase_id}"
    claims = {"merchant_id": str(uuid4()), "shop": DOMAIN}
    assert (await seen(site, path, **claims))[1]["code"] == "PURCHASE_NOT_FOUND"
    assert await books_are_right(site)


async def test_events_take_over_no_merchant_and_no_charge_and_no_reference_twice(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client
) -> None:
    async with running_site(state_dir, database_url, nats_url=nats_server.url) as site:
        attacked = await victim(site)
        await _bought(site)
        shop = {"platform": "custom", "shop_domain": VICTIM, "shop_gid": "2"}
        charge = {"charge_id": CHARGE, "status": "accepted", "merchant_id": str(attacked)}
        dead: list[tuple[str, dict[str, Any]]] = [
            ("evt.merchant.created.v1", shop | {"merchant_id": str(uuid4())}),
            ("evt.merchant.created.v1", shop | {"merchant_id": str(site.merchant_id)}),
            (
                "evt.merchant.created.v1",
                shop | {"merchant_id": str(attacked), "platform": "shopify"},
            ),
            (
                "evt.merchant.created.v1",
                shop
                | {"merchant_id": str(uuid4()), "shop_gid": "9", "shop_domain": "KILO.example"},
            ),
            ("evt.webhook.app.purchase_updated.v1", charge),
        ]
        for subject, told in dead:
            await publish(bus, subject, told)
        # A trial without an end, as some languages write it.
        endless = {"merchant_id": str(attacked), "ends_at": "9999-12-31T23:59:59.999999Z"}
        await publish(bus, "evt.billing.trial.started.v1", endless)

        async def is_buried() -> bool:
            sql = "SELECT count(*) FROM glam.dead_letters"
            return bool(await site.database.fetchval(sql) == len(dead))

        await eventually(is_buried, timeout_s=TIMEOUT_S)

        async def has_trial() -> bool:
            return await balance(site, attacked) == 577

        await eventually(has_trial, timeout_s=TIMEOUT_S)
        for path in ("/api/billing", "/api/billing/trials"):
            status, _ = await seen(site, path, merchant_id=str(attacked), shop=VICTIM)
            assert status == 200
        assert await balance(site, site.merchant_id) == 0
        await _one_reference(site, bus, attacked)
        assert await books_are_right(site)


async def _one_reference(site: Site, bus: Client, merchant_id: UUID) -> None:
    """The same reference over both transports and both operations at once: one effect."""
    event: dict[str, object] = {"merchant_id": str(merchant_id), "match_id": "m"}
    event |= {"shopper_id": "s", "matched_items_count": 1}
    asks: list[Callable[[], Awaitable[Any]]] = [
        lambda: move(site, "consume", merchant_id, 1, "m", "match"),
        lambda: move(site, "grant", merchant_id, 1, "m", "match"),
        lambda: move(site, "consume", merchant_id, 2, "m", "match"),
        lambda: publish(bus, MATCH, event | {"event_id": str(uuid4())}),
    ]
    before = await balance(site, merchant_id)
    answers = await asyncio.gather(*(ask() for _ in range(10) for ask in asks))
    told = Counter(answer[0] for answer in answers if answer is not None)
    # Whichever was first, those who asked for the same are told of it, and nobody else.
    assert told == {200: 10, 409: 20}
    assert abs(await balance(site, merchant_id) - before) in (1, 2)
    sql = "SELECT count(*) FROM glam.credit_transactions WHERE reference_type = 'match'"
    assert await site.database.fetchval(sql) == 1


async def publish(client: Client, subject: str, data: Mapping[str, object]) -> None:
    """An event of whoever may publish, stored by JetStream when this returns."""
    await client.jetstream().publish(subject, orjson.dumps(dict(data)))


async def _bought(site: Site) -> str:
    """The site's merchant has begun to buy a small pack, at Shopify with a known charge."""
    wanted = {"pack": "small", "platform": "custom", "return_url": f"https://{DOMAIN}/"}
    async with site.http.post(
        "/api/billing/purchases", json=wanted, headers=site.client()
    ) as answer:
        assert answer.status == 201, await answer.text()
        purchase_id: str = (await answer.json())["data"]["purchase_id"]
    await site.database.execute(
        "UPDATE glam.credit_purchases SET platform = 'shopify', platform_charge_id = $2"
        " WHERE purchase_id = $1",
        UUID(purchase_id),
        CHARGE,
    )
    return purchase_id


def _paid(*, status: str = "ACTIVE", shop: int = 1, charge: str = CHARGE) -> bytes:
    told = {"admin_graphql_api_id": charge, "status": status}
    told["admin_graphql_api_shop_id"] = f"gid://shopify/Shop/{shop}"
    return orjson.dumps({"app_purchase_one_time": told})


def _signed(secret: bytes, body: bytes) -> str:
    return base64.b64encode(hmac.digest(secret, body, "sha256")).decode()


async def _hook(
    site: Site, body: bytes, headers: Mapping[str, str], signature: str | None = None
) -> int:
    if signature is None:
        signature = _signed(SHOPIFY_SECRET.encode(), body)
    every = {**headers, "X-Shopify-Hmac-Sha256": signature}
    async with site.http.post("/webhooks/shopify", data=body, headers=every) as answer:
        return answer.status
