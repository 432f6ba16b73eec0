"""What the ledger is held against: the two ways in which durable debits are usually done.

A request handler's seven round trips on a pool of connections, and a double-entry ledger inside the
database with one function call a transfer, as pgr0ss/pgledger has it; told here in our own words.
Both are durable and correct; what they lack is company in their commits.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import orjson

CONNECTIONS: Final = 16
METADATA: Final = orjson.dumps({"shopper_id": "gid-1234", "matched_items_count": 3}).decode()
FUNDS: Final = 2**52

Debit: TypeAlias = Callable[[asyncpg.Connection, int], Awaitable[None]]

# Both rows locked in the order of their ids, both balances and versions raised, a transfer, and two
# entries with the balance before and after.
_FUNCTION: Final = """
CREATE SCHEMA rival;
CREATE TABLE rival.accounts (
    id uuid PRIMARY KEY,
    balance numeric NOT NULL,
    version bigint NOT NULL DEFAULT 0,
    may_be_negative boolean NOT NULL DEFAULT false,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE rival.transfers (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    from_id uuid NOT NULL REFERENCES rival.accounts,
    to_id uuid NOT NULL REFERENCES rival.accounts,
    amount numeric NOT NULL CHECK (amount > 0),
    created_at timestamptz NOT NULL,
    metadata jsonb
);
CREATE INDEX ON rival.transfers (from_id);
CREATE INDEX ON rival.transfers (to_id);
CREATE TABLE rival.entries (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    account_id uuid NOT NULL REFERENCES rival.accounts,
    transfer_id uuid NOT NULL REFERENCES rival.transfers,
    amount numeric NOT NULL,
    balance_before numeric NOT NULL,
    balance_after numeric NOT NULL,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE INDEX ON rival.entries (account_id);
CREATE INDEX ON rival.entries (transfer_id);
CREATE FUNCTION rival.transfer(payer uuid, payee uuid, credits numeric, note jsonb)
RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    paying rival.accounts;
    paid rival.accounts;
    made uuid;
BEGIN
    PERFORM FROM rival.accounts WHERE id = least(payer, payee) FOR UPDATE;
    PERFORM FROM rival.accounts WHERE id = greatest(payer, payee) FOR UPDATE;
    UPDATE rival.accounts SET balance = balance - credits, version = version + 1,
        updated_at = now() WHERE id = payer RETURNING * INTO paying;
    IF paying.balance < 0 AND NOT paying.may_be_negative THEN
        RAISE EXCEPTION 'not enough';
    END IF;
    UPDATE rival.accounts SET balance = balance + credits, version = version + 1,
        updated_at = now() WHERE id = payee RETURNING * INTO paid;
    INSERT INTO rival.transfers (from_id, to_id, amount, created_at, metadata)
        VALUES (payer, payee, credits, now(), note) RETURNING id INTO made;
    INSERT INTO rival.entries
        (account_id, transfer_id, amount, balance_before, balance_after, version, created_at)
        VALUES (payer, made, -credits, paying.balance + credits, paying.balance, paying.version,
                now()),
               (payee, made, credits, paid.balance - credits, paid.balance, paid.version, now());
    RETURN made;
END $$;
"""
_FUNDED: Final = (
    "INSERT INTO rival.accounts (id, balance) SELECT id, $2 FROM unnest($1::uuid[]) AS id"
)

_LOCK: Final = """
SELECT balance, total_consumed, transaction_count FROM glam.credit_accounts
WHERE merchant_id = $1 FOR UPDATE
"""
_LOOK: Final = """
SELECT id FROM glam.credit_transactions
WHERE merchant_id = $1 AND reference_type = 'match' AND reference_id = $2
"""
_INSERT: Final = """
INSERT INTO glam.credit_transactions (
    id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
    reference_id, metadata, created_at)
VALUES ($1, $2, $3, 1, 'debit', $4::bigint, $4::bigint - 1, 'match', $5, $6, now())
"""
_UPDATE: Final = """
UPDATE glam.credit_accounts
SET balance = balance - 1, total_consumed = total_consumed + 1,
    transaction_count = transaction_count + 1, version = version + 1, updated_at = now()
WHERE merchant_id = $1
"""
_OUTBOX: Final = """
INSERT INTO glam.outbox (subject, merchant_id, correlation_id, data)
VALUES ('evt.credits.consumed.v1', $1, $2, $3)
"""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of measuring: operations a second, and how long one took."""

    per_s: float
    p50_ms: float
    p99_ms: float


def round_of(took_s: list[float], elapsed_s: float, *, operations: int) -> Round:
    """The figures of a round out of its latencies, which are sorted on the way."""
    took_s.sort()
    return Round(
        per_s=operations / elapsed_s,
        p50_ms=took_s[len(took_s) // 2] * 1e3,
        p99_ms=took_s[len(took_s) * 99 // 100] * 1e3,
    )


class Rival:
    """Debits by as many workers as there are connections."""

    def __init__(self, pool: asyncpg.Pool, debit: Debit) -> None:
        self._pool = pool
        self._debit = debit
        self._numbers = count(1)

    async def run(self, seconds: float) -> Round:
        """Debit for so long."""
        took_s: list[float] = []
        began_s = time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() - began_s < seconds:
                sent_s = time.perf_counter()
                async with self._pool.acquire() as connection:
                    await self._debit(connection, next(self._numbers))
                took_s.append(time.perf_counter() - sent_s)

        await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
        elapsed_s = time.perf_counter() - began_s
        return round_of(took_s, elapsed_s, operations=len(took_s))


@asynccontextmanager
async def pool(url: str) -> AsyncIterator[asyncpg.Pool]:
    """Connections for the rivals, as an application has them."""
    made = await asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS)
    try:
        yield made
    finally:
        await made.close()


def seven_round_trips(connections: asyncpg.Pool, merchants: Sequence[UUID]) -> Rival:
    """BEGIN, lock the account, look for the reference, insert, update, outbox, COMMIT."""

    async def debit(connection: asyncpg.Connection, number: int) -> None:
        merchant_id = merchants[number % len(merchants)]
        reference = str(uuid4())
        async with connection.transaction():
            account = await connection.fetchrow(_LOCK, merchant_id)
            if await connection.fetchrow(_LOOK, merchant_id, reference) is not None:
                return
            balance, _, transactions = account
            await connection.execute(
                _INSERT, uuid4(), merchant_id, transactions + 1, balance, reference, METADATA
            )
            await connection.execute(_UPDATE, merchant_id)
            event = {
                "merchant_id": str(merchant_id),
                "amount": 1,
                "balance": balance - 1,
                "reference_type": "match",
                "reference_id": reference,
                "platform_name": "custom",
            }
            await connection.execute(_OUTBOX, merchant_id, reference, orjson.dumps(event).decode())

    return Rival(connections, debit)


async def make_function(connections: asyncpg.Pool) -> None:
    """Make the tables and the function of the second rival."""
    await connections.execute(_FUNCTION)


async def function_call(connections: asyncpg.Pool, accounts: int) -> Rival:
    """One call of a function a transfer, from each of some accounts to the next."""
    ids = [uuid4() for _ in range(accounts)]
    await connections.execute(_FUNDED, ids, FUNDS)

    async def debit(connection: asyncpg.Connection, number: int) -> None:
        payer, payee = ids[number % accounts], ids[(number + 1) % accounts]
        await connection.fetchval(
            "SELECT rival.transfer($1, $2, $3, $4)", payer, payee, 1, METADATA
        )

    return Rival(connections, debit)
