"""The virtual terminal: stays connected, and sends each request until it is answered.

For development, tests and measuring; a real terminal is not ours. It keeps the terminal's half of
spec 2: the same id with the same content until a final answer comes, reconnecting as often as it
takes. How a card becomes a request is in `terminal_card`, one connection in `terminal_link`.
"""

import asyncio
import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import orjson

from device_gateway import topics
from device_gateway.mqtt import codec
from device_gateway.mqtt.codec import Version
from device_gateway.terminal_device import Device
from device_gateway.terminal_link import KEEP_ALIVE_S, PACKET_LIMIT_BYTES, Ending, Link, ending_of
from glamd.clock import Clock
from glamd.errors import ConflictError, ForbiddenError, UnavailableError

OUTSTANDING_LIMIT: Final = 1024
CONNECT_TIMEOUT_S: Final = 10.0
GOODBYE_TIMEOUT_S: Final = 2.0
RESEND_FIRST_S: Final = 2.0
RETRY_FIRST_S: Final = 0.2
RESEND_LIMIT_S: Final = 10.0
RECONNECT_FIRST_S: Final = 0.25
RECONNECT_LIMIT_S: Final = 5.0
WORDLESS_LIMIT: Final = 3
TAKEN_OVER_PAUSE_S: Final = 5.0
FIRMWARE: Final = "glam-terminal"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of spec 2, as it came: `fields` is the whole of it."""

    fields: dict[str, object]

    @property
    def ok(self) -> bool:
        """Whether the request was served."""
        return self.fields.get("status") == "ok"

    @property
    def final(self) -> bool:
        """Whether sending the request again would change nothing."""
        return self.ok or self.fields.get("retryable") is not True

    @property
    def replayed(self) -> bool:
        """Whether it says that the request had been answered before."""
        return self.fields.get("replayed") is True

    @property
    def code(self) -> str:
        """`ok`, or the error's code."""
        return "ok" if self.ok else self.text("code")

    def text(self, name: str) -> str:
        """The text in field `name`; empty where there is none."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else ""


class Watch(Protocol):
    """Who wants to know more of a terminal than the answers that it asked for."""

    def answered(self, device_id: str, answer: Answer, /) -> None:
        """An answer came, final or not, the first or again, to a request of ours or to none."""

    def resent(self, device_id: str, request_id: str, /) -> None:
        """A request went out once more."""

    def parted(self, device_id: str, ending: Ending, /) -> None:
        """A connection ended or could not be made."""


class _Pending:
    """A request that has no final answer yet."""

    __slots__ = ("attempts", "done", "due_s", "payload", "request_id")

    def __init__(self, request_id: str, payload: bytes, done: Callable[[Answer], None]) -> None:
        self.request_id = request_id
        self.payload = payload
        self.done = done
        self.attempts = 0
        self.due_s = 0.0


class Terminal:
    """One device's connection to glamd. Run `run()` in a task; `close()` ends it.

    With `give_up` a refusal that will not change (an untrusted certificate, a revoked device) ends
    `run` with ForbiddenError; without it, the terminal goes on trying for ever, as a real one does.
    """

    def __init__(
        self,
        device: Device,
        *,
        clock: Clock,
        version: Version = Version.V5,
        give_up: bool = False,
        watch: Watch | None = None,
        locate: Callable[[], tuple[str, int]] | None = None,
        gate: asyncio.Semaphore | None = None,
    ) -> None:
        """`locate` says where to connect, each time; without it, where `device` says.

        Terminals that share a `gate` connect only so many at a time.
        """
        self._device = device
        self._clock = clock
        self._version = version
        self._give_up = give_up
        self._watch = watch
        self._locate = locate or (lambda: (device.host, device.port))
        self._gate = gate or asyncio.Semaphore()
        self._tls: ssl.SSLContext | None = None
        self._request_topic = topics.build(device.device_id, "request")
        self._status_topic = topics.build(device.device_id, "status")
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[None] = self._loop.create_future()
        self._link: Link | None = None
        self._pending: dict[str, _Pending] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._last_ending = ""
        self._wordless = 0
        self.connected = asyncio.Event()

    @property
    def device_id(self) -> str:
        """Whose terminal this is."""
        return self._device.device_id

    @property
    def outstanding(self) -> int:
        """How many requests have no final answer yet."""
        return len(self._pending)

    # Requests.

    def send(self, request_id: str, payload: bytes, done: Callable[[Answer], None]) -> None:
        """Send `payload` until there is a final answer, then call `done` with it, once.

        Raises UnavailableError when too many are outstanding, ConflictError for an id in use.
        """
        if len(self._pending) >= OUTSTANDING_LIMIT:
            raise UnavailableError("the terminal has too many requests without an answer")
        if request_id in self._pending:
            raise ConflictError("the terminal is already sending a request of this id")
        pending = _Pending(request_id, payload, done)
        self._pending[request_id] = pending
        self._transmit(pending)
        self._wake_at(pending.due_s)

    async def ask(self, request_id: str, payload: bytes, *, timeout_s: float) -> Answer:
        """The final answer to `payload`; UnavailableError when none came in `timeout_s`."""
        answered: asyncio.Future[Answer] = self._loop.create_future()

        def done(answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        self.send(request_id, payload, done)
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            raise self._silence("answer", timeout_s) from None
        finally:
            self._pending.pop(request_id, None)

    async def connect(self, *, timeout_s: float) -> None:
        """Wait until there is a connection; UnavailableError with the reason when there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.connected.wait()
        except TimeoutError:
            raise self._silence("connection", timeout_s) from None

    def _silence(self, what: str, timeout_s: float) -> UnavailableError:
        host, port = self._locate()
        why = f": {self._last_ending}" if self._last_ending else ""
        return UnavailableError(f"no {what} within {timeout_s:.3g} s from {host}:{port}{why}")

    def _transmit(self, pending: _Pending) -> None:
        """Publish it now if there is a way; either way it has its turn again later."""
        now_s = self._loop.time()
        if self._link is None or not self._link.publish(self._request_topic, pending.payload):
            # It goes with the next connection, or when the server has taken what is on its way.
            pending.due_s = now_s
            return
        if pending.attempts and self._watch is not None:
            self._watch.resent(self._device.device_id, pending.request_id)
        pending.due_s = now_s + _growing(RESEND_FIRST_S, pending.attempts, RESEND_LIMIT_S)
        pending.attempts += 1

    def _transmit_due(self) -> None:
        now_s = self._loop.time()
        for pending in [each for each in self._pending.values() if each.due_s <= now_s]:
            self._transmit(pending)

    def _wake_at(self, due_s: float) -> None:
        """See to it that the timer is not later than `due_s`; without a link it has no work."""
        if self._link is None:
            return
        # What found no room is due at once; it is `on_room` that sends it, not a busy timer.
        due_s = max(due_s, self._loop.time() + RETRY_FIRST_S)
        if self._timer is not None:
            if self._timer_due_s <= due_s:
                return
            self._timer.cancel()
        self._timer_due_s = due_s
        self._timer = self._loop.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._link is not None and self._pending:
            self._transmit_due()
            self._wake_at(min(each.due_s for each in self._pending.values()))

    def _on_message(self, payload: bytes) -> None:
        fields: object
        with suppress(orjson.JSONDecodeError):
            fields = orjson.loads(payload)
            if isinstance(fields, dict):
                self._on_answer(Answer(fields))

    def _on_answer(self, answer: Answer) -> None:
        if self._watch is not None:
            self._watch.answered(self._device.device_id, answer)
        pending = self._pending.get(answer.text("id"))
        if pending is None:
            return
        if answer.final:
            del self._pending[pending.request_id]
            pending.done(answer)
            return
        wait_s = _growing(RETRY_FIRST_S, pending.attempts - 1, RESEND_LIMIT_S)
        pending.due_s = self._loop.time() + _jittered(wait_s)
        self._wake_at(pending.due_s)

    # The connection.

    async def run(self) -> None:
        """Stay connected until `close()`; see the class for what `give_up` changes."""
        failures = 0
        while not self._stop.done():
            host, port = self._locate()
            link = self._new_link(host)
            try:
                async with self._gate:
                    ending = await self._connect(link, host, port)
                if ending is None:
                    failures = 0
                    ending = await self._serve(link)
            finally:
                link.abort()
            if self._stop.done():
                return
            self._part(ending)
            pause_s = _jittered(_growing(RECONNECT_FIRST_S, failures, RECONNECT_LIMIT_S))
            failures += 1
            # Whoever took the session over gets time to use it: else the two would go on throwing
            # each other out.
            pause_s = TAKEN_OVER_PAUSE_S if ending.taken_over else pause_s
            await asyncio.wait({self._stop}, timeout=pause_s)

    def close(self) -> None:
        """End `run`: say `offline`, disconnect. What is not answered by then never will be."""
        if not self._stop.done():
            self._stop.set_result(None)

    def _part(self, ending: Ending) -> None:
        self._last_ending = ending.reason
        if self._watch is not None:
            self._watch.parted(self._device.device_id, ending)
        # One may be a server on its way down; several in a row are its verdict.
        self._wordless = self._wordless + 1 if ending.wordless else 0
        if self._give_up and (ending.final or self._wordless >= WORDLESS_LIMIT):
            raise ForbiddenError(ending.reason)

    def _new_link(self, host: str) -> Link:
        if self._tls is None:
            self._tls = self._device.tls()
        return Link(
            self._tls,
            host,
            self._connect_packet(),
            topics.build(self._device.device_id, "response"),
            on_message=self._on_message,
            on_room=self._transmit_due,
        )

    async def _connect(self, link: Link, host: str, port: int) -> Ending | None:
        """Bring `link` up; None when it is ready, else why it is not."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.create_connection(lambda: link, host, port)
                await asyncio.wait(
                    {link.ready, link.closed, self._stop}, return_when=asyncio.FIRST_COMPLETED
                )
        except OSError as error:
            return ending_of(error)
        return None if link.ready.done() and not link.closed.done() else link.ending

    async def _serve(self, link: Link) -> Ending:
        """Use a link that is ready until it ends; when told to stop, take leave of it."""
        self._link = link
        self.connected.set()
        link.publish(self._status_topic, self._status("online"), retain=True)
        for pending in self._pending.values():
            pending.due_s = 0.0
        self._on_timer()
        try:
            while not link.closed.done() and not self._stop.done():
                half_s = link.keep_alive_s / 2 or None
                done, _ = await asyncio.wait(
                    {link.closed, self._stop}, timeout=half_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    link.check_alive()
            if not link.closed.done():
                link.publish(self._status_topic, self._status("offline"), retain=True)
                link.disconnect()
                await asyncio.wait({link.closed}, timeout=GOODBYE_TIMEOUT_S)
        finally:
            self._link = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self.connected.clear()
        return link.ending

    def _connect_packet(self) -> codec.Connect:
        modern = self._version is Version.V5
        return codec.Connect(
            version=self._version,
            client_id=self._device.device_id,
            keep_alive_s=KEEP_ALIVE_S,
            will=codec.Will(
                topic=self._status_topic, payload=self._status("offline"), qos=1, retain=True
            ),
            properties=codec.Properties(maximum_packet_size=PACKET_LIMIT_BYTES)
            if modern
            else codec.NO_PROPERTIES,
        )

    def _status(self, state: str) -> bytes:
        status = {"state": state, "firmware": FIRMWARE, "at": self._clock.now()}
        return orjson.dumps(status, option=orjson.OPT_UTC_Z)


def _growing(first_s: float, times: int, limit_s: float) -> float:
    """`first_s`, doubled `times` times, at most `limit_s`."""
    return min(first_s * 2.0 ** min(times, 30), limit_s)


def _jittered(delay_s: float) -> float:
    """Half to all of it, so that a thousand terminals do not come back in the same moment."""
    return delay_s * (0.5 + secrets.randbelow(1000) / 2000)
