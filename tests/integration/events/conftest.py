"""The events room on real servers: one NATS for all, one database a module, both emptied."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from nats.aio.client import Client

from glamd.events.bus import Bus
from tests.support.events_world import running_bus
from tests.support.nats import NatsServer, delete_stream, nats_client
from tests.support.settable_clock import SettableClock


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client beside the daemon's, on a server without a stream."""
    async with nats_client(nats_server.url) as connected:
        await delete_stream(connected)
        yield connected


@pytest.fixture
async def bus(nats_server: NatsServer, client: Client) -> AsyncIterator[Bus]:
    """A bus that is connected, with its stream, which is new."""
    async with running_bus(nats_server.url) as connected:
        yield connected


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests of a module, emptied before each."""
    connection = await asyncpg.connect(module_database_url)
    # Not TRUNCATE, which makes new files and waits for the disk to have them.
    await connection.execute(
        "DELETE FROM glam.outbox; DELETE FROM cde.outbox; DELETE FROM glam.dead_letters"
    )
    await connection.close()
    return module_database_url


@pytest.fixture
def clock() -> SettableClock:
    """A clock that the test moves."""
    return SettableClock()
