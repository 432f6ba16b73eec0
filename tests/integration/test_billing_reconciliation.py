"""Purchases that nobody is sure of: Shopify is asked about them, by jobs that outlive outages."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from glamd.billing import jobs
from glamd.billing.model import Purchase
from glamd.embedded.demo_shopify import Charge
from glamd.errors import UnavailableError
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import eventually
from tests.support.shopify import Act

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    """Shopify and an empty database."""
    async with World.make(module_database_url) as made:
        yield made


@pytest.fixture
async def node(world: World) -> AsyncIterator[Node]:
    """One node, whose jobs do not run by themselves."""
    async with world.node() as made:
        yield made


async def bought_by(world: World, node: Node, **changes: Any) -> tuple[UUID, Purchase]:
    """A merchant with a purchase that waits for its money."""
    merchant_id = await world.merchant()
    return merchant_id, await node.buy(merchant_id, **changes)


async def forget_charge(world: World, purchase: Purchase) -> None:
    """As if the answer to making the charge had not come."""
    await world.database.execute(
        "UPDATE glam.credit_purchases SET platform_charge_id = NULL, checkout_url = NULL"
        " WHERE purchase_id = $1",
        purchase.purchase_id,
    )


async def ask_when_due(world: World, node: Node, purchase: Purchase) -> dict[str, Any]:
    """Let the time come when the purchase is asked about next; its row before and after it."""
    row = await world.purchase(purchase.purchase_id)
    if row["reconcile_at"] > world.clock.now():
        world.clock.set(row["reconcile_at"])
    assert await node.reconciliation.run_once() == 1
    return await world.purchase(purchase.purchase_id)


# ---- what Shopify says that does not fit


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [({"amount": "0.01"}, "wrong_price"), ({"test": True}, "wrong_test")],
)
@pytest.mark.parametrize("is_known", [True, False])
async def test_another_price_or_a_test_is_not_paid_however_it_is_found(
    world: World, node: Node, changes: dict[str, Any], outcome: str, is_known: bool
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    for name, value in changes.items():
        setattr(charge, name, value)
    if not is_known:
        await forget_charge(world, purchase)
    with capture_logs() as events:
        row = await ask_when_due(world, node, purchase)
    assert row["status"] == "pending"
    assert (row["platform_charge_id"] is not None) == is_known
    assert await world.balance(merchant_id) == 0
    assert outcome in [event.get("reason") for event in events]


async def test_a_payment_that_never_fits_is_not_asked_about_for_ever(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.paid(purchase).amount = "0.01"
    world.clock.advance(31 * DAY_S)
    row = await ask_when_due(world, node, purchase)
    assert (row["status"], row["reconcile_at"]) == ("pending", None)
    assert await world.balance(merchant_id) == 0


async def test_a_charge_of_another_name_is_not_the_purchases(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.paid(purchase).name += " "
    await forget_charge(world, purchase)
    assert (await ask_when_due(world, node, purchase))["platform_charge_id"] is None
    assert await world.balance(merchant_id) == 0


async def test_a_charge_that_is_gone_fails_its_purchase_only_after_a_while(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.shops[merchant_id].charges.clear()
    row = await ask_when_due(world, node, purchase)
    assert row["status"] == "pending"
    world.clock.advance(600)
    row = await ask_when_due(world, node, purchase)
    assert (row["status"], row["failure"]) == ("failed", "CHARGE_GONE")


# ---- Shopify does not answer


@pytest.mark.parametrize("answer", ["500", "cut", "error-page", "401", "denied", "429", "redirect"])
async def test_whatever_goes_wrong_the_purchase_is_asked_about_again(
    world: World, node: Node, answer: Any
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.paid(purchase)
    world.shopify.misbehave(Act(answer=answer, retry_after="60"))
    with capture_logs() as events:
        row = await ask_when_due(world, node, purchase)
    assert row["status"] == "pending"
    assert row["reconcile_at"] > world.clock.now()
    assert not any(secret in str(events) for secret in world.shopify.secrets)
    assert (await ask_when_due(world, node, purchase))["status"] == "completed"
    assert await world.balance(merchant_id) == 500


async def test_a_shop_that_went_away_is_asked_about_ever_more_rarely_and_not_for_ever(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.shopify.shops.remove(world.shops[merchant_id])
    pauses, begun = [], world.clock.now()
    with capture_logs() as events:
        while (row := await world.purchase(purchase.purchase_id))["reconcile_at"] is not None:
            pauses.append(row["reconcile_at"] - world.clock.now())
            await ask_when_due(world, node, purchase)
            assert len(pauses) < 100
    assert pauses[0] == pauses[1] == timedelta(minutes=1)
    assert pauses == sorted(pauses)
    assert pauses[-1] == timedelta(days=1)
    assert timedelta(days=30) < world.clock.now() - begun < timedelta(days=32)
    assert [event["event"] for event in events].count("purchase_unreconciled") == 1


async def test_an_open_charge_is_left_alone_when_nobody_can_pay_it_any_more(
    world: World, node: Node
) -> None:
    _, purchase = await bought_by(world, node)
    begun, times = world.clock.now(), 0
    while (await world.purchase(purchase.purchase_id))["reconcile_at"] is not None:
        await ask_when_due(world, node, purchase)
        times += 1
    assert timedelta(days=3) < world.clock.now() - begun < timedelta(days=5)
    assert times < 25


# ---- what it finds


async def test_a_payment_whose_webhook_got_lost_is_found(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    assert (await ask_when_due(world, node, purchase))["status"] == "pending"
    world.paid(purchase)
    assert await node.reconciliation.run_once() == 0
    row = await ask_when_due(world, node, purchase)
    assert (row["status"], row["reconcile_at"]) == ("completed", None)
    assert await world.balance(merchant_id) == 500


async def test_a_payment_of_a_purchase_that_expired_or_failed_here_is_found(
    world: World, node: Node
) -> None:
    merchant_id, expired = await bought_by(world, node)
    failed = await node.buy(merchant_id)
    await forget_charge(world, failed)
    shop = world.shops[merchant_id]
    hidden = [charge for charge in shop.charges if charge.id == failed.platform_charge_id]
    shop.charges.remove(hidden[0])
    world.clock.advance(601)
    assert await node.reconciliation.run_once() == 2
    assert (await world.purchase(failed.purchase_id))["failure"] == "NOT_MADE"
    world.clock.set(expired.expires_at)
    assert (await node.jobs.expire_now()).purchases == 1
    shop.charges += hidden
    for purchase in (expired, failed):
        world.paid(purchase)
    world.clock.advance(DAY_S)
    assert await node.reconciliation.run_once() == 2
    rows = [await world.purchase(one.purchase_id) for one in (expired, failed)]
    assert [(row["status"], row["failure"]) for row in rows] == [("completed", None)] * 2
    assert await world.balance(merchant_id) == 1000


async def test_a_refusal_whose_webhook_got_lost_is_found(world: World, node: Node) -> None:
    _, purchase = await bought_by(world, node)
    world.shopify.charge(purchase.platform_charge_id).status = "DECLINED"
    row = await ask_when_due(world, node, purchase)
    found = (row["status"], row["failure"], row["reconcile_at"])
    assert found == ("failed", "CHARGE_DECLINED", None)


async def test_a_charge_is_found_by_its_name_among_many(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    shop, charge = world.shops[merchant_id], world.paid(purchase)
    shop.charges += [
        Charge(charge.number + number, f"{number}", "1.00", "USD", False, "https://x/")
        for number in range(1, 60)
    ]
    await forget_charge(world, purchase)
    assert (await ask_when_due(world, node, purchase))["platform_charge_id"] == charge.id
    assert world.shopify.requests[-3:] == ["oneTimePurchases"] * 3
    assert await world.balance(merchant_id) == 500


async def test_a_charge_is_found_by_its_name_though_our_clock_is_an_hour_ahead(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    # Shopify's times are in whole seconds.
    charge.created_at = world.clock.now() - timedelta(hours=1, seconds=1)
    await forget_charge(world, purchase)
    await ask_when_due(world, node, purchase)
    assert await world.balance(merchant_id) == 500


async def test_a_search_ends_where_charges_are_older_than_the_purchase(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    shop = world.shops[merchant_id]
    (charge,) = shop.charges
    shop.charges = [
        Charge(
            number,
            "old",
            "1.00",
            "USD",
            False,
            "https://x/",
            created_at=world.clock.now() - timedelta(hours=2, seconds=1),
        )
        for number in range(1, 100)
    ]
    await forget_charge(world, purchase)
    before = len(world.shopify.requests)
    await ask_when_due(world, node, purchase)
    assert world.shopify.requests[before:] == ["oneTimePurchases"]
    assert charge not in shop.charges


# ---- several nodes, and outages


async def test_nodes_share_what_is_to_be_asked_and_ask_once_for_each(world: World) -> None:
    async with world.node() as one, world.node() as other:
        bought = [await bought_by(world, one) for _ in range(20)]
        for _, purchase in bought:
            world.paid(purchase)
        before = len(world.shopify.requests)
        world.clock.advance(61)
        async with one.working(), other.working():

            async def done() -> bool:
                return {row["status"] for row in await world.purchases()} == {"completed"}

            await eventually(done)
    assert world.shopify.requests[before:] == ["node"] * 20
    assert [await world.balance(merchant_id) for merchant_id, _ in bought] == [500] * 20
    assert len(await world.events("billing.credits.purchased")) == 20


async def test_purchases_expire_once_on_whichever_node(world: World) -> None:
    async with world.node() as one, world.node() as other:
        merchant_id, purchase = await bought_by(world, one)
        world.clock.set(purchase.expires_at - timedelta(seconds=1))
        assert (await one.jobs.expire_now()).purchases == 0
        world.clock.advance(1)
        found = await asyncio.gather(one.jobs.expire_now(), other.jobs.expire_now())
        assert sum(each.purchases for each in found) == 1
    assert (await world.purchase(purchase.purchase_id))["status"] == "expired"
    assert await world.balance(merchant_id) == 0


async def test_the_jobs_survive_a_database_that_goes_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TROUBLE_PAUSE_MIN_S", 0.02)
    monkeypatch.setattr(jobs, "TROUBLE_PAUSE_MAX_S", 0.05)
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        merchant_id, purchase = await bought_by(world, node)
        await node.hear(world.shopify.webhook(world.paid(purchase)))
        await node.billing.start_trial(merchant_id, correlation_id="c")
        proxy.go_down()
        with capture_logs() as events:
            async with node.working():

                async def all_blind() -> bool:
                    blind = {e["job"] for e in events if e["event"] == "billing_job_blind"}
                    return len(blind) == 5

                await eventually(all_blind)
                world.clock.advance(15 * DAY_S)
                proxy.is_down = False

                async def done() -> bool:
                    ended = await world.events("billing.trial.expired")
                    return len(ended) == 1 and await world.balance(merchant_id) == 1000

                await eventually(done, errors=(UnavailableError,))


async def test_a_round_that_crashes_does_not_end_its_job(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TROUBLE_PAUSE_MIN_S", 0.02)
    merchant_id, purchase = await bought_by(world, node)
    apply_due, crashes = node.webhooks.apply_due, iter([True, True])

    async def crash() -> int:
        if next(crashes, False):
            raise ZeroDivisionError
        return await apply_due()

    monkeypatch.setattr(node.webhooks, "apply_due", crash)
    webhooks = jobs.BillingJobs(
        node.database,
        webhooks=node.webhooks,
        reconciliation=node.reconciliation,
        clock=world.clock,
    )
    await node.hear(world.shopify.webhook(world.paid(purchase)))
    running = asyncio.create_task(webhooks.run())

    async def done() -> bool:
        return await world.balance(merchant_id) == 500

    await eventually(done)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()


async def test_a_webhook_wakes_the_job_which_then_sleeps_again(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    apply_due, rounds = node.webhooks.apply_due, []

    async def count() -> int:
        rounds.append(1)
        return await apply_due()

    monkeypatch.setattr(node.webhooks, "apply_due", count)
    sleepy = jobs.BillingJobs(
        node.database,
        webhooks=node.webhooks,
        reconciliation=node.reconciliation,
        clock=world.clock,
        webhook_interval_s=HOUR_S,
    )
    running = asyncio.create_task(sleepy.run())
    await node.hear(world.shopify.webhook(world.shopify.charges[0]))

    async def waits() -> bool:
        return await world.outcomes() == ["unchanged"]

    await eventually(waits)
    await node.hear(world.shopify.webhook(world.paid(purchase)))

    async def done() -> bool:
        return await world.balance(merchant_id) == 500

    await eventually(done)
    for _ in range(50):
        await world.balance(merchant_id)
    assert len(rounds) <= 4
    running.cancel()
    await asyncio.wait({running})


async def test_a_node_passes_over_what_another_one_holds(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    await node.billing.start_trial(merchant_id, correlation_id="c")
    await node.hear(world.shopify.webhook(world.paid(purchase)))
    world.clock.advance(30 * DAY_S)
    async with world.database.transaction() as other:
        for table in ("billing_records", "credit_purchases", "webhooks"):
            await other.execute(f"SELECT FROM glam.{table} FOR UPDATE")
        assert await node.jobs.expire_now() == jobs.Expired(0, 0)
        assert await node.reconciliation.run_once() == 0
        assert await node.webhooks.apply_due() == 0
    assert await node.jobs.expire_now() == jobs.Expired(1, 1)
    assert await node.reconciliation.run_once() == 1
    assert await node.webhooks.apply_due() == 1
    assert await world.outcomes() == ["unchanged"]
    assert await world.balance(merchant_id) == 1000
