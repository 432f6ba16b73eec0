"""One group commit of several merchants: whose entry is applied, and whom that may not disturb."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from uuid import uuid4

import pytest

from glamd.db import Connection, UniqueViolationError
from glamd.errors import GlamError
from glamd.ledger import store
from glamd.ledger.drafts import Draft, Entry, draft
from glamd.ledger.journal import commit, new_ids
from glamd.ledger.model import Command
from tests.support.ledgers import Node, command, counted, events, merchant, node
from tests.support.settable_clock import SettableClock

PATIENCE_S = 4.0
NOW = SettableClock().now()


@pytest.fixture
async def here(module_database_url: str) -> AsyncIterator[Node]:
    """A node, to open accounts with and to look."""
    async with node(module_database_url) as made:
        yield made


@pytest.fixture
async def connection(here: Node) -> AsyncIterator[Connection]:
    """The connection that commits."""
    async with here.database.connection() as made:
        yield made


async def entry(connection: Connection, commands: Sequence[Command]) -> Entry:
    """What commands of one merchant leave behind, decided on what is there now."""
    account = await store.account(connection, commands[0].merchant_id)
    assert account is not None
    decided: Draft = draft(
        account,
        commands,
        NOW,
        known={},
        mine=set(),
        ids=new_ids(NOW),
        low_balance_threshold=100,
    )
    assert decided.entry is not None
    return decided.entry


async def test_one_stale_account_does_not_fail_its_neighbours(
    here: Node, connection: Connection
) -> None:
    merchants = [await merchant(here, 10) for _ in range(5)]
    entries = [await entry(connection, [command(each)]) for each in merchants]
    await here.ledger.apply(command(merchants[2]))
    assert await commit(connection, entries) == [True, True, False, True, True]
    # What was fenced has left nothing: neither a transaction nor an event.
    assert await counted(here, merchants[2]) == 2
    assert [name for name, _ in await events(here, merchants[2])] == ["granted", "consumed"]
    # Nobody is fenced for good.
    again = await entry(connection, [command(merchants[2])])
    assert await commit(connection, [again]) == [True]


async def test_one_used_reference_does_not_fail_its_neighbours(
    here: Node, connection: Connection
) -> None:
    merchants = [await merchant(here, 10) for _ in range(5)]
    await here.ledger.apply(command(merchants[2], reference="used"))
    entries = [
        await entry(connection, [command(each), command(each, reference="used")])
        for each in merchants
    ]
    assert await commit(connection, entries) == [True, True, False, True, True]
    assert await counted(here, merchants[2]) == 2
    assert await counted(here, merchants[1]) == 3


async def test_a_refusal_rests_on_its_reference_being_new(
    here: Node, connection: Connection
) -> None:
    used, unused = await merchant(here, 10), await merchant(here, 10)
    await here.ledger.apply(command(used, amount=10, reference="a"))
    refusals = [
        await entry(connection, [command(each, amount=11, reference="a")])
        for each in (used, unused)
    ]
    assert await commit(connection, refusals) == [False, True]
    assert "insufficient" not in [name for name, _ in await events(here, used)]
    assert [name for name, _ in await events(here, unused)][-1] == "insufficient"


async def test_of_two_entries_of_one_merchant_only_the_first_is_applied(
    here: Node, connection: Connection
) -> None:
    merchant_id = await merchant(here, 10)
    entries = [await entry(connection, [command(merchant_id)]) for _ in range(2)]
    assert await commit(connection, entries) == [True, False]
    assert await counted(here, merchant_id) == 2


async def test_an_account_that_somebody_holds_keeps_none_of_its_neighbours_waiting(
    here: Node, connection: Connection
) -> None:
    merchants = [await merchant(here, 10) for _ in range(5)]
    entries = [await entry(connection, [command(each)]) for each in merchants]
    async with here.database.transaction() as other:
        await store.lock_account(other, merchants[2])
        async with asyncio.timeout(PATIENCE_S):
            assert await commit(connection, entries) == [True, True, False, True, True]
        # Who asks the ledger is not told of it, and is served when the holder lets go.
        waiting = [here.ledger.apply(command(each)) for each in merchants]
        await asyncio.gather(*(each for each in waiting if each is not waiting[2]))
        assert not waiting[2].done()
    assert (await waiting[2]).balance == 9
    assert [each.result().balance for each in waiting] == [8, 8, 9, 8, 8]


async def test_the_database_too_refuses_a_balance_below_zero(
    here: Node, connection: Connection
) -> None:
    merchant_id = await merchant(here, 10)
    good = await entry(connection, [command(merchant_id)])
    bad = replace(good, account=good.account._replace(balance=-1, total_consumed=11))
    with pytest.raises(GlamError):
        await commit(connection, [bad])
    assert await counted(here, merchant_id) == 1


async def test_a_key_that_breaks_for_another_reason_is_told(
    here: Node, connection: Connection
) -> None:
    merchant_id = await merchant(here, 10)
    made = await entry(connection, [command(merchant_id)])
    (moved,) = made.transactions
    # A row that was put there by hand, past the account's version.
    await connection.execute(
        "INSERT INTO glam.credit_transactions (id, merchant_id, seq, amount, operation,"
        " balance_before, balance_after, reference_type, reference_id, created_at)"
        " VALUES ($1, $2, $3, 1, 'debit', 10, 9, 'by', 'hand', now())",
        uuid4(),
        merchant_id,
        moved.seq,
    )
    with pytest.raises(UniqueViolationError):
        await commit(connection, [made])


async def test_nothing_reads_a_table_from_end_to_end_not_even_when_planned_on_empty_ones(
    database_url: str,
) -> None:
    async with node(database_url) as here, here.database.connection() as connection:
        merchants = [await merchant(here, 10) for _ in range(3)]
        ids = sorted(merchants, key=lambda each: each.int)
        async with connection.transaction():
            for _ in range(8):  # more often than PostgreSQL makes a plan for each execution
                entries = [await entry(connection, [command(each)]) for each in ids]
                await store.write(connection, entries)
                await store.used(connection, [(each, ("match", "r")) for each in ids])
                await store.by_reference(connection, ids[0], [("match", "r"), ("match", "s")])
                await store.accounts(connection, ids)
                await store.lock_account(connection, ids[0])
                await store.page(connection, ids[0], newest=5, limit=5)
            rows = await connection.fetch(
                "SELECT relname FROM pg_stat_xact_user_tables"
                " WHERE schemaname = 'glam' AND seq_scan > 0"
            )
        assert rows == []
