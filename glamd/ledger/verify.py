"""The proof that the books are right, row by row, from the first transaction of each account on.

It reads what is committed while others go on writing: an account's row says how many transactions
belong to it, and those never change any more. Rows are judged in the database, in spans, so that
neither side has to hold an account's history. Nothing is mended here.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import UUID

from glamd.db import Connection, Database
from glamd.ledger import store
from glamd.ledger.model import Account, AccountNotFoundError
from glamd.ledger.store import Span, SpanFound

Rule = Literal[
    "missing transaction",
    "wrong sum",
    "broken chain",
    "repeated reference",
    "uncounted transaction",
    "account does not agree",
    "orphaned transaction",
]
_MISSING: Final[Rule] = "missing transaction"
_WRONG_SUM: Final[Rule] = "wrong sum"
_BROKEN_CHAIN: Final[Rule] = "broken chain"
_REPEATED: Final[Rule] = "repeated reference"
_UNCOUNTED: Final[Rule] = "uncounted transaction"
_ACCOUNT: Final[Rule] = "account does not agree"
_ORPHANED: Final[Rule] = "orphaned transaction"

SPAN_ROWS: Final = 20_000
"""Transactions that one statement looks at; well within the statement timeout."""
ACCOUNTS_LIMIT: Final = 500
"""Accounts that are read, and of short ones also judged, together."""
HOLDERS_LIMIT: Final = 5_000
"""Merchants with transactions that are looked up together; a statement of 50 ms."""
BROKEN_LIMIT: Final = 1_000
"""Broken accounts that a report names; the others it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The first thing that is wrong with an account, or of one that is not there.

    `seq` is the row's number and `transaction_id` its id (None where it is missing); both are None
    where it is the account's own row that does not agree with its transactions.
    """

    merchant_id: UUID
    rule: Rule
    seq: int | None = None
    transaction_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was looked at, and what is broken: at most BROKEN_LIMIT of `broken_accounts`.

    A merchant whose transactions have no account counts as a broken one, and is none of `accounts`.
    """

    accounts: int
    transactions: int
    broken_accounts: int
    broken: tuple[Broken, ...]


@dataclass(slots=True)
class _Book:
    """An account on its way through its transactions."""

    account: Account
    next_seq: int = 1
    balance: int = 0
    granted: int = 0
    consumed: int = 0
    broken: Broken | None = None

    @property
    def is_done(self) -> bool:
        return self.broken is not None or self.next_seq > self.account.transaction_count


async def verify(database: Database, merchants: Sequence[UUID] | None = None) -> Report:
    """Check all accounts, or those of some merchants.

    Balance, totals and count of an account agree with its transactions, these follow one another
    without a gap in number or balance, no reference is there twice, and no transaction is without
    an account. Raises AccountNotFoundError where a merchant that was named has neither.
    """
    among = None if merchants is None else sorted(set(merchants), key=lambda each: each.int)
    accounts = transactions = broken_accounts = 0
    broken: list[Broken] = []
    async with database.connection() as connection:
        async for group in _groups(connection, among):
            accounts += len(group)
            for book in await _check(connection, group):
                transactions += book.next_seq - 1
                if book.broken is not None:
                    broken_accounts += 1
                    broken += [book.broken] if len(broken) < BROKEN_LIMIT else []
        orphans = 0
        async for orphan in _orphans(connection, among):
            orphans += 1
            broken += [orphan] if len(broken) < BROKEN_LIMIT else []
    if among is not None and accounts + orphans < len(among):
        raise AccountNotFoundError
    return Report(
        accounts=accounts,
        transactions=transactions,
        broken_accounts=broken_accounts + orphans,
        broken=tuple(broken),
    )


async def _groups(
    connection: Connection, among: Sequence[UUID] | None
) -> AsyncIterator[list[Account]]:
    """Accounts in groups of at most SPAN_ROWS transactions, or of one account."""
    after: UUID | None = None
    while page := await store.accounts_after(connection, after, among, limit=ACCOUNTS_LIMIT):
        after = page[-1].merchant_id
        group: list[Account] = []
        rows = 0
        for account in page:
            if group and rows + account.transaction_count > SPAN_ROWS:
                yield group
                group, rows = [], 0
            group.append(account)
            rows += account.transaction_count
        yield group


async def _orphans(connection: Connection, among: Sequence[UUID] | None) -> AsyncIterator[Broken]:
    """The first transaction of each merchant that has no account."""
    async for merchants in _holders(connection, among):
        for merchant_id, seq, transaction_id in await store.orphans(connection, merchants):
            yield Broken(
                merchant_id=merchant_id, rule=_ORPHANED, seq=seq, transaction_id=transaction_id
            )


async def _holders(
    connection: Connection, among: Sequence[UUID] | None
) -> AsyncIterator[Sequence[UUID]]:
    """All who have transactions, or those who were named, HOLDERS_LIMIT at a time."""
    if among is not None:
        for begin in range(0, len(among), HOLDERS_LIMIT):
            yield among[begin : begin + HOLDERS_LIMIT]
        return
    after: UUID | None = None
    while page := await store.holders_after(connection, after, limit=HOLDERS_LIMIT):
        after = page[-1]
        yield page


async def _check(connection: Connection, accounts: Sequence[Account]) -> list[_Book]:
    books = [_Book(account) for account in accounts]
    open_books = [book for book in books if not book.is_done]
    while open_books:
        spans = [_next_span(book) for book in open_books]
        found = await store.look_at(connection, spans)
        for book, span, rows in zip(open_books, spans, found, strict=True):
            _judge(book, span, rows)
        open_books = [book for book in open_books if not book.is_done]
    uncounted = await store.beyond(connection, [account.merchant_id for account in accounts])
    for book in books:
        if book.broken is None:
            _judge_account(book, is_uncounted=book.account.merchant_id in uncounted)
        elif book.broken.seq is not None and book.broken.rule != "missing transaction":
            where = (book.broken.merchant_id, book.broken.seq)
            found_id = await store.id_of(connection, *where)
            book.broken = replace(book.broken, transaction_id=found_id)
    return books


def _next_span(book: _Book) -> Span:
    last = min(book.next_seq + SPAN_ROWS - 1, book.account.transaction_count)
    return Span(book.account.merchant_id, book.next_seq, last, book.balance)


def _judge(book: _Book, span: Span, found: SpanFound) -> None:
    """Note the first broken row of a span, and go on behind it."""
    missing = found.missing
    if missing is None and found.rows <= span.last - span.first:
        missing = span.first + found.rows
    at_fault: list[tuple[int, Rule]] = [
        (seq, rule)
        for seq, rule in (
            (missing, _MISSING),
            (found.wrong_sum, _WRONG_SUM),
            (found.broken_chain, _BROKEN_CHAIN),
            (found.repeated, _REPEATED),
        )
        if seq is not None
    ]
    if at_fault:
        # Of two rules that the same row breaks, the first here tells more.
        seq, rule = min(at_fault, key=lambda fault: fault[0])
        book.broken = Broken(merchant_id=span.merchant_id, rule=rule, seq=seq)
    book.granted += found.granted
    book.consumed += found.consumed
    book.balance = book.balance if found.balance is None else found.balance
    book.next_seq = span.last + 1


def _judge_account(book: _Book, *, is_uncounted: bool) -> None:
    account = book.account
    if is_uncounted:
        book.broken = Broken(merchant_id=account.merchant_id, rule=_UNCOUNTED)
    elif (account.balance, account.total_granted, account.total_consumed) != (
        book.balance,
        book.granted,
        book.consumed,
    ) or account.balance != account.total_granted - account.total_consumed:
        book.broken = Broken(merchant_id=account.merchant_id, rule=_ACCOUNT)
