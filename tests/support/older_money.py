"""The older credit and billing services as far as their tables go, faults and all.

Times without an offset, money as text, balances that two debits at once have read before either
was written, ids of merchants as text in one table and as UUIDs in the other.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias
from uuid import UUID, uuid5

import asyncpg

from glamd.ledger.importing.merchant import OlderMerchant, OlderRow
from tests.support.older_service import merchant_id

TIMEOUT_S = 30.0
Row: TypeAlias = dict[str, str | None]
Move: TypeAlias = tuple[int, str, str]
"""Credits (below 0: debits), reference type and id."""

DROP = """
DROP TABLE IF EXISTS credit_accounts, credit_transactions, billing_records, purchases CASCADE;
"""
TABLES = """
CREATE TABLE credit_accounts (
    id               uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    merchant_id      text NOT NULL,
    platform_name    text NOT NULL,
    platform_id      text NOT NULL,
    platform_domain  text NOT NULL,
    balance          integer NOT NULL,
    total_granted    integer NOT NULL,
    total_consumed   integer NOT NULL,
    created_at       timestamp NOT NULL,
    updated_at       timestamp NOT NULL DEFAULT now()
);
CREATE TABLE credit_transactions (
    id              uuid PRIMARY KEY,
    account_id      uuid,
    merchant_id     uuid NOT NULL,
    amount          numeric(12, 2) NOT NULL,
    operation       text NOT NULL,
    balance_before  integer NOT NULL,
    balance_after   integer NOT NULL,
    reference_type  text,
    reference_id    text,
    description     text,
    metadata        json,
    created_at      timestamp NOT NULL
);
CREATE TABLE billing_records (
    merchant_id        uuid NOT NULL,
    trial_started_at   timestamp,
    trial_ends_at      timestamp,
    credits_purchased  integer NOT NULL DEFAULT 0,
    last_purchase_at   timestamp,
    created_at         timestamp NOT NULL DEFAULT now()
);
CREATE TABLE purchases (
    id                  uuid PRIMARY KEY,
    merchant_id         text NOT NULL,
    credits             integer NOT NULL,
    amount              text NOT NULL,
    status              varchar(20) NOT NULL,
    platform            text NOT NULL,
    platform_charge_id  text,
    created_at          timestamp NOT NULL,
    completed_at        timestamp,
    expires_at          timestamp NOT NULL
);
"""


def account(number: int, balance: int, **changes: str | None) -> Row:
    """An account that nothing is wrong with."""
    return {
        "merchant_id": str(merchant_id(number)),
        "platform_name": "shopify",
        "platform_id": str(10_000 + number),
        "platform_domain": f"shop-{number}.myshopify.com",
        "balance": str(balance),
        "total_granted": str(balance),
        "total_consumed": "0",
        "created_at": "2024-05-01 08:00:00",
    } | changes


def history(number: int, *moves: Move, begins_with: int = 0) -> list[Row]:
    """Transactions one after the other, their balances chained."""
    rows: list[Row] = []
    balance = begins_with
    for place, (amount, reference_type, reference_id) in enumerate(moves):
        rows.append(
            {
                "id": str(transaction_id(number, place)),
                "merchant_id": str(merchant_id(number)),
                "amount": f"{abs(amount)}.00",
                "operation": "credit" if amount > 0 else "debit",
                "balance_before": str(balance),
                "balance_after": str(balance + amount),
                "reference_type": reference_type,
                "reference_id": reference_id,
                "description": f"move {place}",
                "metadata": f'{{"place": {place}}}',
                "created_at": f"2024-05-{1 + place // 1440:02} "
                f"{place // 60 % 24:02}:{place % 60:02}:00.5",
            }
        )
        balance += amount
    return rows


def transaction_id(number: int, place: int) -> UUID:
    """The id of a merchant's transaction with this place; their order is not that of the places."""
    return uuid5(merchant_id(number), f"transaction {place}")


def usual(number: int, debits: int = 3) -> list[Move]:
    """A trial of 500 credits, one pack of 100, and debits of 1."""
    moves: list[Move] = [
        (500, "trial", f"TRIAL_GRANT_{merchant_id(number)}"),
        (100, "purchase", str(purchase_id(number, 0))),
    ]
    return moves + [(-1, "match", f"m-{number}-{place}") for place in range(debits)]


def of_credits(heads: Sequence[OlderRow], rows: Sequence[OlderRow]) -> OlderMerchant:
    """One merchant as an importer takes it, its rows two at a time."""

    def chunks() -> Iterator[Sequence[OlderRow]]:
        for first in range(0, len(rows), 2):
            yield rows[first : first + 2]

    found = (heads or rows)[0]["merchant_id"] or ""
    return OlderMerchant(merchant_id=found, heads=heads, chunks=chunks)


def whole(number: int, debits: int = 3) -> OlderMerchant:
    """A merchant that nothing is wrong with."""
    rows = history(number, *usual(number, debits))
    return of_credits([account(number, 600 - debits)], rows)


def record(number: int, **changes: str | None) -> Row:
    """A billing record: a trial that was over long ago, and one pack bought."""
    return {
        "merchant_id": str(merchant_id(number)),
        "trial_started_at": "2024-05-01 08:00:00",
        "trial_ends_at": "2024-05-15 08:00:00",
        "credits_purchased": "100",
        "last_purchase_at": "2024-06-01 10:00:00",
        "created_at": "2024-05-01 08:00:00",
    } | changes


def purchase(number: int, place: int = 0, **changes: str | None) -> Row:
    """A completed purchase of a small pack."""
    return {
        "id": str(purchase_id(number, place)),
        "merchant_id": str(merchant_id(number)),
        "credits": "100",
        "amount": "9.99",
        "status": "completed",
        "platform": "shopify",
        "platform_charge_id": str(1_000_000 + 1_000 * number + place),
        "created_at": "2024-06-01 09:55:00",
        "completed_at": "2024-06-01 10:00:00",
        "expires_at": "2024-06-02 09:55:00",
    } | changes


def purchase_id(number: int, place: int) -> UUID:
    """The id of a merchant's purchase."""
    return uuid5(merchant_id(number), f"purchase {place}")


async def fill(url: str, table: str, rows: Sequence[Row]) -> None:
    """Put rows into one of the older tables."""
    connection: Any = await asyncpg.connect(url, timeout=TIMEOUT_S)
    try:
        kinds = {
            row["attname"]: row["kind"]
            for row in await connection.fetch(
                "SELECT attname, format_type(atttypid, atttypmod) AS kind FROM pg_attribute"
                " WHERE attrelid = $1::text::regclass AND attnum > 0",
                table,
            )
        }
        names = list(rows[0])
        values = ", ".join(f"${at}::text::{kinds[name]}" for at, name in enumerate(names, 1))
        await connection.executemany(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})",
            [[row[name] for name in names] for row in rows],
        )
    finally:
        await connection.close(timeout=TIMEOUT_S)
