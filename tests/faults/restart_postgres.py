"""PostgreSQL stopped as by a power cut and started again, while cards are tapped and money moves.

The daemon lives on. Meanwhile it may answer only what can be asked again; afterwards it has to work
again by itself, with nothing acknowledged lost and nothing done twice.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path

from bench.report import Result
from tests.faults.fault_site import fault_site
from tests.faults.under_load import Outcome, loaded

MERCHANTS = 8
DOWN_LIMIT_S = 3.0
LIFE_LIMIT_S = 1.5
ROUND_S = 5.0
"""What the terminals reckon with for each round."""
BACK_BAR_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresRestarts:
    """`back_s` is from each restart's begin to acknowledgements of both loads."""

    outcome: Outcome
    back_s: tuple[float, ...]


async def restart_postgres(folder: Path, *, rounds: int, seed: int) -> PostgresRestarts:
    """Stop and start the server `rounds` times under load, and judge what is left."""
    chance = random.Random(seed)
    async with fault_site(folder, merchants=MERCHANTS, terminals=True) as site:
        assert site.postgres is not None
        back_s = []
        async with loaded(site, seed=seed, terminal_seconds=rounds * ROUND_S) as under:
            for _ in range(rounds):
                await under.until_all_go_on()
                # Both moments are what is tried here, so they are drawn and not waited for.
                await asyncio.sleep(chance.uniform(0.0, LIFE_LIMIT_S))
                await site.postgres.stop_immediate()
                await asyncio.sleep(chance.uniform(0.2, DOWN_LIMIT_S))
                began_s = time.monotonic()
                await site.postgres.restart()
                await under.until_all_go_on()
                back_s.append(time.monotonic() - began_s)
            return PostgresRestarts(outcome=await under.settle(), back_s=tuple(back_s))


def results(folder: Path, *, rounds: int, seed: int) -> list[Result]:
    """The rows of the report."""
    report = asyncio.run(restart_postgres(folder, rounds=rounds, seed=seed))
    outcome, slowest_s = report.outcome, max(report.back_s)
    wrong = sum(len(codes) for codes in outcome.account.refused.values())
    passing = ", ".join(f"{n} {code}" for code, n in sorted(outcome.account.passing.items()))
    name = f"PostgreSQL stopped and restarted under load, {rounds} times"
    return [
        Result(
            name=name,
            value=outcome.count,
            unit="lost, doubled or told wrongly",
            bar="0",
            holds=outcome.holds,
            note=f"{outcome.told()}; seed {seed}",
        ),
        Result(
            name=f"{name}: answers that must not be asked again",
            value=wrong,
            unit="answers",
            bar="0",
            holds=wrong == 0,
            note=f"retryable: {passing or 'none'}; the slowest of {outcome.account.answers:,} "
            f"answers {outcome.account.slowest_ms / 1e3:.1f} s",
        ),
        Result(
            name="work again after PostgreSQL's restart began, slowest",
            value=slowest_s,
            unit="s",
            bar="≤ 10 s",
            holds=slowest_s <= BACK_BAR_S,
        ),
    ]
