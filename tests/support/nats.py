"""A nats-server for the tests, and what a test sees of it from outside, by nats-py alone."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from glamd.embedded.bus import EmbeddedBus

T = TypeVar("T")

STREAM = "GLAM_EVENTS"
TIMEOUT_S = 10.0


class NatsServer:
    """A server for a session; synchronous, so that any kind of fixture may make it.

    Its coroutines run on a loop of its own, which stands still between the calls.
    """

    def __init__(self, runner: asyncio.Runner, state_dir: Path) -> None:
        self._runner = runner
        self._embedded = EmbeddedBus(state_dir)
        self.url = self._run(self._embedded.start()).url

    def stop(self) -> None:
        """Stop the server."""
        self._run(self._embedded.stop())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(coroutine, TIMEOUT_S))


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as the stream holds it."""

    subject: str
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The body, read as JSON."""
        content: dict[str, Any] = orjson.loads(self.body)
        return content

    @property
    def merchant_id(self) -> str:
        """Whom it is about."""
        return str(self.content["data"]["merchant_id"])


@asynccontextmanager
async def nats_client(url: str) -> AsyncIterator[Client]:
    """A client of the test's own; an error at once where there is no server."""
    client = Client()
    try:
        await client.connect(
            url, allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0
        )
        yield client
    finally:
        await client.close()


async def stored(client: Client) -> list[Stored]:
    """All messages of the stream in its order; none where there is no stream."""
    manager = client.jsm()
    try:
        state = (await manager.stream_info(STREAM)).state
    except NotFoundError:
        return []
    found: list[Stored] = []
    if not state.messages:
        return found  # it would be asked for number 0
    for sequence in range(state.first_seq, state.last_seq + 1):
        message = await manager.get_msg(STREAM, sequence)
        found.append(Stored(message.subject or "", message.headers or {}, message.data or b""))
    return found


async def count_stored(client: Client) -> int:
    """How many messages the stream holds."""
    try:
        return (await client.jsm().stream_info(STREAM)).state.messages
    except NotFoundError:
        return 0


async def delete_stream(client: Client) -> None:
    """Take the stream away with its consumers and with the ids that it remembers."""
    try:
        await client.jsm().delete_stream(STREAM)
    except NotFoundError:
        return
