"""What a sceptic asks of billing: who can hold up whom, which clock counts, what grows for ever."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from glamd.billing.model import PlatformError, Purchase
from glamd.billing.webhooks import service as webhooks_service
from glamd.billing.webhooks.service import ATTEMPTS_LIMIT
from glamd.errors import InternalError, UnavailableError
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.settable_clock import SettableClock
from tests.support.shopify import Act


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    """Shopify and an empty database."""
    async with World.make(module_database_url) as made:
        yield made


@pytest.fixture
async def node(world: World) -> AsyncIterator[Node]:
    """One node."""
    async with world.node() as made:
        yield made


async def bought_by(world: World, node: Node) -> tuple[UUID, Purchase]:
    """A merchant with a purchase that waits for its money."""
    merchant_id = await world.merchant()
    return merchant_id, await node.buy(merchant_id)


async def count_of(world: World, merchant_id: UUID) -> tuple[int, int]:
    """How many purchases the record counts, and how many there are."""
    sql = "SELECT purchase_count FROM glam.billing_records WHERE merchant_id = $1"
    return await world.database.fetchval(sql, merchant_id), len(await world.purchases())


# ---- webhooks that are in the way of others


async def test_nobody_keeps_out_a_webhook_by_using_its_id_first(world: World, node: Node) -> None:
    bought = [await bought_by(world, node) for _ in range(2)]
    for _, purchase in bought:
        webhook = world.shopify.webhook(world.paid(purchase), **{"Webhook-Id": "the-same"})
        for _ in range(2):
            await node.hear(webhook)
    await node.webhooks.apply_due()
    assert await world.outcomes() == ["completed"] * 2
    assert [await world.balance(merchant_id) for merchant_id, _ in bought] == [500] * 2


async def test_a_webhook_that_the_database_refuses_holds_up_no_other_and_is_given_up_aloud(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one = await bought_by(world, node)
    merchant_id, other = await bought_by(world, node)
    settle = node.billing.settlement.settle

    async def refuse(purchase: Purchase, *args: Any, **more: Any) -> Any:
        if purchase.purchase_id == one.purchase_id:
            raise InternalError("The database refused what was asked of it.")
        return await settle(purchase, *args, **more)

    monkeypatch.setattr(node.billing.settlement, "settle", refuse)
    for purchase in (one, other):
        await node.hear(world.shopify.webhook(world.paid(purchase)))
    with capture_logs() as events:
        for _ in range(ATTEMPTS_LIMIT):
            await node.webhooks.apply_due()
            world.clock.advance(3600)
            assert await world.balance(merchant_id) == 500
    assert await world.outcomes() == ["internal_error", "completed"]
    told = [event["log_level"] for event in events if event["event"] == "webhook_given_up"]
    assert told == ["error"]


# ---- what grows


async def test_webhooks_that_are_done_with_go_and_come_again_without_effect(world: World) -> None:
    async with world.node(webhooks_kept_for=timedelta(days=7)) as node:
        merchant_id, purchase = await bought_by(world, node)
        webhook = world.shopify.webhook(world.paid(purchase))
        await node.hear(webhook)
        await node.webhooks.apply_due()
        world.clock.advance(timedelta(days=7).total_seconds())
        assert await node.webhooks.purge() == 0
        await node.hear(world.shopify.webhook(world.paid(purchase), Topic="app/uninstalled"))
        world.clock.advance(1)
        assert [await node.webhooks.purge() for _ in range(2)] == [1, 0]
        assert await world.outcomes() == ["ignored"]
        await node.hear(webhook)
        await node.webhooks.apply_due()
    assert await world.outcomes() == ["ignored", "unchanged"]
    assert await world.balance(merchant_id) == 500
    assert len(await world.events("billing.credits.purchased")) == 1
    assert len(await world.events("credits.granted")) == 1


async def test_webhooks_that_wait_are_kept_and_not_in_the_way_of_deleting(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks_service, "PURGE_ROWS", 2)
    _, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    for number in range(3):
        await node.hear(world.shopify.webhook(charge, status=f"S{number}"))
    for number in range(5):
        changes = {"Topic": "app/uninstalled", "Webhook-Id": f"{number}"}
        await node.hear(world.shopify.webhook(charge, **changes))
    world.clock.advance(timedelta(days=90, seconds=1).total_seconds())
    assert [await node.webhooks.purge() for _ in range(4)] == [2, 2, 1, 0]
    assert await world.outcomes() == [None] * 3


async def test_two_nodes_that_delete_at_once_delete_each_webhook_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks_service, "PURGE_ROWS", 20)
    async with world.node() as one, world.node() as other:
        _, purchase = await bought_by(world, one)
        charge = world.paid(purchase)
        for number in range(100):
            changes = {"Topic": "app/uninstalled", "Webhook-Id": f"{number}"}
            await one.hear(world.shopify.webhook(charge, **changes))
        world.clock.advance(timedelta(days=91).total_seconds())
        deleted = 0
        while await world.outcomes():
            deleted += sum(
                await asyncio.gather(*(node.webhooks.purge() for node in (one, other, one)))
            )
    assert deleted == 100


# ---- clocks


async def test_a_node_whose_clock_is_an_hour_ahead_ends_nothing_before_its_time(
    world: World,
) -> None:
    right, ahead = SettableClock(datetime.now(UTC)), SettableClock(datetime.now(UTC))
    ahead.advance(3600)
    merchant_id = await world.merchant()
    async with world.node(clock=right) as one, world.node(clock=ahead) as other:
        soon = right.now() + timedelta(minutes=30)
        await one.billing.trial_elsewhere(
            merchant_id, ends_at=soon, credits=None, correlation_id="c"
        )
        purchase = await one.buy(merchant_id)
        sql = "UPDATE glam.credit_purchases SET expires_at = $1"
        await world.database.execute(sql, soon)
        found = await other.jobs.expire_now()
        assert (found.trials, found.purchases) == (0, 0)
        assert (await world.purchase(purchase.purchase_id))["status"] == "pending"
    assert await world.events("billing.trial.expired") == []


async def test_what_a_node_with_a_clock_ahead_took_and_left_does_not_wait_for_that_time(
    world: World,
) -> None:
    right, ahead = SettableClock(datetime.now(UTC)), SettableClock(datetime.now(UTC))
    ahead.advance(3600)
    async with world.node(clock=right) as one, world.node(clock=ahead) as other:
        merchant_id, purchase = await bought_by(world, one)
        await other.hear(world.shopify.webhook(world.paid(purchase)))
        right.advance(5)
        assert await one.webhooks.apply_due() == 1
        # The one ahead finds nothing to be due that is not, either.
        await world.database.execute(
            "UPDATE glam.webhooks SET outcome = NULL, try_at = $1",
            right.now() + timedelta(minutes=10),
        )
        assert await other.webhooks.apply_due() == 0
    assert await world.balance(merchant_id) == 500


async def test_a_node_with_a_clock_ahead_does_not_call_a_charge_unmade_that_is_being_made(
    world: World,
) -> None:
    right, ahead = SettableClock(datetime.now(UTC)), SettableClock(datetime.now(UTC))
    ahead.advance(3600)
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    async with world.node(clock=right) as one, world.node(clock=ahead) as other:
        buying = asyncio.create_task(one.buy(merchant_id))
        await world.shopify.asked(1)
        assert await other.reconciliation.run_once() == 0
        world.shopify.release()
        purchase = await buying
        assert (await world.purchase(purchase.purchase_id))["status"] == "pending"
        # What the one ahead begins is asked about as early as all else.
        begun = await other.buy(merchant_id)
        due = (await world.purchase(begun.purchase_id))["reconcile_at"]
        assert due < right.now() + timedelta(minutes=2)


# ---- a platform that is slow


async def test_no_connection_is_held_while_a_platform_thinks(world: World) -> None:
    merchants = [await world.merchant() for _ in range(5)]
    world.shopify.misbehave(*[Act(is_late=True)] * 5)
    async with world.node(pool_size=1) as node:
        buying = [asyncio.create_task(node.buy(merchant_id)) for merchant_id in merchants]
        await world.shopify.asked(5)
        # There is one connection, and five purchases are under way.
        for merchant_id in merchants:
            assert (await node.billing.trial(merchant_id)).available
        assert [row["status"] for row in await world.purchases()] == ["pending"] * 5
        world.shopify.release()
        await asyncio.gather(*buying)


# ---- how many there are


async def test_purchases_are_counted_when_they_are_begun_whatever_becomes_of_them(
    world: World, node: Node
) -> None:
    merchant_id = await world.merchant()
    with pytest.raises(PlatformError):
        await node.buy(merchant_id, platform="stripe")
    await node.buy(merchant_id)
    world.clock.advance(90_000)
    await node.jobs.expire_now()
    assert await count_of(world, merchant_id) == (2, 2)
    assert (await node.billing.purchases(merchant_id, limit=1)).total == 2
    assert (await node.billing.purchases(await world.merchant(), limit=1)).total == 0


async def test_purchases_begun_at_once_on_two_nodes_are_all_counted(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as one, world.node() as other:
        await asyncio.gather(
            *(node.buy(merchant_id, platform="custom") for node in (one, other) for _ in range(15))
        )
    assert await count_of(world, merchant_id) == (30, 30)


async def test_the_count_fits_wherever_the_connection_breaks(world: World) -> None:
    merchant_id = await world.merchant()
    broken, is_done = 0, False
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        while not is_done:
            proxy.lose_answer = broken + 1
            try:
                await node.buy(merchant_id, platform="custom")
                is_done = proxy.lose_answer > 0
            except UnavailableError:
                pass
            broken += 1
            assert broken < 50
            counted, there = await count_of(world, merchant_id)
            assert counted == there
    assert broken > 3
