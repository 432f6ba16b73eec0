"""The judge of the money faults: what is right passes, and each kind of wrong has its name.

A judge that finds nothing in a broken world would make every fault run green, so each test here
breaks one thing in a world that is right.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest

from tests.faults.money_judge import (
    Balance,
    Books,
    Message,
    MoneyVerdict,
    Row,
    Transaction,
    disordered,
    judge,
)
from tests.faults.money_record import Account, Told, Wanted

SHOP = "m-1"
GRANTED, CONSUMED = "evt.credits.granted.v1", "evt.credits.consumed.v1"
INSUFFICIENT = "evt.credits.insufficient.v1"
World: TypeAlias = tuple[Account, Books, list[Message]]


def wanted(
    id_: str, operation: Any, amount: int, *, kind: str = "load", way: Any = "http"
) -> Wanted:
    """An effect on the one account."""
    return Wanted(id=id_, merchant=SHOP, operation=operation, amount=amount, kind=kind, way=way)


def account() -> Account:
    """A grant, a debit and one that was refused over HTTP; a match, and one that was too much."""
    found = Account()
    for each in (
        wanted("fund", "credit", 3),
        wanted("spend", "debit", 2),
        wanted("greedy", "debit", 9),
        wanted("match", "debit", 1, kind="match", way="event"),
        wanted("late", "debit", 1, kind="match", way="event"),
    ):
        found.wanted[each.id] = each
    found.done["fund"].add(Told("t-1", 3))
    found.done["spend"].add(Told("t-2", 1))
    found.insufficient.add("greedy")
    found.stored |= {"match", "late"}
    return found


def books() -> Books:
    """What the database has after that."""
    return Books(
        transactions=[
            Transaction("t-1", SHOP, 1, "credit", 3, 3, "load", "fund"),
            Transaction("t-2", SHOP, 2, "debit", 2, 1, "load", "spend"),
            Transaction("t-3", SHOP, 3, "debit", 1, 0, "match", "match"),
        ],
        balances=[Balance(SHOP, 0, 3, 3)],
        outbox=[
            Row("glam", 1, "t-1", SHOP, GRANTED, "fund"),
            Row("glam", 2, "e-1", SHOP, INSUFFICIENT, "greedy"),
            Row("glam", 3, "t-2", SHOP, CONSUMED, "spend"),
            Row("glam", 4, "t-3", SHOP, CONSUMED, "match"),
            Row("glam", 5, "e-2", SHOP, "evt.credits.exhausted.v1", "match"),
            Row("glam", 6, "e-3", SHOP, INSUFFICIENT, "late"),
            Row("cde", 1, "c-1", SHOP, "evt.payment.token.created.v1", "tap"),
        ],
        dead_letters=(),
        broken=(),
    )


def stream() -> list[Message]:
    """The outbox as the stream has it; the other schema's where it happened to come."""
    rows = books().outbox
    return [Message(row.event_id, row.merchant, row.subject) for row in (rows[-1], *rows[:-1])]


def world() -> World:
    """All three, right."""
    return account(), books(), stream()


def found_in(broken: World) -> set[str]:
    """The names of what is found."""
    return set(judge(*broken).findings)


def test_what_is_right_passes() -> None:
    assert judge(*world()) == MoneyVerdict()


def test_an_event_that_is_in_the_stream_twice_is_forgiven() -> None:
    record, kept, told = world()
    assert found_in((record, kept, [*told, told[3], told[1]])) == set()


def without(id_: str) -> Callable[[World], World]:
    """The transaction is gone, with everything that it did."""

    def change(given: World) -> World:
        record, kept, told = given
        gone = next(each for each in kept.transactions if each.id == id_)
        sign = -1 if gone.operation == "credit" else 1
        shop = kept.balances[0]
        credit, debit = (gone.amount, 0) if sign < 0 else (0, gone.amount)
        return (
            record,
            replace(
                kept,
                transactions=[each for each in kept.transactions if each.id != id_],
                outbox=[row for row in kept.outbox if row.event_id != id_],
                balances=[
                    Balance(
                        SHOP,
                        shop.balance + sign * gone.amount,
                        shop.granted - credit,
                        shop.consumed - debit,
                    )
                ],
            ),
            [message for message in told if message.event_id != id_],
        )

    return change


def changed(id_: str, **fields: Any) -> Callable[[World], World]:
    """The transaction has other fields."""

    def change(given: World) -> World:
        record, kept, told = given
        rows = [each._replace(**fields) if each.id == id_ else each for each in kept.transactions]
        return record, replace(kept, transactions=rows), told

    return change


def also(*transactions: Transaction) -> Callable[[World], World]:
    """More transactions, each with its event."""

    def change(given: World) -> World:
        record, kept, told = given
        shop = kept.balances[0]
        more = sum(each.amount for each in transactions)
        rows = [
            Row("glam", 100 + each.seq, each.id, SHOP, GRANTED, each.reference)
            for each in transactions
        ]
        return (
            record,
            replace(
                kept,
                transactions=[*kept.transactions, *transactions],
                outbox=[*kept.outbox, *rows],
                balances=[Balance(SHOP, shop.balance + more, shop.granted + more, shop.consumed)],
            ),
            [*told, *(Message(row.event_id, SHOP, row.subject) for row in rows)],
        )

    return change


def recorded(change_record: Callable[[Account], object]) -> Callable[[World], World]:
    """The record says something else."""

    def change(given: World) -> World:
        change_record(given[0])
        return given

    return change


def kept(**fields: Any) -> Callable[[World], World]:
    """The database says something else."""
    return lambda given: (given[0], replace(given[1], **fields), given[2])


def streamed(change_stream: Callable[[list[Message]], list[Message]]) -> Callable[[World], World]:
    """The stream has something else."""
    return lambda given: (given[0], given[1], change_stream(given[2]))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without("t-2"), {"lost"}),
        # The match has neither a debit nor the event that says why.
        (without("t-3"), {"untold"}),
        (
            also(Transaction("t-4", SHOP, 4, "credit", 3, 3, "load", "fund")),
            {"doubled"},
        ),
        (recorded(lambda a: a.done["spend"].add(Told("t-9", 1))), {"doubled", "changed"}),
        (changed("t-2", amount=3), {"changed", "unbalanced"}),
        (changed("t-2", balance_after=7), {"changed"}),
        (recorded(lambda a: a.wanted.pop("spend")), {"uncalled"}),
        (
            also(Transaction("t-4", SHOP, 4, "credit", 9, 9, "load", "greedy")),
            {"uncalled", "changed"},
        ),
        (recorded(lambda a: a.refused["spend"].add("500 INTERNAL_ERROR")), {"refused"}),
        (recorded(lambda a: a.done.pop("fund")), {"unanswered"}),
        (recorded(lambda a: a.stored.discard("match")), {"unanswered"}),
        (kept(balances=[Balance(SHOP, 1, 3, 3)]), {"unbalanced"}),
        (kept(balances=[]), {"unbalanced"}),
        (
            kept(outbox=[row for row in books().outbox if row.event_id != "t-2"]),
            {"untold", "unwritten"},
        ),
        (
            kept(outbox=[row for row in books().outbox if row.event_id != "e-1"]),
            {"untold", "unwritten"},
        ),
        (streamed(lambda told: told[:-1]), {"unpublished"}),
        (streamed(lambda told: told[1:]), {"unpublished"}),
        (streamed(lambda told: [*told, Message("x", SHOP, GRANTED)]), {"unwritten"}),
        (streamed(lambda told: [told[0], told[2], told[1], *told[3:]]), {"disordered"}),
        (
            kept(
                outbox=[
                    row._replace(number={1: 3, 3: 1}.get(row.number, row.number))
                    for row in books().outbox
                ]
            ),
            {"disordered"},
        ),
        (kept(dead_letters=["evt.ai.match.completed.v1: HANDLER_TIMEOUT"]), {"dead"}),
        (kept(broken=["broken chain of m-1"]), {"broken"}),
    ],
)
def test_each_wrong_has_its_name(change: Callable[[World], World], names: set[str]) -> None:
    assert found_in(change(world())) == names


def test_a_match_that_came_twice_may_be_told_short_and_paid_later() -> None:
    record, right, told = world()
    early = Row("glam", 3, "e-9", SHOP, INSUFFICIENT, "match")
    rows = [row._replace(number=row.number * 10) for row in right.outbox]
    more = [told[0], told[1], Message("e-9", SHOP, INSUFFICIENT), *told[2:]]
    assert judge(record, replace(right, outbox=[*rows, early._replace(number=15)]), more).count == 0


def test_a_grant_that_came_as_an_event_cannot_be_insufficient() -> None:
    record, right, told = world()
    record.wanted["bought"] = wanted("bought", "credit", 5, kind="purchase", way="event")
    record.stored.add("bought")
    assert judge(record, right, told).lost == ("purchase bought",)


def test_the_order_is_each_merchants_own() -> None:
    rows = [Row("glam", n, f"e-{n}", f"m-{n % 2}", GRANTED, "-") for n in range(6)]
    sent = [Message(f"e-{n}", f"m-{n % 2}", GRANTED) for n in (1, 0, 3, 2, 4, 5)]
    assert disordered(rows, sent) == []
    assert disordered(rows, [*sent[3:], *sent[:3]]) == ["m-0", "m-1"]


def test_a_repeat_that_comes_late_does_not_count_for_the_order() -> None:
    rows = [Row("glam", n, f"e-{n}", SHOP, GRANTED, "-") for n in range(3)]
    sent = [Message(f"e-{n}", SHOP, GRANTED) for n in (0, 1, 0, 2, 1)]
    assert disordered(rows, sent) == []
