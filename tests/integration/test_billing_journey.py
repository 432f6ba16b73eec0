"""From the trial to the paid pack, over real HTTP both ways, at the platform of the demo."""

from collections.abc import AsyncIterator
from functools import partial
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web

from glamd.embedded.demo_shopify import DemoShopify
from tests.support.billing_world import Node, World
from tests.support.postgres import eventually
from tests.support.shopify import ShopifyStandIn


class Demo(ShopifyStandIn):
    """The platform of the demo as it is, without the engine."""

    _graphql = DemoShopify._graphql
    execute = DemoShopify.execute


@pytest.fixture(params=[Demo, ShopifyStandIn])
async def world(module_database_url: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """An empty database, and Shopify with and without a real engine."""
    async with World.make(module_database_url, shopify=request.param()) as made:
        yield made


async def serve(node: Node) -> web.AppRunner:
    """A listener for webhooks, as our own HTTP has one."""

    async def take(request: web.Request) -> web.Response:
        await node.webhooks.take("shopify", await request.read(), request.headers)
        return web.Response()

    app = web.Application()
    app.router.add_post("/webhooks/shopify", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


async def has(world: World, purchase_id: UUID, status: str) -> bool:
    """Whether the purchase has this status by now."""
    return bool((await world.purchase(purchase_id))["status"] == status)


async def test_a_merchant_tries_declines_buys_and_comes_back_with_credits(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node, node.working(), aiohttp.ClientSession() as browser:
        runner = await serve(node)
        port = runner.addresses[0][1]
        world.shopify.webhooks_url = f"http://127.0.0.1:{port}/webhooks/shopify"
        await node.billing.start_trial(merchant_id, correlation_id="c")
        for act, status in (("decline", "failed"), ("approve", "completed")):
            bought = await node.buy(merchant_id)
            assert bought.checkout_url is not None
            async with browser.get(bought.checkout_url) as page:
                assert "39.99 USD" in await page.text()
            async with browser.post(
                bought.checkout_url, data={"act": act}, allow_redirects=False
            ) as back:
                assert back.status == 302
                assert back.headers["Location"].startswith(f"{bought.return_url}?charge_id=")

            world.clock.advance(1)
            await eventually(partial(has, world, bought.purchase_id, status))
        await runner.cleanup()
        overview = await node.billing.overview(merchant_id)
    assert await world.balance(merchant_id) == 1000
    assert overview.trial.active
    assert overview.credits_purchased == 500
    assert [one.status for one in overview.recent_purchases] == ["completed", "failed"]


async def test_a_lost_webhook_is_made_up_for_by_asking(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        bought = await node.buy(merchant_id)
        lost = await node.buy(merchant_id)
        await world.database.execute(
            "UPDATE glam.credit_purchases SET platform_charge_id = NULL WHERE purchase_id = $1",
            lost.purchase_id,
        )
        for purchase in (bought, lost):
            charge = world.shopify.charge(purchase.platform_charge_id)
            await world.shopify.decide(charge, approve=True)
        world.clock.advance(61)
        assert await node.reconciliation.run_once() == 2
    assert await world.balance(merchant_id) == 1000
