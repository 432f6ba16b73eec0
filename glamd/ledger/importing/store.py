"""The rows of an import of credits, and what is remembered of each merchant that was imported.

All of it runs in the transaction that it is given, of which locking the merchant's record is the
first step: two imports of one merchant take turns, and what one has brought the other finds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from glamd.db import Connection
from glamd.ledger.importing.model import Books
from glamd.ledger.model import Transaction

DELETE_ROWS: Final = 10_000
"""Rows that one statement deletes; well within the statement timeout."""

_BEGIN: Final = """
INSERT INTO glam.imports (name, source, position, counts, started_at, updated_at)
VALUES ($1, '', '', '{}', $2, $2)
ON CONFLICT (name) DO NOTHING
"""
_RECORD: Final = "SELECT source, position, counts FROM glam.imports WHERE name = $1 FOR UPDATE"
_SET_RECORD: Final = """
UPDATE glam.imports SET source = $2, position = $3, counts = $4, updated_at = $5 WHERE name = $1
"""

_DELETE: Final = """
DELETE FROM glam.credit_transactions WHERE merchant_id = $1 AND seq BETWEEN $2 AND $3
"""
# Of two with one reference the first is written, also within one statement.
_ADD: Final = """
INSERT INTO glam.credit_transactions (
    id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
    reference_id, description, metadata, created_at)
SELECT id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
       reference_id, description, metadata, created_at
FROM ROWS FROM (
    jsonb_to_recordset($1) AS (
        id uuid, merchant_id uuid, seq bigint, amount bigint, operation text,
        balance_before bigint, balance_after bigint, reference_type text, reference_id text,
        description text, metadata jsonb),
    unnest($2::timestamptz[])
) AS t (
    id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
    reference_id, description, metadata, created_at)
ORDER BY seq
ON CONFLICT (merchant_id, reference_type, reference_id) DO NOTHING
RETURNING id
"""
_MOVE: Final = """
UPDATE glam.credit_accounts
SET balance = $2, total_granted = $3, total_consumed = $4, transaction_count = $5,
    version = version + 1, created_at = least(created_at, $6), updated_at = $7
WHERE merchant_id = $1
"""
_SUMS: Final = """
SELECT count(*), coalesce(sum(amount) FILTER (WHERE operation = 'credit'), 0)::bigint,
       coalesce(sum(amount) FILTER (WHERE operation = 'debit'), 0)::bigint
FROM glam.credit_transactions WHERE merchant_id = $1
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a merchant: what it was made from, how it was left, and figures."""

    source: str
    position: str
    counts: dict[str, int]


async def lock_record(connection: Connection, name: str, *, at: datetime) -> Record:
    """The record of this name, made where there was none, and nobody else's until the end."""
    await connection.execute(_BEGIN, name, at)
    row = await connection.fetchrow(_RECORD, name)
    assert row is not None
    return Record(row["source"], row["position"], row["counts"])


async def set_record(
    connection: Connection,
    name: str,
    *,
    source: str,
    position: str,
    counts: Mapping[str, int],
    at: datetime,
) -> None:
    """Write it; it is locked."""
    await connection.execute(_SET_RECORD, name, source, position, dict(counts), at)


async def remove(connection: Connection, merchant_id: UUID, *, count: int) -> None:
    """Take away the merchant's first `count` transactions, which an import has brought."""
    for first in range(1, count + 1, DELETE_ROWS):
        await connection.execute(_DELETE, merchant_id, first, first + DELETE_ROWS - 1)


async def add(connection: Connection, transactions: Sequence[Transaction]) -> set[UUID]:
    """Insert these in their order, but for those whose reference is used; the ids of the others.

    UniqueViolationError where another merchant's transaction has one of the ids.
    """
    documents = [
        {
            "id": one.id,
            "merchant_id": one.merchant_id,
            "seq": one.seq,
            "amount": one.amount,
            "operation": one.operation,
            "balance_before": one.balance_before,
            "balance_after": one.balance_after,
            "reference_type": one.reference_type,
            "reference_id": one.reference_id,
            "description": one.description,
            "metadata": one.metadata,
        }
        for one in transactions
    ]
    times = [one.created_at for one in transactions]
    return {row[0] for row in await connection.fetch(_ADD, documents, times)}


async def sums(connection: Connection, merchant_id: UUID) -> tuple[int, int, int]:
    """How many transactions the merchant has, and the sums of its credits and debits."""
    row = await connection.fetchrow(_SUMS, merchant_id)
    assert row is not None
    return row[0], row[1], row[2]


async def move(connection: Connection, books: Books, *, now: datetime) -> None:
    """Let the account, which is locked, say what its transactions say."""
    await connection.execute(
        _MOVE,
        books.account.merchant_id,
        books.balance,
        books.granted,
        books.consumed,
        books.count,
        books.account.created_at or books.first_at or now,
        now,
    )
