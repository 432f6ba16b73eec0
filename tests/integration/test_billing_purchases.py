"""Buying packs: a real database, real HTTP, and a stand-in for Shopify that misbehaves."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from glamd.billing.model import (
    BillingSettings,
    MerchantNotFoundError,
    Pack,
    PlatformError,
    Purchase,
    PurchaseNotFoundError,
    PurchaseUnansweredError,
)
from glamd.billing.money import Money
from glamd.db import Connection
from glamd.errors import GlamError, InputError, UnavailableError
from glamd.idempotency import Claim, IdempotencyKeys, InProgressError, Remembered
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import eventually
from tests.support.shopify import Act

RECONCILED_S = 61.0
"""After this a purchase without an answer is asked about."""


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    """Shopify and an empty database."""
    async with World.make(module_database_url) as made:
        yield made


async def refused(world: World, *acts: Act, timeout_s: float = 5.0) -> tuple[GlamError, str]:
    """What a merchant hears who buys while Shopify behaves so, and what all that was logged."""
    merchant_id = await world.merchant()
    world.shopify.misbehave(*acts)
    async with world.node(timeout_s=timeout_s) as node:
        with capture_logs() as events, pytest.raises(GlamError) as caught:
            await node.buy(merchant_id)
    return caught.value, f"{events} {caught.value} {caught.value.fields}"


# ---- what never gets as far as a platform


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"pack": "huge"}, "INVALID_PACK", "pack"),
        ({"platform": "paypal"}, "VALIDATION_ERROR", "platform"),
        ({"return_url": "http://app.example.com/"}, "VALIDATION_ERROR", "return_url"),
        ({"return_url": "https://evil.example/"}, "VALIDATION_ERROR", "return_url"),
    ],
)
async def test_what_cannot_be_bought_leaves_no_trace(
    world: World, changes: dict[str, Any], code: str, field: str
) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        with pytest.raises(InputError) as caught:
            await node.buy(merchant_id, **changes)
    assert caught.value.code == code
    assert [error.field for error in caught.value.fields] == [field]
    assert await world.purchases() == []
    assert world.shopify.requests == []


async def test_a_shop_may_not_send_its_merchant_to_another_shop(world: World) -> None:
    merchant_id, other = await world.merchant(), await world.merchant()
    async with world.node() as node:
        with pytest.raises(InputError):
            await node.buy(merchant_id, return_url=f"https://{world.shops[other].domain}/")
        await node.buy(merchant_id, return_url=f"https://{world.shops[merchant_id].domain}/admin")


async def test_a_merchant_without_a_record_buys_nothing(world: World) -> None:
    merchant_id = await world.merchant()
    await world.database.execute("DELETE FROM glam.billing_records")
    async with world.node() as node:
        for unknown in (merchant_id, uuid4()):
            with pytest.raises(MerchantNotFoundError):
                await node.buy(unknown)
    assert await world.purchases() == []
    assert world.shopify.requests == []


async def test_a_platform_that_is_not_configured_refuses_and_the_purchase_is_kept(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        with pytest.raises(PlatformError) as caught:
            await node.buy(merchant_id, platform="stripe")
    (row,) = await world.purchases()
    assert caught.value.code == "PLATFORM_ERROR"
    assert (row["status"], row["failure"]) == ("failed", "NOT_CONFIGURED")
    assert str(row["purchase_id"]) in caught.value.message


# ---- what Shopify will not sell: certain, and for good


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("401", "TOKEN_REFUSED"),
        ("402", "SHOP_FROZEN"),
        ("denied", "NOT_ALLOWED"),
        ("user-error", "INPUT_REFUSED"),
        ("redirect", "REDIRECTED"),
    ],
)
async def test_a_refusal_fails_the_purchase_and_shows_nothing_of_the_answer(
    world: World, answer: Any, failure: str
) -> None:
    error, shown = await refused(world, Act(answer=answer))
    assert isinstance(error, PlatformError)
    (row,) = await world.purchases()
    assert (row["status"], row["failure"], row["reconcile_at"]) == ("failed", failure, None)
    assert world.shopify.charges == []
    assert world.shopify.elsewhere == 0
    assert not any(secret in shown for secret in world.shopify.secrets)


async def test_a_merchant_that_has_not_connected_its_shop_is_refused(world: World) -> None:
    merchant_id = await world.merchant(installed=False)
    async with world.node() as node:
        with pytest.raises(PlatformError):
            await node.buy(merchant_id)
    (row,) = await world.purchases()
    assert (row["status"], row["failure"]) == ("failed", "NO_TOKEN")
    assert world.shopify.requests == []


@pytest.mark.parametrize(
    "changes",
    [{"amount": "0.01"}, {"amount": "39.98"}, {"currency": "CAD"}, {"test": True}],
)
async def test_a_charge_that_is_not_what_was_asked_for_is_offered_to_nobody(
    world: World, changes: dict[str, Any]
) -> None:
    error, _ = await refused(world, Act(changes=changes))
    assert isinstance(error, PlatformError)
    (row,) = await world.purchases()
    assert (row["status"], row["failure"]) == ("failed", "OTHER_CHARGE")
    assert row["platform_charge_id"] is None
    assert row["checkout_url"] is None


async def test_a_charge_that_is_another_purchases_is_offered_to_nobody(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        first = await node.buy(merchant_id)
        number = int(str(first.platform_charge_id).rpartition("/")[2])
        world.shopify.misbehave(Act(changes={"number": number}))
        with pytest.raises(PlatformError):
            await node.buy(merchant_id)
    found = {(row["status"], row["failure"]) for row in await world.purchases()}
    assert found == {("pending", None), ("failed", "OTHER_CHARGE")}


# ---- what may pass: certain, and not for good


@pytest.mark.parametrize(
    ("act", "least_s"),
    [(Act(answer="429", retry_after="7.0"), 7), (Act(answer="429", retry_after="120"), 120)],
)
async def test_a_throttle_that_lasts_is_told_with_its_time(
    world: World, act: Act, least_s: int
) -> None:
    error, _ = await refused(world, act)
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s == least_s
    (row,) = await world.purchases()
    assert (row["status"], row["failure"], row["reconcile_at"]) == ("failed", "THROTTLED", None)
    assert len(world.shopify.requests) == 1


async def test_a_throttle_is_waited_out_but_not_for_ever(world: World) -> None:
    short = Act(answer="429", retry_after="0.01")
    error, _ = await refused(world, short, Act(answer="throttled"), short)
    assert isinstance(error, UnavailableError)
    assert len(world.shopify.requests) == 3
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(answer="throttled"), short)
    async with world.node() as node:
        await node.buy(merchant_id)
    assert len(world.shopify.charges) == 1


async def test_nothing_is_bought_where_nobody_listens(
    world: World, unused_tcp_port_factory: Any
) -> None:
    merchant_id = await world.merchant()
    async with world.node(base_url=f"http://127.0.0.1:{unused_tcp_port_factory()}") as node:
        with pytest.raises(UnavailableError) as caught:
            await node.buy(merchant_id)
    assert not isinstance(caught.value, PurchaseUnansweredError)
    (row,) = await world.purchases()
    assert (row["status"], row["failure"]) == ("failed", "CONNECT_FAILED")


# ---- what nobody knows


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize(
    "answer", ["500", "503", "cut", "error-page", "not-json", "huge", "internal-error"]
)
async def test_an_answer_that_says_nothing_is_asked_for_once_and_found_out_later(
    world: World, answer: Any, takes_effect: bool
) -> None:
    error, shown = await refused(world, Act(answer=answer, takes_effect=takes_effect))
    assert isinstance(error, PurchaseUnansweredError)
    (row,) = await world.purchases()
    assert row["status"] == "pending"
    assert str(row["purchase_id"]) in error.message
    assert world.shopify.requests == ["appPurchaseOneTimeCreate"]
    assert not any(secret in shown for secret in world.shopify.secrets)
    async with world.node() as node:
        world.clock.advance(RECONCILED_S)
        assert await node.reconciliation.run_once() == 1
        row = await world.purchase(row["purchase_id"])
        assert row["status"] == "pending"
        assert (row["platform_charge_id"] is not None) == takes_effect
        # What was never made fails, once there was time enough to make it.
        world.clock.advance(600)
        await node.reconciliation.run_once()
    row = await world.purchase(row["purchase_id"])
    expected = ("pending", None) if takes_effect else ("failed", "NOT_MADE")
    assert (row["status"], row["failure"]) == expected


async def test_a_charge_whose_answer_came_too_late_is_found_and_its_payment_too(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    async with world.node(timeout_s=0.1) as node:
        with pytest.raises(PurchaseUnansweredError) as caught:
            await node.buy(merchant_id)
    (charge,) = world.shopify.charges
    charge.status = "ACTIVE"
    async with world.node() as node:
        world.clock.advance(RECONCILED_S)
        assert await node.reconciliation.run_once() == 1
        bought = await node.billing.purchase_of(merchant_id, caught.value.purchase_id)
    assert (bought.status, bought.platform_charge_id) == ("completed", charge.id)
    assert await world.balance(merchant_id) == 500


async def test_whoever_goes_away_while_shopify_thinks_leaves_a_purchase_that_is_found(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    async with world.node() as node:
        buying = asyncio.create_task(node.buy(merchant_id))
        await world.shopify.asked(1)
        buying.cancel()
        await asyncio.wait({buying})
        (row,) = await world.purchases()
        assert row["status"] == "pending"
        world.shopify.release()
        world.clock.advance(RECONCILED_S)
        await node.reconciliation.run_once()
    row = await world.purchase(row["purchase_id"])
    assert row["platform_charge_id"] == world.shopify.charges[0].id


# ---- the database, between the answer and the commit


async def test_a_connection_that_is_killed_before_the_commit_costs_the_merchant_nothing(
    world: World,
) -> None:
    """The purchase is stored, the charge is made, then the connection breaks at each question."""
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        for lost in range(1, 6):
            merchant_id = await world.merchant()
            world.shopify.hold()
            world.shopify.misbehave(Act(is_late=True))
            requests = len(world.shopify.requests)
            buying = asyncio.create_task(node.buy(merchant_id))
            await world.shopify.asked(requests + 1)
            proxy.lose_question = lost
            world.shopify.release()
            bought = await buying
            proxy.lose_question = 0
            row = await world.purchase(bought.purchase_id)
            assert bought.checkout_url == row["checkout_url"] is not None
            assert row["platform_charge_id"] == bought.platform_charge_id
    assert len(world.shopify.charges) == 5


async def test_a_database_that_stays_away_leaves_a_purchase_that_is_found_and_can_be_paid(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        buying = asyncio.create_task(node.buy(merchant_id))
        await world.shopify.asked(1)
        proxy.go_down()
        world.shopify.release()
        with pytest.raises(UnavailableError):
            await buying
        proxy.is_down = False
        world.shopify.charges[0].status = "ACTIVE"
        world.clock.advance(RECONCILED_S)

        async def found() -> bool:
            return await node.reconciliation.run_once() == 1

        await eventually(found, errors=(UnavailableError,))
    assert await world.balance(merchant_id) == 500


async def test_a_refusal_that_cannot_be_written_is_written_by_reconciliation(world: World) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(answer="user-error", is_late=True))
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:
        buying = asyncio.create_task(node.buy(merchant_id))
        await world.shopify.asked(1)
        proxy.go_down()
        world.shopify.release()
        with pytest.raises(PlatformError):
            await buying
    async with world.node() as node:
        world.clock.advance(601)
        await node.reconciliation.run_once()
    (row,) = await world.purchases()
    assert (row["status"], row["failure"]) == ("failed", "NOT_MADE")


# ---- twice


async def once(keys: IdempotencyKeys, node: Node, merchant_id: UUID) -> Purchase | Remembered:
    """Buy under an idempotency key, as the facade does."""
    found = await keys.claim(scope="client:shop POST /purchases", key="k-1", content=b"{}")
    if isinstance(found, Remembered):
        return found
    claim: Claim = found

    async def keep(connection: Connection, bought: Purchase) -> None:
        answer = {"purchase_id": str(bought.purchase_id), "url": bought.checkout_url}
        await keys.answer(claim, status=201, answer=answer, connection=connection)

    return await node.buy(merchant_id, keep=keep)


async def test_a_double_click_with_one_key_is_one_purchase_on_any_node(world: World) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    keys = IdempotencyKeys(world.database)
    async with world.node() as one, world.node() as other:
        first = asyncio.create_task(once(keys, one, merchant_id))
        await world.shopify.asked(1)
        with pytest.raises(InProgressError):
            await once(keys, other, merchant_id)
        world.shopify.release()
        bought = await first
        again = await once(keys, other, merchant_id)
    assert isinstance(bought, Purchase)
    assert isinstance(again, Remembered)
    assert again.answer == {"purchase_id": str(bought.purchase_id), "url": bought.checkout_url}
    assert len(await world.purchases()) == len(world.shopify.charges) == 1


async def test_a_double_click_without_a_key_is_two_offers_and_only_what_is_paid_is_delivered(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        one, other = await asyncio.gather(node.buy(merchant_id), node.buy(merchant_id))
        assert one.platform_charge_id != other.platform_charge_id
        await node.hear(world.shopify.webhook(world.paid(other)))
        await node.webhooks.apply_due()
    assert (await world.purchase(one.purchase_id))["status"] == "pending"
    assert (await world.purchase(other.purchase_id))["status"] == "completed"
    assert await world.balance(merchant_id) == 500


# ---- what is bought


async def test_a_purchase_is_pending_in_the_database_before_shopify_is_asked(world: World) -> None:
    merchant_id = await world.merchant()
    world.shopify.misbehave(Act(is_late=True))
    async with world.node() as node:
        buying = asyncio.create_task(node.buy(merchant_id))
        await world.shopify.asked(1)
        (row,) = await world.purchases()
        assert (row["status"], row["platform_charge_id"]) == ("pending", None)
        assert row["reconcile_at"] == world.clock.now() + timedelta(minutes=1)
        world.shopify.release()
        await buying


async def test_a_pack_is_offered_at_its_price_with_the_purchases_id_in_the_charges_name(
    world: World,
) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        with capture_logs() as events:
            bought = await node.buy(merchant_id)
    (charge,) = world.shopify.charges
    assert bought.status == "pending"
    assert bought.platform_charge_id == charge.id
    assert bought.checkout_url is not None
    assert bought.checkout_url.startswith(world.shopify.url)
    assert bought.expires_at == world.clock.now() + timedelta(hours=24)
    assert (charge.amount, charge.currency, charge.test) == ("39.99", "USD", False)
    assert charge.return_url == "https://app.example.com/billing"
    assert str(bought.purchase_id) in charge.name
    assert world.shopify.versions == {"2026-10"}
    shown = f"{events} {bought}"
    assert not any(secret in shown for secret in world.shopify.secrets)
    assert "signature=" not in shown


async def test_a_purchase_keeps_the_price_that_it_was_begun_with(world: World) -> None:
    merchant_id = await world.merchant()
    hosts = frozenset({"app.example.com"})
    async with world.node() as node:
        bought = await node.buy(merchant_id)
    dearer = BillingSettings(packs={"medium": Pack(1, Money(99_99, "EUR"))}, return_hosts=hosts)
    async with world.node(settings=dearer) as node:
        await node.hear(world.shopify.webhook(world.paid(bought)))
        await node.webhooks.apply_due()
        other = await node.buy(merchant_id)
    assert await world.balance(merchant_id) == 500
    assert other.price.amount == "99.99"
    assert world.shopify.charges[-1].currency == "EUR"


async def test_a_payment_page_of_ones_own_needs_no_shop_and_is_called_from_nowhere(
    world: World,
) -> None:
    merchant_id = await world.merchant(installed=False)
    async with world.node() as node:
        bought = await node.buy(merchant_id, platform="custom")
    assert bought.checkout_url is not None
    assert bought.checkout_url.startswith("https://pay.example.com/?charge_id=")
    assert bought.platform_charge_id == str(bought.purchase_id)
    assert (await world.purchase(bought.purchase_id))["reconcile_at"] is None
    assert world.shopify.requests == []


# ---- reading


async def test_another_merchants_purchase_does_not_exist(world: World) -> None:
    merchant_id, other = await world.merchant(), await world.merchant()
    async with world.node() as node:
        bought = await node.buy(merchant_id)
        assert await node.billing.purchase_of(merchant_id, bought.purchase_id) == bought
        for whose, which in ((other, bought.purchase_id), (merchant_id, uuid4())):
            with pytest.raises(PurchaseNotFoundError):
                await node.billing.purchase_of(whose, which)
        assert (await node.billing.purchases(other, limit=50)).total == 0


@pytest.mark.parametrize("cursor", ["", "x", "äöü", "fA==", "MjAyNi0xMS0yMXwx", "A" * 200])
async def test_a_cursor_that_is_not_ours_is_refused(world: World, cursor: str) -> None:
    async with world.node() as node:
        with pytest.raises(InputError):
            await node.billing.purchases(uuid4(), limit=5, cursor=cursor)


async def test_purchases_are_paged_newest_first_by_number_and_by_cursor(world: World) -> None:
    merchant_id = await world.merchant()
    async with world.node() as node:
        bought = []
        for _ in range(7):
            bought.append(await node.buy(merchant_id, pack="small", platform="custom"))
            world.clock.advance(0.5)
        newest = [one.purchase_id for one in reversed(bought)]
        listed = node.billing.purchases
        first = await listed(merchant_id, limit=3)
        second = await listed(merchant_id, limit=3, cursor=first.next_cursor)
        last = await listed(merchant_id, limit=3, cursor=second.next_cursor)
        by_number = await listed(merchant_id, limit=3, page=2)
        overview = await node.billing.overview(merchant_id)
    pages = [[one.purchase_id for one in page.items] for page in (first, second, last)]
    assert pages == [newest[:3], newest[3:6], newest[6:]]
    assert by_number == second
    assert (first.total, last.next_cursor) == (7, None)
    assert [one.purchase_id for one in overview.recent_purchases] == newest[:5]
