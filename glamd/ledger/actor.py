"""The ledger actor: one merchant's commands in their order, decided on an account in memory.

It lets nothing out before it is committed. That the account in memory is behind, because another
node or billing has moved it, shows when the commit is fenced: then it reads again and decides
again, the second time under the row's lock, where nobody can come before it any more. Whoever
asked sees none of this.

While an entry is being committed, the next one is decided already, on the account as it will be;
it is handed over only when the one before it stands.

The rules are the model's, SQL the store's, the commit the journal's.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog
from prometheus_client import Counter

from glamd.actor import Actor
from glamd.clock import Clock
from glamd.db import Database, OutcomeUnknownError, UniqueViolationError
from glamd.errors import GlamError, UnavailableError
from glamd.ledger import store
from glamd.ledger.drafts import Answer, Draft, draft
from glamd.ledger.journal import AccountReader, LedgerJournal, apply_locked, new_ids
from glamd.ledger.model import (
    Account,
    AccountNotFoundError,
    Applied,
    Command,
    Reference,
    Transaction,
)

KIND: Final = "ledger"
BATCH_LIMIT: Final = 1024
"""Commands that an actor takes out of its mailbox at once."""
ENTRY_LIMIT: Final = 256
"""Commands that are decided and committed together."""
MAILBOX_LIMIT: Final = 2048
IDLE_S: Final = 300.0
RECENT_LIMIT: Final = 64
"""Transactions kept in memory at least, and twice as many at most, to answer their repetitions at
once; the database has them all."""
ATTEMPT_LIMIT: Final = 4
"""How often commands are decided whose commit was fenced, or whose outcome got lost."""

log = structlog.get_logger()

_OPERATIONS = Counter(
    "glamd_ledger_operations_total", "Commands answered, by outcome.", ["operation", "outcome"]
)
_COUNTERS: dict[tuple[str, str], Counter] = {}
"""The few children of it, since to find one by its labels takes longer than to count."""
_FENCED = Counter(
    "glamd_ledger_fenced_total", "Entries not applied: the account or a reference had moved."
)
_UNKNOWN = Counter(
    "glamd_ledger_outcomes_unknown_total", "Entries whose commit was cut off, and looked up."
)
_RELOADED = Counter("glamd_ledger_reloaded_total", "Accounts read again, since memory was behind.")
_LOCKED = Counter("glamd_ledger_locked_total", "Entries decided under the lock of their account.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerParts:
    """What every ledger actor is given; `saw` hears of accounts that were read or written, and
    since when (monotonic seconds)."""

    database: Database
    journal: LedgerJournal
    reader: AccountReader
    clock: Clock
    low_balance_threshold: int
    saw: Callable[[Account, float], object]


class LedgerActor(Actor[Command, Applied]):
    """Applies one merchant's commands; each is answered by what is committed, or by its error."""

    __slots__ = ("_account", "_merchant_id", "_parts", "_recent")

    def __init__(self, merchant_id: UUID, parts: LedgerParts) -> None:
        self._merchant_id = merchant_id
        self._parts = parts
        self._account: Account | None = None
        self._recent: dict[Reference, Transaction] = {}

    async def on_activate(self) -> None:
        """Read the account; AccountNotFoundError, UnavailableError."""
        await self._current()

    async def receive_batch(self, messages: Sequence[Command]) -> Sequence[Answer]:
        """Decide them in their order, commit them in entries, and answer them."""
        answers: list[Answer] = []
        try:
            await self._apply(messages, answers)
        except GlamError as error:
            # What was answered stands. Of the rest, what the account is now is not known.
            self._forget()
            answers += [error] * (len(messages) - len(answers))
        if len(self._recent) > 2 * RECENT_LIMIT:
            self._recent = dict(list(self._recent.items())[-RECENT_LIMIT:])
        return answers

    async def _apply(self, messages: Sequence[Command], answers: list[Answer]) -> None:
        none: set[UUID] = set()
        decided = self._draft(await self._current(), messages[:ENTRY_LIMIT], none)
        while True:
            begin = len(answers)
            commit = self._submit(decided)
            following = messages[begin + ENTRY_LIMIT : begin + 2 * ENTRY_LIMIT]
            ahead = None
            if following:
                # First the journal's turn to send what it was given, so that both work at once.
                await asyncio.sleep(0)
                ahead = self._draft(decided.account, following, none)
            if not await self._stands(commit):
                decided = await self._again(messages[begin : begin + ENTRY_LIMIT], decided)
                ahead = self._draft(decided.account, following, none) if following else None
            self._account = decided.account
            if decided.entry is not None:
                # Only what was written is known to be so now; repetitions are answered from memory.
                self._parts.saw(decided.account, self._parts.clock.monotonic_s())
            answers += decided.answers
            count_outcomes(decided)
            if ahead is None:
                return
            decided = ahead

    async def _again(self, commands: Sequence[Command], lost: Draft) -> Draft:
        """Decide on what the database holds now, until it stands.

        Of an entry whose outcome is unknown, the references tell whether it was applied.
        """
        mine: set[UUID] = set()
        for attempt in range(2, ATTEMPT_LIMIT + 1):
            if lost.entry is not None:
                mine.update(transaction.id for transaction in lost.entry.transactions)
            if attempt == 2:
                lost = self._draft(await self._reload(commands), commands, mine)
                stands = await self._stands(self._submit(lost))
            else:
                lost, stands = await self._under_lock(commands, mine)
            if stands:
                return lost
        raise UnavailableError("Whether it was done is not known; the same again will tell.")

    async def _under_lock(self, commands: Sequence[Command], mine: set[UUID]) -> tuple[Draft, bool]:
        """Decide and commit where nobody can come before it, and whether that is certain."""
        parts = self._parts
        self._forget()
        _LOCKED.inc()
        decided = None
        try:
            async with parts.database.transaction() as connection:
                decided = await apply_locked(
                    connection,
                    commands,
                    parts.clock.now(),
                    mine=mine,
                    low_balance_threshold=parts.low_balance_threshold,
                )
        except OutcomeUnknownError:
            if decided is None:
                raise
            _UNKNOWN.inc()
            return decided, False
        return decided, True

    def _draft(self, account: Account, commands: Sequence[Command], mine: set[UUID]) -> Draft:
        now = self._parts.clock.now()
        return draft(
            account,
            commands,
            now,
            known=self._recent,
            mine=mine,
            ids=new_ids(now),
            low_balance_threshold=self._parts.low_balance_threshold,
        )

    def _submit(self, decided: Draft) -> asyncio.Future[bool] | None:
        return None if decided.entry is None else self._parts.journal.submit(decided.entry)

    async def _stands(self, commit: asyncio.Future[bool] | None) -> bool:
        """Whether what was submitted is committed; False also where nobody knows."""
        if commit is None:
            return True
        try:
            if await commit:
                return True
        except OutcomeUnknownError:
            _UNKNOWN.inc()
            return False
        except UniqueViolationError:
            # Somebody has written past the version; what is there now will show.
            log.warning("ledger_key_broken", merchant_id=str(self._merchant_id))
        _FENCED.inc()
        return False

    async def _current(self) -> Account:
        if self._account is not None:
            return self._account
        began_s = self._parts.clock.monotonic_s()
        account = await self._parts.reader.submit(self._merchant_id)
        if account is None:
            raise AccountNotFoundError
        self._account = account
        self._parts.saw(account, began_s)
        return account

    async def _reload(self, commands: Sequence[Command]) -> Account:
        """Drop what is in memory; read the account, and what these references have had."""
        self._forget()
        account = await self._current()
        references = [command.reference for command in commands]
        async with self._parts.database.connection() as connection:
            found = await store.by_reference(connection, self._merchant_id, references)
        self._recent = {transaction.reference: transaction for transaction in found}
        _RELOADED.inc()
        return account

    def _forget(self) -> None:
        self._account = None
        self._recent = {}


def count_outcomes(decided: Draft) -> None:
    """Count commands by how they ended, once that is certain."""
    for outcome, number in decided.outcomes.items():
        counter = _COUNTERS.get(outcome)
        if counter is None:
            counter = _COUNTERS[outcome] = _OPERATIONS.labels(*outcome)
        counter.inc(number)
