"""The ledger's commits: many merchants' entries in one statement, each with its own outcome.

An entry whose account was moved or is held by another writer, or one of whose references was used
before, is fenced: nothing of it is written, and its neighbours are, without waiting for anything.
When to commit is for `glamd.journal` to say, the SQL is the store's, what to do about a fence is
the actor's part.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Final, TypeAlias
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.db import Connection, Database, UniqueViolationError
from glamd.errors import InternalError
from glamd.journal import Journal
from glamd.ledger import store
from glamd.ledger.drafts import Draft, Entry, draft
from glamd.ledger.model import Account, AccountNotFoundError, Command, Reference

LedgerJournal: TypeAlias = Journal[Entry, bool]
AccountReader: TypeAlias = Journal[UUID, Account | None]

log = structlog.get_logger()

_PROCESS_BITS: Final = secrets.randbits(12)
_STEP_BITS: Final = 20
_STEPS_AT_ONCE: Final = 256


def _numbers() -> Iterator[int]:
    """Numbers that grow by steps nobody can guess, from anywhere below half of 62 bits.

    An event's id is the one by which JetStream drops repetitions: whoever knew the next one could
    send something under it first, and the event would be dropped. It also tells nobody how many
    transactions others had. Drawn by the hundred; there are 2^41 until the bits are used up.
    """
    number = secrets.randbits(61)
    while True:
        for step in memoryview(os.urandom(4 * _STEPS_AT_ONCE)).cast("I"):
            number += 1 + (step >> (32 - _STEP_BITS))
            yield number


_NUMBERS: Final = _numbers()

_USED = Counter(
    "glamd_ledger_used_references_total",
    "Entries fenced because one of their references had its effect before.",
)


def make_journal(
    database: Database,
    *,
    connections: int,
    batch_limit: int,
    committed: Callable[[], None] | None,
    observe: Callable[[float], None] | None,
) -> LedgerJournal:
    """The journal of entries; a result says whether its entry was applied (False: fenced).

    `committed` is called after each commit, `observe` with the seconds that each one took.
    """
    return Journal(
        name="ledger",
        database=database,
        commit=commit,
        connections=connections,
        batch_limit=batch_limit,
        committed=committed,
        observe=observe,
    )


def make_reader(database: Database) -> AccountReader:
    """Reads accounts in groups: after a start all merchants want theirs at once."""
    return Journal(name="ledger_accounts", database=database, commit=store.accounts, connections=1)


async def commit(connection: Connection, entries: Sequence[Entry]) -> list[bool]:
    """Apply the entries that can be; for each, in order, whether it was.

    Usually one statement. That a reference is new is left to the unique key, as it almost always
    is; only where the key refuses, or where an entry also rests on references that it does not
    write, are they looked up. Nothing is missed by looking before the statement and not in it: who
    uses a reference raises the version, which the statement checks.
    """
    firsts: dict[UUID, Entry] = {}
    for entry in entries:
        # A second entry of one merchant can only be what an actor that died has left behind.
        firsts.setdefault(entry.account.merchant_id, entry)
    wanted = list(firsts.values())
    if any(entry.refused for entry in wanted):
        wanted = await _without_used(connection, wanted, _refused(wanted))
    try:
        applied = await _write(connection, wanted)
    except UniqueViolationError:
        wanted = await _without_used(connection, wanted, _written(wanted))
        applied = await _write(connection, wanted)
    return [
        entry.account.merchant_id in applied and firsts[entry.account.merchant_id] is entry
        for entry in entries
    ]


async def apply_locked(
    connection: Connection,
    commands: Sequence[Command],
    now: datetime,
    *,
    mine: set[UUID],
    low_balance_threshold: int,
) -> Draft:
    """Decide and write one merchant's commands within the connection's transaction.

    The account is locked until that ends, so that nothing can be fenced; whoever decided on the
    account before is. Raises AccountNotFoundError.
    """
    merchant_id = commands[0].merchant_id
    account = await store.lock_account(connection, merchant_id)
    if account is None:
        raise AccountNotFoundError
    references = [command.reference for command in commands]
    found = await store.by_reference(connection, merchant_id, references)
    decided = draft(
        account,
        commands,
        now,
        known={transaction.reference: transaction for transaction in found},
        mine=mine,
        ids=new_ids(now),
        low_balance_threshold=low_balance_threshold,
    )
    if decided.entry is not None and not await store.write(connection, [decided.entry]):
        log.error("ledger_locked_account_moved", merchant_id=str(merchant_id))
        raise InternalError("An account was moved under its lock.")
    return decided


def new_ids(now: datetime) -> Iterator[UUID]:
    """UUIDv7s that grow (RFC 9562, 6.2, method 1): 48 bits of milliseconds, then a counter.

    The counter of 62 bits begins anywhere below its half with each process, and is common to all
    ids that the process makes.
    """
    first = int(now.timestamp() * 1000) << 80 | 7 << 76 | _PROCESS_BITS << 64 | 2 << 62
    return (UUID(int=first | number) for number in _NUMBERS)


async def _write(connection: Connection, entries: Sequence[Entry]) -> set[UUID]:
    return await store.write(connection, entries) if entries else set()


async def _without_used(
    connection: Connection,
    entries: Sequence[Entry],
    references: Iterator[tuple[UUID, Reference]],
) -> list[Entry]:
    used = await store.used(connection, references)
    _USED.inc(len(used))
    return [entry for entry in entries if entry.account.merchant_id not in used]


def _refused(entries: Sequence[Entry]) -> Iterator[tuple[UUID, Reference]]:
    for entry in entries:
        for reference in entry.refused:
            yield entry.account.merchant_id, reference


def _written(entries: Sequence[Entry]) -> Iterator[tuple[UUID, Reference]]:
    for entry in entries:
        for transaction in entry.transactions:
            yield entry.account.merchant_id, transaction.reference
