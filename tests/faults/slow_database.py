"""A database that answers in half a second to five: what is acknowledged is committed all the same.

A proxy of our own stands between daemon and PostgreSQL and holds each answer back. Far more is
asked than can be done so: what is too much has to be refused at once, as something to be asked
again, and when the database is quick again everything has to be as before.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from bench.report import Result
from glamd.admin import migrate
from glamd.embedded.postgres import EmbeddedPostgres
from tests.faults.fault_site import fault_site
from tests.faults.under_load import Outcome, loaded

MERCHANTS = 8
SLOW_S = 25.0
FASTEST_S, SLOWEST_S = 0.5, 5.0
CHUNK_BYTES = 65_536
CROWD, WAVE, WAVE_EVERY_S = 4_000, 40, 0.05
"""Requests for one merchant beside the load, more than a mailbox has room for, and how they come:
not faster than this process can open connections, or it would measure itself."""

REFUSED_BAR_S = 1.0
BACK_BAR_S = 10.0
ANSWER_TIMEOUT_S = 60.0
FULL = "MAILBOX_FULL"


class SlowProxy:
    """Passes bytes both ways; while `slow`, each answer comes after a delay that the seed draws."""

    def __init__(self, url: str, *, seed: int) -> None:
        self._target = urlsplit(url)
        self._chance = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.slow = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Listen; the database's URL by way of this proxy."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        login = self._target.netloc.rpartition("@")[0]
        try:
            yield urlunsplit(self._target._replace(netloc=f"{login}@127.0.0.1:{port}"))
        finally:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there_reader, there_writer = await asyncio.open_connection(
            self._target.hostname, self._target.port
        )
        pumps = (
            asyncio.create_task(self._pump(reader, there_writer, slows=False)),
            asyncio.create_task(self._pump(there_reader, writer, slows=True)),
        )
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for each in (writer, there_writer):
                each.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, slows: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                if slows and self.slow:
                    # To be slow is what this proxy is for.
                    await asyncio.sleep(self._chance.uniform(FASTEST_S, SLOWEST_S))
                sink.write(chunk)
                await sink.drain()


@dataclass(slots=True)
class Crowd:
    """What many requests at once were answered: how many by code, and the slowest refusal."""

    codes: Counter[str] = field(default_factory=Counter)
    slowest_refusal_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowDatabase:
    """What a run left behind; `back_s` from when the database was quick again."""

    outcome: Outcome
    crowd: Crowd
    back_s: float


async def slow_database(folder: Path, *, slow_s: float, seed: int) -> SlowDatabase:
    """Let the database be slow for so long under load, and judge what is left."""
    postgres = EmbeddedPostgres(folder / "database")
    database_url = (await postgres.start()).app
    try:
        await migrate.upgrade(database_url)
        proxy = SlowProxy(database_url, seed=seed)
        async with (
            proxy.serving() as slow_url,
            fault_site(
                folder, merchants=MERCHANTS, database_url=database_url, seen_by_daemon=slow_url
            ) as site,
            loaded(site, seed=seed) as under,
        ):
            proxy.slow = True
            crowd = Crowd()
            began_s = time.monotonic()
            await _crowd(site.http_url, site.jwt, site.merchants[0], crowd)
            # That it is slow for so long is what is tried here.
            await asyncio.sleep(max(0.0, slow_s - (time.monotonic() - began_s)))
            proxy.slow = False
            began_s = time.monotonic()
            await under.money.until_more(20)
            back_s = time.monotonic() - began_s
            return SlowDatabase(outcome=await under.settle(), crowd=crowd, back_s=back_s)
    finally:
        await postgres.stop()


async def _crowd(url: str, jwt: str, merchant: str, crowd: Crowd) -> None:
    """Ask for far more than there is room for, at once; nothing that could be paid for."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {jwt}"}
    async with aiohttp.ClientSession(
        url, timeout=timeout, headers=headers, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(number: int) -> None:
            body = {
                "merchant_id": merchant,
                # No account has so much, so that none of it moves anything.
                "amount": 2**52,
                "reference_type": "crowd",
                "reference_id": str(number),
            }
            began_s = time.monotonic()
            async with session.post("/api/credits/consume", json=body) as answer:
                code = str((await answer.json(content_type=None))["code"])
            crowd.codes[code] += 1
            if code == FULL:
                taken_s = time.monotonic() - began_s
                crowd.slowest_refusal_s = max(crowd.slowest_refusal_s, taken_s)

        async with asyncio.TaskGroup() as group:
            for number in range(CROWD):
                group.create_task(one(number))
                if number % WAVE == WAVE - 1:
                    await asyncio.sleep(WAVE_EVERY_S)


def results(folder: Path, *, seed: int) -> list[Result]:
    """The rows of the report."""
    report = asyncio.run(slow_database(folder, slow_s=SLOW_S, seed=seed))
    outcome, crowd = report.outcome, report.crowd
    told = ", ".join(f"{count:,} {code}" for code, count in sorted(crowd.codes.items()))
    wrong = sum(len(codes) for codes in outcome.account.refused.values())
    full = crowd.codes[FULL]
    name = f"database answering in {FASTEST_S:g}-{SLOWEST_S:g} s for {SLOW_S:g} s under load"
    return [
        Result(
            name=name,
            value=outcome.count + wrong,
            unit="lost, doubled or told wrongly",
            bar="0",
            holds=outcome.holds and wrong == 0,
            note=f"{outcome.told()}; seed {seed}",
        ),
        Result(
            name=f"{name}: slowest refusal of what there was no room for",
            value=crowd.slowest_refusal_s,
            unit="s",
            bar="≤ 1 s",
            holds=full > 0 and crowd.slowest_refusal_s <= REFUSED_BAR_S,
            note=f"of {CROWD:,} requests for one merchant: {told}",
        ),
        Result(
            name=f"{name}: works again when it is quick again",
            value=report.back_s,
            unit="s",
            bar="≤ 10 s",
            holds=report.back_s <= BACK_BAR_S,
        ),
    ]
