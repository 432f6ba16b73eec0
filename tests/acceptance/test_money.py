"""A merchant's money through a whole daemon: over HTTP, NATS and a shop platform, on real wires.

What each room does in which case is tried there. Here it is that they are put together rightly: an
event that comes in has its effect, each effect its event, and none of it depends on NATS.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import orjson
import pytest
from nats.aio.client import Client

from glamd.db import Database
from tests.support.looks import tap
from tests.support.nats import NatsServer, Stored, delete_stream, nats_client, stored
from tests.support.postgres import eventually
from tests.support.shopify import ShopifyStandIn
from tests.support.site import NOBODY, Site, running_site

TIMEOUT_S = 20.0
SHOP = "money-shop.myshopify.com"


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client of the test's own, on a server without a stream."""
    async with nats_client(nats_server.url) as client:
        await delete_stream(client)
        yield client


async def publish(client: Client, subject: str, data: Mapping[str, object]) -> None:
    """An event as another service sends it: flat, stored by JetStream when this returns."""
    await client.jetstream().publish(subject, orjson.dumps(dict(data)))


async def balance(site: Site, merchant_id: UUID) -> int | None:
    """What the merchant's back end is told; None where there is no account."""
    async with site.http.get("/api/credits", headers=site.client(merchant_id)) as answer:
        return int((await answer.json())["data"]["balance"]) if answer.status == 200 else None


async def published(client: Client, *, of: UUID) -> list[Stored]:
    """glamd's own events about the merchant, in the stream's order."""
    found = await stored(client)
    return [each for each in found if "ce-id" in each.headers and each.merchant_id == str(of)]


async def unsent(database: Database) -> int:
    """Rows of both outboxes that JetStream has not acknowledged."""
    rows: int = await database.fetchval(
        "SELECT (SELECT count(*) FROM glam.outbox WHERE published_at IS NULL)"
        " + (SELECT count(*) FROM cde.outbox WHERE published_at IS NULL)"
    )
    return rows


async def created(site: Site, client: Client) -> UUID:
    """A merchant that glamd hears of by its event."""
    merchant_id = uuid4()
    told = {"merchant_id": str(merchant_id), "platform_name": "shopify", "shop_domain": SHOP}
    await publish(client, "evt.merchant.created.v1", told | {"shop_gid": "gid://shopify/Shop/7"})

    async def is_there() -> bool:
        return await balance(site, merchant_id) == 0

    await eventually(is_there, timeout_s=TIMEOUT_S)
    return merchant_id


@asynccontextmanager
async def selling(
    state_dir: Path, database_url: str, nats_url: str
) -> AsyncIterator[tuple[Site, ShopifyStandIn]]:
    """A site whose merchants buy at a stand-in."""
    async with ShopifyStandIn() as shopify:
        app = {"api_key": "app", "api_secrets": [shopify.api_secret], "base_url": shopify.url}
        changes = {"shopify": app}
        async with running_site(
            state_dir, database_url, nats_url=nats_url, changes=changes
        ) as site:
            shopify.webhooks_url = f"http://127.0.0.1:{site.daemon.http_port}/webhooks/shopify"
            yield site, shopify


async def test_a_merchant_comes_tries_buys_and_uses_up_what_it_has(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client
) -> None:
    async with selling(state_dir, database_url, nats_server.url) as (site, shopify):
        merchant_id = await created(site, bus)
        headers = _client(site, merchant_id)
        await _post(site, "/api/billing/trials", None, headers, 201)
        assert await balance(site, merchant_id) == 500

        shop = shopify.install(SHOP, 7)
        token = {
            "merchant_id": str(merchant_id),
            "platform_name": "shopify",
            "platform_shop_id": "7",
            "domain": SHOP,
            "token_data": {"access_token": shop.access_token},
            "token_type": "oauth",
        }
        await _post(site, "/api/v1/tokens", token, headers, 201)
        wanted = {"pack": "small", "platform": "shopify", "return_url": f"https://{SHOP}/back"}
        begun = await _post(site, "/api/billing/purchases", wanted, headers, 201)
        async with aiohttp.ClientSession() as browser:
            await browser.post(
                begun["checkout_url"], data={"act": "approve"}, allow_redirects=False
            )

        async def is_paid() -> bool:
            return await balance(site, merchant_id) == 600

        await eventually(is_paid, timeout_s=TIMEOUT_S)
        path = f"/api/billing/purchases/{begun['purchase_id']}"
        async with site.http.get(path, headers=headers) as answer:
            bought = (await answer.json())["data"]
        assert (bought["status"], bought["amount"]) == ("completed", "9.99")

        # One more than it can pay, and each of the first ten twice.
        for number in (*range(601), *range(10)):
            match = {
                "merchant_id": str(merchant_id),
                "match_id": f"m-{number}",
                "shopper_id": "s",
                "matched_items_count": 2,
            }
            await publish(bus, "evt.ai.match.completed.v1", match)

        async def is_told() -> bool:
            found = await published(bus, of=merchant_id)
            return any(each.subject == "evt.credits.insufficient.v1" for each in found)

        await eventually(is_told, timeout_s=TIMEOUT_S)
        assert await balance(site, merchant_id) == 0

        events = await published(bus, of=merchant_id)
        told = [each.subject.split(".", 1)[1] for each in events]
        assert sorted(told[:2]) == ["billing.trial.started.v1", "credits.granted.v1"]
        assert sorted(told[2:4]) == ["billing.credits.purchased.v1", "credits.granted.v1"]
        assert told.count("credits.consumed.v1") == 600
        after = [
            each.content["data"]["balance"]
            for each in events
            if each.subject == "evt.credits.consumed.v1"
        ]
        assert after == list(range(599, -1, -1)), "in order, each once"
        low = told.index("credits.low_balance.v1")
        assert told.count("credits.low_balance.v1") == told.count("credits.exhausted.v1") == 1
        assert events[low].content["data"] == {
            "merchant_id": str(merchant_id),
            "balance": 99,
            "threshold": 100,
            "platform_name": "shopify",
        }
        assert len({each.headers["Nats-Msg-Id"] for each in events}) == len(events)
        assert not await site.database.fetchval("SELECT count(*) FROM glam.dead_letters")
        for secret in shopify.secrets:
            assert not any(secret.encode() in each.body for each in events)


async def test_taps_and_terminals_are_told_of_without_a_card(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client
) -> None:
    async with running_site(state_dir, database_url, nats_url=nats_server.url) as site:
        device = await site.enroll()
        token = await tap(site, device)
        path = f"/api/v1/payment-tokens/{token}"
        async with site.http.delete(path, headers=site.client()) as answer:
            assert answer.status == 200

        async def is_told() -> dict[str, Stored]:
            found = {each.subject: each for each in await published(bus, of=site.merchant_id)}
            return found if "evt.payment.token.revoked.v1" in found else {}

        found = await eventually(is_told, timeout_s=TIMEOUT_S)
        data = found["evt.payment.token.created.v1"].content["data"]
        assert data == {
            "merchant_id": str(site.merchant_id),
            "token": token,
            "device_id": device.device_id,
            "brand": "visa",
            "last4": "4242",
        }
        enrolled = found["evt.device.enrolled.v1"].content["data"]
        assert enrolled.keys() == {"merchant_id", "device_id", "at"}
        assert not any(b"4242424242424242" in each.body for each in found.values())


async def test_without_nats_money_moves_and_its_events_come_later(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client
) -> None:
    async with running_site(state_dir, database_url, nats_url=NOBODY) as site:
        async with site.http.get("/readyz") as ready:
            assert ready.status == 200
            assert "nats" in (await ready.json())["data"]["degraded"]
        for number in range(3):
            await _grant(site, number)
        assert await balance(site, site.merchant_id) == 30
        assert await unsent(site.database) == 3
    async with running_site(state_dir, database_url, nats_url=nats_server.url) as site:

        async def is_sent() -> bool:
            return await unsent(site.database) == 0

        await eventually(is_sent, timeout_s=TIMEOUT_S)
        granted = await published(bus, of=site.merchant_id)
        assert [each.content["data"]["balance"] for each in granted] == [10, 20, 30]


async def test_a_drain_sends_what_was_committed_before_it(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client, database: Database
) -> None:
    async with running_site(
        state_dir,
        database_url,
        nats_url=nats_server.url,
        # Only what is woken is sent before the drain.
        changes={"events": {"servers": [nats_server.url], "poll_s": 60}},
    ) as site:
        await asyncio.gather(*(_grant(site, number) for number in range(50)))
        merchant_id = site.merchant_id
    assert await unsent(database) == 0
    assert len(await published(bus, of=merchant_id)) == 50


async def test_what_comes_for_an_unknown_merchant_waits_for_it(
    state_dir: Path, database_url: str, nats_server: NatsServer, bus: Client
) -> None:
    async with running_site(state_dir, database_url, nats_url=nats_server.url) as site:
        merchant_id = str(uuid4())
        bought = {"merchant_id": merchant_id, "purchase_id": "p-1", "credits": 7}
        await publish(bus, "evt.billing.credits.purchased.v1", bought)

        async def is_retried() -> bool:
            info = await bus.jsm().consumer_info(
                "GLAM_EVENTS", "glamd-evt-billing-credits-purchased-v1"
            )
            return bool(info.num_ack_pending)

        await eventually(is_retried, timeout_s=TIMEOUT_S)
        shop = {"platform": "custom", "shop_id": "77", "domain": "late.example"}
        async with site.admin.post("/v1/merchants", json=shop | {"merchant_id": merchant_id}) as r:
            assert r.status == 201, await r.text()

        async def is_granted() -> bool:
            return await balance(site, UUID(merchant_id)) == 7

        await eventually(is_granted, timeout_s=TIMEOUT_S)


def _client(site: Site, merchant_id: UUID) -> dict[str, str]:
    token = site.mint.client(merchant_id=str(merchant_id), shop=SHOP, scope="bff:call")
    return {"Authorization": f"Bearer {token}"}


async def _post(
    site: Site, path: str, body: object, headers: dict[str, str], status: int
) -> dict[str, Any]:
    async with site.http.post(path, json=body, headers=headers) as answer:
        told = await answer.json()
        assert answer.status == status, told
        data: dict[str, Any] = told["data"]
        return data


async def _grant(site: Site, number: int) -> None:
    body = {
        "merchant_id": str(site.merchant_id),
        "amount": 10,
        "reference_type": "test",
        "reference_id": str(number),
    }
    await _post(site, "/api/credits/grant", body, site.internal("credits:write"), 200)
