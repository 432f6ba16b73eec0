"""The import of older bills on a real PostgreSQL: money as text, open purchases, repetitions."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from glamd.billing.importing.service import BillingImporter
from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.ledger.importing.merchant import OlderMerchant, OlderRow, Taken
from glamd.ledger.importing.service import CreditImporter
from glamd.ledger.verify import verify
from tests.support.billing_world import World
from tests.support.database_proxy import DatabaseProxy
from tests.support.older_money import (
    account,
    history,
    of_credits,
    purchase,
    purchase_id,
    record,
    usual,
)
from tests.support.older_service import merchant_id
from tests.support.postgres import execute
from tests.support.shopify import ShopifyStandIn

TABLES = "glam.billing_records, glam.credit_purchases, glam.imports, glam.outbox"
ANSWERS_LIMIT = 100
NOW = datetime(2025, 11, 12, 10, 30, tzinfo=UTC)
"""Long after all that happened at the older service."""

WRONG_PURCHASES: tuple[tuple[str, str | None], ...] = (
    ("id", "7"),
    ("credits", "0"),
    ("credits", "-1"),
    ("credits", "1.5"),
    ("amount", "9.999"),
    ("amount", "-9.99"),
    ("amount", "$9.99"),
    ("amount", "9,99"),
    ("amount", ""),
    ("amount", "1e3"),
    ("status", "refunded"),
    ("status", None),
    ("platform", "paypal"),
    ("platform_charge_id", "two words"),
    ("created_at", None),
    ("created_at", "soon"),
    ("completed_at", None),
    ("expires_at", "infinity"),
)
MONEY: tuple[tuple[str, str | None, int], ...] = (
    ("9.99", None, 999),
    ("9.9", None, 990),
    ("10", "usd", 1000),
    ("9.9900000000000000", "EUR", 999),
    ("100.00", "EUR", 10000),
    ("0.00", None, 0),
    (" 39.99 ", None, 3999),
    ("500", "JPY", 500),
)


@pytest.fixture
async def world(module_database_url: str) -> AsyncIterator[World]:
    """A world of billing with nothing in it."""
    await execute(module_database_url, f"TRUNCATE {TABLES}")
    async with World.make(module_database_url, shopify=ShopifyStandIn()) as world:
        world.clock.set(NOW)
        yield world


@pytest.fixture
def importer(world: World) -> BillingImporter:
    """An importer on the same database, with the same clock."""
    return BillingImporter(world.database, clock=world.clock)


def of_bills(
    number: int, *purchases: OlderRow, heads: Sequence[OlderRow] | None = None
) -> OlderMerchant:
    """One merchant's bills; with the usual record where none is given."""
    found = of_credits([record(number)] if heads is None else heads, purchases)
    return OlderMerchant(
        merchant_id=str(merchant_id(number)), heads=found.heads, chunks=found.chunks
    )


async def record_of(world: World, number: int) -> Any:
    """The merchant's record as it stands in the table."""
    return await world.database.fetchrow(
        "SELECT * FROM glam.billing_records WHERE merchant_id = $1", merchant_id(number)
    )


async def purchases_of(world: World, number: int) -> list[Any]:
    """The merchant's purchases as they stand in the table."""
    return await world.database.fetch(
        "SELECT * FROM glam.credit_purchases WHERE merchant_id = $1"
        " ORDER BY created_at, purchase_id",
        merchant_id(number),
    )


async def balance_of(world: World, number: int) -> int:
    """The merchant's balance as it stands in the table."""
    return int(
        await world.database.fetchval(
            "SELECT balance FROM glam.credit_accounts WHERE merchant_id = $1", merchant_id(number)
        )
    )


def wrong(taken: Taken) -> list[tuple[str, str, str]]:
    """Table, id and field of what was refused."""
    assert taken.outcome == "refused"
    return [(each.table, each.id, each.field) for each in taken.refused]


class TestWrongRows:
    """A merchant with a wrong row is left out, whole, and the row is named."""

    async def test_a_wrong_field_is_named_with_its_row_and_nothing_is_written(
        self, world: World, importer: BillingImporter
    ) -> None:
        for field, value in WRONG_PURCHASES:
            row = purchase(1, 1, **{field: value})
            taken = await importer.take(of_bills(1, purchase(1, 0), row))
            named = str(value) if field == "id" else str(purchase_id(1, 1))
            assert wrong(taken) == [("purchases", named, field)], (field, value)
        assert await record_of(world, 1) is None
        assert await purchases_of(world, 1) == []

    async def test_a_wrong_record_is_named(self, world: World, importer: BillingImporter) -> None:
        for changes, field in (
            ({"trial_ends_at": None}, "trial_ends_at"),
            ({"trial_started_at": None}, "trial_started_at"),
            ({"credits_purchased": "-1"}, "credits_purchased"),
        ):
            taken = await importer.take(of_bills(1, heads=[record(1, **changes)]))
            assert wrong(taken) == [("billing_records", str(merchant_id(1)), field)]
        twice = await importer.take(of_bills(1, heads=[record(1), record(1)]))
        assert wrong(twice) == [("billing_records", str(merchant_id(1)), "merchant_id")]
        assert await record_of(world, 1) is None

    async def test_a_charge_or_an_id_of_another_merchants_is_refused(
        self, world: World, importer: BillingImporter
    ) -> None:
        await importer.take(of_bills(1, purchase(1)))
        charge = purchase(2, platform_charge_id=purchase(1)["platform_charge_id"])
        assert wrong(await importer.take(of_bills(2, charge)))[0][2] == "platform_charge_id"
        same_id = purchase(2, id=str(purchase_id(1, 0)))
        assert wrong(await importer.take(of_bills(2, same_id)))[0][2] == "id"
        assert len(await purchases_of(world, 1)) == 1
        assert await record_of(world, 2) is None


class TestBills:
    """What comes over."""

    async def test_money_is_exact(self, world: World, importer: BillingImporter) -> None:
        for number, (amount, currency, minor) in enumerate(MONEY):
            row = purchase(number, amount=amount, currency=currency)
            taken = await importer.take(of_bills(number, row))
            (found,) = await purchases_of(world, number)
            expected = (minor, (currency or "USD").upper())
            assert (found["amount_minor"], found["currency"]) == expected
            assert taken.figures[f"amount_{expected[1]}"] == minor

    async def test_ids_states_and_times_are_kept_and_counted(
        self, world: World, importer: BillingImporter
    ) -> None:
        rows = [
            purchase(1, 0),
            purchase(1, 1, status="FAILED", completed_at=None, created_at="2024-06-03 00:00:00"),
            purchase(1, 2, status="expired", completed_at=None, created_at="2024-06-04 00:00:00"),
        ]
        assert (await importer.take(of_bills(1, *rows))).outcome == "taken"
        found = await purchases_of(world, 1)
        assert [row["purchase_id"] for row in found] == [purchase_id(1, n) for n in range(3)]
        assert [row["status"] for row in found] == ["completed", "failed", "expired"]
        assert [row["reconcile_at"] for row in found] == [None] * 3
        assert (found[0]["pack"], found[0]["completed_at"]) == (
            "small",
            datetime(2024, 6, 1, 10, tzinfo=UTC),
        )
        stands = await record_of(world, 1)
        assert (stands["purchase_count"], stands["credits_purchased"]) == (3, 100)
        assert stands["created_at"] == datetime(2024, 5, 1, 8, tzinfo=UTC)

    async def test_purchases_without_a_record_get_one(
        self, world: World, importer: BillingImporter
    ) -> None:
        await importer.take(of_bills(1, purchase(1, 0), purchase(1, 1), heads=[]))
        stands = await record_of(world, 1)
        assert (stands["purchase_count"], stands["credits_purchased"]) == (2, 200)
        assert stands["trial_started_at"] is None

    async def test_a_total_that_is_not_that_of_the_purchases_is_told_or_refused(
        self, world: World, importer: BillingImporter
    ) -> None:
        merchant = of_bills(1, purchase(1), heads=[record(1, credits_purchased="150")])
        named = ("billing_records", str(merchant_id(1)), "credits_purchased")
        assert wrong(await importer.take(merchant, strict=True)) == [named]
        taken = await importer.take(merchant)
        assert taken.notes == {"credits_purchased_differs_by": 50}
        assert (await record_of(world, 1))["credits_purchased"] == 150

    async def test_a_trial_that_was_over_is_not_told_of_again_and_one_that_runs_ends_here(
        self, world: World, importer: BillingImporter
    ) -> None:
        ends_at = world.clock.now() + timedelta(days=1)
        await importer.take(of_bills(1))
        await importer.take(of_bills(2, heads=[record(2, trial_ends_at=ends_at.isoformat())]))
        async with world.node() as node:
            assert (await node.jobs.expire_now()).trials == 0
            world.clock.advance(86_401)
            assert (await node.jobs.expire_now()).trials == 1
            assert not (await node.billing.trial(merchant_id(1))).available
        assert (await record_of(world, 1))["trial_expired_at"] == datetime(
            2024, 5, 15, 8, tzinfo=UTC
        )
        told = await world.database.fetch("SELECT merchant_id FROM glam.outbox")
        assert [row["merchant_id"] for row in told] == [merchant_id(2)]


class TestOpenPurchases:
    """What was pending there is glamd's from now on."""

    async def test_what_may_still_be_paid_is_asked_about_and_nothing_else(
        self, world: World, importer: BillingImporter
    ) -> None:
        now = world.clock.now()
        lately = (now - timedelta(hours=30)).isoformat()
        rows = [
            purchase(1, 0),
            purchase(1, 1, status="pending", completed_at=None, created_at=lately),
            purchase(1, 2, status="expired", completed_at=None, created_at=lately),
            purchase(1, 3, status="expired", completed_at=None),
            purchase(1, 4, status="pending", completed_at=None, platform="custom"),
            purchase(1, 5, status="failed", completed_at=None, created_at=lately),
        ]
        await importer.take(of_bills(1, *rows))
        asked = {
            row["purchase_id"]
            for row in await purchases_of(world, 1)
            if row["reconcile_at"] == now + timedelta(minutes=1)
        }
        assert asked == {purchase_id(1, 1), purchase_id(1, 2)}

    async def test_a_pending_purchase_is_completed_by_its_charges_event_and_granted_once(
        self, world: World, importer: BillingImporter
    ) -> None:
        pending = purchase(1, status="pending", completed_at=None)
        await importer.take(of_bills(1, pending))
        async with world.node() as node:
            credits_ = CreditImporter(world.database, ledger=node.ledger, clock=world.clock)
            moves = usual(1)[:1]
            await credits_.take(of_credits([account(1, 500)], history(1, *moves)))
            for _ in range(2):
                await node.billing.charge_updated(
                    charge_id=pending["platform_charge_id"] or "",
                    status="ACTIVE",
                    merchant_id=merchant_id(1),
                    correlation_id="c",
                )
            assert await balance_of(world, 1) == 600
        assert (await importer.take(of_bills(1, purchase(1)))).outcome == "moved_on"
        assert (await verify(world.database)).broken == ()

    async def test_a_purchase_that_was_completed_there_is_not_granted_again(
        self, world: World, importer: BillingImporter
    ) -> None:
        await importer.take(of_bills(1, purchase(1)))
        async with world.node() as node:
            credits_ = CreditImporter(world.database, ledger=node.ledger, clock=world.clock)
            await credits_.take(of_credits([account(1, 597)], history(1, *usual(1))))
            again = await node.billing.credits_bought_elsewhere(
                merchant_id(1), purchase_id=str(purchase_id(1, 0)), credits=100, correlation_id="c"
            )
            trial = await node.billing.trial_elsewhere(
                merchant_id(1), ends_at=world.clock.now(), credits=500, correlation_id="c"
            )
            assert (again, trial) == (False, False)
            assert await balance_of(world, 1) == 597


class TestAgain:
    """The same merchant again, changed there or here meanwhile, or after a cut."""

    async def test_the_same_again_and_what_was_added_there(
        self, world: World, importer: BillingImporter
    ) -> None:
        first = await importer.take(of_bills(1, purchase(1)))
        again = await importer.take(of_bills(1, purchase(1)))
        assert (again.outcome, again.figures) == ("already", first.figures)
        more = of_bills(1, purchase(1), purchase(1, 1), heads=[record(1, credits_purchased="200")])
        assert (await importer.take(more)).outcome == "updated"
        stands = await record_of(world, 1)
        assert (stands["purchase_count"], stands["credits_purchased"]) == (2, 200)
        empty = {"trial_started_at": None, "trial_ends_at": None, "last_purchase_at": None}
        nothing = record(2, credits_purchased="0", **empty)
        outcomes = [(await importer.take(of_bills(2, heads=[nothing]))).outcome for _ in range(2)]
        assert outcomes == ["taken", "already"]

    async def test_what_has_moved_here_is_left_alone_unless_it_moved_alike(
        self, world: World, importer: BillingImporter
    ) -> None:
        lately = world.clock.now().isoformat()
        open_ = purchase(1, status="pending", completed_at=None, expires_at=lately)
        await importer.take(of_bills(1, open_))
        async with world.node() as node:
            assert (await node.jobs.expire_now()).purchases == 1
        expired = open_ | {"status": "expired"}
        assert (await importer.take(of_bills(1, expired))).outcome == "already"
        failed = open_ | {"status": "failed"}
        assert (await importer.take(of_bills(1, failed))).outcome == "updated"
        assert (await importer.take(of_bills(1, expired, purchase(1, 1)))).outcome == "updated"
        await world.database.execute(
            "UPDATE glam.credit_purchases SET status = 'failed', completed_at = NULL"
        )
        assert (await importer.take(of_bills(1, expired))).outcome == "moved_on"
        assert len(await purchases_of(world, 1)) == 2

    async def test_a_trial_that_began_here_is_not_overwritten(
        self, world: World, importer: BillingImporter
    ) -> None:
        async with world.node() as node:
            async with world.database.transaction() as connection:
                await node.billing.merchant_created(connection, merchant_id(1))
                await node.ledger.open_account(
                    connection,
                    merchant_id=merchant_id(1),
                    platform_name="shopify",
                    platform_id="1",
                    platform_domain="a.example",
                )
            await node.billing.start_trial(merchant_id(1), correlation_id="c")
        before = await record_of(world, 1)
        assert (await importer.take(of_bills(1))).outcome == "moved_on"
        assert await record_of(world, 1) == before

    async def test_wherever_it_is_cut_all_is_there_or_nothing(
        self, world: World, importer: BillingImporter, module_database_url: str
    ) -> None:
        outcomes: set[str] = set()
        for step in range(1, ANSWERS_LIMIT):
            async with DatabaseProxy(module_database_url) as proxy:
                behind = await Database.connect(proxy.url, pool_size=1)
                cut = BillingImporter(behind, clock=world.clock)
                proxy.lose_answer = step
                try:
                    await cut.take(of_bills(step, purchase(step)))
                except UnavailableError:
                    pass
                else:
                    outcomes.add("whole")
                await behind.close()
            stands = await record_of(world, step)
            assert len(await purchases_of(world, step)) == (0 if stands is None else 1)
            again = (await importer.take(of_bills(step, purchase(step)))).outcome
            assert again == ("taken" if stands is None else "already")
            if "whole" in outcomes:
                break
            outcomes.add(again)
        assert outcomes == {"taken", "already", "whole"}

    async def test_a_dry_run_leaves_no_trace(self, world: World, importer: BillingImporter) -> None:
        tried = await importer.take(of_bills(1, purchase(1)), dry_run=True)
        assert await record_of(world, 1) is None
        assert not await world.database.fetchval("SELECT count(*) FROM glam.imports")
        assert await importer.take(of_bills(1, purchase(1))) == tried
