"""Events that come one to three times and out of order: one effect for each id.

Nothing is broken here but the delivery. Copies carry message ids of their own, so that JetStream
does not drop them and the daemon has to; a copy may come long before or after the others.
"""

import asyncio
import random
from pathlib import Path

from nats.aio.client import Client

from bench.report import Result
from tests.faults.fault_site import fault_site
from tests.faults.money_load import SUBJECTS, event_body
from tests.faults.money_record import DONE, MoneyRecord, Told, Wanted
from tests.faults.under_load import Outcome, settled
from tests.support.nats import nats_client

MERCHANTS = 20
COPIES_LIMIT = 3
IN_FLIGHT = 64
PUBLISH_TIMEOUT_S = 20.0
SHAPES = 3


async def deliver(
    folder: Path, *, events: int, seed: int, database_url: str | None = None
) -> tuple[Outcome, int]:
    """Publish so many events, each one to three times; what is left, and how many were sent."""
    chance = random.Random(seed)
    async with fault_site(folder, merchants=MERCHANTS, database_url=database_url) as site:
        path = folder / "money.jsonl"
        wanted = [
            Wanted(
                id=f"match-{number}",
                merchant=chance.choice(site.merchants),
                operation="debit",
                amount=1,
                kind="match",
                way="event",
            )
            for number in range(events)
        ]
        copies = [each for each in wanted for _ in range(chance.randint(1, COPIES_LIMIT))]
        chance.shuffle(copies)
        with MoneyRecord(path) as record:
            for merchant in site.merchants:
                granted = await site.admin(
                    f"/v1/ledger/{merchant}/grant",
                    {"amount": events, "reference_type": "fund", "reference_id": merchant},
                )
                fund = Wanted(
                    id=merchant,
                    merchant=merchant,
                    operation="credit",
                    amount=events,
                    kind="fund",
                    way="http",
                )
                told = Told(granted["transaction"]["id"], granted["balance"])
                record.wanted(fund)
                record.answer(fund, status=DONE, code="ok", ms=0.0, told=told)
            for each in wanted:
                record.wanted(each)
            async with nats_client(site.nats_url) as client:
                await _publish(client, copies, chance)
            for each in wanted:
                record.stored(each)
        return await settled(site, path), len(copies)


async def _publish(client: Client, copies: list[Wanted], chance: random.Random) -> None:
    jetstream = client.jetstream()
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int, wanted: Wanted) -> None:
        async with room:
            await jetstream.publish(
                SUBJECTS[wanted.kind],
                event_body(wanted, shape=chance.randrange(SHAPES)),
                timeout=PUBLISH_TIMEOUT_S,
                headers={"Nats-Msg-Id": f"copy-{number}"},
            )

    async with asyncio.TaskGroup() as group:
        for number, wanted in enumerate(copies):
            group.create_task(one(number, wanted))


def results(folder: Path, *, events: int, seed: int) -> list[Result]:
    """The row of the report."""
    outcome, sent = asyncio.run(deliver(folder, events=events, seed=seed))
    return [
        Result(
            name=f"each event delivered 1-3 times, reordered, {events:,} events",
            value=outcome.count,
            unit="lost, doubled or told wrongly",
            bar="0",
            holds=outcome.holds,
            note=f"{sent:,} sent; {outcome.told()}; seed {seed}",
        )
    ]
