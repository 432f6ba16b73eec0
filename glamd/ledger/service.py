"""The ledger as the rest of glamd sees it: apply a command, look at an account, page through time.

Every change of a balance goes through `apply` (by the merchant's actor) or, in the transaction of
another writer, through `apply_within`. Whose merchant a caller may name, and which HTTP status an
error has, is decided elsewhere.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.actor import ActorSpec, Ref, System
from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import FieldError, GlamError, InputError
from glamd.ledger import actor, store
from glamd.ledger.actor import LedgerActor, LedgerParts
from glamd.ledger.journal import apply_locked, make_journal, make_reader
from glamd.ledger.model import Account, AccountNotFoundError, Applied, Command, Transaction

ASK_TIMEOUT_S: Final = 10.0
"""Longer than a statement of the journal may take, so that it is the database that answers."""
TRUST_S: Final = 1.0
"""How long an account in memory is shown without a look at the database; spec 9: any node may
have moved it since."""
SEEN_LIMIT: Final = 50_000
"""Accounts kept to be shown; beyond it the one that was not touched for longest is dropped."""
PAGE_LIMIT: Final = 200
CURSOR_LIMIT_CHARS: Final = 18
"""Digits that surely fit into a `bigint`."""


@dataclass(frozen=True, slots=True)
class TransactionPage:
    """Some of a merchant's transactions, newest first, and how many there are altogether.

    `next_cursor` is None on the last page.
    """

    items: tuple[Transaction, ...]
    total: int
    next_cursor: str | None


class Ledger:
    """The credits of all merchants.

    `connections` and `batch_limit` are the journal's: how many commits are under way at once, and
    how many merchants' entries one of them takes. `low_balance_threshold` 0 means no such event.
    `committed` is called after each commit: there may be events to send. `observe` is told the
    seconds of each.
    """

    def __init__(
        self,
        database: Database,
        *,
        system: System,
        clock: Clock,
        low_balance_threshold: int = 100,
        connections: int = 2,
        batch_limit: int = 256,
        committed: Callable[[], None] | None = None,
        observe: Callable[[float], None] | None = None,
    ) -> None:
        self._database = database
        self._system = system
        self._clock = clock
        self._low_balance_threshold = low_balance_threshold
        self._seen = _Seen(clock)
        self._refs: dict[UUID, Ref[Command, Applied]] = {}
        self._journal = make_journal(
            database,
            connections=connections,
            batch_limit=batch_limit,
            committed=committed,
            observe=observe,
        )
        self._reader = make_reader(database)
        parts = LedgerParts(
            database=database,
            journal=self._journal,
            reader=self._reader,
            clock=clock,
            low_balance_threshold=low_balance_threshold,
            saw=self._seen.keep,
        )
        self._spec: ActorSpec[Command, Applied] = ActorSpec(
            kind=actor.KIND,
            factory=lambda key: LedgerActor(UUID(key), parts),
            mailbox_limit=actor.MAILBOX_LIMIT,
            batch_limit=actor.BATCH_LIMIT,
            idle_s=actor.IDLE_S,
        )

    async def start(self) -> None:
        """Start reading and committing; before it, everything is refused."""
        await self._reader.start()
        await self._journal.start()

    async def stop(self, timeout_s: float) -> None:
        """Commit what waits for at most `timeout_s`; to be called when the actors are drained."""
        await self._journal.stop(timeout_s)
        await self._reader.stop(timeout_s)

    def apply(self, command: Command) -> asyncio.Future[Applied]:
        """Apply a command; the future is done when that is committed, or has its error.

        The reference is the idempotency key: the same again is answered with the first
        transaction. Errors: InsufficientCreditsError, DuplicateTransactionError,
        AccountNotFoundError, InputError where the account would be granted too much, and
        TransientError, after which the same command may, and should, be sent again.
        """
        merchant_id = command.merchant_id
        ref = self._refs.get(merchant_id)
        if ref is None:
            if len(self._refs) >= SEEN_LIMIT:
                self._refs.clear()
            ref = self._refs[merchant_id] = self._system.ref(self._spec, str(merchant_id))
        return ref.ask(command, timeout_s=ASK_TIMEOUT_S)

    async def apply_within(
        self, connection: Connection, command: Command, now: datetime
    ) -> Applied:
        """Apply a command as a part of the connection's transaction, which may do more.

        It holds once that transaction commits; until then the account is locked. The errors are
        those of `apply`; the event of an insufficient balance is written before its error is
        raised, and is there if the caller commits all the same. After the commit, `forget` makes
        it show at once.
        """
        decided = await apply_locked(
            connection,
            (command,),
            now,
            mine=set(),
            low_balance_threshold=self._low_balance_threshold,
        )
        actor.count_outcomes(decided)
        (answer,) = decided.answers
        if isinstance(answer, GlamError):
            raise answer
        return answer

    async def open_account(
        self,
        connection: Connection,
        *,
        merchant_id: UUID,
        platform_name: str,
        platform_id: str,
        platform_domain: str,
    ) -> bool:
        """Make the merchant's empty account; False where there is one, which stays as it is."""
        return await store.open_account(
            connection,
            merchant_id=merchant_id,
            platform_name=platform_name,
            platform_id=platform_id,
            platform_domain=platform_domain,
            now=self._clock.now(),
        )

    async def account(self, merchant_id: UUID) -> Account:
        """The merchant's account, as it is or, where another writer moved it, was TRUST_S ago.

        What this ledger has committed shows at once. Raises AccountNotFoundError.
        """
        seen = self._seen.recent(merchant_id)
        if seen is not None:
            return seen
        began_s = self._clock.monotonic_s()
        found = await self._reader.submit(merchant_id)
        if found is None:
            raise AccountNotFoundError
        return self._seen.keep(found, began_s)

    async def account_by_domain(self, domain: str) -> Account:
        """The youngest account of a shop's domain. Raises AccountNotFoundError."""
        found = await store.account_by_domain(self._database, domain)
        if found is None:
            raise AccountNotFoundError
        return found

    def forget(self, merchant_id: UUID) -> None:
        """Show this account from the database next time; for who has committed `apply_within`."""
        self._seen.drop(merchant_id)

    async def transactions(
        self, merchant_id: UUID, *, limit: int, page: int | None = None, cursor: str | None = None
    ) -> TransactionPage:
        """The merchant's transactions, newest first, by page number (from 1) or behind a cursor.

        Every page costs the same, however deep. `limit` is at most PAGE_LIMIT. Raises
        AccountNotFoundError, InputError for a cursor that is not one of ours.
        """
        limit = max(1, min(limit, PAGE_LIMIT))
        async with self._database.connection() as connection:
            account = await store.account(connection, merchant_id)
            if account is None:
                raise AccountNotFoundError
            total = account.transaction_count
            newest = total - ((page or 1) - 1) * limit if cursor is None else _decode(cursor)
            items = await store.page(connection, merchant_id, newest=max(newest, 0), limit=limit)
        is_last = not items or items[-1].seq == 1
        return TransactionPage(
            items=tuple(items),
            total=total,
            next_cursor=None if is_last else str(items[-1].seq - 1),
        )


class _Seen:
    """Accounts as they were last seen, and when; never an older one in place of a newer."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._accounts: OrderedDict[UUID, tuple[Account, float]] = OrderedDict()

    def keep(self, account: Account, began_s: float) -> Account:
        """Remember what was read or written since `began_s`; returns what is to be shown.

        That is what was known before, where it was seen later and is newer.
        """
        merchant_id = account.merchant_id
        known = self._accounts.get(merchant_id)
        if known is not None and known[1] >= began_s and known[0].version > account.version:
            return known[0]
        self._accounts[merchant_id] = (account, self._clock.monotonic_s())
        self._accounts.move_to_end(merchant_id)
        if len(self._accounts) > SEEN_LIMIT:
            self._accounts.popitem(last=False)
        return account

    def recent(self, merchant_id: UUID) -> Account | None:
        """The account, if it was seen within TRUST_S."""
        known = self._accounts.get(merchant_id)
        if known is None or self._clock.monotonic_s() - known[1] > TRUST_S:
            return None
        return known[0]

    def drop(self, merchant_id: UUID) -> None:
        """Forget an account."""
        self._accounts.pop(merchant_id, None)


def _decode(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= CURSOR_LIMIT_CHARS):
        raise InputError(
            "The cursor is not one of ours.", fields=(FieldError("cursor", "is not one of ours"),)
        )
    return int(cursor)
