"""kill -9 of the daemon while it moves money: nothing acknowledged is lost, nothing happens twice.

PostgreSQL and NATS live on; the daemon is killed at moments drawn from the seed and started again
on the same ports. Requests and events go on arriving all the time.
"""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

from bench.report import Result
from tests.faults.fault_site import fault_site
from tests.faults.under_load import Outcome, loaded

MERCHANTS = 8
LIFE_LIMIT_S = 1.5
"""A daemon under load lives at most so long before it is killed."""
READY_BAR_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoneyKills:
    """What a run of kills left behind; `ready_s` is how long each restart took."""

    outcome: Outcome
    ready_s: tuple[float, ...]


async def kill_money(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    database_url: str | None = None,
    events_per_s: float = 50.0,
    life_limit_s: float = LIFE_LIMIT_S,
) -> MoneyKills:
    """Kill the daemon `rounds` times while money moves, and judge what is left."""
    chance = random.Random(seed)
    async with fault_site(folder, merchants=MERCHANTS, database_url=database_url) as site:
        ready_s = []
        async with loaded(site, seed=seed, events_per_s=events_per_s) as under:
            for _ in range(rounds):
                await under.money.until_more()
                # The moment of the kill is what is tried here, so it is drawn and not waited for.
                await asyncio.sleep(chance.uniform(0.0, life_limit_s))
                await site.kill9()
                ready_s.append(await site.start())
            return MoneyKills(outcome=await under.settle(), ready_s=tuple(ready_s))


def results(folder: Path, *, rounds: int, seed: int) -> list[Result]:
    """The rows of the report."""
    report = asyncio.run(kill_money(folder, rounds=rounds, seed=seed))
    slowest_s = max(report.ready_s)
    return [
        Result(
            name=f"kill -9 of the daemon under money load, {rounds} times",
            value=report.outcome.count,
            unit="lost, doubled or told wrongly",
            bar="0",
            holds=report.outcome.holds,
            note=f"{report.outcome.told()}; seed {seed}",
        ),
        Result(
            name="ready again after kill -9 under money load, slowest",
            value=slowest_s,
            unit="s",
            bar="≤ 5 s",
            holds=slowest_s <= READY_BAR_S,
        ),
    ]
