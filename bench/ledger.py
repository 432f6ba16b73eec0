"""Durable debits: the ledger's actors beside the ways in which it is usually done.

All run against one server, in one process, in turn; the best of some rounds counts, since the
machine is shared. The commands of a saturated round are made before the clock starts: what is
measured is the way from an ask to the answer after the commit. `python -m bench.ledger` prints the
rows; a number behind it is how many transactions of history the row "growth" has.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
import uvloop

from bench import ledger_rivals as rivals
from bench.ledger_rivals import Round, round_of
from bench.report import Result, show
from glamd.actor import System
from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.embedded.postgres import EmbeddedPostgres, PostgresUrls
from glamd.ledger.actor import KIND
from glamd.ledger.model import Command
from glamd.ledger.service import Ledger
from glamd.lifetime import spare_the_collector

ACCOUNTS: Final = 1_000
ROUNDS: Final = 3
DEBITS: Final = 40_000
IN_FLIGHT_ONE: Final = 2_048
IN_FLIGHT_MANY: Final = 4_096
TOGETHER: Final = 64
"""Debits that one sender of a saturated round has under way."""
FEW: Final = 16
FEW_DEBITS: Final = 4_000
RIVAL_S: Final = 1.0
HISTORY: Final = 500_000
"""Transactions before the row "growth"; the bar is meant for ten million."""
HISTORY_CHUNK: Final = 100
"""Transactions of each account that are written together, so that they lie mixed, as in life."""
GRANT: Final = 2**52

RATE_BAR: Final = 30_000.0
ONE_BAR: Final = 20.0
MANY_BAR: Final = 8.0
FEW_BAR_MS: Final = 3.0
GROWTH_BAR: Final = 0.8

_HISTORY: Final = """
INSERT INTO glam.credit_transactions (
    id, merchant_id, seq, amount, operation, balance_before, balance_after, reference_type,
    reference_id, metadata, created_at)
SELECT gen_random_uuid(), merchant_id, seq, 1, 'debit', $2 - seq + 2, $2 - seq + 1, 'history',
       gen_random_uuid()::text, '{"shopper_id": "gid-1234", "matched_items_count": 3}', now()
FROM generate_series($3::bigint, $4::bigint) AS seq, unnest($1::uuid[]) AS merchant_id
"""
_KEYS: Final = """
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = 'glam.credit_transactions'::regclass AND contype IN ('p', 'u', 'f')
"""
_INDEXES: Final = """
SELECT indexname, indexdef FROM pg_indexes
WHERE schemaname = 'glam' AND tablename = 'credit_transactions'
"""
_AFTER_HISTORY: Final = """
UPDATE glam.credit_accounts
SET balance = balance - $1, total_consumed = $1, transaction_count = 1 + $1, version = version + 1
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A database of its own with a ledger and funded accounts on it."""

    url: str
    ledger: Ledger
    merchants: Sequence[UUID]


def measure(*, history: int = HISTORY) -> list[Result]:
    """The rows "ledger", "ledger at 16 in flight" and "growth"."""
    spare_the_collector()
    return uvloop.run(_measure(history))


async def _measure(history: int) -> list[Result]:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="glamd-bench-"))
        server = EmbeddedPostgres(Path(folder))
        urls = await server.start()
        stack.push_async_callback(server.stop)
        # Ours and theirs do not share accounts, or each would fence the other.
        site = await _site(stack, urls, "rivals", accounts=2 * ACCOUNTS)
        pool = await stack.enter_async_context(rivals.pool(site.url))
        await rivals.make_function(pool)
        return [
            *await _saturated(site, pool, accounts=1, in_flight=IN_FLIGHT_ONE, bar=ONE_BAR),
            *await _saturated(
                site, pool, accounts=ACCOUNTS, in_flight=IN_FLIGHT_MANY, bar=MANY_BAR
            ),
            await _few(site, pool),
            await _growth(stack, urls, history),
        ]


async def _saturated(
    site: Site, pool: asyncpg.Pool, *, accounts: int, in_flight: int, bar: float
) -> list[Result]:
    name = "one account" if accounts == 1 else f"{accounts} accounts"
    merchants = site.merchants[:accounts]
    seven = rivals.seven_round_trips(pool, site.merchants[-accounts:])
    function = await rivals.function_call(pool, max(accounts, 2))
    ours, sevens, functions = [], [], []
    for _ in range(ROUNDS):
        ours.append(await _debit(site, merchants, DEBITS, in_flight // TOGETHER, TOGETHER))
        sevens.append(await seven.run(RIVAL_S))
        functions.append(await function.run(RIVAL_S))
    mine = max(ours, key=lambda round_: round_.per_s)
    seven_per_s = max(round_.per_s for round_ in sevens)
    function_per_s = max(round_.per_s for round_ in functions)
    return [
        Result(
            name=f"ledger, durable debits on {name}",
            value=mine.per_s,
            unit="1/s",
            rival="seven round trips",
            rival_value=seven_per_s,
            ratio=mine.per_s / seven_per_s,
            bar=f">= {RATE_BAR:,.0f}/s and >= {bar:.0f} times the seven round trips",
            holds=mine.per_s >= RATE_BAR and mine.per_s >= bar * seven_per_s,
            note=f"{in_flight} in flight, p50 {mine.p50_ms:.0f} ms",
        ),
        Result(
            name=f"ledger, durable debits on {name}",
            value=mine.per_s,
            unit="1/s",
            rival="pgledger's approach",
            rival_value=function_per_s,
            ratio=mine.per_s / function_per_s,
        ),
    ]


async def _few(site: Site, pool: asyncpg.Pool) -> Result:
    seven = rivals.seven_round_trips(pool, site.merchants[ACCOUNTS:])
    ours, sevens = [], []
    for _ in range(ROUNDS):
        ours.append(await _debit(site, site.merchants[:ACCOUNTS], FEW_DEBITS, FEW, 1))
        sevens.append(await seven.run(RIVAL_S))
    mine = min(ours, key=lambda round_: round_.p99_ms)
    theirs = min(sevens, key=lambda round_: round_.p99_ms)
    return Result(
        name=f"ledger at {FEW} in flight, p99",
        value=mine.p99_ms,
        unit="ms",
        rival="seven round trips",
        rival_value=theirs.p99_ms,
        ratio=mine.p99_ms / theirs.p99_ms,
        bar=f"<= {FEW_BAR_MS:.0f} ms",
        holds=mine.p99_ms <= FEW_BAR_MS,
        note=f"p50 {mine.p50_ms:.2f} ms, theirs {theirs.p50_ms:.2f} ms; {mine.per_s:,.0f}/s",
    )


async def _growth(stack: AsyncExitStack, urls: PostgresUrls, history: int) -> Result:
    """Two databases, one of them with a history, in turn.

    That the best round counts matters here: after a checkpoint PostgreSQL logs whole pages at their
    first change, of which a long history has more, though no more than once.
    """
    empty = await _site(stack, urls, "empty")
    grown = await _site(stack, urls, "grown", history=history)
    before: list[Round] = []
    after: list[Round] = []
    pairs = [(empty, before), (grown, after)]
    for _ in range(ROUNDS + 1):
        # Turned round each time, so that neither always comes after the other's work.
        pairs.reverse()
        for site, rounds in pairs:
            rounds.append(
                await _debit(site, site.merchants, DEBITS, IN_FLIGHT_MANY // TOGETHER, TOGETHER)
            )
    empty_per_s = max(round_.per_s for round_ in before)
    grown_per_s = max(round_.per_s for round_ in after)
    return Result(
        name=f"growth: debits after {history:,} transactions",
        value=grown_per_s,
        unit="1/s",
        rival="the empty rate",
        rival_value=empty_per_s,
        ratio=grown_per_s / empty_per_s,
        bar=f">= {GROWTH_BAR} of the empty rate",
        holds=grown_per_s >= GROWTH_BAR * empty_per_s,
    )


async def _debit(
    site: Site, merchants: Sequence[UUID], debits: int, senders: int, together: int
) -> Round:
    """So many debits by senders of which each has `together` under way."""
    commands = [_debit_of_one(merchants[n % len(merchants)]) for n in range(debits)]
    chunks = iter([commands[n : n + together] for n in range(0, debits, together)])
    took_s: list[float] = []

    async def sender() -> None:
        for chunk in chunks:
            sent_s = time.perf_counter()
            await asyncio.gather(*[site.ledger.apply(command) for command in chunk])
            took_s.append(time.perf_counter() - sent_s)

    began_s = time.perf_counter()
    await asyncio.gather(*(sender() for _ in range(senders)))
    return round_of(took_s, time.perf_counter() - began_s, operations=debits)


def _debit_of_one(merchant_id: UUID) -> Command:
    reference = str(uuid4())
    return Command(
        merchant_id=merchant_id,
        operation="debit",
        amount=1,
        reference_type="match",
        reference_id=reference,
        metadata={"shopper_id": "gid-1234", "matched_items_count": 3},
        correlation_id=reference,
    )


def _grant_of(merchant_id: UUID) -> Command:
    return Command(
        merchant_id=merchant_id,
        operation="credit",
        amount=GRANT,
        reference_type="purchase",
        reference_id="first",
        correlation_id="bench",
    )


async def _site(
    stack: AsyncExitStack,
    urls: PostgresUrls,
    name: str,
    *,
    accounts: int = ACCOUNTS,
    history: int = 0,
) -> Site:
    """Make a database, migrate it, open and fund accounts, and let time go by on them."""
    raw = await asyncpg.connect(urls.app)
    await raw.execute(f"CREATE DATABASE {name}")
    await raw.close()
    url = _on(urls.app, name)
    await migrate.upgrade(url)
    database = await Database.connect(url)
    stack.push_async_callback(database.close)
    system = System()
    ledger = Ledger(database, system=system, clock=SystemClock())
    await ledger.start()
    stack.push_async_callback(ledger.stop, 5.0)
    stack.push_async_callback(system.drain, 5.0)
    merchants = [uuid4() for _ in range(accounts)]
    async with database.transaction() as connection:
        for merchant_id in merchants:
            await ledger.open_account(
                connection,
                merchant_id=merchant_id,
                platform_name="custom",
                platform_id=str(merchant_id),
                platform_domain="shop.example.com",
            )
    await asyncio.gather(*(ledger.apply(_grant_of(merchant_id)) for merchant_id in merchants))
    # Their history goes past the actors, which are to read it.
    for merchant_id in merchants if history else ():
        system.stop(KIND, str(merchant_id))
    raw = await asyncpg.connect(_on(urls.admin, name))
    await _let_time_go_by(raw, merchants, history // accounts)
    await raw.execute("VACUUM ANALYZE")
    await raw.execute("CHECKPOINT")
    await raw.close()
    return Site(url, ledger, merchants)


async def _let_time_go_by(raw: asyncpg.Connection, merchants: Sequence[UUID], each: int) -> None:
    if each == 0:
        return
    # Keys and indexes are made anew behind it: ten times as fast as to keep them all the way.
    await raw.execute("SET maintenance_work_mem = '256MB'")
    keys = await raw.fetch(_KEYS)
    for name, _ in keys:
        await raw.execute(f"ALTER TABLE glam.credit_transactions DROP CONSTRAINT {name}")
    indexes = await raw.fetch(_INDEXES)
    for name, _ in indexes:
        await raw.execute(f"DROP INDEX glam.{name}")
    for first in range(2, each + 2, HISTORY_CHUNK):
        last = min(first + HISTORY_CHUNK - 1, each + 1)
        await raw.execute(_HISTORY, list(merchants), GRANT, first, last)
    await raw.execute(_AFTER_HISTORY, each)
    for name, definition in keys:
        await raw.execute(
            f"ALTER TABLE glam.credit_transactions ADD CONSTRAINT {name} {definition}"
        )
    for _, definition in indexes:
        await raw.execute(definition)


def _on(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


if __name__ == "__main__":
    print(show(measure(history=int(sys.argv[1]) if len(sys.argv) > 1 else HISTORY)))
