"""That `verify` finds what is wrong, and says where it begins; each fault is made by hand."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest

from glamd.ledger import verify as room
from glamd.ledger.model import AccountNotFoundError
from glamd.ledger.verify import Broken, Rule, verify
from tests.support.ledgers import Node, command, merchant, node

DEBITS = 20


@pytest.fixture
async def here(module_database_url: str) -> AsyncIterator[Node]:
    """A node on a database that holds no rule by itself any more."""
    async with node(module_database_url) as made:
        await made.database.execute(_LOOSEN)
        yield made


_LOOSEN = """
DO $$
DECLARE found record;
BEGIN
    FOR found IN
        SELECT conrelid::regclass AS relation, conname FROM pg_constraint
        WHERE conrelid IN ('glam.credit_transactions'::regclass, 'glam.credit_accounts'::regclass)
          AND contype IN ('c', 'u')
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', found.relation, found.conname);
    END LOOP;
END $$;
CREATE INDEX IF NOT EXISTS by_seq ON glam.credit_transactions (merchant_id, seq);
CREATE INDEX IF NOT EXISTS by_reference
    ON glam.credit_transactions (merchant_id, reference_type, reference_id);
"""


async def spent(here: Node) -> UUID:
    """A merchant with one grant and then DEBITS debits: 1 to 21."""
    merchant_id = await merchant(here, 100)
    await asyncio.gather(*(here.ledger.apply(command(merchant_id)) for _ in range(DEBITS)))
    return merchant_id


def rows_set(change: str, which: str) -> str:
    """Change some of the merchant's transactions."""
    return f"UPDATE glam.credit_transactions SET {change} WHERE merchant_id = $1 AND seq {which}"


def rows_gone(which: str) -> str:
    """Take some of the merchant's transactions away."""
    return f"DELETE FROM glam.credit_transactions WHERE merchant_id = $1 AND seq {which}"


def account_set(change: str) -> str:
    """Change the merchant's account."""
    return f"UPDATE glam.credit_accounts SET {change} WHERE merchant_id = $1"


THIRD_REFERENCE = """(
    SELECT t.reference_id FROM glam.credit_transactions t WHERE t.merchant_id = $1 AND t.seq = 3)"""

FAULTS: dict[str, tuple[str, Rule, int | None]] = {
    "a hole": (rows_gone("= 7"), "missing transaction", 7),
    "two holes": (rows_gone("IN (8, 12)"), "missing transaction", 8),
    "no beginning": (rows_gone("< 3"), "missing transaction", 1),
    "no end": (rows_gone("> 19"), "missing transaction", 20),
    "nothing left": (rows_gone("> 0"), "missing transaction", 1),
    "a changed amount": (rows_set("amount = 2", "= 9"), "wrong sum", 9),
    "a changed operation": (rows_set("operation = 'credit'", "= 9"), "wrong sum", 9),
    "a row that is right in itself": (
        rows_set("amount = 2, balance_after = balance_after - 1", "= 9"),
        "broken chain",
        10,
    ),
    "all balances moved": (
        rows_set("balance_before = balance_before + 1, balance_after = balance_after + 1", "> 4"),
        "broken chain",
        5,
    ),
    "a first row that comes from nothing": (
        rows_set("balance_before = 5, amount = 95", "= 1"),
        "broken chain",
        1,
    ),
    "a reference twice": (
        rows_set(f"reference_id = {THIRD_REFERENCE}", "= 11"),
        "repeated reference",
        11,
    ),
    "an account's balance": (account_set("balance = balance + 1"), "account does not agree", None),
    "an account's totals": (
        account_set("total_granted = total_granted + 1, total_consumed = total_consumed + 1"),
        "account does not agree",
        None,
    ),
    "an account that counts too few": (
        account_set(
            "transaction_count = transaction_count - 1, balance = balance + 1,"
            " total_consumed = total_consumed - 1"
        ),
        "uncounted transaction",
        None,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_found_where_it_begins_and_nowhere_else(
    here: Node, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(room, "SPAN_ROWS", 3)  # so that every fault is near the end of a span
    before, bad, after = [await spent(here) for _ in range(3)]
    statement, rule, seq = FAULTS[fault]
    await here.database.execute(statement, bad)
    report = await verify(here.database, [before, bad, after])
    assert (report.accounts, report.broken_accounts) == (3, 1)
    (broken,) = report.broken
    assert (broken.merchant_id, broken.rule, broken.seq) == (bad, rule, seq)
    is_row = seq is not None and rule != "missing transaction"
    assert (broken.transaction_id is not None) == is_row
    assert (await verify(here.database, [before, after])).broken == ()


async def test_all_accounts_are_looked_at_and_each_broken_one_is_named_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ACCOUNTS_LIMIT", 4)
    monkeypatch.setattr(room, "SPAN_ROWS", 30)
    monkeypatch.setattr(room, "BROKEN_LIMIT", 2)
    async with node(database_url) as here:
        await here.database.execute(_LOOSEN)
        merchants = [await spent(here) for _ in range(9)]
        empty = [await merchant(here) for _ in range(2)]
        report = await verify(here.database)
        assert (report.accounts, report.transactions) == (11, 9 * (DEBITS + 1))
        assert report.broken_accounts == 0
        await here.database.execute(
            "UPDATE glam.credit_transactions SET amount = 7 WHERE merchant_id = ANY ($1)"
            " AND seq >= 5",
            merchants[:3],
        )
        await here.database.execute(
            "UPDATE glam.credit_accounts SET balance = 1 WHERE merchant_id = $1", empty[0]
        )
        report = await verify(here.database)
        assert report.broken_accounts == 4
        assert len(report.broken) == 2
        named = {each.merchant_id for each in (await verify(here.database, merchants)).broken}
        assert named <= set(merchants[:3])
        assert (await verify(here.database, [empty[0]])).broken == (
            Broken(merchant_id=empty[0], rule="account does not agree"),
        )


async def test_what_is_written_meanwhile_is_no_fault(here: Node) -> None:
    merchant_id = await merchant(here, 5000)
    is_over = asyncio.Event()

    async def spend() -> None:
        while not is_over.is_set():
            await asyncio.gather(*(here.ledger.apply(command(merchant_id)) for _ in range(20)))

    spending = asyncio.create_task(spend())
    for _ in range(20):
        assert (await verify(here.database, [merchant_id])).broken == ()
    is_over.set()
    await spending


async def test_a_merchant_that_was_named_and_has_no_account_is_told(here: Node) -> None:
    with pytest.raises(AccountNotFoundError):
        await verify(here.database, [await merchant(here), uuid4()])


async def test_transactions_without_an_account_are_found_among_all_and_by_name(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "HOLDERS_LIMIT", 2)
    async with node(database_url) as here:
        merchants = [await spent(here) for _ in range(5)]
        lost = sorted(merchants)[::2]
        await merchant(here)  # has no transaction, and is no orphan
        await here.database.execute(
            "DELETE FROM glam.credit_accounts WHERE merchant_id = ANY ($1)", lost
        )
        await here.database.execute(rows_gone("< 3"), lost[0])
        report = await verify(here.database)
        assert (report.accounts, report.broken_accounts) == (3, 3)
        assert report.transactions == 2 * (DEBITS + 1)
        assert [(each.merchant_id, each.rule, each.seq) for each in report.broken] == [
            (lost[0], "orphaned transaction", 3),
            (lost[1], "orphaned transaction", 1),
            (lost[2], "orphaned transaction", 1),
        ]
        assert all(each.transaction_id is not None for each in report.broken)
        named = await verify(here.database, [*lost[1:], *sorted(merchants)[1::2]])
        assert (named.accounts, named.broken) == (2, report.broken[1:])
        with pytest.raises(AccountNotFoundError):
            await verify(here.database, [*lost, uuid4()])
