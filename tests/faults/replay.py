"""Replayed KSNs: every transaction counter that made a token is refused under any other id.

The taps are made and replayed by a terminal that keeps its own requests; the daemon is restarted in
between, so that what refuses them is the database and not a memory.
"""

import asyncio
from collections import Counter
from pathlib import Path

import orjson

from bench.harness import DevDaemon
from bench.report import Result
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_card import TEST_CARDS, CardReader, clear_form
from device_gateway.terminal_device import Counters, Device, device_from
from glamd.clock import SystemClock

ANSWER_TIMEOUT_S = 60.0
TOGETHER = 16
WINDOW_REFUSALS = frozenset({"KSN_REPLAYED", "KSN_TOO_OLD"})


def replay(folder: Path, *, taps: int) -> tuple[Counter[str], Counter[str]]:
    """Tap `taps` times, restart, send each again under another id; the codes of both."""
    daemon = DevDaemon(folder / "state")
    daemon.start()
    try:
        payloads = _requests(_device(daemon), taps)
        first = asyncio.run(_send(_device(daemon), payloads))
        assert daemon.stop() == 0
        daemon.start()
        again = [
            orjson.dumps(orjson.loads(p) | {"id": f"again-{n}"}) for n, p in enumerate(payloads)
        ]
        return first, asyncio.run(_send(_device(daemon), again))
    finally:
        daemon.stop()


def results(folder: Path, *, taps: int) -> list[Result]:
    """The row of the report."""
    first, again = replay(folder, taps=taps)
    accepted = sum(count for code, count in again.items() if code not in WINDOW_REFUSALS)
    told = ", ".join(f"{count:,} {code}" for code, count in sorted(again.items()))
    return [
        Result(
            name=f"{taps:,} replayed KSNs, across a restart",
            value=accepted,
            unit="accepted",
            bar="0",
            holds=accepted == 0 and first["ok"] == taps,
            note=told,
        )
    ]


def _device(daemon: DevDaemon) -> Device:
    listed = daemon.description["devices"]
    assert isinstance(listed, list)
    return device_from(listed[0], daemon.state_dir)


def _requests(device: Device, count: int) -> list[bytes]:
    reader = CardReader(device, Counters(device, block=count))
    clear = clear_form(TEST_CARDS[0], "track2")
    return [reader.request(f"tap-{n}", clear, "track2") for n in range(count)]


async def _send(device: Device, payloads: list[bytes]) -> Counter[str]:
    terminal = Terminal(device, clock=SystemClock())
    codes: Counter[str] = Counter()
    room = asyncio.Semaphore(TOGETHER)

    async def one(payload: bytes) -> None:
        async with room:
            request_id = orjson.loads(payload)["id"]
            answer: Answer = await terminal.ask(request_id, payload, timeout_s=ANSWER_TIMEOUT_S)
            codes[answer.code] += 1

    running = asyncio.create_task(terminal.run(), name="terminal")
    try:
        async with asyncio.TaskGroup() as group:
            for payload in payloads:
                group.create_task(one(payload))
    finally:
        terminal.close()
        await asyncio.gather(running, return_exceptions=True)
    return codes
