"""Credits on a real PostgreSQL: what is refused, repeated, fenced, raced for, and told."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
from prometheus_client import REGISTRY

from glamd.errors import InputError, UnavailableError
from glamd.ledger import actor
from glamd.ledger.model import (
    TOTAL_LIMIT,
    AccountNotFoundError,
    Applied,
    Command,
    DuplicateTransactionError,
    InsufficientCreditsError,
)
from glamd.ledger.verify import verify
from tests.support.database_proxy import DatabaseProxy
from tests.support.ledgers import Node, command, counted, events, grant, merchant, node
from tests.support.settable_clock import SettableClock


@pytest.fixture
async def here(module_database_url: str) -> AsyncIterator[Node]:
    """The node that the test asks; its books are right at the end, whatever was done to them."""
    async with node(module_database_url) as made:
        yield made
        report = await verify(made.database)
        assert report.broken == ()


@pytest.fixture
async def there(module_database_url: str) -> AsyncIterator[Node]:
    """Another node on the same database."""
    async with node(module_database_url) as made:
        yield made


async def balance(at: Node, merchant_id: UUID) -> int:
    """The balance as it is committed."""
    value: int = await at.database.fetchval(
        "SELECT balance FROM glam.credit_accounts WHERE merchant_id = $1", merchant_id
    )
    return value


async def move(at: Node, merchant_id: UUID, amount: int) -> Applied:
    """Debit as another writer does, in a transaction of its own."""
    async with at.database.transaction() as connection:
        return await at.ledger.apply_within(
            connection, command(merchant_id, amount=amount), SettableClock().now()
        )


# What is refused.


async def test_a_merchant_without_an_account_is_told_so_everywhere(here: Node) -> None:
    unknown = command(uuid4())
    with pytest.raises(AccountNotFoundError) as refused:
        await here.ledger.apply(unknown)
    assert refused.value.code == "CREDIT_ACCOUNT_NOT_FOUND"
    with pytest.raises(AccountNotFoundError):
        await here.ledger.account(unknown.merchant_id)
    with pytest.raises(AccountNotFoundError):
        await here.ledger.transactions(unknown.merchant_id, limit=10)
    with pytest.raises(AccountNotFoundError):
        await here.ledger.account_by_domain("unknown.example.com")
    with pytest.raises(AccountNotFoundError):
        async with here.database.transaction() as connection:
            await here.ledger.apply_within(connection, unknown, SettableClock().now())


async def test_a_debit_above_the_balance_takes_nothing_and_succeeds_after_a_top_up(
    here: Node,
) -> None:
    merchant_id = await merchant(here, 4)
    wanted = command(merchant_id, amount=5)
    for _ in range(2):
        with pytest.raises(InsufficientCreditsError) as refused:
            await here.ledger.apply(wanted)
        assert (refused.value.balance, refused.value.required) == (4, 5)
    assert await balance(here, merchant_id) == 4
    await grant(here, merchant_id, 1)
    applied = await here.ledger.apply(wanted)
    assert (applied.balance, applied.replayed) == (0, False)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_reference_with_another_amount_or_operation_is_a_duplicate(
    here: Node, there: Node, elsewhere: bool
) -> None:
    merchant_id = await merchant(here, 50)
    await here.ledger.apply(command(merchant_id, "debit", 3, "a"))
    asked = there if elsewhere else here
    for other in (command(merchant_id, "debit", 4, "a"), command(merchant_id, "credit", 3, "a")):
        with pytest.raises(DuplicateTransactionError) as refused:
            await asked.ledger.apply(other)
        assert refused.value.code == "DUPLICATE_TRANSACTION"
    assert await balance(here, merchant_id) == 47


async def test_no_account_is_granted_more_than_it_can_hold(here: Node) -> None:
    merchant_id = await merchant(here)
    await here.database.execute(
        "UPDATE glam.credit_accounts SET total_granted = $2, total_consumed = $2"
        " WHERE merchant_id = $1",
        merchant_id,
        TOTAL_LIMIT - 10,
    )
    with pytest.raises(InputError):
        await grant(here, merchant_id, 11)
    assert (await grant(here, merchant_id, 10)).balance == 10
    # Such an account's books are wrong, and must not fail the test that asks for right ones.
    await here.database.execute(
        "DELETE FROM glam.credit_transactions WHERE merchant_id = $1", merchant_id
    )
    await here.database.execute(
        "DELETE FROM glam.credit_accounts WHERE merchant_id = $1", merchant_id
    )


async def test_a_ledger_that_is_not_started_or_stopped_refuses(module_database_url: str) -> None:
    async with node(module_database_url) as made:
        merchant_id = await merchant(made, 5)
        await made.ledger.stop(1.0)
        with pytest.raises(UnavailableError):
            await made.ledger.apply(command(merchant_id))


# What is repeated.


async def test_the_same_reference_is_answered_with_the_first_transaction(here: Node) -> None:
    merchant_id = await merchant(here, 50)
    first = await here.ledger.apply(command(merchant_id, amount=3, reference="a"))
    await here.ledger.apply(command(merchant_id, amount=47))
    again = await here.ledger.apply(command(merchant_id, amount=3, reference="a"))
    assert again.transaction == first.transaction
    assert (again.balance, again.replayed) == (47, True)
    assert await balance(here, merchant_id) == 0


@pytest.mark.parametrize("how", ["another node", "gone actor", "long ago"])
async def test_a_repetition_is_known_where_memory_has_nothing_of_it_even_without_balance(
    here: Node, there: Node, how: str
) -> None:
    merchant_id = await merchant(here, 500)
    first = await here.ledger.apply(command(merchant_id, amount=3, reference="a"))
    await here.ledger.apply(command(merchant_id, amount=297))
    many = [command(merchant_id) for _ in range(200)]
    await asyncio.gather(*(here.ledger.apply(each) for each in many))
    if how == "gone actor":
        here.system.stop("ledger", str(merchant_id))
    asked = there if how == "another node" else here
    again = await asked.ledger.apply(command(merchant_id, amount=3, reference="a"))
    assert again.transaction == first.transaction
    assert again.replayed
    assert await balance(here, merchant_id) == 0


async def test_repetitions_that_come_all_at_once_have_one_effect(here: Node, there: Node) -> None:
    merchant_id = await merchant(here, 50)
    wanted = command(merchant_id, amount=3)
    answers = await asyncio.gather(
        *(asked.ledger.apply(wanted) for _ in range(50) for asked in (here, there))
    )
    assert len({answer.transaction.id for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert await balance(here, merchant_id) == 47


async def test_old_repetitions_do_not_fail_those_that_are_committed_with_them(
    here: Node, there: Node
) -> None:
    merchants = [await merchant(here, 10) for _ in range(20)]
    old = [command(each) for each in merchants[:10]]
    firsts = await asyncio.gather(*(here.ledger.apply(each) for each in old))
    new = [command(each) for each in merchants]
    answers = await asyncio.gather(*(there.ledger.apply(each) for each in [*old, *new]))
    assert [answer.transaction for answer in answers[:10]] == [
        answer.transaction for answer in firsts
    ]
    assert [answer.replayed for answer in answers] == [True] * 10 + [False] * 20


# What is raced for.


async def test_a_thousand_debits_at_once_never_take_more_than_there_is(here: Node) -> None:
    merchant_id = await merchant(here, 600)
    answers = await asyncio.gather(
        *(here.ledger.apply(command(merchant_id)) for _ in range(1000)), return_exceptions=True
    )
    applied = [answer for answer in answers if isinstance(answer, Applied)]
    refused = [answer for answer in answers if isinstance(answer, InsufficientCreditsError)]
    assert (len(applied), len(refused)) == (600, 400)
    # In the order in which they were asked.
    assert [answer.balance for answer in applied] == list(range(599, -1, -1))
    assert await balance(here, merchant_id) == 0
    assert [name for name, _ in await events(here, merchant_id)] == [
        "granted",
        *("consumed" for _ in range(501)),
        "low_balance",
        *("consumed" for _ in range(99)),
        "exhausted",
        *("insufficient" for _ in range(400)),
    ]


async def test_two_nodes_on_one_account_lose_and_double_nothing(here: Node, there: Node) -> None:
    merchant_id = await merchant(here, 900)
    answers = await asyncio.gather(
        *(asked.ledger.apply(command(merchant_id)) for _ in range(500) for asked in (here, there)),
        return_exceptions=True,
    )
    applied = [answer for answer in answers if isinstance(answer, Applied)]
    assert len(applied) == 900
    assert len([a for a in answers if isinstance(a, InsufficientCreditsError)]) == 100
    assert {answer.transaction.seq for answer in applied} == set(range(2, 902))
    assert not any(answer.replayed for answer in applied)


async def test_three_writers_on_many_accounts_never_lock_each_other_out(
    here: Node, there: Node
) -> None:
    merchants = [await merchant(here, 100) for _ in range(40)]

    async def billing() -> None:
        for merchant_id in merchants:
            await move(there, merchant_id, 1)

    asked = [
        at.ledger.apply(command(merchant_id))
        for _ in range(10)
        for merchant_id in merchants
        for at in (here, there)
    ]
    await asyncio.gather(*asked, billing())
    for merchant_id in merchants:
        assert await balance(here, merchant_id) == 100 - 21
        assert await counted(here, merchant_id) == 1 + 21


async def test_who_decided_on_an_account_that_moved_decides_again_unseen(
    here: Node, there: Node
) -> None:
    merchant_id = await merchant(here, 10)
    assert (await there.ledger.apply(command(merchant_id))).balance == 9
    assert (await here.ledger.apply(command(merchant_id))).balance == 8
    await grant(here, merchant_id, 5)
    # What the other node remembers would not do for this.
    assert (await there.ledger.apply(command(merchant_id, amount=13))).balance == 0


async def test_a_refusal_on_an_account_that_moved_is_taken_back(here: Node, there: Node) -> None:
    merchant_id = await merchant(here, 10)
    await there.ledger.apply(command(merchant_id, amount=9))
    async with here.database.transaction() as connection:
        topped = command(merchant_id, "credit", 100, "t", reference_type="purchase")
        await here.ledger.apply_within(connection, topped, SettableClock().now())
    assert (await there.ledger.apply(command(merchant_id, amount=100))).balance == 1
    assert "insufficient" not in [name for name, _ in await events(here, merchant_id)]


async def test_a_long_row_of_commands_is_applied_in_its_order_though_it_is_fenced(
    here: Node, there: Node
) -> None:
    merchant_id = await merchant(here, 10_000)
    await there.ledger.apply(command(merchant_id))
    wanted = [command(merchant_id) for _ in range(3 * actor.ENTRY_LIMIT)]
    under_way = [here.ledger.apply(each) for each in wanted]
    moved = await move(there, merchant_id, 1)
    answers = await asyncio.gather(*under_way)
    assert [answer.transaction.reference_id for answer in answers] == [
        each.reference_id for each in wanted
    ]
    seqs = [answer.transaction.seq for answer in answers]
    assert sorted([*seqs, moved.transaction.seq]) == list(range(3, 3 + len(wanted) + 1))
    assert seqs == sorted(seqs)


async def test_what_was_decided_ahead_on_something_that_did_not_come_to_pass_is_decided_again(
    here: Node, there: Node
) -> None:
    merchant_id = await merchant(here, 10_000)
    await here.ledger.apply(command(merchant_id))
    wanted = [command(merchant_id) for _ in range(2 * actor.ENTRY_LIMIT)]
    # The other node uses the references of the first half otherwise, in one write, so that the
    # version stands where this node would have brought it, and the balance does not.
    taken = [
        command(merchant_id, "debit", 2, each.reference_id) for each in wanted[: actor.ENTRY_LIMIT]
    ]
    await asyncio.gather(*(there.ledger.apply(each) for each in taken))
    answers = await asyncio.gather(
        *(here.ledger.apply(each) for each in wanted), return_exceptions=True
    )
    kinds = [type(answer) for answer in answers]
    assert kinds[: actor.ENTRY_LIMIT] == [DuplicateTransactionError] * actor.ENTRY_LIMIT
    assert kinds[actor.ENTRY_LIMIT :] == [Applied] * actor.ENTRY_LIMIT
    assert await balance(here, merchant_id) == 10_000 - 1 - 3 * actor.ENTRY_LIMIT


async def test_an_account_that_nobody_else_moves_is_never_fenced(here: Node) -> None:
    merchant_id = await merchant(here, 10_000)
    before = REGISTRY.get_sample_value("glamd_ledger_fenced_total")
    for _ in range(10):
        await here.ledger.apply(command(merchant_id))
    await asyncio.gather(*(here.ledger.apply(command(merchant_id)) for _ in range(1000)))
    assert REGISTRY.get_sample_value("glamd_ledger_fenced_total") == before


# What is told.


async def test_each_event_is_told_once_and_in_order_and_low_balance_again_after_a_top_up(
    here: Node,
) -> None:
    merchant_id = await merchant(here, 102)
    spent = [command(merchant_id, amount=n) for n in (2, 1, 1, 98)]
    for each in spent:
        await here.ledger.apply(each)
        await here.ledger.apply(each)
    await grant(here, merchant_id, 100)
    await here.ledger.apply(command(merchant_id, amount=1))
    assert [name for name, _ in await events(here, merchant_id)] == [
        "granted",
        *("consumed", "consumed", "low_balance", "consumed", "consumed", "exhausted"),
        *("granted", "consumed", "low_balance"),
    ]


async def test_events_say_what_the_contract_says_and_carry_the_correlation(here: Node) -> None:
    merchant_id = await merchant(here, 1)
    await here.ledger.apply(command(merchant_id, reference="a"))
    with pytest.raises(InsufficientCreditsError):
        await here.ledger.apply(command(merchant_id, amount=7, reference="b"))
    who = {"merchant_id": str(merchant_id), "platform_name": "shopify"}
    assert (await events(here, merchant_id))[1:] == [
        (
            "consumed",
            {**who, "amount": 1, "balance": 0, "reference_type": "match", "reference_id": "a"},
        ),
        ("exhausted", who),
        ("insufficient", {**who, "attempted_amount": 7, "balance": 0}),
    ]
    rows = await here.database.fetch(
        "SELECT correlation_id, event_id FROM glam.outbox WHERE merchant_id = $1 ORDER BY id",
        merchant_id,
    )
    assert [row[0] for row in rows][1:] == ["c-a", "c-a", "c-b"]
    assert len({row[1] for row in rows}) == 4


# Another writer's transaction.


async def test_within_another_transaction_nothing_holds_until_that_commits(
    here: Node,
) -> None:
    merchant_id = await merchant(here, 10)
    await here.ledger.apply(command(merchant_id))
    granted = command(merchant_id, "credit", 5, "g", reference_type="purchase")

    async def grant_and_break_off() -> None:
        async with here.database.transaction() as connection:
            await here.ledger.apply_within(connection, granted, SettableClock().now())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await grant_and_break_off()
    assert await balance(here, merchant_id) == 9
    async with here.database.transaction() as connection:
        applied = await here.ledger.apply_within(connection, granted, SettableClock().now())
        assert (applied.balance, applied.replayed) == (14, False)
        waiting = asyncio.ensure_future(here.ledger.apply(command(merchant_id)))
        again = await here.ledger.apply_within(connection, granted, SettableClock().now())
        assert again.replayed
        assert again.transaction.id == applied.transaction.id
    assert (await waiting).balance == 13
    assert (await here.ledger.apply(granted)).replayed
    names = [name for name, _ in await events(here, merchant_id)]
    assert names.count("granted") == 2


async def test_within_another_transaction_too_the_rules_hold(here: Node) -> None:
    merchant_id = await merchant(here, 10)
    used = command(merchant_id, amount=2, reference="a")
    await here.ledger.apply(used)
    now = SettableClock().now()
    async with here.database.transaction() as connection:
        with pytest.raises(DuplicateTransactionError):
            await here.ledger.apply_within(connection, command(merchant_id, reference="a"), now)
        with pytest.raises(InsufficientCreditsError):
            await here.ledger.apply_within(connection, command(merchant_id, amount=9), now)
    assert [name for name, _ in await events(here, merchant_id)][-1] == "insufficient"


# Looking at it.


async def test_an_account_that_was_just_seen_is_shown_without_the_database(
    module_database_url: str,
) -> None:
    async with DatabaseProxy(module_database_url) as proxy, node(proxy.url) as here:
        merchant_id = await merchant(here, 10)
        await here.ledger.apply(command(merchant_id))
        asked = proxy.questions
        for _ in range(100):
            assert (await here.ledger.account(merchant_id)).balance == 9
        assert proxy.questions == asked


async def test_what_another_writer_did_shows_within_a_second_and_what_this_one_did_at_once(
    module_database_url: str, here: Node
) -> None:
    clock = SettableClock()
    async with node(module_database_url, clock=clock) as there:
        merchant_id = await merchant(there, 10)
        await here.ledger.apply(command(merchant_id))
        clock.advance(1.01)
        assert (await there.ledger.account(merchant_id)).balance == 9
        await there.ledger.apply(command(merchant_id))
        assert (await there.ledger.account(merchant_id)).balance == 8
        await move(there, merchant_id, 1)
        there.ledger.forget(merchant_id)
        found = await there.ledger.account(merchant_id)
        assert (found.balance, found.total_granted, found.total_consumed) == (7, 10, 3)


async def test_repetitions_that_memory_answers_make_it_no_younger(
    module_database_url: str, here: Node
) -> None:
    clock = SettableClock()
    async with node(module_database_url, clock=clock) as there:
        merchant_id = await merchant(there, 10)
        wanted = command(merchant_id)
        await there.ledger.apply(wanted)
        await here.ledger.apply(command(merchant_id))
        clock.advance(0.9)
        assert (await there.ledger.apply(wanted)).replayed
        clock.advance(0.2)
        assert (await there.ledger.account(merchant_id)).balance == 8


async def test_a_thousand_merchants_who_all_come_at_once_are_read_in_groups(
    module_database_url: str, here: Node
) -> None:
    merchants = [await merchant(here) for _ in range(200)]
    async with DatabaseProxy(module_database_url) as proxy, node(proxy.url) as there:
        asked = proxy.questions
        found = await asyncio.gather(*(there.ledger.account(each) for each in merchants * 5))
        assert [each.merchant_id for each in found] == merchants * 5
        assert proxy.questions - asked < 30


async def test_opening_an_account_again_leaves_it_as_it_is(here: Node) -> None:
    merchant_id = await merchant(here, 10, domain="first.example.com")
    async with here.database.transaction() as connection:
        assert not await here.ledger.open_account(
            connection,
            merchant_id=merchant_id,
            platform_name="custom",
            platform_id="2",
            platform_domain="second.example.com",
        )
    found = await here.ledger.account_by_domain("first.example.com")
    assert (found.merchant_id, found.balance, found.platform_name) == (merchant_id, 10, "shopify")


async def test_pages_by_number_and_behind_cursors_are_the_same_and_newest_first(
    here: Node,
) -> None:
    merchant_id = await merchant(here, 1000)
    empty = await merchant(here)
    wanted = [command(merchant_id, amount=n) for n in range(1, 25)]
    await asyncio.gather(*(here.ledger.apply(each) for each in wanted))
    by_number = [await here.ledger.transactions(merchant_id, limit=10, page=n) for n in (1, 2, 3)]
    assert [page.total for page in by_number] == [25, 25, 25]
    assert [[each.seq for each in page.items] for page in by_number] == [
        list(range(25, 15, -1)),
        list(range(15, 5, -1)),
        list(range(5, 0, -1)),
    ]
    cursor = by_number[0].next_cursor
    await here.ledger.apply(command(merchant_id))
    second = await here.ledger.transactions(merchant_id, limit=10, cursor=cursor)
    assert second.items == by_number[1].items
    third = await here.ledger.transactions(merchant_id, limit=10, cursor=second.next_cursor)
    assert third.items == by_number[2].items
    assert (third.next_cursor, by_number[2].next_cursor) == (None, None)
    assert third.total == 26
    nothing = await here.ledger.transactions(empty, limit=10, page=1)
    assert (nothing.items, nothing.total, nothing.next_cursor) == ((), 0, None)
    beyond = await here.ledger.transactions(merchant_id, limit=200, page=10_000)
    assert (beyond.items, beyond.next_cursor) == ((), None)


@pytest.mark.parametrize("cursor", ["", "x", "-1", "1.5", "\uff19", "9" * 19, "1;"])
async def test_a_cursor_of_anybody_elses_making_is_refused(here: Node, cursor: str) -> None:
    merchant_id = await merchant(here, 1)
    with pytest.raises(InputError):
        await here.ledger.transactions(merchant_id, limit=10, cursor=cursor)


async def test_what_a_command_said_is_what_the_list_says(here: Node) -> None:
    merchant_id = await merchant(here, 10)
    wanted = Command(
        merchant_id=merchant_id,
        operation="debit",
        amount=2,
        reference_type="match",
        reference_id="заказ-7",
        description="zwei\nZeilen",
        metadata={"shopper_id": "gid-1", "matched_items_count": 3, "path": "C:\\u0000"},
        correlation_id="c",
    )
    applied = await here.ledger.apply(wanted)
    page = await here.ledger.transactions(merchant_id, limit=1)
    assert page.items == (applied.transaction,)
    assert page.items[0].metadata == wanted.metadata
    assert page.items[0].description == wanted.description
