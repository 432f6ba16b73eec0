"""Trials and purchases of another billing service, on a real database: each once, and on record."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import pytest

from glamd.billing.model import MerchantNotFoundError, TrialAlreadyUsedError
from glamd.errors import InputError, UnavailableError
from glamd.ledger.model import AccountNotFoundError, DuplicateTransactionError
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy

DAY = timedelta(days=1)
FIRST = datetime.fromisoformat("0001-01-01T00:00:00+00:00")
LAST = datetime.fromisoformat("9999-12-31T23:59:59.999999+00:00")


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


async def tried(
    world: World, node: Node, merchant_id: UUID, credits_: int | None = None, days: float = 7
) -> bool:
    """Another billing service says that it has begun the merchant's trial."""
    return await node.billing.trial_elsewhere(
        merchant_id,
        ends_at=world.clock.now() + days * DAY,
        credits=credits_,
        correlation_id="c-1",
    )


async def bought(node: Node, merchant_id: UUID, purchase_id: str, credits_: int = 500) -> bool:
    """Another billing service says that it has sold the merchant credits."""
    return await node.billing.credits_bought_elsewhere(
        merchant_id, purchase_id=purchase_id, credits=credits_, correlation_id="c-1"
    )


async def state(world: World, node: Node, merchant_id: UUID) -> tuple[int, int, bool]:
    """The balance, the credits that count as bought, and whether there is a day of a purchase."""
    overview = await node.billing.overview(merchant_id)
    balance = await world.balance(merchant_id)
    return balance, overview.credits_purchased, overview.last_purchase_at is not None


# ---- trials


@pytest.mark.parametrize("is_trial", [True, False])
async def test_what_was_had_by_a_merchant_that_is_not_known_yet_leaves_no_trace_and_comes_again(
    world: World, node: Node, *, is_trial: bool
) -> None:
    async def tell(merchant_id: UUID) -> bool:
        if is_trial:
            return await tried(world, node, merchant_id)
        return await bought(node, merchant_id, "p-1")

    merchant_id = uuid4()
    with pytest.raises(MerchantNotFoundError):
        await tell(merchant_id)
    async with node.database.transaction() as connection:
        await node.billing.merchant_created(connection, merchant_id)
    with pytest.raises(AccountNotFoundError):
        await tell(merchant_id)
    overview = await node.billing.overview(merchant_id)
    assert overview.trial.available
    assert (overview.credits_purchased, overview.last_purchase_at) == (0, None)
    async with node.database.transaction() as connection:
        await node.ledger.open_account(
            connection,
            merchant_id=merchant_id,
            platform_name="shopify",
            platform_id="1",
            platform_domain="a.myshopify.com",
        )
    assert await tell(merchant_id)


@pytest.mark.parametrize("credits_", [0, -1, 2**53])
async def test_a_trial_of_impossible_credits_leaves_no_trace(
    world: World, node: Node, credits_: int
) -> None:
    merchant_id = await world.merchant()
    with pytest.raises(InputError):
        await tried(world, node, merchant_id, credits_)
    with pytest.raises(InputError):
        await bought(node, merchant_id, "p-1", credits_)
    assert (await node.billing.trial(merchant_id)).available
    assert await state(world, node, merchant_id) == (0, 0, False)


async def test_a_trial_elsewhere_is_the_merchants_trial_once_and_tells_nothing_of_its_beginning(
    world: World, node: Node
) -> None:
    merchant_id = await world.merchant()
    began = world.clock.now()
    assert await tried(world, node, merchant_id)
    world.clock.advance(60)
    for credits_ in (None, 500, 7):
        assert not await tried(world, node, merchant_id, credits_, days=30)
    trial = await node.billing.trial(merchant_id)
    assert (trial.available, trial.active) == (False, True)
    assert (trial.started_at, trial.ends_at) == (began, began + 7 * DAY)
    with pytest.raises(TrialAlreadyUsedError):
        await node.billing.start_trial(merchant_id, correlation_id="c-2")
    assert await world.balance(merchant_id) == 500
    assert await world.events("billing.trial.started") == []
    assert len(await world.events("credits.granted")) == 1


@pytest.mark.parametrize("end", [FIRST, LAST])
async def test_a_trial_that_ends_at_an_end_of_the_calendar_can_be_looked_at_ever_after(
    world: World, node: Node, end: datetime
) -> None:
    merchant_id = await world.merchant()
    await node.billing.trial_elsewhere(merchant_id, ends_at=end, credits=None, correlation_id="c")
    trial = await node.billing.trial(merchant_id)
    assert (trial.available, trial.active) == (False, end == LAST)
    assert (await node.billing.overview(merchant_id)).trial == trial
    assert (await node.jobs.expire_now()).trials == (end == FIRST)
    for event in await world.events("billing.trial.expired"):
        assert datetime.fromisoformat(event["expired_at"]).tzinfo is not None


@pytest.mark.parametrize("end", ["infinity", "-infinity"])
async def test_a_trial_whose_end_came_into_the_table_as_an_infinity_is_a_trial_like_any_other(
    world: World, node: Node, end: str
) -> None:
    merchant_id = await world.merchant()
    await world.database.execute(
        "UPDATE glam.billing_records SET trial_started_at = now(), trial_ends_at = $2::text::"
        "timestamptz WHERE merchant_id = $1",
        merchant_id,
        end,
    )
    assert (await node.billing.trial(merchant_id)).active == (end == "infinity")
    assert (await node.jobs.expire_now()).trials == (end == "-infinity")


async def test_a_trial_here_is_not_changed_by_one_elsewhere(world: World, node: Node) -> None:
    merchant_id = await world.merchant()
    await node.billing.start_trial(merchant_id, correlation_id="c")
    before = await node.billing.trial(merchant_id)
    assert not await tried(world, node, merchant_id, 900)
    assert await node.billing.trial(merchant_id) == before
    assert await world.balance(merchant_id) == 500


async def test_a_trial_elsewhere_ends_here_once_also_if_it_is_over_when_we_hear_of_it(
    world: World, node: Node
) -> None:
    running, over = await world.merchant(), await world.merchant()
    now = world.clock.now()
    await tried(world, node, running, 70)
    await tried(world, node, over, days=-2)
    trial = await node.billing.trial(over)
    assert (trial.active, trial.started_at, trial.ends_at) == (False, now - 2 * DAY, now - 2 * DAY)
    for _ in range(3):
        await node.jobs.expire_now()
        await tried(world, node, running, 70)
        await tried(world, node, over, days=-2)
        world.clock.advance(DAY.total_seconds() * 8)
    assert await world.events("billing.trial.expired") == [
        {"merchant_id": str(over), "expired_at": (now - 2 * DAY).isoformat()},
        {"merchant_id": str(running), "expired_at": (now + 7 * DAY).isoformat()},
    ]
    assert await world.balance(running) == 70


async def test_a_trial_here_and_one_elsewhere_at_once_are_one_trial(world: World) -> None:
    async with world.node() as one, world.node() as other:
        for _ in range(5):
            merchant_id = await world.merchant()
            results = await asyncio.gather(
                one.billing.start_trial(merchant_id, correlation_id="c"),
                tried(world, other, merchant_id, 300),
                tried(world, one, merchant_id, 300),
                other.billing.start_trial(merchant_id, correlation_id="c"),
                return_exceptions=True,
            )
            assert all(
                isinstance(each, TrialAlreadyUsedError) or not isinstance(each, BaseException)
                for each in results
            )
            assert await world.balance(merchant_id) in {300, 500}
            assert not (await one.billing.trial(merchant_id)).available


# ---- purchases


async def test_a_purchase_elsewhere_is_granted_and_counted_once_however_it_is_written(
    world: World, node: Node
) -> None:
    merchant_id, purchase_id = await world.merchant(), str(uuid4())
    assert await bought(node, merchant_id, purchase_id.upper())
    for again in (purchase_id, purchase_id.upper()):
        assert not await bought(node, merchant_id, again)
    assert await bought(node, merchant_id, "an id of its own")
    assert await state(world, node, merchant_id) == (1000, 1000, True)
    with pytest.raises(DuplicateTransactionError):
        await bought(node, merchant_id, purchase_id, 7)
    assert await state(world, node, merchant_id) == (1000, 1000, True)
    assert await world.events("billing.credits.purchased") == []
    assert (await node.billing.purchases(merchant_id, limit=1)).total == 0


async def test_our_own_purchase_has_no_second_effect(world: World, node: Node) -> None:
    merchant_id = await world.merchant()
    purchase = await node.buy(merchant_id)
    await node.hear(world.shopify.webhook(world.paid(purchase)))
    await node.webhooks.apply_due()
    assert not await bought(node, merchant_id, str(purchase.purchase_id))
    assert await state(world, node, merchant_id) == (500, 500, True)


async def test_a_purchase_that_we_hold_open_is_completed_by_it_and_stays_so(
    world: World, node: Node
) -> None:
    merchant_id = await world.merchant()
    purchase = await node.buy(merchant_id)
    assert await bought(node, merchant_id, str(purchase.purchase_id))
    row = await world.purchase(purchase.purchase_id)
    assert (row["status"], row["reconcile_at"]) == ("completed", None)
    await node.hear(world.shopify.webhook(world.paid(purchase)))
    await node.webhooks.apply_due()
    assert await world.outcomes() == ["unchanged"]
    assert await state(world, node, merchant_id) == (500, 500, True)
    assert await world.events("billing.credits.purchased") == []


@pytest.mark.parametrize("wrong", ["merchant_id", "credits"])
async def test_a_purchase_of_ours_that_is_told_otherwise_has_no_effect(
    world: World, node: Node, wrong: str
) -> None:
    merchant_id, other_id = await world.merchant(), await world.merchant()
    purchase_id = (await node.buy(merchant_id)).purchase_id
    is_merchant = wrong == "merchant_id"
    teller = other_id if is_merchant else merchant_id
    with pytest.raises(InputError) as caught:
        await bought(node, teller, str(purchase_id), 500 if is_merchant else 501)
    assert [error.field for error in caught.value.fields] == [wrong]
    assert (await world.purchase(purchase_id))["status"] == "pending"
    for each in (merchant_id, other_id):
        assert await state(world, node, each) == (0, 0, False)


async def test_a_purchase_that_was_told_before_it_was_brought_over_counts_once(
    world: World, node: Node
) -> None:
    # The event is faster than the import, which then brings the purchase as one that is open.
    merchant_id = await world.merchant()
    purchase = await node.buy(merchant_id)
    sql = "UPDATE glam.credit_purchases SET purchase_id = $2 WHERE purchase_id = $1"
    hidden = uuid4()
    await world.database.execute(sql, purchase.purchase_id, hidden)
    assert await bought(node, merchant_id, str(purchase.purchase_id))
    await world.database.execute(sql, hidden, purchase.purchase_id)
    await node.hear(world.shopify.webhook(world.paid(purchase)))
    await node.webhooks.apply_due()
    assert await world.outcomes() == ["completed"]
    assert await state(world, node, merchant_id) == (500, 500, True)


async def test_told_at_once_by_everybody_a_purchase_is_one(world: World) -> None:
    async with world.node() as one, world.node() as other:
        for _ in range(3):
            merchant_id = await world.merchant()
            purchase = await one.buy(merchant_id)
            await one.hear(world.shopify.webhook(world.paid(purchase)))
            told = await asyncio.gather(
                bought(one, merchant_id, str(purchase.purchase_id)),
                other.webhooks.apply_due(),
                bought(other, merchant_id, str(purchase.purchase_id)),
                bought(other, merchant_id, "another"),
            )
            assert told[3]
            assert await state(world, one, merchant_id) == (1000, 1000, True)


@pytest.mark.parametrize("is_trial", [True, False])
async def test_it_is_there_whole_or_not_at_all_wherever_the_connection_breaks(
    world: World, *, is_trial: bool
) -> None:
    broken = 0
    async with DatabaseProxy(world.url) as proxy, world.node(url=proxy.url) as node:

        async def tell() -> bool:
            if is_trial:
                return await tried(world, node, merchant_id)
            return await bought(node, merchant_id, str(merchant_id))

        is_done = False
        while not is_done:
            merchant_id = await world.merchant()
            proxy.lose_answer = broken + 1
            try:
                is_done = await tell()
            except UnavailableError:
                broken += 1
            proxy.lose_answer = 0
            balance, counted, is_dated = await state(world, node, merchant_id)
            trial = await node.billing.trial(merchant_id)
            assert balance in {0, 500}
            if is_trial:
                assert trial.available == (balance == 0)
            else:
                assert (counted, is_dated) == (balance, balance > 0)
            assert await tell() == (balance == 0)
            assert await world.balance(merchant_id) == 500
    assert broken > 4
