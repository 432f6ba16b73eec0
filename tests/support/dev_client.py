"""What a script does with a running `glamd dev`, knowing nothing but its `dev.json`."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson

from bench.harness import DevDaemon
from device_gateway.terminal import Answer, Terminal, Watch
from device_gateway.terminal_card import TEST_CARDS, CardReader, clear_form
from device_gateway.terminal_device import Counters, Device
from device_gateway.terminal_link import Ending
from device_gateway.terminal_site import load_devices, read_site
from glamd.clock import SystemClock

TIMEOUT = aiohttp.ClientTimeout(total=15.0)
ANSWER_TIMEOUT_S = 20.0

Caller = Literal["client", "internal"]


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer whose body is JSON."""

    status: int
    body: Mapping[str, Any]

    @property
    def data(self) -> Any:
        """What a success is about."""
        return self.body["data"]


async def rest(
    daemon: DevDaemon, path: str, *, method: str = "GET", caller: Caller = "client"
) -> Reply:
    """Ask the REST API with one of the JWTs of `dev.json`."""
    headers = {"Authorization": f"Bearer {daemon.text('jwt', caller)}"}
    return await call(method, daemon.text("http", "url") + path, headers=headers)


async def decrypted(daemon: DevDaemon, token: str) -> Reply:
    """Look at a token as the demo worker may."""
    tls = ssl.create_default_context(cafile=daemon.text("worker", "ca"))
    tls.load_cert_chain(daemon.text("worker", "cert"), daemon.text("worker", "key"))
    url = f"{daemon.text('worker', 'url')}/internal/v1/payment-tokens/{token}/decrypt"
    body = {"purpose": "settlement", "fields": ["pan", "expiry"]}
    return await call("POST", url, json=body, ssl=tls)


async def call(method: str, url: str, **options: Any) -> Reply:
    """One request on a connection of its own."""
    async with (
        aiohttp.ClientSession(timeout=TIMEOUT) as session,
        session.request(method, url, **options) as response,
    ):
        return Reply(response.status, orjson.loads(await response.read()))


async def own_device(daemon: DevDaemon) -> Device:
    """A device that no terminal of the daemon's own is connected with."""
    [device] = await load_devices(read_site(daemon.state_dir), 1)
    return device


def tap(device: Device, request_id: str) -> bytes:
    """A request of this device for the first test card."""
    source = CardReader(device, Counters(device))
    return source.request(request_id, clear_form(TEST_CARDS[0], "track2"), "track2")


async def ask(device: Device, *payloads: bytes) -> list[Answer]:
    """Send each request until it is answered for good; the final answers."""
    return (await watched(device, *payloads))[0]


async def watched(device: Device, *payloads: bytes) -> tuple[list[Answer], list[Answer]]:
    """The final answers, and what was answered before them that was not final."""
    seen = _Retryable()
    async with connected(device, watch=seen) as terminal:
        answers = [
            await terminal.ask(orjson.loads(each)["id"], each, timeout_s=ANSWER_TIMEOUT_S)
            for each in payloads
        ]
    return answers, seen.answers


@asynccontextmanager
async def connected(device: Device, *, watch: Watch | None = None) -> AsyncIterator[Terminal]:
    """A terminal of this device, connected when the context begins."""
    terminal = Terminal(device, clock=SystemClock(), watch=watch)
    running = asyncio.create_task(terminal.run(), name="terminal")
    try:
        await terminal.connect(timeout_s=ANSWER_TIMEOUT_S)
        yield terminal
    finally:
        terminal.close()
        await asyncio.gather(running, return_exceptions=True)


class _Retryable:
    """A terminal's watch that keeps the answers that were not final."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def answered(self, _device_id: str, answer: Answer, /) -> None:
        if not answer.final:
            self.answers.append(answer)

    def resent(self, _device_id: str, _request_id: str, /) -> None:
        pass

    def parted(self, _device_id: str, _ending: Ending, /) -> None:
        pass
