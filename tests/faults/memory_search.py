"""What is left in the daemon's memory of cards that it has finished with: a search for them.

A daemon of its own takes known card numbers, each different, in every form; some of the tokens are
detokenized. It is given time, with a little other traffic, and then all of its memory is searched.
That the search finds what is there is shown first, on the process that made the numbers.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import orjson

from bench.report import Result
from device_gateway.terminal import Terminal
from device_gateway.terminal_card import TEST_CARDS, CardReader, DemoCard, clear_form
from device_gateway.terminal_device import Counters, Device, device_from
from glamd.admin import migrate
from glamd.clock import SystemClock
from glamd.crypto import dukpt_aes
from glamd.embedded.postgres import EmbeddedPostgres, free_port
from glamd.embedded.settings import LOOPBACK, WORKER
from glamd.payments.model import Format
from tests.support.memory_of import Sighting, look_through, may_look
from tests.support.run_daemon import Changes, RunDaemon, supervised

RATE: Final = 100_000
KEY_SET: Final = "memory-aes"
BDK: Final = "0123456789ABCDEFFEDCBA9876543210"
KSN: Final = "4D454D4F5259303100000000"
PREFIX: Final = "41372964"
FORMS: Final[tuple[Format, ...]] = ("track2", "track1", "emv-tlv", "pan", "json")
CARDS: Final = 2000
LOOKS: Final = 200
WAIT_S: Final = 60.0
BESIDE_PER_S: Final = 20
USED_KEYS: Final = 20
"""Each is looked for by itself, which costs a pass over the memory."""
TOGETHER: Final = 16
ANSWER_TIMEOUT_S: Final = 60.0
GRANT: Final = {
    "name": WORKER,
    "purposes": ["settlement"],
    "fields": ["pan", "expiry"],
    "merchants": "*",
    "rate_per_s": 10_000.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """How many card numbers were there, how many still are, and what of the keys is."""

    only_tokenized: int
    only_tokenized_found: int
    detokenized: int
    detokenized_found: int
    tracks_found: int
    found_by_self_check: int
    used_keys: int
    used_keys_found: int
    initial_key_copies: int
    searched_bytes: int

    @property
    def cards(self) -> int:
        """All of them."""
        return self.only_tokenized + self.detokenized


class CannotLookError(Exception):
    """The memory of another process is not for us to read here."""


def numbers(count: int) -> list[str]:
    """Distinct card numbers with good check digits, all of one prefix."""
    made = []
    for serial in range(count):
        body = f"{PREFIX}{(serial * 7919 + 1_234_567) % 10_000_000:07}"
        doubled = [int(digit) * 2 for digit in body[::2]]
        total = sum(value - 9 * (value > 9) for value in doubled) + sum(map(int, body[1::2]))
        made.append(body + str(-total % 10))
    return made


async def search(
    folder: Path,
    *,
    cards: int,
    looks: int,
    wait_s: float,
    database_url: str | None = None,
) -> MemoryReport:
    """Tokenize, detokenize, wait, search. CannotLookError where that is not allowed."""
    if not may_look(os.getpid()) or os.geteuid() != 0:
        raise CannotLookError("only root may read the memory of a process that is not dumpable")
    pans = numbers(cards)
    async with AsyncExitStack() as stack:
        if database_url is None:
            postgres = EmbeddedPostgres(folder / "database")
            stack.push_async_callback(postgres.stop)
            database_url = (await postgres.start()).app
            await migrate.upgrade(database_url)
        daemon = _daemon(folder, database_url)
        # The key set's clear BDK comes in by the administrators' socket, and the device's key goes
        # out there. The process that is searched is another one, which has seen neither.
        device = await asyncio.to_thread(_enrolled, daemon)
        await asyncio.to_thread(stack.enter_context, supervised(daemon))
        async with _tapping(device) as (terminal, reader):
            tokens = await _tap_all(terminal, reader, pans)
            await _look_at(daemon, tokens[:looks])
            await _traffic(terminal, reader, wait_s)
            used = _working_keys(device, cards)
            strings = [*used, device.initial_key]
            seen, self_check = await asyncio.to_thread(_both, daemon.process.pid, strings)
    return _report(pans, looks, seen, self_check, used, device)


def results(folder: Path) -> list[Result]:
    """The rows of the report."""
    found = asyncio.run(search(folder, cards=CARDS, looks=LOOKS, wait_s=WAIT_S))
    note = (
        f"{found.searched_bytes / 2**20:,.0f} MiB searched {WAIT_S:.0f} s after the load; "
        f"self-check finds {found.found_by_self_check:,} of {found.cards:,}"
    )
    return [
        Result(
            name=f"{found.only_tokenized:,} cards tokenized, left in memory",
            value=found.only_tokenized_found,
            unit="cards",
            bar="0",
            holds=found.only_tokenized_found == 0 and found.found_by_self_check == found.cards,
            note=note,
        ),
        Result(
            name=f"{found.detokenized:,} cards detokenized too, left in memory",
            value=found.detokenized_found,
            unit="cards",
            note="a str and an HTTP body each, which Python frees and cannot overwrite",
        ),
        Result(
            name=f"{found.used_keys:,} transaction keys used, left in memory",
            value=found.used_keys_found,
            unit="keys",
            note=f"device still active: {found.initial_key_copies} copies of its initial key",
        ),
    ]


def _report(
    pans: Sequence[str],
    looks: int,
    seen: Sighting,
    self_check: Sighting,
    used: Sequence[bytes],
    device: Device,
) -> MemoryReport:
    return MemoryReport(
        only_tokenized=len(pans) - looks,
        only_tokenized_found=seen.of(pans[looks:]),
        detokenized=looks,
        detokenized_found=seen.of(pans[:looks]),
        tracks_found=len(seen.tracks & set(pans)),
        found_by_self_check=self_check.of(pans),
        used_keys=len(used),
        used_keys_found=sum(seen.times[key] > 0 for key in used),
        initial_key_copies=seen.times[device.initial_key],
        searched_bytes=seen.searched_bytes,
    )


def _both(pid: int, keys: Sequence[bytes]) -> tuple[Sighting, Sighting]:
    seen = look_through(pid, prefix=PREFIX, strings=keys)
    return seen, look_through(os.getpid(), prefix=PREFIX)


def _daemon(folder: Path, database_url: str) -> RunDaemon:
    state = folder / "state"
    state.mkdir(exist_ok=True)
    rates = {"rate_limit_per_s": RATE, "rate_burst": RATE}
    # The terminal is told the port before the restart.
    changes: Changes = {
        "http": rates,
        "mqtt": {"port": free_port(), **rates},
        "worker": {"grants": orjson.dumps([GRANT]).decode()},
    }
    return RunDaemon(state, database_url, changes=changes)


def _enrolled(daemon: RunDaemon) -> Device:
    """A device of a new merchant, from a daemon that ends with it."""
    out = daemon.directory / "device"
    with supervised(daemon):
        daemon.glamctl("keys", "import-bdk", KEY_SET, "--scheme", "aes-dukpt", "--clear", BDK)
        made = daemon.glamctl(
            *("merchant", "create", "--platform", "custom", "--shop-id", "memory"),
            *("--domain", "memory.example"),
        )
        daemon.glamctl(
            *("device", "enroll", "--merchant", made["merchant_id"], "--key-set", KEY_SET),
            *("--ksn", KSN, "--export-initial-key", "--out", str(out)),
        )
    return device_from(orjson.loads((out / "device.json").read_bytes()), out)


def _working_keys(device: Device, count: int) -> list[bytes]:
    """The data keys of the first counters, which the daemon derived and has no more use for."""
    deriver = dukpt_aes.Deriver(device.initial_key, device.key_id)
    data_key = deriver.working_keys(dukpt_aes.Usage.DATA_ENCRYPT, deriver.key_type)
    counters = (n for n in range(1, 2 * count) if n.bit_count() <= dukpt_aes.COUNTERS.ones_limit)
    return [data_key(next(counters)) for _ in range(min(count, USED_KEYS))]


@asynccontextmanager
async def _tapping(device: Device) -> AsyncIterator[tuple[Terminal, CardReader]]:
    terminal = Terminal(device, clock=SystemClock())
    running = asyncio.create_task(terminal.run(), name="terminal")
    try:
        yield terminal, CardReader(device, Counters(device, block=4096))
    finally:
        terminal.close()
        await asyncio.gather(running, return_exceptions=True)


async def _tap_all(terminal: Terminal, reader: CardReader, pans: Sequence[str]) -> list[str]:
    tokens = [""] * len(pans)
    room = asyncio.Semaphore(TOGETHER)

    async def one(index: int, payload: bytes) -> None:
        async with room:
            answer = await terminal.ask(f"card-{index}", payload, timeout_s=ANSWER_TIMEOUT_S)
        if not answer.ok:
            raise RuntimeError(f"a tap was refused: {answer.code}")
        tokens[index] = answer.text("token")

    async with asyncio.TaskGroup() as group:
        for index, pan in enumerate(pans):
            form = FORMS[index % len(FORMS)]
            clear = clear_form(DemoCard(pan=pan), form)
            group.create_task(one(index, reader.request(f"card-{index}", clear, form)))
    return tokens


async def _look_at(daemon: RunDaemon, tokens: Sequence[str]) -> None:
    port = (await asyncio.to_thread(daemon.listeners))["worker"]
    base = f"https://{LOOPBACK}:{port}"
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    connector = aiohttp.TCPConnector(ssl=daemon.as_worker())
    async with aiohttp.ClientSession(base, connector=connector, timeout=timeout) as session:
        for token in tokens:
            path = f"/internal/v1/payment-tokens/{token}/decrypt"
            body = {"purpose": "settlement", "fields": ["pan", "expiry"]}
            async with session.post(path, json=body) as answer:
                found = await answer.read()
                if answer.status != 200 or PREFIX.encode() not in found:
                    raise RuntimeError(f"a look was answered with {answer.status}")


async def _traffic(terminal: Terminal, reader: CardReader, wait_s: float) -> None:
    """Other cards, a few a second, until the time is over."""
    clock = SystemClock()
    end_s, taps = clock.monotonic_s() + wait_s, 0
    while (left_s := end_s - clock.monotonic_s()) > 0:
        taps += 1
        card = TEST_CARDS[taps % len(TEST_CARDS)]
        payload = reader.request(f"other-{taps}", clear_form(card, "track2"), "track2")
        await terminal.ask(f"other-{taps}", payload, timeout_s=ANSWER_TIMEOUT_S)
        await asyncio.sleep(min(left_s, 1 / BESIDE_PER_S))
