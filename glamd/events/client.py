"""nats-py's client as we need it: stricter about TLS, sure to end, cheaper to publish with.

Each method says what it stands in for. They reach into what is not public in nats-py; the tests
against a real server hold them to that, and the lock holds the version.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from glamd.events.message import Message

CLOSE_TIMEOUT_S: Final = 1.0

YIELD_EVERY: Final = 32
"""Messages taken before others in this process get their turn: about a millisecond."""

OnMessage: TypeAlias = Callable[[Message], None]
"""Must not wait, since all that comes over this connection waits behind it."""

log = structlog.get_logger()


class NatsClient(Client):
    """One connection, which is not made again: see `bus`."""

    def __init__(self, *, wants_tls: bool) -> None:
        super().__init__()
        self._wants_tls = wants_tls
        self._takers: dict[int, OnMessage] = {}
        self._taken = 0

    @property
    def is_full(self) -> bool:
        """Whether as much waits for the socket as should."""
        return bool(self._pending_data_size > self._max_pending_size)

    def send(self, subject: str, body: bytes) -> None:
        """Publish without waiting, and without looking at a subject that the server has written."""
        self._enqueue(f"PUB {subject} {len(body)}\r\n".encode() + body + b"\r\n")

    def send_built(self, subject: str, headers: bytes, body: bytes, reply: str) -> None:
        """The same with ready headers: nats-py looks at each name and value by regular expression,
        which took a quarter of the relay's time."""
        first = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n".encode()
        self._enqueue(b"".join((first, headers, body, b"\r\n")))

    async def relieve(self) -> None:
        """Return when there is room again, and others had their turn."""
        if self.is_full:
            await self._flush_pending(force_flush=True)
        else:
            await asyncio.sleep(0)

    async def subscribe_taker(self, subject: str, take: OnMessage) -> Subscription:
        """Have each message taken as it comes, without nats-py's queue and task for it."""

        async def too_early(message: Msg) -> None:
            # None comes before anybody knows the subject; what JetStream sends it repeats.
            log.warning("message_before_its_taker", subject=message.subject)

        made = await self.subscribe(subject, cb=too_early)
        sid = next(sid for sid, each in self._subs.items() if each is made)
        self._takers[sid] = take
        return made

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        take = self._takers.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        try:
            take(Message(subject.decode(), reply.decode(), data, headers or b"", self.send))
        except Exception:
            log.exception("bus_callback_crashed")
        self._taken += 1
        if self._taken % YIELD_EVERY == 0:
            await asyncio.sleep(0)

    def _enqueue(self, command: bytes) -> None:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._flush_queue is not None and self._flush_queue.empty():
            # Whoever else has something to say in this turn of the loop goes with it.
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

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
