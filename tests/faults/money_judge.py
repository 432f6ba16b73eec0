"""The record of a load, the books in the database and the stream of events, held together.

Pure: three things that were read, and what does not add up between them. Reading them is
`money_books`'. Nothing is forgiven here but what the contract forgives: an event may be in the
stream more than once.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal, NamedTuple, TypeAlias

from tests.faults.money_record import Account, Told, Wanted

Reference: TypeAlias = tuple[str, str, str]
"""Merchant, kind, id."""

INSUFFICIENT: Final = "evt.credits.insufficient.v1"
MOVED: Final[Mapping[str, str]] = {
    "credit": "evt.credits.granted.v1",
    "debit": "evt.credits.consumed.v1",
}


class Transaction(NamedTuple):
    """A row of the books."""

    id: str
    merchant: str
    seq: int
    operation: Literal["credit", "debit"]
    amount: int
    balance_after: int
    kind: str
    reference: str


class Balance(NamedTuple):
    """An account's own row."""

    merchant: str
    balance: int
    granted: int
    consumed: int


class Row(NamedTuple):
    """A row of an outbox; `number` orders those of one outbox."""

    outbox: str
    number: int
    event_id: str
    merchant: str
    subject: str
    correlation: str


class Message(NamedTuple):
    """An event of ours as the stream has it, in the stream's order."""

    event_id: str
    merchant: str
    subject: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What the database has; `broken` is what `ledger verify` says of it."""

    transactions: Sequence[Transaction]
    balances: Sequence[Balance]
    outbox: Sequence[Row]
    dead_letters: Sequence[str]
    broken: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoneyVerdict:
    """What does not add up; all empty is what must be.

    lost         what was acknowledged and had no effect
    doubled      references with two effects, or two answers that name different ones
    changed      effects that are not what was asked for, or not what was answered
    uncalled     effects that nobody asked for, or that were refused
    refused      final answers that an honest caller must not get
    unanswered   what never had a final answer
    unbalanced   accounts that are not what the effects come to
    untold       effects and refusals without their event in the outbox
    unpublished  events in an outbox that are not in the stream
    unwritten    events of ours in the stream that are in no outbox
    disordered   merchants whose events are in another order in the stream than in the outbox, or
                 there than in the books
    dead         dead letters
    broken       what `ledger verify` found
    """

    lost: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    unanswered: tuple[str, ...] = ()
    unbalanced: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    disordered: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def findings(self) -> dict[str, tuple[str, ...]]:
        """What was found, by name, without the names under which nothing was."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: what for name, what in found.items() if what}

    @property
    def count(self) -> int:
        """How much was found."""
        return sum(len(what) for what in self.findings.values())


def judge(record: Account, books: Books, stream: Sequence[Message]) -> MoneyVerdict:
    """Hold all three together."""
    by_reference: defaultdict[Reference, list[Transaction]] = defaultdict(list)
    for each in books.transactions:
        by_reference[each.merchant, each.kind, each.reference].append(each)
    told_short = {row.correlation for row in books.outbox if row.subject == INSUFFICIENT}
    found = _Findings()
    for wanted in record.wanted.values():
        rows = by_reference.pop((wanted.merchant, wanted.kind, wanted.id), [])
        _judge_one(found, wanted, rows, record, told_short)
    found["uncalled"] += [f"{kind} {id_}" for _, kind, id_ in by_reference]
    found["unbalanced"] += _unbalanced(books)
    found["untold"] += _untold(books)
    rows_by_event = {row.event_id: row for row in books.outbox}
    published = {message.event_id for message in stream}
    found["unpublished"] += [
        f"{row.subject} {row.event_id}" for row in books.outbox if row.event_id not in published
    ]
    found["unwritten"] += [
        f"{message.subject} {message.event_id}"
        for message in stream
        if message.event_id not in rows_by_event
    ]
    found["disordered"] += disordered(books.outbox, stream)
    found["disordered"] += _out_of_step(books)
    return MoneyVerdict(
        **{name: tuple(sorted(what)) for name, what in found.items()},
        dead=tuple(books.dead_letters),
        broken=tuple(books.broken),
    )


class _Findings(defaultdict[str, list[str]]):
    """Lists by the names of the verdict."""

    def __init__(self) -> None:
        super().__init__(list)


def _judge_one(
    found: _Findings,
    wanted: Wanted,
    rows: Sequence[Transaction],
    record: Account,
    told_short: set[str],
) -> None:
    """One effect that was wanted, and what has become of it."""
    name = f"{wanted.kind} {wanted.id}"
    told = record.done.get(wanted.id, set())
    refused = record.refused.get(wanted.id, set())
    short = wanted.id in record.insufficient
    is_stored = wanted.id in record.stored
    if len(rows) > 1 or len({each.transaction for each in told}) > 1:
        found["doubled"].append(name)
    if refused:
        found["refused"].append(f"{name}: {', '.join(sorted(refused))}")
    if not (told or refused or short or is_stored):
        found["unanswered"].append(name)
    may_lack = wanted.operation == "debit" and (short or is_stored) and not told
    if not rows:
        if may_lack and wanted.id not in told_short:
            found["untold"].append(f"{name}: insufficient")
        elif told or (is_stored and not may_lack):
            found["lost"].append(name)
        return
    if short and not told:
        found["uncalled"].append(f"{name}: it was refused")
    if any(not _is(wanted, row) for row in rows):
        found["changed"].append(f"{name}: not what was asked for")
    if told and not told <= {Told(row.id, row.balance_after) for row in rows}:
        found["changed"].append(f"{name}: not what was answered")


def _is(wanted: Wanted, row: Transaction) -> bool:
    return (wanted.operation, wanted.amount) == (row.operation, row.amount)


def _unbalanced(books: Books) -> list[str]:
    """Accounts whose balance or totals are not the sums of their transactions."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in books.transactions:
        sums[each.merchant][each.operation] += each.amount
    found = []
    for account in books.balances:
        moved = sums.pop(account.merchant, Counter())
        granted, consumed = moved["credit"], moved["debit"]
        if account[1:] != (granted - consumed, granted, consumed) or account.balance < 0:
            found.append(account.merchant)
    return [*found, *(f"{merchant}: there is no account" for merchant in sums)]


def _untold(books: Books) -> list[str]:
    """Transactions whose event, which has their id, is not in the outbox as it should be."""
    events = {row.event_id: (row.merchant, row.subject) for row in books.outbox}
    return [
        f"{each.operation} {each.id}"
        for each in books.transactions
        if events.get(each.id) != (each.merchant, MOVED[each.operation])
    ]


def disordered(outbox: Iterable[Row], stream: Iterable[Message]) -> list[str]:
    """Merchants whose credits are told in another order than they moved.

    The order is that of the outbox `glam` for one who drops repeats. What other rooms write about
    a merchant is ordered by other locks, and by nothing among one another.
    """
    rows: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in outbox:
        if row.outbox == "glam" and row.subject.startswith("evt.credits."):
            rows[row.merchant].append((row.number, row.event_id))
    seen: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for message in stream:
        if message.subject.startswith("evt.credits."):
            seen[message.merchant][message.event_id] = None
    found = []
    for merchant, numbered in rows.items():
        there = seen[merchant]
        expected = [event_id for _, event_id in sorted(numbered) if event_id in there]
        known = set(expected)
        if expected != [event_id for event_id in there if event_id in known]:
            found.append(merchant)
    return found


def _out_of_step(books: Books) -> list[str]:
    """Merchants whose movements have an order in the outbox that is not that of the books."""
    numbers = {row.event_id: row.number for row in books.outbox if row.outbox == "glam"}
    by_merchant: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for each in books.transactions:
        if each.id in numbers:
            by_merchant[each.merchant].append((each.seq, numbers[each.id]))
    found = []
    for merchant, steps in by_merchant.items():
        told = [number for _, number in sorted(steps)]
        if told != sorted(told):
            found.append(f"{merchant}: the outbox")
    return found
