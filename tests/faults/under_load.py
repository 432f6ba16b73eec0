"""Loads beside a `FaultSite`, and the judgement when all has settled.

A run takes a site, breaks something while `loaded` holds, and gets from `settle` what is left:
whether anything acknowledged was lost, doubled or told wrongly. What is broken, and how often, is
the runs' own.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import aiohttp
import orjson

from bench.harness import PROGRAMS
from glamd.embedded.files import write_private
from tests.faults.fault_site import FaultSite
from tests.faults.ledger_of_load import Acknowledged, Verdict
from tests.faults.ledger_of_load import judge as judge_tokens
from tests.faults.money_books import read_books, read_stream
from tests.faults.money_judge import Books, Message, MoneyVerdict, judge
from tests.faults.money_load import MoneyPlan
from tests.faults.money_record import Account

PATIENCE_S: Final = 60.0
SETTLE_TIMEOUT_S: Final = 240.0
"""JetStream repeats what was neither acknowledged nor given back after 60 s, each time."""

POLL_S: Final = 0.02
LAG_EVERY_S: Final = 0.2
TERMINALS: Final = 10
TERMINALS_PER_S: Final = 100


class Tail:
    """The end of a record that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def successes(self) -> int:
        """How many acknowledgements were written since the last question."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        told = [orjson.loads(line) for line in lines]
        return sum(
            line["what"] == "answer" and (line.get("status") == 200 or line["code"] == "ok")
            for line in told
        )

    async def until_more(self, count: int = 1, *, while_running: "Load | None" = None) -> None:
        """Return at so many further acknowledgements, or when the load has ended; TimeoutError."""
        self.successes()

        async def more() -> bool:
            nonlocal count
            count -= self.successes()
            return count <= 0 or (while_running is not None and while_running.has_ended)

        await until(more)


class Load:
    """A process that loads, with its record."""

    def __init__(self, process: subprocess.Popen[str], record: Path) -> None:
        self._process = process
        self.record = record
        self.tail = Tail(record)

    @property
    def has_ended(self) -> bool:
        """Whether it is through."""
        return self._process.poll() is not None

    async def until_more(self, count: int = 1) -> None:
        """Return at so many further acknowledgements, or when it is through."""
        await self.tail.until_more(count, while_running=self)

    async def finish(self) -> None:
        """Let it begin nothing more, and wait until all is answered; RuntimeError."""
        output, _ = await asyncio.to_thread(self._process.communicate, timeout=SETTLE_TIMEOUT_S)
        if self._process.returncode != 0:
            raise RuntimeError(f"a load ended with {self._process.returncode}: {output[-2000:]}")

    async def kill(self) -> None:
        """End it in whatever state it is."""
        if not self.has_ended:
            self._process.kill()
        await asyncio.to_thread(self._process.communicate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run left behind: money, and tokens where there were terminals."""

    money: MoneyVerdict
    account: Account
    books: Books
    stream: list[Message]
    crashes: tuple[str, ...]
    unsettled: str = ""
    """What still waited when the patience was over; nothing where it is empty."""

    tokens: Verdict | None = None
    acknowledged: Acknowledged | None = None

    @property
    def count(self) -> int:
        """How much does not add up."""
        tokens = 0
        if self.tokens is not None:
            tokens = sum(
                len(value) if isinstance(value, tuple) else value
                for value in asdict(self.tokens).values()
            )
        return self.money.count + tokens

    @property
    def holds(self) -> bool:
        """Whether everything adds up, and nothing of ours broke meanwhile."""
        return self.count == 0 and not self.crashes and not self.unsettled

    @property
    def repeated(self) -> int:
        """Messages of the stream that were there before."""
        return len(self.stream) - len({message.event_id for message in self.stream})

    def told(self) -> str:
        """The outcome in a line, for the report's note."""
        parts = [f"{len(self.books.transactions):,} transactions, {len(self.stream):,} events out"]
        if self.acknowledged is not None:
            parts.append(f"{len(self.acknowledged.tokens):,} tokens")
        parts += [f"{name}: {len(what)}" for name, what in self.money.findings.items()]
        if self.crashes:
            parts.append(f"crashed: {len(self.crashes)}")
        if self.unsettled:
            parts.append("not settled")
        return "; ".join(parts)

    def show(self) -> None:
        """Print the first of each finding, for whoever looks for the cause."""
        for name, what in self.money.findings.items():
            print(f"  {name} ({len(what)}): {', '.join(what[:5])}")
        if self.tokens is not None and not self.tokens.holds:
            print(f"  tokens: {self.tokens}")
        if self.unsettled:
            print(f"  not settled: {self.unsettled}")
        for crash in self.crashes[:5]:
            print(f"  crashed: {crash}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A site under load."""

    site: FaultSite
    money: Load
    terminals: Load | None = None

    async def until_all_go_on(self) -> None:
        """Return when both loads got new acknowledgements."""
        loads = [load for load in (self.money, self.terminals) if load is not None]
        await asyncio.gather(*(load.until_more() for load in loads))

    async def settle(self) -> Outcome:
        """Let the loads end, everything be told and consumed, and judge what is left."""
        await self.money.finish()
        if self.terminals is not None:
            await self.terminals.finish()
        return await settled(self.site, self.money.record, self.terminals)


async def settled(site: FaultSite, record: Path, terminals: Load | None = None) -> Outcome:
    """Wait until the outboxes are empty and everything is consumed, and judge what is left."""
    unsettled = ""
    try:
        await until(lambda: _is_quiet(site), every_s=LAG_EVERY_S, timeout_s=SETTLE_TIMEOUT_S)
    except TimeoutError:
        unsettled = str(await site.admin("/v1/events/lag"))
    # With its exit status 1 it still says what is broken.
    verified = await site.glamctl("ledger", "verify")
    account = Account.read(record)
    books, stream = await read_books(site.database_url, verified), await read_stream(site.nats_url)
    found = None if terminals is None else Acknowledged.read(terminals.record)
    outcome = Outcome(
        money=judge(account, books, stream),
        account=account,
        books=books,
        stream=stream,
        crashes=site.crashes(),
        unsettled=unsettled,
        acknowledged=found,
        tokens=None if found is None else await judge_tokens(found, site.database_url),
    )
    outcome.show()
    return outcome


@asynccontextmanager
async def loaded(
    site: FaultSite,
    *,
    seed: int,
    http_per_s: float = 150.0,
    events_per_s: float = 50.0,
    terminal_seconds: float = 0.0,
) -> AsyncIterator[Loaded]:
    """Money at these rates until `settle`, and terminals that tap for so long, if at all."""
    record = site.folder / "money.jsonl"
    plan_file = site.folder / "plan.json"
    plan = MoneyPlan(
        http_url=site.http_url,
        nats_url=site.nats_url,
        jwt=site.jwt,
        merchants=site.merchants,
        record=str(record),
        http_per_s=http_per_s,
        events_per_s=events_per_s,
        seed=seed,
    )
    write_private(plan_file, orjson.dumps(asdict(plan)))
    async with AsyncExitStack() as stack:
        money = _begun([sys.executable, "-m", "tests.faults.money_load", str(plan_file)], record)
        stack.push_async_callback(money.kill)
        terminals = None
        if terminal_seconds:
            tapped = site.folder / "tokens.jsonl"
            command = [str(PROGRAMS / "glam-terminal"), "load", "--json", f"--record={tapped}"]
            command += [f"--state-dir={site.daemon.directory}", f"--seed={seed}"]
            command += [f"--terminals={TERMINALS}", f"--rate={TERMINALS_PER_S}"]
            command += [f"--seconds={terminal_seconds}"]
            terminals = _begun(command, tapped)
            stack.push_async_callback(terminals.kill)
        under = Loaded(site=site, money=money, terminals=terminals)
        await money.until_more(len(site.merchants) + 1)
        await under.until_all_go_on()
        yield under


async def until(
    condition: Callable[[], Awaitable[bool]],
    *,
    every_s: float = POLL_S,
    timeout_s: float = PATIENCE_S,
) -> float:
    """Wait for something that other processes do; the seconds it took. TimeoutError."""
    began_s = time.monotonic()
    while not await condition():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError(f"not so within {timeout_s:g} s")
        await asyncio.sleep(every_s)
    return time.monotonic() - began_s


async def drained(site: FaultSite, *, timeout_s: float) -> float:
    """Wait until all is sent that was written before now, however much is written meanwhile.

    The seconds it took.
    """
    began_s = time.monotonic()

    async def is_drained() -> bool:
        with suppress(RuntimeError, OSError, aiohttp.ClientError):
            asked_s = time.monotonic()
            found = await site.admin("/v1/events/lag")
            oldest = [each["oldest_s"] or 0.0 for each in found["outboxes"]]
            return found["trouble"] is None and max(oldest) < asked_s - began_s
        return False

    return await until(is_drained, timeout_s=timeout_s)


async def _is_quiet(site: FaultSite) -> bool:
    with suppress(RuntimeError, OSError, aiohttp.ClientError):
        return await site.lag() == (0, 0)
    return False


def _begun(command: list[str], record: Path) -> Load:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Load(process, record)
