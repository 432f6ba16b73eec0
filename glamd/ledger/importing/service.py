"""Taking over one merchant's account with all of its transactions, in one transaction.

Nobody sees an account half imported. Importing the same again changes nothing; where the older
rows have changed since, and nothing has moved the account here, the books are written anew. No
event is published: what happened there was told there.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Final, NoReturn
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.clock import Clock
from glamd.db import Connection, Database, UniqueViolationError
from glamd.errors import InternalError
from glamd.ids import as_uuid
from glamd.ledger import store as ledger_store
from glamd.ledger.importing import store
from glamd.ledger.importing.merchant import (
    REFUSED_LIMIT,
    OlderMerchant,
    Outcome,
    Refusal,
    RefusedError,
    Taken,
)
from glamd.ledger.importing.model import (
    ACCOUNTS,
    TRANSACTIONS,
    Books,
    OlderTransaction,
    entries,
    read_account,
    read_transaction,
    settle,
    told_apart,
)
from glamd.ledger.model import Transaction
from glamd.ledger.service import Ledger

CHUNK_ROWS: Final = 1_000
"""Transactions that one statement writes."""

log = structlog.get_logger()

_ACCOUNTS = Counter(
    "glamd_ledger_imported_accounts_total", "Older accounts by outcome.", ["outcome"]
)


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """What was found out about a merchant before a row is written."""

    digest: str
    books: Books


class _TriedError(Exception):
    """The end of a dry run, so that its transaction is rolled back."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()
        self.taken = taken


class CreditImporter:
    """Takes older accounts; two of them may be at work, also on two nodes."""

    def __init__(self, database: Database, *, ledger: Ledger, clock: Clock) -> None:
        self._database = database
        self._ledger = ledger
        self._clock = clock

    async def take(
        self, merchant: OlderMerchant, *, strict: bool = False, dry_run: bool = False
    ) -> Taken:
        """Take a merchant: all of it is committed or nothing, also where this raises.

        `strict` refuses what could only be taken with a transaction of the import's own, or with a
        reference changed; with `dry_run` nothing is kept. UnavailableError, after which the same
        may be taken again.
        """
        try:
            # Reading a long history would hold up everybody else.
            surveyed = await asyncio.to_thread(_survey, merchant)
            if strict and surveyed.books.is_adjusted:
                raise _refused(surveyed.books, "balance", "Its transactions do not come to it.")
            taken = await self._take(merchant, surveyed, strict=strict, dry_run=dry_run)
        except RefusedError as error:
            taken = Taken(
                merchant_id=merchant.merchant_id, outcome="refused", refused=error.refused
            )
        if not dry_run:
            _ACCOUNTS.labels(taken.outcome).inc()
            log.info(
                "older_credits_imported", merchant_id=merchant.merchant_id, outcome=taken.outcome
            )
        return taken

    async def _take(
        self, merchant: OlderMerchant, surveyed: _Surveyed, *, strict: bool, dry_run: bool
    ) -> Taken:
        now = self._clock.now()
        books = surveyed.books
        try:
            async with self._database.transaction() as connection:
                taken = await self._within(connection, merchant, surveyed, strict=strict, now=now)
                if dry_run:
                    _end_dry_run(taken)
        except _TriedError as tried:
            return tried.taken
        except UniqueViolationError:
            message = "Another transaction, here or in the older table, has one of its ids."
            raise _refused(books, "id", message, table=TRANSACTIONS.name) from None
        self._ledger.forget(books.account.merchant_id)
        return taken

    async def _within(
        self,
        connection: Connection,
        merchant: OlderMerchant,
        surveyed: _Surveyed,
        *,
        strict: bool,
        now: datetime,
    ) -> Taken:
        books = surveyed.books
        merchant_id = books.account.merchant_id
        name = f"credits/{merchant_id}"
        record = await store.lock_record(connection, name, at=now)
        if record.source == surveyed.digest:
            return _taken(books, "already", record.counts)
        count = await self._opened(connection, books, now)
        if count != record.counts.get("transactions", 0):
            return _taken(books, "moved_on", record.counts)
        await store.remove(connection, merchant_id, count=count)
        renamed, rechained = await _write(connection, merchant, books, now)
        if renamed and strict:
            message = f"{renamed} have a reference that another one has."
            raise _refused(books, "reference_id", message, table=TRANSACTIONS.name)
        await store.move(connection, books, now=now)
        counts = _counts(books) | {"renamed": renamed, "rechained": rechained}
        if await store.sums(connection, merchant_id) != (
            books.count,
            books.granted,
            books.consumed,
        ):
            log.error("imported_books_do_not_agree", merchant_id=str(merchant_id))
            raise InternalError("What was written is not what should have been.")
        await store.set_record(
            connection, name, source=surveyed.digest, position="", counts=counts, at=now
        )
        return _taken(books, "updated" if record.source else "taken", counts)

    async def _opened(self, connection: Connection, books: Books, now: datetime) -> int:
        """Lock the merchant's account, made where there is none; how many transactions it has."""
        account, shop = books.account, books.account.shop
        await ledger_store.open_account(
            connection,
            merchant_id=account.merchant_id,
            platform_name=shop.platform,
            platform_id=shop.shop_id,
            platform_domain=shop.domain,
            now=account.created_at or books.first_at or now,
        )
        found = await ledger_store.lock_account(connection, account.merchant_id)
        assert found is not None
        return found.transaction_count


def _end_dry_run(taken: Taken) -> NoReturn:
    raise _TriedError(taken)


def _survey(merchant: OlderMerchant) -> _Surveyed:
    """Read all of a merchant. Raises RefusedError."""
    if as_uuid(merchant.merchant_id) is None or len(merchant.heads) != 1:
        table, field, message = _no_account(merchant)
        raise RefusedError([Refusal(table, merchant.merchant_id[:64], field, message)])
    wrong: list[Refusal] = []
    try:
        account = read_account(merchant.heads[0])
    except RefusedError as error:
        wrong += error.refused
    transactions: Iterator[OlderTransaction] = _read(merchant, wrong)
    if wrong:
        for _ in transactions:
            pass  # so that all that is wrong is named at once
        raise RefusedError(wrong)
    books = settle(account, transactions)
    if wrong:
        raise RefusedError(wrong)
    return _Surveyed(merchant.digest(), books)


def _no_account(merchant: OlderMerchant) -> tuple[str, str, str]:
    if len(merchant.heads) > 1:
        return ACCOUNTS.name, "merchant_id", "There are several accounts of this merchant."
    if merchant.heads:
        return ACCOUNTS.name, "merchant_id", "It is no UUID."
    return TRANSACTIONS.name, "merchant_id", "There is no account of this merchant."


def _read(merchant: OlderMerchant, wrong: list[Refusal]) -> Iterator[OlderTransaction]:
    """The merchant's transactions; those that are wrong are left out and noted, up to a limit."""
    for chunk in merchant.chunks():
        for row in chunk:
            try:
                yield read_transaction(row)
            except RefusedError as error:
                wrong += error.refused
                if len(wrong) >= REFUSED_LIMIT:
                    return


async def _write(
    connection: Connection, merchant: OlderMerchant, books: Books, now: datetime
) -> tuple[int, int]:
    """Write the books' rows; how many have another reference or another balance than there."""
    shown: dict[UUID, int | None] = {}

    def remembered() -> Iterator[OlderTransaction]:
        for one in _read(merchant, []):
            shown[one.id] = one.balance_after
            yield one

    source = entries(books, remembered(), now)
    renamed = rechained = 0
    is_last = False
    while not is_last:
        chunk = await asyncio.to_thread(_next, source)
        is_last = len(chunk) < CHUNK_ROWS
        rechained += sum(shown.get(one.id) not in (None, one.balance_after) for one in chunk)
        shown.clear()
        written = await store.add(connection, chunk)
        again = [told_apart(one) for one in chunk if one.id not in written]
        renamed += len(again)
        if again and len(await store.add(connection, again)) != len(again):
            message = "It is another one's with an id behind it."
            raise _refused(books, "reference_id", message, table=TRANSACTIONS.name)
    return renamed, rechained


def _next(source: Iterator[Transaction]) -> Sequence[Transaction]:
    return list(islice(source, CHUNK_ROWS))


def _counts(books: Books) -> dict[str, int]:
    return {
        "accounts": 1,
        "transactions": books.count,
        "added": books.count - books.rows,
        "balance": books.balance,
        "granted": books.granted,
        "consumed": books.consumed,
        "opening": books.opening,
        "closing": books.closing,
    }


def _taken(books: Books, outcome: Outcome, counts: dict[str, int]) -> Taken:
    account = books.account
    notes = {
        name: counts[name]
        for name in ("opening", "closing", "renamed", "rechained")
        if counts.get(name)
    }
    for name, told, is_so in (
        ("total_granted", account.total_granted, books.credits),
        ("total_consumed", account.total_consumed, books.debits),
    ):
        if told is not None and told != is_so:
            notes[f"{name}_differs_by"] = is_so - told
    return Taken(
        merchant_id=str(account.merchant_id),
        outcome=outcome,
        figures=counts,
        notes=notes,
        shop=account.shop,
    )


def _refused(books: Books, field: str, message: str, *, table: str = ACCOUNTS.name) -> RefusedError:
    return RefusedError([Refusal(table, str(books.account.merchant_id), field, message)])
