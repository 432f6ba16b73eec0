"""The import of older accounts on a real PostgreSQL: wrong rows, races' remains, cuts, repeats."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.ledger.importing.merchant import OlderMerchant, Taken
from glamd.ledger.importing.service import CreditImporter
from glamd.ledger.model import DuplicateTransactionError, InsufficientCreditsError, Operation
from glamd.ledger.verify import verify
from tests.support import ledgers
from tests.support.database_proxy import DatabaseProxy
from tests.support.ledgers import Node
from tests.support.older_money import (
    Row,
    account,
    history,
    of_credits,
    purchase_id,
    transaction_id,
    usual,
    whole,
)
from tests.support.older_service import merchant_id
from tests.support.postgres import execute
from tests.support.settable_clock import SettableClock

TABLES = "glam.credit_accounts, glam.credit_transactions, glam.imports, glam.outbox"
MANY = 2_500
ANSWERS_LIMIT = 100
WRONG_TRANSACTIONS: tuple[tuple[str, str | None], ...] = (
    ("id", "17"),
    ("id", None),
    ("amount", "0"),
    ("amount", "-5"),
    ("amount", "1.50"),
    ("amount", "a lot"),
    ("amount", str(2**53)),
    ("amount", None),
    ("operation", "hold"),
    ("operation", None),
    ("balance_before", "many"),
    ("reference_type", None),
    ("reference_id", ""),
    ("reference_id", "x" * 256),
    ("reference_id", "two\nlines"),
    ("metadata", "[1]"),
    ("metadata", "{"),
    ("metadata", '{"a": "\\u0000"}'),
    ("created_at", None),
    ("created_at", "infinity"),
    ("created_at", "yesterday"),
    ("created_at", "2023-01-01 00:00:00"),
)
WRONG_ACCOUNTS: tuple[tuple[str, str | None], ...] = (
    ("balance", "12.5"),
    ("balance", None),
    ("platform_name", ""),
    ("platform_domain", None),
    ("total_granted", "NaN"),
    ("created_at", "0001-01-01 00:00:00"),
)


@pytest.fixture
async def here(module_database_url: str) -> AsyncIterator[Node]:
    """A node; afterwards the books are right, and no event tells of an import."""
    await execute(module_database_url, f"TRUNCATE {TABLES}")
    async with ledgers.node(module_database_url) as node:
        yield node
        assert (await verify(node.database)).broken == ()
        assert not await node.database.fetchval(
            "SELECT count(*) FROM glam.outbox WHERE correlation_id LIKE '%import%'"
        )


@pytest.fixture
def importer(here: Node) -> CreditImporter:
    """The node's importer."""
    return CreditImporter(here.database, ledger=here.ledger, clock=SettableClock())


async def rows_of(here: Node, number: int) -> list[Any]:
    """The merchant's transactions as they stand in the table."""
    return await here.database.fetch(
        "SELECT * FROM glam.credit_transactions WHERE merchant_id = $1 ORDER BY seq",
        merchant_id(number),
    )


async def is_untouched(here: Node) -> bool:
    """Whether there is no trace of any import."""
    found = [await here.database.fetchval(f"SELECT count(*) FROM {t}") for t in TABLES.split(", ")]
    return not any(found)


def changed(number: int, place: int, **changes: str | None) -> OlderMerchant:
    """The usual merchant with one of its transactions changed."""
    rows = history(number, *usual(number))
    rows[place] |= changes
    return of_credits([account(number, 597)], rows)


def wrong(taken: Taken) -> list[tuple[str, str, str]]:
    """Table, id and field of what was refused."""
    assert taken.outcome == "refused"
    return [(each.table, each.id, each.field) for each in taken.refused]


class TestWrongRows:
    """A merchant with a wrong row is left out, whole, and the row is named."""

    async def test_a_wrong_field_is_named_with_its_row_and_nothing_is_written(
        self, here: Node, importer: CreditImporter
    ) -> None:
        for field, value in WRONG_TRANSACTIONS:
            taken = await importer.take(changed(1, 3, **{field: value}))
            named = str(value or "") if field == "id" else str(transaction_id(1, 3))
            assert wrong(taken) == [("credit_transactions", named, field)], (field, value)
        for field, value in WRONG_ACCOUNTS:
            taken = await importer.take(of_credits([account(1, 0) | {field: value}], []))
            assert wrong(taken) == [("credit_accounts", str(merchant_id(1)), field)], (field, value)
        assert await is_untouched(here)

    async def test_all_that_is_wrong_is_named_at_once_up_to_a_limit(
        self, importer: CreditImporter
    ) -> None:
        rows = [row | {"amount": "0"} for row in history(1, *usual(1, 40))]
        found = wrong(await importer.take(of_credits([account(1, 0) | {"balance": "x"}], rows)))
        assert (len(found), found[0][2], found[1][2]) == (20, "balance", "amount")

    async def test_transactions_without_an_account_and_two_accounts_are_refused(
        self, here: Node, importer: CreditImporter
    ) -> None:
        rows = history(1, *usual(1))
        named = ("credit_transactions", str(merchant_id(1)), "merchant_id")
        assert wrong(await importer.take(of_credits([], rows))) == [named]
        twice = of_credits([account(1, 5), account(1, 6)], rows)
        assert wrong(await importer.take(twice)) == [("credit_accounts", *named[1:])]
        nobody = of_credits([account(1, 5, merchant_id="nobody")], [])
        assert wrong(await importer.take(nobody)) == [("credit_accounts", "nobody", "merchant_id")]
        assert await is_untouched(here)

    async def test_an_id_that_another_merchant_has_is_refused_and_the_other_one_stays(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(whole(1))
        before = await rows_of(here, 1)
        stolen = changed(2, 4, id=str(transaction_id(1, 4)))
        assert wrong(await importer.take(stolen))[0][2] == "id"
        assert await rows_of(here, 1) == before
        assert await rows_of(here, 2) == []
        assert (await importer.take(whole(2))).outcome == "taken"


class TestBooks:
    """What comes over, and how it is made to balance."""

    async def test_ids_references_amounts_and_times_are_kept_and_numbered(
        self, here: Node, importer: CreditImporter
    ) -> None:
        taken = await importer.take(whole(1))
        assert (taken.outcome, taken.notes) == (
            "taken",
            {"total_granted_differs_by": 3, "total_consumed_differs_by": 3},
        )
        found = await rows_of(here, 1)
        assert [row["id"] for row in found] == [transaction_id(1, place) for place in range(5)]
        assert [row["seq"] for row in found] == [1, 2, 3, 4, 5]
        assert [row["reference_id"] for row in found] == [move[2] for move in usual(1)]
        assert found[0]["created_at"] == datetime(2024, 5, 1, 0, 0, 0, 500_000, tzinfo=UTC)
        assert found[4]["metadata"] == {"place": 4}
        shown = await here.ledger.account(merchant_id(1))
        assert (shown.balance, shown.total_granted, shown.total_consumed) == (597, 600, 3)
        assert shown.platform_domain == "shop-1.myshopify.com"

    async def test_an_event_that_comes_again_has_no_second_effect(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(changed(1, 1, reference_id=str(purchase_id(1, 0)).upper()))
        for amount, reference_type, reference in usual(1):
            operation: Operation = "credit" if amount > 0 else "debit"
            again = ledgers.command(
                merchant_id(1), operation, abs(amount), reference, reference_type=reference_type
            )
            assert (await here.ledger.apply(again)).replayed
        other = ledgers.command(merchant_id(1), "debit", 2, "m-1-0")
        with pytest.raises(DuplicateTransactionError):
            await here.ledger.apply(other)
        assert (await here.ledger.account(merchant_id(1))).balance == 597
        new = await here.ledger.apply(ledgers.command(merchant_id(1), "debit", 7, "new"))
        assert (new.balance, new.transaction.seq) == (590, 6)

    async def test_debits_that_raced_below_zero_get_an_opening_and_the_balance_stays_as_shown(
        self, here: Node, importer: CreditImporter
    ) -> None:
        # Two debits of 3 went through at a balance of 4; the second one's write won.
        rows = history(1, (4, "purchase", "p"), (-3, "match", "a"), (-3, "match", "b"))
        rows[2] |= {"balance_before": "4", "balance_after": "1"}
        merchant = of_credits([account(1, 1)], rows)
        refused = await importer.take(merchant, strict=True)
        assert wrong(refused) == [("credit_accounts", str(merchant_id(1)), "balance")]
        assert await is_untouched(here)
        taken = await importer.take(merchant)
        assert taken.notes["opening"] == 2
        assert taken.notes["closing"] == 1
        found = await rows_of(here, 1)
        assert [(row["reference_type"], row["reference_id"]) for row in (found[0], found[-1])] == [
            ("import", f"OPENING_{merchant_id(1)}"),
            ("import", f"ADJUSTMENT_{merchant_id(1)}"),
        ]
        assert [row["balance_after"] for row in found] == [2, 6, 3, 0, 1]
        assert [row["amount"] for row in found[1:4]] == [4, 3, 3]

    @pytest.mark.parametrize(
        ("balance", "opening", "closing", "shown"),
        [(50, 0, -47, 50), (100, 0, 3, 100), (-5, 0, -97, 0), (97, 0, 0, 97)],
    )
    async def test_the_balance_that_was_shown_is_what_counts(
        self,
        here: Node,
        importer: CreditImporter,
        balance: int,
        opening: int,
        closing: int,
        shown: int,
    ) -> None:
        rows = history(1, (100, "purchase", "p"), (-3, "match", "a"))
        taken = await importer.take(of_credits([account(1, balance)], rows))
        assert (taken.figures["opening"], taken.figures["closing"]) == (opening, closing)
        assert (await here.ledger.account(merchant_id(1))).balance == shown

    async def test_a_history_whose_beginning_was_deleted_begins_with_what_there_was(
        self, here: Node, importer: CreditImporter
    ) -> None:
        rows = history(1, (-3, "match", "a"), (-4, "match", "b"), begins_with=70)
        taken = await importer.take(of_credits([account(1, 63)], rows))
        assert (taken.figures["opening"], taken.figures["closing"]) == (70, 0)
        assert "rechained" not in taken.notes
        assert [row["balance_after"] for row in await rows_of(here, 1)] == [70, 67, 63]

    async def test_a_balance_without_transactions_is_one_adjustment(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(of_credits([account(1, 40)], []))
        await importer.take(of_credits([account(2, 0)], []))
        assert [row["amount"] for row in await rows_of(here, 1)] == [40]
        assert await rows_of(here, 2) == []
        assert (await here.ledger.account(merchant_id(2))).balance == 0

    async def test_a_reference_that_had_two_effects_stays_the_first_ones(
        self, here: Node, importer: CreditImporter
    ) -> None:
        long = "x" * 255
        moves = [(9, "purchase", "p"), *[(-1, "match", "twice")] * 3, *[(-1, "match", long)] * 2]
        merchant = of_credits([account(1, 4)], history(1, *moves))
        refused = wrong(await importer.take(merchant, strict=True))
        assert refused == [("credit_transactions", str(merchant_id(1)), "reference_id")]
        taken = await importer.take(merchant)
        assert taken.notes["renamed"] == 3
        assert not taken.figures["added"]
        found = [row["reference_id"] for row in await rows_of(here, 1)]
        assert found[1:4] == [
            "twice",
            f"twice#{transaction_id(1, 2)}",
            f"twice#{transaction_id(1, 3)}",
        ]
        assert found[4] == long
        assert found[5] == f"{long[:218]}#{transaction_id(1, 5)}"
        again = await here.ledger.apply(ledgers.command(merchant_id(1), "debit", 1, "twice"))
        assert (again.replayed, again.transaction.id) == (True, transaction_id(1, 1))

    async def test_a_row_without_a_reference_gets_one_of_its_own(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(changed(1, 2, reference_type=None, reference_id=None))
        row = (await rows_of(here, 1))[2]
        reference = ("import", f"TRANSACTION_{transaction_id(1, 2)}")
        assert (row["reference_type"], row["reference_id"]) == reference


class TestAgain:
    """The same merchant again, changed there or here meanwhile."""

    async def test_the_same_again_changes_nothing(
        self, here: Node, importer: CreditImporter
    ) -> None:
        first = await importer.take(whole(1))
        before = await rows_of(here, 1)
        again = await importer.take(whole(1))
        assert (again.outcome, again.figures) == ("already", first.figures)
        assert await rows_of(here, 1) == before

    async def test_what_was_added_there_comes_with_the_next_run(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(whole(1, 3))
        assert (await importer.take(whole(1, 8))).outcome == "updated"
        assert len(await rows_of(here, 1)) == 10
        assert (await here.ledger.account(merchant_id(1))).balance == 592

    async def test_an_account_that_moved_here_is_left_alone_and_said_so(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(whole(1, 3))
        await here.ledger.apply(ledgers.command(merchant_id(1), "debit", 1, "here"))
        before = await rows_of(here, 1)
        assert (await importer.take(whole(1, 3))).outcome == "already"
        assert (await importer.take(whole(1, 8))).outcome == "moved_on"
        assert await rows_of(here, 1) == before

    async def test_an_empty_account_that_an_event_made_is_filled_and_its_actor_sees_it(
        self, here: Node, importer: CreditImporter
    ) -> None:
        number = merchant_id(1)
        async with here.database.transaction() as connection:
            await here.ledger.open_account(
                connection,
                merchant_id=number,
                platform_name="shopify",
                platform_id="by-event",
                platform_domain="by.event.example",
            )
        with pytest.raises(InsufficientCreditsError):
            await here.ledger.apply(ledgers.command(number, "debit", 1, "too early"))
        assert (await importer.take(whole(1))).outcome == "taken"
        applied = await here.ledger.apply(ledgers.command(number, "debit", 1, "too early"))
        assert applied.balance == 596
        assert (await here.ledger.account(number)).platform_domain == "by.event.example"

    async def test_an_account_with_movements_of_its_own_is_not_touched(
        self, here: Node, importer: CreditImporter
    ) -> None:
        await importer.take(of_credits([account(1, 0)], []))
        await ledgers.grant(here, merchant_id(1), 5)
        assert (await importer.take(whole(1))).outcome == "moved_on"
        assert (await here.ledger.account(merchant_id(1))).balance == 5

    async def test_a_dry_run_tells_the_same_and_leaves_no_trace(
        self, here: Node, importer: CreditImporter
    ) -> None:
        tried = await importer.take(whole(1), dry_run=True)
        assert await is_untouched(here)
        assert await importer.take(whole(1)) == tried

    async def test_a_debit_in_the_same_moment_is_on_top_of_the_import_or_holds_it_off(
        self, here: Node, importer: CreditImporter
    ) -> None:
        for number in range(1, 9):
            await importer.take(whole(number, 3))
            here_too = ledgers.command(merchant_id(number), "debit", 50, "here")
            taken, applied = await asyncio.gather(
                importer.take(whole(number, 8)), here.ledger.apply(here_too)
            )
            balance = (await here.ledger.account(merchant_id(number))).balance
            wanted = {"updated": 592 - 50, "moved_on": 597 - 50}
            assert balance == applied.balance == wanted[taken.outcome]

    async def test_two_imports_at_once_take_turns(
        self, here: Node, importer: CreditImporter
    ) -> None:
        both = await asyncio.gather(importer.take(whole(1)), importer.take(whole(1)))
        assert sorted(each.outcome for each in both) == ["already", "taken"]
        assert len(await rows_of(here, 1)) == 5


class TestCuts:
    """A database that goes away at each step; nobody ever sees a half."""

    async def test_wherever_it_is_cut_all_is_there_or_nothing_and_the_same_again_mends_it(
        self, here: Node, importer: CreditImporter, module_database_url: str
    ) -> None:
        outcomes: set[str] = set()
        for step in range(1, ANSWERS_LIMIT):
            async with DatabaseProxy(module_database_url) as proxy:
                behind = await Database.connect(proxy.url, pool_size=1)
                cut = CreditImporter(behind, ledger=here.ledger, clock=SettableClock())
                proxy.lose_answer = step
                try:
                    await cut.take(whole(step))
                except UnavailableError:
                    outcomes.add("cut")
                else:
                    outcomes.add("whole")
                await behind.close()
            found = len(await rows_of(here, step))
            known = await here.database.fetchval(
                "SELECT transaction_count FROM glam.credit_accounts WHERE merchant_id = $1",
                merchant_id(step),
            )
            assert (found, known) in ((0, None), (5, 5))
            again = await importer.take(whole(step))
            assert again.outcome == ("already" if found else "taken")
            if "whole" in outcomes:
                break
            outcomes.add("unheard" if found else "undone")
        assert outcomes == {"cut", "undone", "unheard", "whole"}

    async def test_a_long_history_is_one_transaction_and_is_rewritten_as_one(
        self, here: Node, importer: CreditImporter
    ) -> None:
        rows: list[Row] = history(1, *usual(1, MANY))
        taken = await importer.take(of_credits([account(1, 0)], rows))
        assert taken.figures["transactions"] == MANY + 3
        assert taken.notes["opening"] == MANY - 600
        found = await here.database.fetchrow(
            "SELECT count(*), count(DISTINCT xmin::text) FROM glam.credit_transactions"
        )
        assert tuple(found or ()) == (MANY + 3, 1)
        mended = of_credits([account(1, 0)], rows[: MANY // 2])
        assert (await importer.take(mended)).outcome == "updated"
