"""A data key rotated under a million tokens while cards are tapped and workers look.

Once undisturbed, for the rate and for what traffic feels of it; once with the daemon killed in the
middle, which has to go on where it was. No look may fail in all that time, and in the end the old
versions are destroyed and every token still opens to its own card.
"""

import asyncio
import random
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import aiohttp
import orjson

from bench import sealed_tokens
from bench.harness import PROGRAMS
from bench.report import Result
from bench.sealed_tokens import RING, Opened
from tests.faults.fault_site import FaultSite, fault_site

TERMINALS: Final = 20
TAPS_PER_S: Final = 300
"""Of all terminals; the rate at which the bars measure p99."""
LOOKERS: Final = 4
LOOKS_PER_S: Final = 100
"""Of all workers together."""

WARM_UP_S: Final = 3.0
MEASURED_S: Final = 15.0
POLL_S: Final = 0.25
FINISH_TIMEOUT_S: Final = 900.0
LOOK_TIMEOUT_S: Final = 10.0
LOAD_MARGIN_S: Final = 60.0
RATE_BAR: Final = 20_000.0
P99_BAR: Final = 2.0
KILL_AT: Final = 0.4
"""How much of the second rotation is done when the daemon is killed."""


@dataclass(slots=True)
class Looks:
    """What workers were answered; while the daemon is down they try again and again."""

    latencies_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unanswered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """p50 and p99 of taps and looks in one stretch of time, in ms."""

    taps_ms: tuple[float, float]
    looks_ms: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """Everything that was seen. Rates are rows a second, `alone` without any traffic."""

    rows: int
    alone_per_s: float
    under_traffic_per_s: float
    before: Felt
    during: Felt
    looks: Looks
    resumed_at: int
    opened: Opened
    destroyed: bool


async def rotate(folder: Path, *, rows: int, seed: int) -> Rotated:
    """Three rotations: alone, under traffic, and under traffic with a kill."""
    async with fault_site(folder, merchants=1, terminals=True) as site:
        kek_file = site.daemon.directory / "kek"
        tokens = await sealed_tokens.add(
            site.database_url,
            kek_file,
            count=rows,
            merchant_id=UUID(site.merchants[0]),
            device_id="dev_of_the_seed",
        )
        looks = Looks()
        await _taps(site, WARM_UP_S)
        async with _looking(site, tokens, looks, seed=seed):
            before = await _felt(site, looks)
            under_traffic, during = await _rotated_under_traffic(site, looks)
            resumed_at = await _rotated_and_killed(site, rows)
        alone = await _rotated_alone(site)
        destroyed = await _destroy_old(site)
        opened = await sealed_tokens.open_all(site.database_url, kek_file, tokens)
    return Rotated(
        rows=rows,
        alone_per_s=alone,
        under_traffic_per_s=under_traffic,
        before=before,
        during=during,
        looks=looks,
        resumed_at=resumed_at,
        opened=opened,
        destroyed=destroyed,
    )


async def _rotated_alone(site: FaultSite) -> float:
    await site.command("keys", "rotate", RING)
    return await _finished(site)


async def _rotated_under_traffic(site: FaultSite, looks: Looks) -> tuple[float, Felt]:
    await site.command("keys", "rotate", RING)
    felt = asyncio.create_task(_felt(site, looks))
    rate = await _finished(site)
    return rate, await felt


async def _rotated_and_killed(site: FaultSite, rows: int) -> int:
    """How many rows were left when the daemon that was killed in the middle went on."""
    await site.command("keys", "rotate", RING)
    await _until(site, lambda status: 0 < status["remaining"] < rows * (1 - KILL_AT))
    await site.kill9()
    await site.start()
    status = await _until(site, lambda status: status["remaining"] is not None)
    remaining: int = status["remaining"]
    await _finished(site)
    return remaining


async def _finished(site: FaultSite) -> float:
    """The job's own rate, once nothing remains."""
    rates: list[float] = []

    def done(status: dict[str, Any]) -> bool:
        if status["rate"]:
            rates.append(status["rate"])
        return bool(status["remaining"] == 0)

    await _until(site, done)
    return rates[-1] if rates else 0.0


async def _until(site: FaultSite, holds: Any) -> dict[str, Any]:
    async with asyncio.timeout(FINISH_TIMEOUT_S):
        while True:
            status: dict[str, Any] = (await site.admin("/v1/keyrings"))[RING]
            if holds(status):
                return status
            await asyncio.sleep(POLL_S)


async def _destroy_old(site: FaultSite) -> bool:
    """Whether every version but the active one could be retired and destroyed."""
    status = (await site.admin("/v1/keyrings"))[RING]
    old = [each["version"] for each in status["versions"] if each["version"] != status["active"]]
    for version in old:
        await site.command("keys", "retire", RING, version)
        await site.command("keys", "destroy", RING, version, "--yes")
    status = (await site.admin("/v1/keyrings"))[RING]
    states = {each["version"]: each["status"] for each in status["versions"]}
    return all(states[version] == "destroyed" for version in old) and len(old) >= 3


async def _felt(site: FaultSite, looks: Looks) -> Felt:
    begin = len(looks.latencies_ms)
    taps_ms = await _taps(site, MEASURED_S)
    seen = sorted(looks.latencies_ms[begin:])
    return Felt(taps_ms=taps_ms, looks_ms=(_part(seen, 50), _part(seen, 99)))


def _part(latencies_ms: Sequence[float], percent: int) -> float:
    return latencies_ms[len(latencies_ms) * percent // 100]


async def _taps(site: FaultSite, seconds: float) -> tuple[float, float]:
    command = [
        *(str(PROGRAMS / "glam-terminal"), "load", "--json"),
        *("--state-dir", str(site.daemon.directory), "--terminals", str(TERMINALS)),
        *("--seconds", str(seconds), "--rate", str(TAPS_PER_S)),
    ]
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + LOAD_MARGIN_S,
    )
    told = orjson.loads(done.stdout)
    if told["ok"] != told["sent"]:
        raise RuntimeError(f"not every tap became a token: {told}")
    return told["latency_ms"]["p50"], told["latency_ms"]["p99"]


@asynccontextmanager
async def _looking(
    site: FaultSite, tokens: Sequence[str], looks: Looks, *, seed: int
) -> AsyncIterator[None]:
    """Workers that look at cards all the time."""
    connector = aiohttp.TCPConnector(ssl=site.daemon.as_worker())
    timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        lookers = [
            asyncio.create_task(_look(session, site, tokens, looks, random.Random(seed + number)))
            for number in range(LOOKERS)
        ]
        try:
            yield
        finally:
            for looker in lookers:
                looker.cancel()
            ended = await asyncio.gather(*lookers, return_exceptions=True)
            looks.failed += [repr(each) for each in ended if isinstance(each, Exception)]


async def _look(
    session: aiohttp.ClientSession,
    site: FaultSite,
    tokens: Sequence[str],
    looks: Looks,
    chance: random.Random,
) -> None:
    body = {"purpose": "settlement", "fields": ["pan", "expiry"]}
    host = f"https://localhost:{site.worker_port}"
    while True:
        number = chance.randrange(len(tokens))
        began_s = time.perf_counter()
        try:
            path = f"/internal/v1/payment-tokens/{tokens[number]}/decrypt"
            async with session.post(host + path, json=body) as answer:
                told = orjson.loads(await answer.read())
        except (aiohttp.ClientError, TimeoutError):
            looks.unanswered += 1
        else:
            if answer.status != 200 or told["data"]["pan"] != sealed_tokens.pan_of(number):
                looks.failed.append(f"{answer.status} {told.get('code')}")
            looks.latencies_ms.append((time.perf_counter() - began_s) * 1e3)
        await asyncio.sleep(LOOKERS / LOOKS_PER_S)


def results(folder: Path, *, rows: int, seed: int) -> list[Result]:
    """The rows of the report."""
    seen = asyncio.run(rotate(folder, rows=rows, seed=seed))
    name = f"rotation of {rows:,} tokens"
    ratio = seen.during.taps_ms[1] / seen.before.taps_ms[1]
    looked = seen.during.looks_ms[1] / seen.before.looks_ms[1]
    return [
        Result(
            name=f"{name}: re-encryption, no traffic",
            value=seen.alone_per_s,
            unit="rows/s",
            bar=f">= {RATE_BAR:,.0f} rows/s",
            holds=seen.alone_per_s >= RATE_BAR,
        ),
        Result(
            name=f"{name}: p99 of taps at {TAPS_PER_S}/s meanwhile",
            value=seen.during.taps_ms[1],
            unit="ms",
            rival="without",
            rival_value=seen.before.taps_ms[1],
            ratio=ratio,
            bar=f"<= {P99_BAR:.0f} times",
            holds=ratio <= P99_BAR,
            note=f"p50 {seen.during.taps_ms[0]:.1f} ms beside {seen.before.taps_ms[0]:.1f}; "
            f"re-encryption {seen.under_traffic_per_s:,.0f} rows/s",
        ),
        Result(
            name=f"{name}: p99 of looks at {LOOKS_PER_S}/s meanwhile",
            value=seen.during.looks_ms[1],
            unit="ms",
            rival="without",
            rival_value=seen.before.looks_ms[1],
            ratio=looked,
            bar=f"<= {P99_BAR:.0f} times",
            holds=looked <= P99_BAR,
        ),
        Result(
            name=f"{name}: looks that failed",
            value=len(seen.looks.failed),
            unit="looks",
            bar="0",
            holds=not seen.looks.failed,
            note=f"of {len(seen.looks.latencies_ms):,}; {seen.looks.unanswered} tried again while "
            f"the daemon was down; {', '.join(sorted(set(seen.looks.failed))) or 'none'}",
        ),
        Result(
            name=f"{name}, killed in the middle: tokens that do not open",
            value=seen.opened.bad,
            unit="tokens",
            bar="0",
            holds=seen.opened.bad == 0 and seen.destroyed and 0 < seen.resumed_at < rows,
            note=f"resumed with {seen.resumed_at:,} left; all older versions "
            f"{'destroyed' if seen.destroyed else 'NOT destroyed'}; seed {seed}",
        ),
    ]
