"""Event → effect → events out, JetStream to JetStream, by the daemon's own consumers and relay.

A process of its own consumes the matches of many merchants, has an effect committed for each
together with an event in the outbox, and relays that. Beside it stands what nats-py alone publishes
and has acknowledged on the same server, before and after. An event counts when JetStream has
acknowledged what came of it. `python -m bench.events` prints the rows.

The effect here is a row of the group commit and nothing else. Another one, such as the ledger's, is
named as `module:function` (see `Effect`).
"""

import asyncio
import importlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias
from uuid import UUID

import orjson
import structlog
import uvloop
from nats.aio.client import Client
from prometheus_client import REGISTRY

from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.db import Connection, Database
from glamd.embedded.bus import EmbeddedBus
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.events.bus import Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.envelope import Event
from glamd.events.relay import Relay
from glamd.events.schemas import MatchCompleted
from glamd.events.subscription import Subscription
from glamd.journal import Journal

EVENTS: Final = 40_000
MERCHANTS: Final = 1000
PUBLISH_WINDOW: Final = 512
BAR_PER_S: Final = 8_000.0
PATIENCE_S: Final = 120.0
LOOK_EVERY_S: Final = 0.01
ROW_EFFECT: Final = "bench.events:row_effect"

Row: TypeAlias = dict[str, str | float | bool]
Handler: TypeAlias = Callable[[Event[MatchCompleted]], Awaitable[None]]
Entry: TypeAlias = tuple[UUID, str, str]
Effect: TypeAlias = Callable[
    [Database, Sequence[UUID], Callable[[], None]], AbstractAsyncContextManager[Handler]
]
"""Given the database, the merchants, and what to call after a commit: a context with the handler,
which returns after the commit of the effect and of one event in the outbox of `glam`."""

_OUT: Final = """
INSERT INTO glam.outbox (subject, merchant_id, correlation_id, data)
SELECT 'evt.credits.consumed.v1', merchant_id, correlation_id,
       jsonb_build_object('merchant_id', merchant_id, 'amount', 1, 'balance', 1000,
                          'reference_type', 'match', 'reference_id', reference,
                          'platform_name', 'shopify')
FROM unnest($1::uuid[], $2::text[], $3::text[]) AS i (merchant_id, correlation_id, reference)
"""


@asynccontextmanager
async def row_effect(
    database: Database, _merchants: Sequence[UUID], committed: Callable[[], None]
) -> AsyncIterator[Handler]:
    """The least effect there is: the event itself, in a group commit."""

    async def commit(connection: Connection, entries: Sequence[Entry]) -> Sequence[None]:
        await connection.execute(_OUT, *zip(*entries, strict=True))
        committed()
        return [None] * len(entries)

    journal: Journal[Entry, None] = Journal(name="bench", database=database, commit=commit)
    await journal.start()

    async def handle(event: Event[MatchCompleted]) -> None:
        await journal.submit((event.data.merchant_id, event.correlation_id, event.data.match_id))

    yield handle
    await journal.stop(PATIENCE_S)


def measure(effect: str = ROW_EFFECT, *, events: int = EVENTS) -> list[Row]:
    """Publish plainly, consume and relay, publish plainly again; all on one NATS server."""
    with tempfile.TemporaryDirectory(prefix="glamd-bench-") as folder:
        return uvloop.run(_measure(Path(folder), effect, events))


async def _measure(folder: Path, effect: str, events: int) -> list[Row]:
    bus, postgres = EmbeddedBus(folder), EmbeddedPostgres(folder)
    try:
        nats_url = (await bus.start()).url
        database_url = (await postgres.start()).app
        await migrate.upgrade(database_url)
        before = await _run("publish", nats_url, "first", str(events))
        ours = await _run("daemon", nats_url, database_url, effect, str(events))
        after = await _run("publish", nats_url, "second", str(events))
    finally:
        await postgres.stop()
        await bus.stop()
    per_s = ours["per_s"]
    plain_per_s = statistics.mean((before["per_s"], after["per_s"]))
    return [
        {
            "name": f"event, effect, event out; {MERCHANTS} merchants",
            "value": per_s,
            "unit": "1/s",
            "rival_name": "nats-py, publish with acknowledgement alone",
            "rival": plain_per_s,
            "ratio": per_s / plain_per_s,
            "bar": f">= {BAR_PER_S:,.0f}/s",
            "holds": per_s >= BAR_PER_S,
            "note": f"processor {ours['cpu_us']:.0f} us an event, to {before['cpu_us']:.0f} us",
        }
    ]


async def _run(*arguments: str) -> dict[str, float]:
    """A part of the measurement in a process of its own; the servers' supervision goes on."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.events", *arguments), stdout=subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    if process.returncode != 0:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}")
    found: dict[str, float] = json.loads(output)
    return found


async def publish(url: str, name: str, events: int) -> None:
    """Publish matches as any user of nats-py does it fast, and print the rate."""
    merchants = [str(each) for each in _merchants()]
    client = Client()
    await client.connect(url)
    jetstream = client.jetstream(publish_async_max_pending=PUBLISH_WINDOW)
    await jetstream.add_stream(name="GLAM_EVENTS", subjects=["evt.>", "cmd.>"])
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for n in range(events):
        event_id = f"{name}-{n}"
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
    _tell(events, time.perf_counter() - began_s, time.process_time() - cpu_s)
    await client.close()


async def daemon(nats_url: str, database_url: str, effect: Effect, events: int) -> None:
    """Consume what waits, relay what comes of it, and print the rate."""
    clock = SystemClock()
    database = await Database.connect(database_url)
    bus = Bus([nats_url], name="bench")
    relay = Relay(bus, databases={"glam": database}, clock=clock)
    tasks = [asyncio.create_task(bus.run()), asyncio.create_task(relay.run())]
    await bus.link()
    async with effect(database, _merchants(), relay.wake) as handle:
        subscription = Subscription(MatchCompleted, handle, in_turn=False)
        letters = DeadLetters(database, subscriptions=[subscription], clock=clock)
        consumers = Consumers(bus, subscriptions=[subscription], dead_letters=letters)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        tasks.append(asyncio.create_task(consumers.run()))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if _published() >= events:
                    break
                await asyncio.sleep(LOOK_EVERY_S)
        _tell(events, time.perf_counter() - began_s, time.process_time() - cpu_s)
        await consumers.stop(PATIENCE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await database.close()


def _merchants() -> list[UUID]:
    return [UUID(int=(0x0198 << 112) + n) for n in range(MERCHANTS)]


def _published() -> float:
    return REGISTRY.get_sample_value("glamd_events_published_total", {"outbox": "glam"}) or 0.0


def _tell(events: int, took_s: float, cpu_s: float) -> None:
    print(json.dumps({"per_s": events / took_s, "cpu_us": cpu_s / events * 1e6}), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Publish, consume and relay, or measure and print."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    match arguments:
        case ["publish", url, name, events]:
            uvloop.run(publish(url, name, int(events)))
        case ["daemon", nats_url, database_url, named, events]:
            module, _, function = named.partition(":")
            effect: Effect = getattr(importlib.import_module(module), function)
            uvloop.run(daemon(nats_url, database_url, effect, int(events)))
        case _:
            for row in measure(*arguments):
                print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
