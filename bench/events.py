"""Event → debit → events out, JetStream to JetStream, by the daemon's own consumers and relay.

One process consumes the matches of a thousand merchants, has the ledger debit each, and relays what
comes of it; a round is over when the stream holds the last `evt.credits.consumed`. Beside it stand,
in every round and on the same servers, what nats-py publishes and has acknowledged, and what it
fetches and acknowledges with no effect at all. The best of some rounds counts, since the machine is
shared. `python -m bench.events` prints the rows.
"""

import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final
from uuid import UUID

import orjson
import structlog
import uvloop
from nats.aio.client import Client

from bench.report import Result, show
from glamd.actor import System
from glamd.admin import migrate
from glamd.billing.model import BillingSettings, Shop
from glamd.billing.service import Billing
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.embedded.bus import EmbeddedBus
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import NotFoundError
from glamd.events.bus import STREAM, Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.handlers import subscriptions
from glamd.events.relay import Relay
from glamd.events.schemas import MatchCompleted
from glamd.ledger.model import CONSUMED, Command
from glamd.ledger.service import Ledger
from glamd.lifetime import spare_the_collector
from glamd.merchants.service import Merchants
from glamd.onboarding import Onboarding

EVENTS: Final = 16_000
"""Of one round."""
ROUNDS: Final = 3
MERCHANTS: Final = 1000
GRANT: Final = 2**40
PUBLISH_WINDOW: Final = 512
FETCH_BATCH: Final = 256
BAR_PER_S: Final = 8_000.0
PATIENCE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.02
RIVAL: Final = "bench-rival"

Figures = dict[str, float]
"""`per_s`, and `cpu_us`: the process's own processor time for an event."""


def measure() -> list[Result]:
    """The row "event → debit → events out", beside both of its rivals."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        return uvloop.run(_measure(Path(folder)))


async def _measure(folder: Path) -> list[Result]:
    bus, postgres = EmbeddedBus(folder), EmbeddedPostgres(folder)
    rounds: dict[str, list[Figures]] = {"publish": [], "daemon": [], "fetch": []}
    try:
        nats_url = (await bus.start()).url
        database_url = (await postgres.start()).app
        await migrate.upgrade(database_url)
        await _fund(database_url)
        for number in range(1, ROUNDS + 1):
            # What the rival acknowledges is the same as what we do, by a consumer of its own.
            for name, arguments in (
                ("publish", (nats_url, str(number))),
                ("daemon", (nats_url, database_url, str(number))),
                ("fetch", (nats_url,)),
            ):
                rounds[name].append(await _run(name, *arguments))
    finally:
        await postgres.stop()
        await bus.stop()
    best = {name: max(each, key=lambda figures: figures["per_s"]) for name, each in rounds.items()}
    return _results(**best)


def _results(publish: Figures, daemon: Figures, fetch: Figures) -> list[Result]:
    per_s = daemon["per_s"]
    name = f"event, debit, events out; {MERCHANTS} merchants"
    return [
        Result(
            name=name,
            value=per_s,
            unit="1/s",
            rival="nats-py, publish with acknowledgement alone",
            rival_value=publish["per_s"],
            ratio=per_s / publish["per_s"],
            bar=f">= {BAR_PER_S:,.0f}/s",
            holds=per_s >= BAR_PER_S,
            note=f"processor {daemon['cpu_us']:.0f} us an event, to {publish['cpu_us']:.0f} us",
        ),
        Result(
            name=name,
            value=per_s,
            unit="1/s",
            rival="nats-py, fetch and acknowledge alone",
            rival_value=fetch["per_s"],
            ratio=per_s / fetch["per_s"],
            note=f"processor {daemon['cpu_us']:.0f} us an event, to {fetch['cpu_us']:.0f} us",
        ),
    ]


async def _run(*arguments: str) -> Figures:
    """A part of a round in a process of its own; the servers' supervision goes on."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.events", *arguments), stdout=subprocess.PIPE
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    except TimeoutError:
        process.kill()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}")
    found: Figures = json.loads(output)
    return found


async def _fund(database_url: str) -> None:
    """Open all accounts with credits for every round, and no event of that."""
    database = await Database.connect(database_url)
    ledger = Ledger(database, system=System(), clock=SystemClock())
    async with database.transaction() as connection:
        for merchant_id in _merchants():
            await ledger.open_account(
                connection,
                merchant_id=merchant_id,
                platform_name="custom",
                platform_id=str(merchant_id),
                platform_domain="shop.example.com",
            )
            grant = Command(
                merchant_id=merchant_id,
                operation="credit",
                amount=GRANT,
                reference_type="purchase",
                reference_id="first",
                correlation_id="bench",
            )
            await ledger.apply_within(connection, grant, SystemClock().now())
        await connection.execute("DELETE FROM glam.outbox")
    await database.close()


async def publish(url: str, number: str) -> None:
    """Publish matches as any user of nats-py does it fast, and print the rate."""
    merchants = [str(each) for each in _merchants()]
    client = Client()
    await client.connect(url)
    jetstream = client.jetstream(publish_async_max_pending=PUBLISH_WINDOW)
    await jetstream.add_stream(name=STREAM, subjects=["evt.>", "cmd.>"])
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for n in range(EVENTS):
        event_id = f"{number}-{n}"
        body = {
            "event_id": event_id,
            "event_type": MatchCompleted.SUBJECT,
            "correlation_id": f"c-{n}",
            "timestamp": "2025-11-12T10:30:00Z",
            "source_service": "bench",
            "data": {
                "merchant_id": merchants[n % MERCHANTS],
                "match_id": event_id,
                "shopper_id": "s-1",
                "matched_items_count": 3,
            },
            "metadata": {},
        }
        await jetstream.publish_async(
            MatchCompleted.SUBJECT, orjson.dumps(body), headers={"Nats-Msg-Id": event_id}
        )
        if n % 64 == 0:
            await asyncio.sleep(0)
    await jetstream.publish_async_completed()
    _tell(time.perf_counter() - began_s, time.process_time() - cpu_s)
    await client.close()


async def fetch(url: str) -> None:
    """Fetch the matches as any user of nats-py does, acknowledge them, and print the rate."""
    client = Client()
    await client.connect(url)
    inbox = await client.jetstream().pull_subscribe(MatchCompleted.SUBJECT, durable=RIVAL)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    left = EVENTS
    while left:
        for message in await inbox.fetch(min(FETCH_BATCH, left)):
            await message.ack()
            left -= 1
    await client.flush()
    _tell(time.perf_counter() - began_s, time.process_time() - cpu_s)
    await client.close()


async def daemon(nats_url: str, database_url: str, number: str) -> None:
    """Consume what waits, debit, relay what comes of it, and print the rate."""
    async with AsyncExitStack() as stack:
        client = Client()
        await client.connect(nats_url)
        stack.push_async_callback(client.close)
        consumers, tasks = await _start(stack, nats_url, database_url)
        spare_the_collector()
        began_s, cpu_s = time.perf_counter(), time.process_time()
        tasks.append(asyncio.create_task(consumers.run()))
        await asyncio.wait_for(_until_stored(client, int(number) * EVENTS), PATIENCE_S)
        _tell(time.perf_counter() - began_s, time.process_time() - cpu_s)
        await consumers.stop(PATIENCE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start(
    stack: AsyncExitStack, nats_url: str, database_url: str
) -> tuple[Consumers, list[asyncio.Task[None]]]:
    """Everything between the subject that comes in and the one that goes out, as the daemon has
    it; the consumers do not run yet."""
    clock = SystemClock()
    database = await Database.connect(database_url)
    stack.push_async_callback(database.close)
    bus = Bus([nats_url], name="bench")
    relay = Relay(bus, databases={"glam": database}, clock=clock)
    tasks = [asyncio.create_task(bus.run()), asyncio.create_task(relay.run())]
    await bus.link()
    system = System()
    ledger = Ledger(database, system=system, clock=clock, committed=relay.wake)
    await ledger.start()
    stack.push_async_callback(ledger.stop, PATIENCE_S)
    stack.push_async_callback(system.drain, PATIENCE_S)
    billing = Billing(
        database,
        ledger=ledger,
        platforms=(),
        shop_of=_no_shop,
        clock=clock,
        settings=BillingSettings(),
    )
    merchants = Merchants(glam=database, cde=database, clock=clock)
    consumed = subscriptions(
        onboarding=Onboarding(glam=database, merchants=merchants, billing=billing, ledger=ledger),
        ledger=ledger,
        billing=billing,
    )
    letters = DeadLetters(database, subscriptions=consumed, clock=clock)
    return Consumers(bus, subscriptions=consumed, dead_letters=letters), tasks


async def _no_shop(_merchant_id: UUID) -> Shop:
    raise NotFoundError("There is no shop here.")


async def _until_stored(client: Client, debits: int) -> None:
    """Return when the stream holds so many events of debits."""
    found = 0
    while found < debits:
        await asyncio.sleep(LOOK_EVERY_S)
        state = (await client.jsm().stream_info(STREAM, subjects_filter=CONSUMED)).state
        found = (state.subjects or {}).get(CONSUMED, 0)


def _merchants() -> list[UUID]:
    return [UUID(int=(0x0198 << 112) + n) for n in range(MERCHANTS)]


def _tell(took_s: float, cpu_s: float) -> None:
    print(json.dumps({"per_s": EVENTS / took_s, "cpu_us": cpu_s / EVENTS * 1e6}), flush=True)


def main(arguments: Sequence[str]) -> None:
    """A part of a round, or all of it and print."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    match arguments:
        case ["publish", url, number]:
            uvloop.run(publish(url, number))
        case ["daemon", nats_url, database_url, number]:
            uvloop.run(daemon(nats_url, database_url, number))
        case ["fetch", url]:
            uvloop.run(fetch(url))
        case _:
            print(show(measure()))


if __name__ == "__main__":
    main(sys.argv[1:])
