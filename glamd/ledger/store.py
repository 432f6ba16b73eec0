"""The SQL of credits: accounts, transactions, and the statement of the group commit.

No rule is decided here: an entry either applies on the version it was decided on or it does not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.db import Connection, Database, Row
from glamd.ledger.drafts import Entry
from glamd.ledger.model import Account, Reference, Transaction

_ACCOUNT_COLUMNS: Final = """
    merchant_id, platform_name, platform_id, platform_domain,
    balance, total_granted, total_consumed, transaction_count, version
"""
_TRANSACTION_COLUMNS: Final = """
    id, merchant_id, seq, amount, operation, balance_before, balance_after,
    reference_type, reference_id, description, metadata, created_at
"""

# One statement is one transaction and one round trip. All entries come as one JSON document: to
# encode their values as PostgreSQL's arrays, one at a time, costs the driver more than it saves the
# server. Every row is a JSON array, whose places `_document` knows: to read it by name
# (`jsonb_to_recordset`) takes the server two thirds longer. What an entry's rows have in common
# stands there once, since to read a UUID or a time takes as long as to read all their numbers.
# `free` takes the accounts that nobody else holds, and waits for none: who is being moved by
# another writer is about to be stale, and would hold up everybody in the batch. LATERAL is never
# made into a join, which would be planned once on what the tables held when the statement was
# prepared, which is nothing. For the same reason `moved` is an INSERT that never inserts: ON
# CONFLICT finds the accounts by their primary key whatever the planner believes of the table.
# An account that another writer has moved keeps what it has, and its transactions and events are
# left out. A reference that was used already breaks the unique key, and with it the statement:
# whoever raised the version later than this entry was decided has been fenced before that, so only
# references older than the version can do so, and those `used` finds.
_WRITE: Final = """
WITH entry AS (
    SELECT (i->>0)::uuid AS merchant_id, (i->>9)::timestamptz AS at, i AS account,
           i->10 AS transactions, i->11 AS events, place
    FROM jsonb_array_elements($1) WITH ORDINALITY AS entries (i, place)
), free AS (
    SELECT locked.merchant_id FROM entry
    CROSS JOIN LATERAL (
        SELECT a.merchant_id FROM glam.credit_accounts a WHERE a.merchant_id = entry.merchant_id
        FOR NO KEY UPDATE SKIP LOCKED) AS locked
), moved AS (
    INSERT INTO glam.credit_accounts AS a (
        merchant_id, platform_name, platform_id, platform_domain, balance, total_granted,
        total_consumed, transaction_count, version, created_at, updated_at)
    SELECT merchant_id, account->>1, account->>2, account->>3, (account->>4)::bigint,
           (account->>5)::bigint, (account->>6)::bigint, (account->>7)::bigint,
           (account->>8)::bigint, at, at
    FROM entry WHERE (merchant_id IN (SELECT merchant_id FROM free)) IS TRUE
    ON CONFLICT (merchant_id) DO UPDATE
    SET balance = EXCLUDED.balance, total_granted = EXCLUDED.total_granted,
        total_consumed = EXCLUDED.total_consumed,
        transaction_count = EXCLUDED.transaction_count,
        version = EXCLUDED.version, updated_at = EXCLUDED.updated_at
    WHERE a.version = EXCLUDED.version - 1
    RETURNING merchant_id
), written AS (
    INSERT INTO glam.credit_transactions (
        id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
        reference_id, description, metadata, created_at)
    SELECT (t->>0)::uuid, merchant_id, (t->>1)::bigint, (t->>2)::bigint, t->>3, (t->>4)::bigint,
           (t->>5)::bigint, t->>6, t->>7, t->>8, nullif(t->9, 'null'), at
    FROM entry CROSS JOIN LATERAL jsonb_array_elements(transactions) AS t
    WHERE (merchant_id IN (SELECT merchant_id FROM moved)) IS TRUE
), announced AS (
    INSERT INTO glam.outbox (event_id, subject, merchant_id, correlation_id, data)
    SELECT (e->>0)::uuid, e->>1, merchant_id, e->>2, e->3
    FROM entry CROSS JOIN LATERAL jsonb_array_elements(events) WITH ORDINALITY AS told (e, nth)
    WHERE (merchant_id IN (SELECT merchant_id FROM moved)) IS TRUE
    ORDER BY place, nth
)
SELECT merchant_id FROM moved
"""

# Scalar subqueries are never made into a join, which would read the whole table (see above).
_USED: Final = """
SELECT merchant_id FROM unnest($1::uuid[], $2::text[], $3::text[])
    AS i (merchant_id, reference_type, reference_id)
WHERE (SELECT true FROM glam.credit_transactions t
       WHERE t.merchant_id = i.merchant_id AND t.reference_type = i.reference_type
         AND t.reference_id = i.reference_id)
"""
_BY_REFERENCE: Final = f"""
SELECT t.* FROM unnest($2::text[], $3::text[]) AS i (reference_type, reference_id)
CROSS JOIN LATERAL (
    SELECT {_TRANSACTION_COLUMNS} FROM glam.credit_transactions t
    WHERE t.merchant_id = $1 AND t.reference_type = i.reference_type
      AND t.reference_id = i.reference_id
    LIMIT 1) AS t
"""  # noqa: S608 - our own constants

_ACCOUNTS: Final = f"""
SELECT a.* FROM unnest($1::uuid[]) AS i (merchant_id)
CROSS JOIN LATERAL (
    SELECT {_ACCOUNT_COLUMNS} FROM glam.credit_accounts a WHERE a.merchant_id = i.merchant_id
    LIMIT 1) AS a
"""  # noqa: S608 - our own constants
_ACCOUNT: Final = f"SELECT {_ACCOUNT_COLUMNS} FROM glam.credit_accounts WHERE merchant_id = $1"  # noqa: S608 - our own constants
_LOCK_ACCOUNT: Final = f"{_ACCOUNT} FOR UPDATE"
_ACCOUNT_BY_DOMAIN: Final = f"""
SELECT {_ACCOUNT_COLUMNS} FROM glam.credit_accounts
WHERE platform_domain = $1 ORDER BY created_at DESC LIMIT 1
"""  # noqa: S608 - our own constants
_OPEN: Final = """
INSERT INTO glam.credit_accounts (
    merchant_id, platform_name, platform_id, platform_domain, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $5)
ON CONFLICT (merchant_id) DO NOTHING
"""
# There is no gap in `seq`, so that a page by its number costs what a page behind a cursor costs.
_PAGE: Final = f"""
SELECT {_TRANSACTION_COLUMNS} FROM glam.credit_transactions
WHERE merchant_id = $1 AND seq <= $2 ORDER BY seq DESC LIMIT $3
"""  # noqa: S608 - our own constants

_ACCOUNTS_AFTER: Final = f"""
SELECT {_ACCOUNT_COLUMNS} FROM glam.credit_accounts
WHERE ($1::uuid IS NULL OR merchant_id > $1) AND ($2::uuid[] IS NULL OR merchant_id = ANY ($2))
ORDER BY merchant_id LIMIT $3
"""  # noqa: S608 - our own constants
# One row a span of one merchant's transactions. A row of it is broken that does not go on where the
# one before it ended, does not move the balance by its amount, or has a reference that an earlier
# one has.
_SPANS: Final = """
SELECT found.* FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[])
    WITH ORDINALITY AS span (merchant_id, first, last, balance, place)
CROSS JOIN LATERAL (
    SELECT count(*) AS rows,
           coalesce(sum(amount) FILTER (WHERE operation = 'credit'), 0) AS granted,
           coalesce(sum(amount) FILTER (WHERE operation = 'debit'), 0) AS consumed,
           max(balance_after) FILTER (WHERE is_last) AS balance,
           min(expected) FILTER (WHERE seq <> expected) AS missing,
           min(seq) FILTER (WHERE is_break) AS broken_chain,
           min(seq) FILTER (WHERE is_wrong) AS wrong_sum,
           min(seq) FILTER (WHERE is_repeated) AS repeated
    FROM (
        SELECT t.seq, t.amount, t.operation, t.balance_after,
               lead(t.seq) OVER by_seq IS NULL AS is_last,
               coalesce(lag(t.seq) OVER by_seq + 1, span.first) AS expected,
               t.balance_before <> coalesce(lag(t.balance_after) OVER by_seq, span.balance)
                   AS is_break,
               t.balance_after <> t.balance_before
                   + CASE t.operation WHEN 'credit' THEN t.amount ELSE -t.amount END
                   OR t.amount <= 0 OR t.balance_after < 0 AS is_wrong,
               t.seq <> (SELECT min(same.seq) FROM glam.credit_transactions same
                         WHERE same.merchant_id = t.merchant_id
                           AND same.reference_type = t.reference_type
                           AND same.reference_id = t.reference_id) AS is_repeated
        FROM glam.credit_transactions t
        WHERE t.merchant_id = span.merchant_id AND t.seq BETWEEN span.first AND span.last
        WINDOW by_seq AS (ORDER BY t.seq)
    ) AS judged
) AS found
ORDER BY span.place
"""
_BEYOND: Final = """
SELECT merchant_id FROM unnest($1::uuid[]) AS i (merchant_id)
WHERE (SELECT max(seq) FROM glam.credit_transactions t WHERE t.merchant_id = i.merchant_id)
      > (SELECT transaction_count FROM glam.credit_accounts a WHERE a.merchant_id = i.merchant_id)
"""
# From one merchant that has transactions to the next one by the index, however many each has.
_HOLDERS_AFTER: Final = """
WITH RECURSIVE holder AS (
    (SELECT merchant_id FROM glam.credit_transactions
     WHERE $1::uuid IS NULL OR merchant_id > $1 ORDER BY merchant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT t.merchant_id FROM glam.credit_transactions t
            WHERE t.merchant_id > holder.merchant_id ORDER BY t.merchant_id LIMIT 1)
    FROM holder WHERE holder.merchant_id IS NOT NULL
)
SELECT merchant_id FROM holder WHERE merchant_id IS NOT NULL LIMIT $2
"""
_ORPHANS: Final = """
SELECT t.merchant_id, t.seq, t.id FROM unnest($1::uuid[]) AS i (merchant_id)
CROSS JOIN LATERAL (
    SELECT merchant_id, seq, id FROM glam.credit_transactions
    WHERE merchant_id = i.merchant_id ORDER BY seq LIMIT 1) AS t
WHERE (SELECT true FROM glam.credit_accounts a WHERE a.merchant_id = i.merchant_id) IS NULL
ORDER BY t.merchant_id
"""
_ID_OF: Final = """
SELECT id FROM glam.credit_transactions WHERE merchant_id = $1 AND seq = $2 LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of one merchant's transactions to be looked at, and the balance before it."""

    merchant_id: UUID
    first: int
    last: int
    balance: int


@dataclass(frozen=True, slots=True)
class SpanFound:
    """What a span holds: how many rows, their sums, the balance after the last one (None: no row).

    Then the numbers, each None where all is well, of the first row that is missing before another
    one, that does not begin with the balance of the one before it, whose own sum is wrong, whose
    reference is an earlier row's.
    """

    rows: int
    granted: int
    consumed: int
    balance: int | None
    missing: int | None
    broken_chain: int | None
    wrong_sum: int | None
    repeated: int | None


async def write(connection: Connection, entries: Sequence[Entry]) -> set[UUID]:
    """Apply entries, one a merchant; the merchants whose version held, and whom nobody held.

    UniqueViolationError when a reference was used already; then nothing of this was written.
    """
    rows = await connection.fetch(_WRITE, [_document(entry) for entry in entries])
    return {row[0] for row in rows}


async def used(connection: Connection, references: Iterable[tuple[UUID, Reference]]) -> set[UUID]:
    """The merchants of those of these references that have had their effect."""
    rows = await connection.fetch(
        _USED, *_columns(3, ((merchant_id, *reference) for merchant_id, reference in references))
    )
    return {row[0] for row in rows}


async def accounts(connection: Connection, merchant_ids: Sequence[UUID]) -> list[Account | None]:
    """The accounts of some merchants as they are committed now, in the order of the ids."""
    rows = await connection.fetch(_ACCOUNTS, merchant_ids)
    found = {row["merchant_id"]: _account(row) for row in rows}
    return [found.get(merchant_id) for merchant_id in merchant_ids]


async def account(connection: Connection, merchant_id: UUID) -> Account | None:
    """A merchant's account as it is committed now."""
    row = await connection.fetchrow(_ACCOUNT, merchant_id)
    return None if row is None else _account(row)


async def lock_account(connection: Connection, merchant_id: UUID) -> Account | None:
    """A merchant's account, which nobody else moves until the transaction ends."""
    row = await connection.fetchrow(_LOCK_ACCOUNT, merchant_id)
    return None if row is None else _account(row)


async def account_by_domain(database: Database, domain: str) -> Account | None:
    """The youngest account of a shop's domain."""
    row = await database.fetchrow(_ACCOUNT_BY_DOMAIN, domain)
    return None if row is None else _account(row)


async def open_account(
    connection: Connection,
    *,
    merchant_id: UUID,
    platform_name: str,
    platform_id: str,
    platform_domain: str,
    now: datetime,
) -> bool:
    """Make an empty account; False where the merchant has one, which stays as it is."""
    tag = await connection.execute(
        _OPEN, merchant_id, platform_name, platform_id, platform_domain, now
    )
    return tag == "INSERT 0 1"


async def by_reference(
    connection: Connection, merchant_id: UUID, references: Sequence[Reference]
) -> list[Transaction]:
    """The transactions that these references have had."""
    types, ids = _columns(2, references)
    rows = await connection.fetch(_BY_REFERENCE, merchant_id, types, ids)
    return [_transaction(row) for row in rows]


async def page(
    connection: Connection, merchant_id: UUID, *, newest: int, limit: int
) -> list[Transaction]:
    """The merchant's transactions from the one with `seq` `newest` back, newest first."""
    rows = await connection.fetch(_PAGE, merchant_id, newest, limit)
    return [_transaction(row) for row in rows]


async def accounts_after(
    connection: Connection, after: UUID | None, among: Sequence[UUID] | None, *, limit: int
) -> list[Account]:
    """The next accounts by merchant id, all or among some."""
    rows = await connection.fetch(_ACCOUNTS_AFTER, after, among, limit)
    return [_account(row) for row in rows]


async def look_at(connection: Connection, spans: Sequence[Span]) -> list[SpanFound]:
    """What the spans hold, judged row by row where they are."""
    columns = _columns(4, ((s.merchant_id, s.first, s.last, s.balance) for s in spans))
    rows = await connection.fetch(_SPANS, *columns)
    # PostgreSQL sums a `bigint` as `numeric`.
    return [
        SpanFound(**{**row, "granted": int(row["granted"]), "consumed": int(row["consumed"])})
        for row in rows
    ]


async def beyond(connection: Connection, merchant_ids: Sequence[UUID]) -> set[UUID]:
    """Those of these merchants that have transactions which their account does not count."""
    return {row[0] for row in await connection.fetch(_BEYOND, merchant_ids)}


async def holders_after(connection: Connection, after: UUID | None, *, limit: int) -> list[UUID]:
    """The next merchants by id that have transactions, with or without an account."""
    return [row[0] for row in await connection.fetch(_HOLDERS_AFTER, after, limit)]


async def orphans(
    connection: Connection, merchant_ids: Sequence[UUID]
) -> list[tuple[UUID, int, UUID]]:
    """Of these merchants those with transactions and no account; number and id of the first one."""
    rows = await connection.fetch(_ORPHANS, merchant_ids)
    return [(row["merchant_id"], row["seq"], row["id"]) for row in rows]


async def id_of(connection: Connection, merchant_id: UUID, seq: int) -> UUID | None:
    """The id of a merchant's transaction with this number."""
    value: UUID | None = await connection.fetchval(_ID_OF, merchant_id, seq)
    return value


def _document(entry: Entry) -> tuple[object, ...]:
    """An entry as `_WRITE` reads it: of its rows, what is not the entry's own."""
    return (
        *entry.account,
        entry.at,
        # Without the merchant and the moment, which are the second field and the last.
        [(transaction.id, *transaction[2:-1]) for transaction in entry.transactions],
        [
            (event_id, event.subject, event.correlation_id, event.data)
            for event_id, event in entry.events
        ],
    )


def _columns(count: int, rows: Iterable[Sequence[object]]) -> list[Sequence[object]]:
    """The columns of some rows, also where there are none."""
    return list(zip(*rows, strict=True)) or [()] * count


def _account(row: Row) -> Account:
    return Account(**dict(row))


def _transaction(row: Row) -> Transaction:
    return Transaction(**dict(row))
