"""`/webhooks/…` over real sockets: who is believed, and what is kept before the 200."""

import gzip
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import pytest

from glamd.billing.model import Purchase
from glamd.billing.platforms.custom import sign_callback
from glamd.billing.webhooks.service import Webhooks
from glamd.embedded.demo_shopify import Webhook
from glamd.http.limits import RateLimiter
from glamd.http.webhooks import WebhookRoutes
from tests.support.billing_world import CUSTOM_SECRET, OLD_API_SECRET, Node
from tests.support.billing_world import World as BillingWorld
from tests.support.database_proxy import DatabaseProxy
from tests.support.http_fakes import Reply, Wire, client_jwt, connected
from tests.support.http_world import World
from tests.support.money_world import api, ask, examples_fit, refusal

SHOPIFY = "/webhooks/shopify"
CUSTOM = "/webhooks/custom"
JSON = {"Content-Type": "application/json"}


@dataclass(slots=True)
class Post:
    """A listener with these routes, and what stands behind them."""

    world: World
    billing: BillingWorld
    node: Node
    wire: Wire

    async def send(self, webhook: Webhook, **changes: str) -> Reply:
        """Deliver one of Shopify's."""
        return await ask(
            self.wire,
            "POST",
            SHOPIFY,
            sent=webhook.body,
            headers={**JSON, **webhook.headers, **changes},
        )

    async def bought(self, **changes: Any) -> tuple[UUID, Purchase]:
        """A merchant with a purchase that waits for its money."""
        merchant_id = await self.billing.merchant()
        return merchant_id, await self.node.buy(merchant_id, **changes)


@pytest.fixture
async def billing(module_database_url: str) -> AsyncIterator[BillingWorld]:
    """Shopify and an empty database."""
    async with BillingWorld.make(module_database_url) as made:
        yield made


def routes(world: World, webhooks: Webhooks, limiter: RateLimiter | None = None) -> WebhookRoutes:
    """The routes, as the listener's own limiter and drain have them."""
    return WebhookRoutes(
        webhooks, limiter=limiter or world.limiter(), draining=lambda: world.draining
    )


@pytest.fixture
async def post(world: World, billing: BillingWorld) -> AsyncIterator[Post]:
    """A listener, and a connection to it."""
    async with (
        billing.node() as node,
        api(world, routes(world, node.webhooks).routes()) as port,
        connected(port) as wire,
    ):
        yield Post(world, billing, node, wire)


# ---- who is believed


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": "shpss_unknown"},
        {"Hmac-Sha256": ""},
        {"Hmac-Sha256": "bm90IGEgc2lnbmF0dXJl"},
        {"Hmac-Sha256": "%%%"},
    ],
)
async def test_a_wrong_signature_is_401_and_nothing_is_kept(
    post: Post, changes: dict[str, str]
) -> None:
    merchant_id, purchase = await post.bought()
    webhook = post.billing.shopify.webhook(post.billing.paid(purchase), **changes)
    reply = await post.send(webhook)
    assert refusal(reply) == (401, "UNAUTHENTICATED", [])
    assert await post.billing.outcomes() == []
    assert await post.billing.balance(merchant_id) == 0


async def test_a_byte_that_was_changed_or_a_bearer_token_is_no_signature(post: Post) -> None:
    _, purchase = await post.bought()
    webhook = post.billing.shopify.webhook(post.billing.paid(purchase))
    changed = Webhook(webhook.body.replace(b"PENDING", b"ACTIVE") + b" ", webhook.headers)
    assert (await post.send(changed)).status == 401
    for path in (SHOPIFY, CUSTOM):
        reply = await ask(post.wire, "POST", path, client_jwt(), {"status": "ACTIVE"})
        assert refusal(reply) == (401, "UNAUTHENTICATED", [])
        assert (await ask(post.wire, "POST", path)).status == 401
        assert (await ask(post.wire, "GET", path)).status == 405
    assert await post.billing.outcomes() == []


async def test_a_platform_that_is_not_configured_is_not_there(
    world: World, billing: BillingWorld
) -> None:
    async with billing.node() as node:
        nobody = Webhooks(
            node.database,
            settlement=node.billing.settlement,
            platforms=(),
            clock=billing.clock,
        )
        async with (
            api(world, routes(world, nobody).routes()) as port,
            connected(port) as wire,
        ):
            for path in (SHOPIFY, CUSTOM):
                assert refusal(await ask(wire, "POST", path)) == (404, "NOT_FOUND", [])


# ---- what is not taken


async def test_a_body_beyond_the_limit_or_compressed_is_refused(post: Post) -> None:
    _, purchase = await post.bought()
    charge = post.billing.paid(purchase)
    compressed = post.billing.shopify.webhook(charge, body=gzip.compress(b"{}"))
    reply = await post.send(compressed, **{"Content-Encoding": "gzip"})
    assert refusal(reply) == (415, "UNSUPPORTED_MEDIA_TYPE", [])
    large = post.billing.shopify.webhook(charge, body=b" " * (256 * 1024 + 1))
    await post.wire.send(
        f"POST {SHOPIFY} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(large.body)}\r\n\r\n".encode()
    )
    assert refusal(await post.wire.reply()) == (413, "BODY_TOO_LARGE", [])
    assert await post.billing.outcomes() == []


async def test_an_address_is_held_to_its_rate_which_is_not_that_of_those_who_guess(
    world: World, billing: BillingWorld
) -> None:
    limiter = RateLimiter(rate_per_s=0.5, burst=2, clock=world.clock)
    async with billing.node() as node:
        made = routes(world, node.webhooks, limiter).routes()
        webhook = billing.shopify.webhook(billing.paid(await node.buy(await billing.merchant())))
        while not limiter.take("ip:127.0.0.1"):
            pass
        async with api(world, made) as port, connected(port) as wire:
            sent: Any = {"sent": webhook.body, "headers": {**JSON, **webhook.headers}}
            replies = [await ask(wire, "POST", SHOPIFY, **sent) for _ in range(3)]
            assert [each.status for each in replies] == [200, 200, 429]
            assert replies[2].headers["retry-after"] == "2"
            world.clock.advance(2)
            assert (await ask(wire, "POST", SHOPIFY, **sent)).status == 200


async def test_while_the_daemon_drains_or_its_database_is_away_there_is_no_200(
    world: World, billing: BillingWorld
) -> None:
    async with DatabaseProxy(billing.url) as proxy, billing.node(url=proxy.url) as node:
        webhook = billing.shopify.webhook(billing.paid(await node.buy(await billing.merchant())))
        made = routes(world, node.webhooks).routes()
        async with api(world, made) as port, connected(port) as wire:
            sent: Any = {"sent": webhook.body, "headers": {**JSON, **webhook.headers}}
            world.draining = True
            assert refusal(await ask(wire, "POST", SHOPIFY, **sent)) == (503, "UNAVAILABLE", [])
            world.draining = False
            proxy.go_down()
            away = await ask(wire, "POST", SHOPIFY, **sent)
            assert refusal(away) == (503, "UNAVAILABLE", [])
            assert int(away.headers["retry-after"]) >= 1
    assert await billing.outcomes() == []


# ---- what is


async def test_a_webhook_is_kept_to_the_byte_when_it_is_answered_and_once_when_repeated(
    post: Post,
) -> None:
    merchant_id, purchase = await post.bought()
    webhook = post.billing.shopify.webhook(post.billing.paid(purchase), secret=OLD_API_SECRET)
    for _ in range(2):
        reply = await post.send(webhook)
        assert (reply.status, reply.json["data"]) == (200, {"status": "stored"})
        assert await post.billing.outcomes() == [None]
    kept = await post.billing.database.fetchval("SELECT body FROM glam.webhooks")
    assert kept == webhook.body
    assert post.node.webhooks.arrived.is_set()
    await post.node.webhooks.apply_due()
    await post.send(webhook)
    await post.node.webhooks.apply_due()
    assert await post.billing.outcomes() == ["completed"]
    assert await post.billing.balance(merchant_id) == 500


async def test_a_signed_body_that_is_no_json_is_kept_and_answered_all_the_same(post: Post) -> None:
    _, purchase = await post.bought()
    webhook = post.billing.shopify.webhook(post.billing.paid(purchase), body=b"\xff\x00 no JSON")
    assert (await post.send(webhook, **{"Content-Type": "text/plain"})).status == 200
    await post.node.webhooks.apply_due()
    assert await post.billing.outcomes() == ["validation_error"]


@pytest.mark.parametrize(
    ("age_s", "nonce", "secret", "status"),
    [
        (301, "n" * 16, CUSTOM_SECRET, 401),
        (-301, "n" * 16, CUSTOM_SECRET, 401),
        (0, "n" * 15, CUSTOM_SECRET, 401),
        (0, "n" * 16, "another secret of thirty-two chars", 401),
        (0, "n" * 16, CUSTOM_SECRET, 200),
    ],
)
async def test_a_callback_is_taken_where_its_signature_is_right_and_young(
    post: Post, age_s: int, nonce: str, secret: str, status: int
) -> None:
    merchant_id, purchase = await post.bought(platform="custom")
    body = orjson.dumps(
        {
            "charge_id": purchase.platform_charge_id,
            "merchant_id": str(merchant_id),
            "status": "active",
            "amount": "39.99",
            "currency": "USD",
            "test": False,
        }
    )
    timestamp = str(int(post.billing.clock.now().timestamp()) - age_s)
    headers = {
        "X-Glamd-Timestamp": timestamp,
        "X-Glamd-Nonce": nonce,
        "X-Glamd-Signature": sign_callback(secret, timestamp, nonce, body),
    }
    reply = await ask(post.wire, "POST", CUSTOM, sent=body, headers=JSON | headers)
    assert reply.status == status
    await post.node.webhooks.apply_due()
    assert await post.billing.balance(merchant_id) == (500 if status == 200 else 0)
    # Signed for one platform it is nothing at the other one.
    assert (await ask(post.wire, "POST", SHOPIFY, sent=body, headers=JSON | headers)).status == 401


def test_what_the_document_shows_is_what_is_answered() -> None:
    nobody: Any = None
    examples_fit(WebhookRoutes(nobody, limiter=None, draining=lambda: False).routes())
