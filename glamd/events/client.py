"""nats-py's client as we need it: stricter about TLS, sure to end, cheaper to publish with.

Each method says what it stands in for. They reach into what is not public in nats-py; the tests
against a real server hold them to that, and the lock holds the version.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import nats.errors
from nats.aio.client import Client

CLOSE_TIMEOUT_S: Final = 1.0


class NatsClient(Client):
    """One connection, which is not made again: see `bus`."""

    def __init__(self, *, wants_tls: bool) -> None:
        super().__init__()
        self._wants_tls = wants_tls

    async def publish_built(self, subject: str, headers: bytes, body: bytes, reply: str) -> None:
        """Publish with ready headers: nats-py looks at each name and value by regular expression,
        which took a quarter of the relay's time."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        first = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n".encode()
        await self._send_command(b"".join((first, headers, body, b"\r\n")))
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    def when_over(self, call: Callable[[], None]) -> None:
        """Call when the connection has ended: nats-py's own callback does not always come."""
        for task in (self._reading_task, self._flusher_task, self._ping_interval_task):
            assert task is not None
            task.add_done_callback(lambda _: call())

    async def end(self) -> None:
        """Close; what waits to be written is written if that is possible."""
        await self._close_within()
        # Where that was not possible nats-py has stopped halfway, and has a socket and tasks still.
        self._pending, self._pending_data_size = [], 0
        self._status = Client.DISCONNECTED
        await self._close_within()

    async def _close_within(self) -> None:
        # In a task of its own: nats-py may wait for a future that is cancelled already, which
        # would look as if we were.
        closing = asyncio.create_task(self.close(), name="bus-close")
        await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py would go on in the clear with a server that offers no TLS, and tell the password
        # to whoever sits in between.
        if initial_connection and self._wants_tls and not info.get("tls_required"):
            raise nats.errors.SecureConnWantedError
        await super()._process_info(info, initial_connection)


def heed_cancellation() -> None:
    """Raise the cancellation that nats-py has swallowed while it waited for the socket."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
