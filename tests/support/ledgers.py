"""Nodes with a ledger, merchants with an account, and commands, for the tests of credits."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from uuid import UUID, uuid4

from glamd.actor import System
from glamd.clock import Clock, SystemClock
from glamd.db import Database
from glamd.ledger.model import Applied, Command, Operation
from glamd.ledger.service import Ledger

PLATFORM = "shopify"
_NUMBERS = count(1)


@dataclass(frozen=True, slots=True)
class Node:
    """One daemon's ledger: its own actors, memory and connections."""

    ledger: Ledger
    system: System
    database: Database


@asynccontextmanager
async def node(
    url: str,
    *,
    clock: Clock | None = None,
    threshold: int = 100,
    connections: int = 2,
    name: str = "glamd",
) -> AsyncIterator[Node]:
    """A node, whose ledger runs for as long as the body; the server knows it by its name."""
    database = await Database.connect(url, pool_size=4, name=name)
    system = System()
    ledger = Ledger(
        database,
        system=system,
        clock=clock or SystemClock(),
        low_balance_threshold=threshold,
        connections=connections,
    )
    await ledger.start()
    try:
        yield Node(ledger, system, database)
    finally:
        await system.drain(5.0)
        await ledger.stop(5.0)
        await database.close()


def command(
    merchant_id: UUID,
    operation: Operation = "debit",
    amount: int = 1,
    reference: str | None = None,
    *,
    reference_type: str = "match",
) -> Command:
    """A command; without a reference it has one of its own."""
    reference = reference or f"r{next(_NUMBERS)}"
    return Command(
        merchant_id=merchant_id,
        operation=operation,
        amount=amount,
        reference_type=reference_type,
        reference_id=reference,
        correlation_id=f"c-{reference}",
    )


async def merchant(at: Node, balance: int = 0, *, domain: str = "shop.example.com") -> UUID:
    """A merchant with an account, and, where there is a balance, one grant."""
    merchant_id = uuid4()
    async with at.database.transaction() as connection:
        await at.ledger.open_account(
            connection,
            merchant_id=merchant_id,
            platform_name=PLATFORM,
            platform_id=f"gid-{merchant_id}",
            platform_domain=domain,
        )
    if balance:
        await grant(at, merchant_id, balance)
    return merchant_id


async def grant(at: Node, merchant_id: UUID, amount: int) -> Applied:
    """Grant credits."""
    return await at.ledger.apply(command(merchant_id, "credit", amount, reference_type="purchase"))


async def events(at: Node, merchant_id: UUID) -> list[tuple[str, dict[str, object]]]:
    """The merchant's events in the order in which they are to be published: name, data."""
    rows = await at.database.fetch(
        "SELECT subject, data FROM glam.outbox WHERE merchant_id = $1 ORDER BY id", merchant_id
    )
    return [(row[0].removeprefix("evt.credits.").removesuffix(".v1"), row[1]) for row in rows]


async def counted(at: Node, merchant_id: UUID) -> int:
    """How many transactions the merchant has."""
    value: int = await at.database.fetchval(
        "SELECT count(*) FROM glam.credit_transactions WHERE merchant_id = $1", merchant_id
    )
    return value
