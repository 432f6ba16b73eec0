"""NATS killed, and NATS away, while cards are tapped and money moves: nobody notices but the relay.

Not one request may fail or be asked again for it, nothing may be lost, and afterwards the outboxes
drain in each merchant's order.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.report import Result
from tests.faults.fault_site import FaultSite, fault_site
from tests.faults.under_load import Loaded, Outcome, drained, loaded, until

MERCHANTS = 8
LIFE_LIMIT_S = 1.5
ROUND_S = 4.0
"""What the terminals reckon with for each round."""
AWAY_S = 120.0
DRAIN_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsFaults:
    """What a run left behind.

    `drained_s` is how long each drain took once NATS was back, `waited` how many rows had waited
    for it, `failed` counts answers, and lacks of one, after which something had to be asked again.
    """

    outcome: Outcome
    drained_s: tuple[float, ...]
    waited: int
    failed: Counter[str]


async def kill_nats(
    folder: Path,
    *,
    rounds: int,
    seed: int,
    database_url: str | None = None,
    events_per_s: float = 50.0,
    terminal_seconds: float = 0.0,
    life_limit_s: float = LIFE_LIMIT_S,
) -> NatsFaults:
    """Kill the server `rounds` times, which is started again at once, and judge what is left."""
    chance = random.Random(seed)
    async with fault_site(
        folder, merchants=MERCHANTS, database_url=database_url, terminals=terminal_seconds > 0
    ) as site:
        drained_s = []
        async with loaded(
            site, seed=seed, events_per_s=events_per_s, terminal_seconds=terminal_seconds
        ) as under:
            for _ in range(rounds):
                await under.until_all_go_on()
                # The moment of the kill is what is tried here, so it is drawn and not waited for.
                await asyncio.sleep(chance.uniform(0.0, life_limit_s))
                restarts = site.bus.restarts
                site.bus.kill9()
                await until(partial(_is_restarted, site, restarts))
                drained_s.append(await drained(site, timeout_s=DRAIN_TIMEOUT_S))
            return await _judged(under, drained_s, waited=0)


async def lose_nats(folder: Path, *, away_s: float, seed: int) -> NatsFaults:
    """Take the server away for so long, and judge what is left."""
    async with (
        fault_site(folder, merchants=MERCHANTS, terminals=True) as site,
        loaded(site, seed=seed, terminal_seconds=away_s) as under,
    ):
        await under.until_all_go_on()
        await site.bus.stop()
        # That it is away for so long is what is tried here.
        await asyncio.sleep(away_s)
        await under.money.until_more()
        waited = await _waiting(site)
        await site.bus.restart()
        return await _judged(under, [await drained(site, timeout_s=DRAIN_TIMEOUT_S)], waited=waited)


async def _judged(under: Loaded, drained_s: list[float], *, waited: int) -> NatsFaults:
    outcome = await under.settle()
    failed = Counter(outcome.account.passing)
    failed.update(code for codes in outcome.account.refused.values() for code in codes)
    if (tapped := outcome.acknowledged) is not None:
        failed += Counter({"taps sent again": tapped.resent, "taps refused": len(tapped.refused)})
    return NatsFaults(outcome=outcome, drained_s=tuple(drained_s), waited=waited, failed=failed)


async def _is_restarted(site: FaultSite, before: int) -> bool:
    return site.bus.restarts > before and site.bus.pid is not None


async def _waiting(site: FaultSite) -> int:
    found = await site.admin("/v1/events/lag")
    return sum(each["rows"] for each in found["outboxes"])


def kill_results(folder: Path, *, rounds: int, seed: int) -> list[Result]:
    """The rows of the report about kills."""
    report = asyncio.run(
        kill_nats(folder, rounds=rounds, seed=seed, terminal_seconds=rounds * ROUND_S)
    )
    name = f"NATS killed and restarted under load, {rounds} times"
    return _rows(name, report, f"drained again after {max(report.drained_s):.1f} s; seed {seed}")


def away_results(folder: Path, *, away_s: float, seed: int) -> list[Result]:
    """The rows of the report about the absence."""
    report = asyncio.run(lose_nats(folder, away_s=away_s, seed=seed))
    [drained_s] = report.drained_s
    told = f"{report.waited:,} events waited, all were sent {drained_s:.1f} s after it was back"
    return _rows(f"NATS away for {away_s:g} s under load", report, f"{told}; seed {seed}")


def _rows(name: str, report: NatsFaults, note: str) -> list[Result]:
    told = "".join(f"{count:,} {code}; " for code, count in sorted(report.failed.items()))
    return [
        Result(
            name=name,
            value=report.outcome.count,
            unit="lost, doubled, out of order or told wrongly",
            bar="0",
            holds=report.outcome.holds,
            note=f"{report.outcome.told()}, {report.outcome.repeated:,} of them repeats; {note}",
        ),
        Result(
            name=f"{name}: taps and requests that failed",
            value=report.failed.total(),
            unit="failed",
            bar="0",
            holds=not report.failed,
            note=f"{told}the slowest request took {report.outcome.account.slowest_ms:.0f} ms",
        ),
    ]
