"""Clients that say nothing, or say it slowly, or do not listen: closed in time, at nobody's cost.

The limits are a fraction of the real ones. The long waits here are limits that must not have
been reached, so each is several times what it is compared with.
"""

import asyncio
from dataclasses import replace
from typing import cast

import pytest
from prometheus_client import REGISTRY

from glamd.http.limits import HttpLimits
from tests.support.http_fakes import (
    MERCHANT,
    SHORT_S,
    TOKEN,
    Wire,
    client_jwt,
    connected,
    payment_token,
)
from tests.support.http_world import World

SHORT = HttpLimits(
    head_timeout_s=0.2,
    body_timeout_s=0.2,
    write_timeout_s=0.3,
    handshake_timeout_s=0.3,
    linger_s=0.1,
    keepalive_s=30.0,
)
HEALTH = "GET /healthz HTTP/1.1"


@pytest.fixture(autouse=True)
def _short(world: World) -> None:
    world.limits = SHORT


async def trickle(wire: Wire, data: bytes, *, every_s: float = 0.04) -> bool:
    """Send byte by byte; True once the other side has closed without a word."""
    for byte in data:
        try:
            await wire.send(bytes([byte]))
            async with asyncio.timeout(every_s):
                return await wire.reader.read(1) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


async def test_a_connection_that_says_nothing_is_closed(api: int) -> None:
    async with connected(api) as wire:
        assert await wire.closed()


async def test_a_head_that_comes_byte_by_byte_is_cut_off(api: int) -> None:
    async with connected(api) as wire:
        assert await trickle(wire, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200)


async def test_a_second_head_that_comes_byte_by_byte_is_cut_off(api: int) -> None:
    async with connected(api) as wire:
        assert (await wire.ask(HEALTH)).status == 200
        assert await trickle(wire, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200)


async def test_an_idle_connection_is_kept_longer_than_a_head_may_take(api: int) -> None:
    async with connected(api) as wire:
        assert (await wire.ask(HEALTH)).status == 200
        assert await wire.silent_for(3 * SHORT.head_timeout_s)
        assert (await wire.ask(HEALTH)).status == 200


async def test_an_idle_connection_is_closed_in_the_end(world: World) -> None:
    world.limits = replace(SHORT, keepalive_s=0.2)
    async with world.api() as port, connected(port) as wire:
        assert (await wire.ask(HEALTH)).status == 200
        assert await wire.closed()


async def test_half_a_pipelined_head_costs_no_more_than_an_idle_connection(world: World) -> None:
    world.limits = replace(SHORT, keepalive_s=0.3)
    async with world.api() as port, connected(port) as wire:
        await wire.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HT")
        assert (await wire.reply()).status == 200
        assert await wire.closed()


async def test_a_handler_may_take_longer_than_a_head(world: World, api: int) -> None:
    world.tokens.gate = asyncio.Event()
    async with connected(api) as wire:
        head = f"GET /api/v1/payment-tokens/{TOKEN} HTTP/1.1\r\nHost: x\r\n"
        await wire.send(f"{head}Authorization: Bearer {client_jwt()}\r\n\r\n".encode())
        await world.tokens.entered.wait()
        assert await wire.silent_for(2 * SHORT.head_timeout_s)
        world.tokens.gate.set()
        assert (await wire.reply()).status == 200


async def test_a_body_that_nobody_wanted_is_not_waited_for(api: int) -> None:
    async with connected(api) as wire:
        head = "DELETE /api/v1/payment-tokens/ptk_x HTTP/1.1\nContent-Length: 200000"
        reply = await wire.ask(head, b"only the beginning")
        assert reply.status == 401
        assert reply.headers["connection"] == "close"
        assert await wire.closed()


async def test_a_client_that_does_not_read_is_cut_off(world: World, api: int) -> None:
    many = {f"ptk_{n:026}": payment_token(f"ptk_{n:026}", MERCHANT) for n in range(200)}
    world.tokens.tokens = many
    before = cut("slow_reader")
    # Far more than the sockets' buffers hold, however the kernel tunes them: 100 times 80 KB.
    one = (
        "GET /api/v1/payment-tokens?limit=200 HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {client_jwt()}\r\n\r\n"
    )
    async with connected(api) as wire, connected(api) as other:
        transport = cast("asyncio.Transport", wire.writer.transport)
        transport.pause_reading()
        await wire.send(one.encode() * 100)
        async with asyncio.timeout(SHORT_S):
            while cut("slow_reader") == before:
                assert (await other.ask(HEALTH)).status == 200
        transport.resume_reading()
        assert await wire.closed()


def cut(reason: str) -> float:
    """How many connections of the api listener were closed for this."""
    labels = {"listener": "api", "reason": reason}
    return REGISTRY.get_sample_value("glamd_http_connections_cut_total", labels) or 0.0


def test_the_real_limits_are_the_contracts() -> None:
    limits = HttpLimits()
    assert limits.head_timeout_s <= 10
    assert limits.body_timeout_s <= 10
    assert limits.linger_s <= 10
    assert limits.keepalive_s == 75
    assert limits.body_bytes == 256 * 1024
