"""Answers larger than the network takes at once: what a client that reads slowly, or not, costs us.

The times are a fraction of the real ones. A client's pace is a wait for nothing, so that it is the
same however busy the machine is; what is compared with it is several times as long or as short.
"""

import array
import asyncio
import fcntl
import ssl
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest
from prometheus_client import REGISTRY

from glamd.http.call import Answer, Call, Raw
from glamd.http.limits import HttpLimits
from glamd.http.plain import PIECE_BYTES
from glamd.http.routes import Route
from glamd.http.tls import api_tls
from tests.support.facade import serving
from tests.support.http_certificates import Authority
from tests.support.http_fakes import SHORT_S, Wire, connected
from tests.support.http_world import World

LIMITS = HttpLimits(linger_s=0.2)
# Far more than the sockets' buffers hold, however the kernel tunes them; no piece is like another.
LARGE = b"".join(n.to_bytes(4, "big") for n in range(4 * 2**20))
HEALTH = "GET /small HTTP/1.1"


class Shelf:
    """Public routes with a large and a small answer, and the transports that took the large one."""

    def __init__(self) -> None:
        self.transports: list[asyncio.Transport] = []

    def routes(self) -> Sequence[Route]:
        """Both."""

        async def large(call: Call) -> Raw:
            assert call.request.transport is not None
            self.transports.append(call.request.transport)
            return Raw(body=LARGE, content_type="text/plain")

        async def small(_call: Call) -> Answer:
            return Answer(data="small")

        return [
            Route(method="GET", path="/large", handler=large, access=()),
            Route(method="GET", path="/small", handler=small, access=()),
        ]


@pytest.fixture
def shelf() -> Shelf:
    """A fresh one."""
    return Shelf()


@asynccontextmanager
async def not_reading(port: int) -> AsyncIterator[Wire]:
    """A connection that has asked for the large answer, and takes nothing of it."""
    async with connected(port) as wire:
        cast("asyncio.Transport", wire.writer.transport).pause_reading()
        await wire.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        yield wire


async def taken(wire: Wire, *, every_s: float) -> int:
    """Take the answer 512 KiB at a time, with a pause after each; how much of the body came."""
    head = await wire.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    nothing = asyncio.Event()
    total = 0
    while total < len(LARGE):
        try:
            total += len(await wire.reader.readexactly(512 * 1024))
        except (asyncio.IncompleteReadError, ConnectionError):
            break
        try:
            async with asyncio.timeout(every_s):
                await nothing.wait()
        except TimeoutError:
            continue
    return total


async def test_a_client_that_does_not_read_has_one_piece_waiting_for_it(shelf: Shelf) -> None:
    async with (
        serving(shelf.routes(), limits=LIMITS) as port,
        connected(port) as other,
        not_reading(port),
        asyncio.timeout(SHORT_S),
    ):
        most = 0
        while most == 0:
            assert (await other.ask(HEALTH)).status == 200
            most = max((t.get_write_buffer_size() for t in shelf.transports), default=0)
        for _ in range(20):
            assert (await other.ask(HEALTH)).status == 200
            most = max(most, shelf.transports[0].get_write_buffer_size())
        assert most <= PIECE_BYTES


async def test_a_client_that_does_not_read_has_little_in_the_kernel(shelf: Shelf) -> None:
    async with (
        serving(shelf.routes(), limits=LIMITS) as port,
        connected(port) as other,
        not_reading(port),
        asyncio.timeout(SHORT_S),
    ):
        while not shelf.transports or not shelf.transports[0].get_write_buffer_size():
            assert (await other.ask(HEALTH)).status == 200
        queued = array.array("i", [0])
        fcntl.ioctl(shelf.transports[0].get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        # Twice: the kernel looks at it before it takes a piece, not after.
        assert 0 < queued[0] <= 2 * LIMITS.unsent_bytes + PIECE_BYTES


async def test_a_client_that_does_not_read_a_large_answer_is_cut_off(shelf: Shelf) -> None:
    before = cut("slow_reader")
    limits = replace(LIMITS, write_timeout_s=0.2)
    async with (
        serving(shelf.routes(), limits=limits) as port,
        connected(port) as other,
        not_reading(port) as wire,
        asyncio.timeout(SHORT_S),
    ):
        while cut("slow_reader") == before:
            assert (await other.ask(HEALTH)).status == 200
        cast("asyncio.Transport", wire.writer.transport).resume_reading()
        assert await wire.closed()


async def test_a_client_that_reads_slowly_is_served_for_as_long_as_it_goes_on(shelf: Shelf) -> None:
    limits = replace(LIMITS, write_timeout_s=0.3)
    async with serving(shelf.routes(), limits=limits) as port, connected(port) as wire:
        began_s = asyncio.get_running_loop().time()
        await wire.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await taken(wire, every_s=0.02) == len(LARGE)
        assert asyncio.get_running_loop().time() - began_s > limits.write_timeout_s


async def test_a_client_that_reads_slowly_is_not_served_for_ever(shelf: Shelf) -> None:
    before = cut("slow_reader")
    limits = replace(LIMITS, answer_timeout_s=0.5)
    async with serving(shelf.routes(), limits=limits) as port, connected(port) as wire:
        await wire.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await taken(wire, every_s=0.05) < len(LARGE)
    assert cut("slow_reader") == before + 1


async def test_each_answer_of_a_connection_has_its_own_time(shelf: Shelf) -> None:
    limits = replace(LIMITS, answer_timeout_s=1.5)
    async with serving(shelf.routes(), limits=limits) as port, connected(port) as wire:
        for _ in range(3):
            await wire.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await taken(wire, every_s=0.02) == len(LARGE)


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
async def test_every_byte_comes_and_the_connection_goes_on(
    shelf: Shelf, world: World, authority: Authority, tls: bool
) -> None:
    path = "/docs/swagger-ui-bundle.js"
    files = authority.issue("api")
    context = api_tls(certificate=files.certificate, key=files.key) if tls else None
    trusting: ssl.SSLContext | None = authority.trusting() if tls else None
    async with world.api(context) as port, connected(port, ssl=trusting) as wire:
        whole = await wire.ask(f"GET {path} HTTP/1.1")
        assert whole.status == 200
        assert len(whole.body) > 20 * PIECE_BYTES
        assert whole.body == (await wire.ask(f"GET {path} HTTP/1.1")).body
        await wire.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = (await wire.reader.readuntil(b"\r\n\r\n")).lower()
        assert f"content-length: {len(whole.body)}\r\n".encode() in head
        assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200
    async with serving(shelf.routes(), limits=LIMITS) as port, connected(port) as wire:
        assert (await wire.ask("GET /large HTTP/1.1")).body == LARGE


async def test_a_client_that_goes_away_in_the_middle_costs_the_others_nothing(shelf: Shelf) -> None:
    async with serving(shelf.routes(), limits=LIMITS) as port, connected(port) as other:
        async with connected(port) as wire:
            await wire.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            await wire.reader.readexactly(100_000)
        assert (await other.ask("GET /large HTTP/1.1")).body == LARGE


def cut(reason: str) -> float:
    """How many connections of the api listener were closed for this."""
    labels = {"listener": "api", "reason": reason}
    return REGISTRY.get_sample_value("glamd_http_connections_cut_total", labels) or 0.0
