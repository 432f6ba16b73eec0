"""A listener that is full: whoever idles makes room, whoever is at work does not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from prometheus_client import REGISTRY

from glamd.http.limits import HttpLimits
from glamd.http.tls import api_tls
from tests.support.http_certificates import Authority
from tests.support.http_fakes import SHORT_S, TOKEN, Wire, client_jwt, connected
from tests.support.http_world import World

HEALTH = "GET /healthz HTTP/1.1"
ROOM = 3


@pytest.fixture(autouse=True)
def _little_room(world: World) -> None:
    world.limits = HttpLimits(connections=ROOM, linger_s=0.2)


@pytest.fixture
async def idle(api: int) -> AsyncIterator[list[Wire]]:
    """As many connections as there may be, the one that idles for longest first."""
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(api)) for _ in range(ROOM)]
        for wire in wires:
            assert (await wire.ask(HEALTH)).status == 200
        yield wires


async def work(wire: Wire, world: World) -> None:
    """Begin a request that does not end before the world's gate is open."""
    if world.tokens.gate is None:
        world.tokens.gate = asyncio.Event()
    world.tokens.entered.clear()
    await wire.send(
        f"GET /api/v1/payment-tokens/{TOKEN} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {client_jwt()}\r\n\r\n".encode()
    )
    async with asyncio.timeout(SHORT_S):
        await world.tokens.entered.wait()


def cut(reason: str) -> float:
    """How many connections of the api listener were closed for this."""
    labels = {"listener": "api", "reason": reason}
    return REGISTRY.get_sample_value("glamd_http_connections_cut_total", labels) or 0.0


async def test_a_newcomer_is_served_and_the_longest_idle_is_closed(
    api: int, idle: list[Wire]
) -> None:
    before = cut("idle"), cut("too_many")
    async with connected(api) as newcomer:
        assert (await newcomer.ask(HEALTH)).status == 200
        assert await idle[0].closed()
        for wire in idle[1:]:
            assert (await wire.ask(HEALTH)).status == 200
    assert (cut("idle"), cut("too_many")) == (before[0] + 1, before[1])


async def test_who_asks_again_is_no_longer_the_longest_idle(api: int, idle: list[Wire]) -> None:
    assert (await idle[0].ask(HEALTH)).status == 200
    async with connected(api) as newcomer:
        assert (await newcomer.ask(HEALTH)).status == 200
        assert await idle[1].closed()
        assert (await idle[0].ask(HEALTH)).status == 200


async def test_one_client_with_all_connections_keeps_nobody_out(api: int, idle: list[Wire]) -> None:
    del idle
    for _ in range(10 * ROOM):
        async with connected(api) as newcomer:
            assert (await newcomer.ask(HEALTH)).status == 200


async def test_connections_that_hold_on_never_become_more_than_there_may_be(
    api: int, idle: list[Wire]
) -> None:
    async with AsyncExitStack() as stack:
        newcomers = [await stack.enter_async_context(connected(api)) for _ in range(ROOM)]
        for wire in newcomers:
            assert (await wire.ask(HEALTH)).status == 200
        for wire in idle:
            assert await wire.closed()
        labels = {"listener": "api"}
        assert REGISTRY.get_sample_value("glamd_http_connections", labels) == ROOM


async def test_where_nobody_idles_the_newcomer_is_closed_at_once(
    world: World, api: int, idle: list[Wire]
) -> None:
    before = cut("too_many")
    for wire in idle:
        await work(wire, world)
    async with connected(api) as newcomer:
        assert await newcomer.closed()
    assert cut("too_many") == before + 1
    assert world.tokens.gate is not None
    world.tokens.gate.set()
    for wire in idle:
        assert (await wire.reply()).status == 200


async def test_a_connection_in_the_middle_of_a_head_does_not_idle(
    api: int, idle: list[Wire]
) -> None:
    await idle[0].send(b"GET /healthz HTTP/1.1\r\nHo")
    # What was sent before this answer came has been read as well.
    assert (await idle[1].ask(HEALTH)).status == 200
    async with connected(api) as newcomer:
        assert (await newcomer.ask(HEALTH)).status == 200
        await idle[0].send(b"st: x\r\n\r\n")
        assert (await idle[0].reply()).status == 200
        assert await idle[2].closed()


async def test_a_connection_that_has_said_nothing_yet_is_not_closed_for_another(
    world: World, api: int, idle: list[Wire]
) -> None:
    for wire in idle[1:]:
        await work(wire, world)
    async with connected(api) as silent:
        assert await idle[0].closed()
        async with connected(api) as newcomer:
            assert await newcomer.closed()
        assert (await silent.ask(HEALTH)).status == 200


async def test_over_tls_it_is_the_same(world: World, authority: Authority) -> None:
    files = authority.issue("api")
    context = api_tls(certificate=files.certificate, key=files.key)
    trusting = authority.trusting()
    async with world.api(context) as port, AsyncExitStack() as stack:
        wires = []
        for _ in range(2 * ROOM):
            wires.append(await stack.enter_async_context(connected(port, ssl=trusting)))
            assert (await wires[-1].ask(HEALTH)).status == 200
        for wire in wires[:ROOM]:
            assert await wire.closed()
        for wire in wires[ROOM:]:
            assert (await wire.ask(HEALTH)).status == 200
