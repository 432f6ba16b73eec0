"""Webhooks and events about charges: forged, repeated, early, reordered, and of somebody else."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from structlog.testing import capture_logs

from glamd.billing.model import Purchase, PurchaseNotFoundError
from glamd.billing.platforms.custom import sign_callback
from glamd.billing.webhooks.service import ATTEMPTS_LIMIT, BODY_LIMIT_BYTES
from glamd.embedded.demo_shopify import Webhook
from glamd.errors import InputError, NotFoundError, UnauthenticatedError, UnavailableError
from glamd.ledger.model import Command
from tests.support.billing_world import CUSTOM_SECRET, OLD_API_SECRET, Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import eventually
from tests.support.shopify import Act


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


async def hear(world: World, node: Node, *webhooks: Webhook) -> None:
    """Take webhooks and give them their effect."""
    for webhook in webhooks:
        await node.hear(webhook)
    await node.webhooks.apply_due()


async def nothing_happened(world: World, merchant_id: UUID, purchase: Purchase) -> None:
    """Assert that there is no trace in the money."""
    assert (await world.purchase(purchase.purchase_id))["status"] == purchase.status
    assert await world.balance(merchant_id) == 0
    assert await world.events("billing.credits.purchased") == []
    assert await world.events("credits.granted") == []


# ---- who may speak


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": "shpss_unknown"},
        {"Hmac-Sha256": ""},
        {"Hmac-Sha256": "bm90IGEgc2lnbmF0dXJl"},
    ],
)
async def test_a_webhook_with_a_wrong_signature_is_refused_and_not_kept(
    world: World, node: Node, changes: dict[str, Any]
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    with pytest.raises(UnauthenticatedError):
        await node.hear(world.shopify.webhook(world.paid(purchase), **changes))
    assert await world.outcomes() == []
    await nothing_happened(world, merchant_id, purchase)


async def test_a_body_that_was_changed_after_the_signature_is_refused(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    declined = world.shopify.webhook(
        world.shopify.charge(purchase.platform_charge_id), status="DECLINED"
    )
    forged = Webhook(declined.body.replace(b"DECLINED", b"ACTIVE"), declined.headers)
    with pytest.raises(UnauthenticatedError):
        await node.hear(forged)
    await nothing_happened(world, merchant_id, purchase)


async def test_a_webhook_for_a_platform_that_is_not_configured_has_no_address(node: Node) -> None:
    for platform in ("stripe", "", "nonsense"):
        with pytest.raises(NotFoundError):
            await node.webhooks.take(platform, b"{}", {})


async def test_a_boundless_webhook_is_refused_before_it_is_looked_at(node: Node) -> None:
    with pytest.raises(InputError) as caught:
        await node.webhooks.take("shopify", b" " * (BODY_LIMIT_BYTES + 1), {})
    assert caught.value.code == "BODY_TOO_LARGE"


async def test_the_previous_secret_is_good_for_as_long_as_it_is_configured(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    await hear(world, node, world.shopify.webhook(world.paid(purchase), secret=OLD_API_SECRET))
    assert await world.balance(merchant_id) == 500


async def test_a_webhook_that_could_not_be_kept_is_not_answered_as_if_it_were(
    world: World,
) -> None:
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        _, purchase = await bought_by(world, node)
        webhook = world.shopify.webhook(world.paid(purchase))
        proxy.go_down()
        with pytest.raises(UnavailableError):
            await node.hear(webhook)
        proxy.is_down = False
        await eventually(lambda: _took(node, webhook), errors=(UnavailableError,))
    assert await world.outcomes() == [None]


async def _took(node: Node, webhook: Webhook) -> bool:
    await node.hear(webhook)
    return True


# ---- what it may be about


@pytest.mark.parametrize(
    "changes",
    [
        {"shop_number": 1},
        {"Shop-Domain": "other.myshopify.com"},
        {"shop_number": 1, "Shop-Domain": "other.myshopify.com"},
    ],
)
async def test_a_webhook_of_another_shop_does_nothing(
    world: World, node: Node, changes: dict[str, Any]
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    with capture_logs() as events:
        await hear(world, node, world.shopify.webhook(world.paid(purchase), **changes))
    assert await world.outcomes() == ["wrong_shop"]
    await nothing_happened(world, merchant_id, purchase)
    assert [
        (event["log_level"], event["reason"])
        for event in events
        if event["event"] == "charge_report_refused"
    ] == [("error", "wrong_shop")]


async def test_topics_that_are_not_about_charges_are_kept_without_what_they_say(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    for topic in ("customers/redact", "app/uninstalled", "", "x" * 500):
        await node.hear(world.shopify.webhook(charge, Topic=topic))
    assert await node.webhooks.apply_due() == 0
    assert await world.outcomes() == ["ignored"] * 4
    kept = await world.database.fetch("SELECT body FROM glam.webhooks")
    assert {row[0] for row in kept} == {b""}
    await nothing_happened(world, merchant_id, purchase)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"app_purchase_one_time": {}}', b"\xff\xfe"])
async def test_what_cannot_be_read_is_kept_once_and_done_with(
    world: World, node: Node, body: bytes
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    webhook = world.shopify.webhook(world.paid(purchase), body=body)
    await hear(world, node, webhook, webhook)
    assert await world.outcomes() == ["validation_error"]
    await nothing_happened(world, merchant_id, purchase)


async def test_a_status_that_nobody_knows_changes_nothing(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.shopify.charge(purchase.platform_charge_id)
    for status in ("PENDING", "FROZEN", "active ", "ACTIVE\u0000"):
        await hear(world, node, world.shopify.webhook(charge, status=status))
    assert await world.outcomes() == ["unchanged"] * 4
    await nothing_happened(world, merchant_id, purchase)


# ---- once


async def test_a_payment_is_delivered_once_however_often_it_is_told(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    repeated = world.shopify.webhook(charge)
    others = [world.shopify.webhook(charge) for _ in range(3)]
    await hear(world, node, repeated, repeated, *others, repeated)
    world.clock.advance(10)
    await hear(world, node, repeated)
    assert sorted(map(str, await world.outcomes())) == ["completed"] + ["unchanged"] * 3
    assert await world.balance(merchant_id) == 500
    assert await world.events("billing.credits.purchased") == [
        {
            "merchant_id": str(merchant_id),
            "purchase_id": str(purchase.purchase_id),
            "credits": 500,
            "amount": "39.99",
            "platform": "shopify",
        }
    ]
    assert len(await world.events("credits.granted")) == 1
    overview = await node.billing.overview(merchant_id)
    assert overview.credits_purchased == 500
    assert overview.last_purchase_at == overview.recent_purchases[0].completed_at


async def test_many_nodes_that_are_told_at_once_deliver_once(world: World, node: Node) -> None:
    bought = [await bought_by(world, node) for _ in range(10)]
    async with world.node() as other, world.node() as third:
        nodes = (node, other, third)
        for _, purchase in bought:
            charge = world.paid(purchase)
            for each in nodes:
                await each.hear(world.shopify.webhook(charge))
        async with node.working(), other.working(), third.working():

            async def done() -> bool:
                return None not in await world.outcomes()

            await eventually(done)
    assert sorted(map(str, await world.outcomes())) == ["completed"] * 10 + ["unchanged"] * 20
    assert [await world.balance(merchant_id) for merchant_id, _ in bought] == [500] * 10
    assert len(await world.events("billing.credits.purchased")) == 10
    assert len(await world.events("credits.granted")) == 10


async def test_a_webhook_an_event_and_a_look_at_shopify_at_once_are_one_payment(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    await node.hear(world.shopify.webhook(charge))
    world.clock.advance(61)
    outcomes = await asyncio.gather(
        node.webhooks.apply_due(),
        node.reconciliation.run_once(),
        node.billing.charge_updated(
            charge_id=str(charge.number),
            status="Active",
            merchant_id=merchant_id,
            correlation_id="c",
        ),
    )
    assert outcomes[0] == 1
    assert await world.balance(merchant_id) == 500
    assert len(await world.events("billing.credits.purchased")) == 1


async def test_credits_that_were_granted_elsewhere_are_not_granted_again(
    world: World, node: Node
) -> None:
    for amount, outcome in ((500, "completed"), (7, "duplicate_transaction")):
        merchant_id, purchase = await bought_by(world, node)
        command = Command(
            merchant_id=merchant_id,
            operation="credit",
            amount=amount,
            reference_type="purchase",
            reference_id=str(purchase.purchase_id),
            correlation_id="elsewhere",
        )
        async with node.database.transaction() as connection:
            await node.ledger.apply_within(connection, command, world.clock.now())
        await hear(world, node, world.shopify.webhook(world.paid(purchase)))
        assert (await world.outcomes())[-1] == outcome
        assert await world.balance(merchant_id) == amount


# ---- early, late, in any order


async def test_a_webhook_that_comes_before_its_charges_id_waits_for_it(
    world: World, node: Node
) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    buying = asyncio.create_task(node.buy(merchant_id))
    await world.shopify.asked(1)
    (charge,) = await _made(world)
    charge.status = "ACTIVE"
    for _ in range(3):
        await hear(world, node, world.shopify.webhook(charge))
    assert await world.outcomes() == [None] * 3
    world.shopify.release()
    await buying
    world.clock.advance(10)
    await node.webhooks.apply_due()
    assert sorted(map(str, await world.outcomes())) == ["completed", "unchanged", "unchanged"]
    assert await world.balance(merchant_id) == 500


async def _made(world: World) -> Any:
    async def look() -> Any:
        return world.shopify.charges

    return await eventually(look)


async def test_a_webhook_waits_longer_each_time_and_not_for_ever(world: World, node: Node) -> None:
    _, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    await world.database.execute("DELETE FROM glam.credit_purchases")
    await node.hear(world.shopify.webhook(charge))
    pauses = []
    for _ in range(ATTEMPTS_LIMIT):
        assert await node.webhooks.apply_due() == 1
        row = await world.database.fetchrow("SELECT try_at, outcome FROM glam.webhooks")
        assert row is not None
        if row["try_at"] is not None:
            pauses.append((row["try_at"] - world.clock.now()).total_seconds())
            assert await node.webhooks.apply_due() == 0
            world.clock.set(row["try_at"])
    assert await world.outcomes() == ["purchase_not_found"]
    assert pauses[:4] == [1, 2, 4, 8]
    assert max(pauses) == 600
    assert 6000 < sum(pauses) < 7200


@pytest.mark.parametrize(
    ("told", "status", "balance"),
    [
        (("DECLINED", "ACTIVE"), "completed", 500),
        (("ACTIVE", "DECLINED"), "completed", 500),
        (("ACTIVE", "PENDING", "EXPIRED"), "completed", 500),
        (("PENDING", "DECLINED", "PENDING"), "failed", 0),
        (("EXPIRED", "ACCEPTED", "ACTIVE"), "completed", 500),
        (("CANCELLED",), "failed", 0),
    ],
)
async def test_in_whatever_order_it_comes_what_was_paid_is_delivered(
    world: World, node: Node, told: tuple[str, ...], status: str, balance: int
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.shopify.charge(purchase.platform_charge_id)
    for each in told:
        await hear(world, node, world.shopify.webhook(charge, status=each))
    row = await world.purchase(purchase.purchase_id)
    assert (row["status"], row["reconcile_at"]) == (status, None)
    assert (row["failure"] is None) == (status == "completed")
    assert await world.balance(merchant_id) == balance
    assert len(await world.events("billing.credits.purchased")) == balance // 500


async def test_a_purchase_that_has_expired_is_delivered_when_it_was_paid_after_all(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    world.clock.set(purchase.expires_at)
    assert (await node.jobs.expire_now()).purchases == 1
    assert (await world.purchase(purchase.purchase_id))["status"] == "expired"
    charge = world.shopify.charge(purchase.platform_charge_id)
    await hear(world, node, world.shopify.webhook(charge, status="DECLINED"))
    assert (await world.purchase(purchase.purchase_id))["status"] == "expired"
    await hear(world, node, world.shopify.webhook(world.paid(purchase)))
    assert (await world.purchase(purchase.purchase_id))["status"] == "completed"
    assert await world.balance(merchant_id) == 500
    assert (await node.jobs.expire_now()).purchases == 0


async def test_what_has_no_account_yet_waits_too(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    rows = await world.database.fetch("DELETE FROM glam.credit_accounts RETURNING *")
    await hear(world, node, world.shopify.webhook(world.paid(purchase)))
    assert await world.outcomes() == [None]
    assert (await world.purchase(purchase.purchase_id))["status"] == "pending"
    async with node.database.transaction() as connection:
        await node.ledger.open_account(
            connection,
            merchant_id=merchant_id,
            platform_name=rows[0]["platform_name"],
            platform_id=rows[0]["platform_id"],
            platform_domain=rows[0]["platform_domain"],
        )
    world.clock.advance(5)
    await node.webhooks.apply_due()
    assert await world.outcomes() == ["completed"]
    assert await world.balance(merchant_id) == 500


# ---- a webhook and a database that breaks


async def test_a_webhook_has_its_effect_once_wherever_the_connection_breaks(world: World) -> None:
    broken = 0
    async with DatabaseProxy(world.url) as proxy, world.node() as sound:
        merchant_id, purchase = await bought_by(world, sound)
        await sound.hear(world.shopify.webhook(world.paid(purchase)))
        async with world.node(url=proxy.url) as node:
            while None in await world.outcomes():
                proxy.lose_answer = broken + 1
                try:
                    await node.webhooks.apply_due()
                except UnavailableError:
                    broken += 1
                world.clock.advance(1200)
                assert broken < 40
            proxy.lose_answer = 0
    assert broken > 5
    assert await world.balance(merchant_id) == 500
    assert len(await world.events("billing.credits.purchased")) == 1


async def test_one_webhook_that_crashes_holds_up_no_other(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one = await bought_by(world, node)
    merchant_id, other = await bought_by(world, node)
    settle = node.billing.settlement.settle

    async def crash(purchase: Purchase, *args: Any, **more: Any) -> Any:
        if purchase.purchase_id == one.purchase_id:
            raise ZeroDivisionError
        return await settle(purchase, *args, **more)

    monkeypatch.setattr(node.billing.settlement, "settle", crash)
    with capture_logs() as events:
        webhooks = [world.shopify.webhook(world.paid(each)) for each in (one, other)]
        await hear(world, node, *webhooks)
    assert await world.outcomes() == [None, "completed"]
    assert await world.balance(merchant_id) == 500
    assert [event["event"] for event in events].count("webhook_crashed") == 1


# ---- the same by event


async def test_an_event_of_another_merchants_charge_does_nothing(world: World, node: Node) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.paid(purchase)
    with pytest.raises(InputError) as caught:
        await node.billing.charge_updated(
            charge_id=charge.id, status="active", merchant_id=uuid4(), correlation_id="c"
        )
    assert [error.field for error in caught.value.fields] == ["merchant_id"]
    await nothing_happened(world, merchant_id, purchase)


async def test_an_event_of_an_unknown_charge_says_so(world: World, node: Node) -> None:
    merchant_id = await world.merchant()
    for charge_id in ("gid://shopify/AppPurchaseOneTime/1", "1", "x" * 200):
        with pytest.raises(PurchaseNotFoundError):
            await node.billing.charge_updated(
                charge_id=charge_id, status="active", merchant_id=merchant_id, correlation_id="c"
            )


async def test_an_event_may_name_a_charge_by_its_number_and_a_status_in_any_case(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    charge = world.shopify.charge(purchase.platform_charge_id)
    for status, outcome in (("Pending", "unchanged"), ("ACTIVE", "completed"), ("x", "unchanged")):
        found = await node.billing.charge_updated(
            charge_id=str(charge.number),
            status=status,
            merchant_id=merchant_id,
            correlation_id="c",
        )
        assert found == outcome
    assert await world.balance(merchant_id) == 500


# ---- a payment page of one's own


def callback(world: World, **said: Any) -> Webhook:
    """A signed callback of our own payment page."""
    body, timestamp = orjson.dumps(said), str(int(world.clock.now().timestamp()))
    nonce = uuid4().hex
    headers = {
        "X-Glamd-Timestamp": timestamp,
        "X-Glamd-Nonce": nonce,
        "X-Glamd-Signature": sign_callback(CUSTOM_SECRET, timestamp, nonce, body),
    }
    return Webhook(body, headers)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"amount": "0.01"}, "wrong_price"),
        ({"amount": "40.00"}, "wrong_price"),
        ({"currency": "CAD"}, "wrong_price"),
        ({"test": True}, "wrong_test"),
        ({"merchant_id": str(uuid4())}, "wrong_merchant"),
        ({"amount": 39.99}, "validation_error"),
        ({}, "completed"),
    ],
)
async def test_a_callback_is_compared_with_the_purchase_in_full(
    world: World, node: Node, changes: dict[str, Any], outcome: str
) -> None:
    merchant_id, purchase = await bought_by(world, node, platform="custom")
    said = {
        "charge_id": str(purchase.purchase_id),
        "merchant_id": str(merchant_id),
        "status": "active",
        "amount": "39.99",
        "currency": "USD",
        "test": False,
    }
    heard = callback(world, **(said | changes))
    await node.webhooks.take("custom", heard.body, heard.headers)
    await node.webhooks.take("custom", heard.body, heard.headers)
    await node.webhooks.apply_due()
    assert await world.outcomes() == [outcome]
    assert await world.balance(merchant_id) == (500 if outcome == "completed" else 0)


async def test_a_charge_of_one_platform_is_not_paid_by_a_webhook_of_another(
    world: World, node: Node
) -> None:
    merchant_id, purchase = await bought_by(world, node)
    heard = callback(
        world,
        charge_id=purchase.platform_charge_id,
        merchant_id=str(merchant_id),
        status="active",
        amount="39.99",
        currency="USD",
        test=False,
    )
    await node.webhooks.take("custom", heard.body, heard.headers)
    await node.webhooks.apply_due()
    assert await world.outcomes() == [None]
    await nothing_happened(world, merchant_id, purchase)
