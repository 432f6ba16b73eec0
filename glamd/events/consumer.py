"""From JetStream to the handlers: who fetches what, when, and how that ends.

One durable pull consumer a subject, the same for all nodes; each node takes what it has room for.
What becomes of a message is decided in `handling`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import orjson
import structlog
from nats.aio.subscription import Subscription as Inbox
from nats.js import api
from nats.js.errors import NotFoundError as AbsentError
from prometheus_client import Gauge

from glamd.errors import GlamError, UnavailableError
from glamd.events.bus import STREAM, Bus, BusLostError, BusRefusedError, Link
from glamd.events.dead_letters import DeadLetters
from glamd.events.handling import ACK_WAIT_S, RETRY_DELAYS_S, Handling
from glamd.events.message import DESCRIPTION, STATUS, Message
from glamd.events.subscription import Subscription

IN_FLIGHT: Final = 1024
"""Messages of a subject that were fetched and are not finished, on one node."""

UNFINISHED_LIMIT: Final = 100_000
"""Events of a subject, over all nodes, that wait for a later attempt; then no more are given out.
The server's own limit of 1000 would be reached by the events of one unknown merchant."""

PULL_EXPIRES_S: Final = 10.0
PULL_GRACE_S: Final = 5.0
"""Without the server's word on an expired request for so much longer, the link is given up."""

PULL_BYTES: Final = 4 * 1024 * 1024
"""Of one fetch, unless a single message may be larger."""

LAST_FLUSH_S: Final = 0.5
"""What the last acknowledgements have to leave in, however little of the drain's time is left."""

LAG_EVERY_S: Final = 15.0
FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 5.0
"""Before the next fetch while handlers say that something is away: doubled each time. The last one
also before a consumer is asked for again that JetStream has refused."""

log = structlog.get_logger()

_WAITING = Gauge(
    "glamd_events_consumer_lag_rows", "Events of a subject that nobody was given yet.", ["subject"]
)
_UNFINISHED = Gauge(
    "glamd_events_consumer_unfinished_rows",
    "Events of a subject that were given to a node and are not done, retries too.",
    ["subject"],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerLag:
    """How far all nodes together are with a subject."""

    subject: str
    waiting: int
    unfinished: int
    redelivered: int


class Consumers:
    """Consumes all subjects that somebody handles."""

    def __init__(
        self,
        bus: Bus,
        *,
        subscriptions: Sequence[Subscription],
        dead_letters: DeadLetters,
        in_flight: int = IN_FLIGHT,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        start_at: datetime | None = None,
    ) -> None:
        """`start_at`, aware, is where a consumer begins that JetStream does not know yet.

        It begins with all there are without it; one that is there goes on where it was.
        """
        self._bus = bus
        self._dead_letters = dead_letters
        self._consumers = [
            Consumer(
                each,
                dead_letters,
                in_flight=in_flight,
                retry_delays_s=retry_delays_s,
                start_at=start_at,
            )
            for each in subscriptions
        ]

    async def run(self) -> None:
        """Consume until cancelled."""
        async with asyncio.TaskGroup() as group:
            for each in self._consumers:
                group.create_task(each.run(self._bus), name=f"consumer:{each.subject}")
                group.create_task(each.watch(), name=f"handlers:{each.subject}")
            group.create_task(self._measure(), name="consumer-lag")

    async def stop(self, timeout_s: float) -> None:
        """Take no more, finish what is begun, give back the rest, and see the last ack off."""
        await asyncio.gather(*(each.stop(timeout_s) for each in self._consumers))

    async def lag(self) -> tuple[ConsumerLag, ...]:
        """How far each subject is. UnavailableError without NATS."""
        link = self._bus.current
        if link is None:
            raise UnavailableError(self._bus.trouble() or "NATS: not connected.")
        return tuple([await each.lag(link) for each in self._consumers])

    async def _measure(self) -> None:
        while True:
            try:
                await self._dead_letters.measure()
                for lag in await self.lag():
                    _WAITING.labels(lag.subject).set(lag.waiting)
                    _UNFINISHED.labels(lag.subject).set(lag.unfinished)
            except GlamError as error:
                log.debug("consumer_lag_unknown", code=error.code)
            await asyncio.sleep(LAG_EVERY_S)


class Consumer:
    """One subject on this node, over any number of links."""

    def __init__(
        self,
        subscription: Subscription,
        dead_letters: DeadLetters,
        *,
        in_flight: int,
        retry_delays_s: Sequence[float],
        start_at: datetime | None,
    ) -> None:
        self.subject = subscription.subject
        self._durable = subscription.durable
        self._in_flight = in_flight
        self._start_at = start_at
        self._handling = Handling(
            subscription, dead_letters, retry_delays_s=retry_delays_s, released=self._released
        )
        self._stopping = False
        self._link: Link | None = None
        self._inbox: Inbox | None = None
        self._wanted = 0
        self._refused = False
        self._pulled: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    async def run(self, bus: Bus) -> None:
        """Consume over one link after the other until cancelled, which breaks off the handlers."""
        try:
            while True:
                link = await bus.link()
                try:
                    await self._serve(link)
                except BusRefusedError as error:
                    # All others use this link, and are not what is refused.
                    log.warning("consumer_refused", subject=self.subject, error=str(error))
                    await asyncio.sleep(LAST_PAUSE_S)
                except (UnavailableError, AbsentError) as error:
                    # Whatever is not there is made anew with the next link.
                    link.drop()
                    if not isinstance(error, BusLostError):
                        log.warning("consumer_interrupted", subject=self.subject, error=str(error))
                except Exception:
                    # The events are safe where they are; other subjects go on.
                    log.exception("consumer_crashed", subject=self.subject)
                    link.drop()
        finally:
            await self._handling.cancel()

    async def watch(self) -> None:
        """Break off handlers that take too long, until cancelled."""
        await self._handling.watch()

    async def stop(self, timeout_s: float) -> None:
        """Take no more, finish what is begun, give back the rest, and see the last ack off."""
        until_s = asyncio.get_running_loop().time() + timeout_s
        self._stopping = True
        self._handling.close()
        link, inbox = self._link, self._inbox
        if link is not None and inbox is not None:
            await link.close_inbox(inbox, timeout_s=timeout_s)
        _resolve(self._pulled)
        left_s = max(0.0, until_s - asyncio.get_running_loop().time())
        if left := await self._handling.finish(left_s):
            log.warning("events_unfinished", subject=self.subject, events=left)
        if link is not None and not link.is_lost:
            try:
                left_s = until_s - asyncio.get_running_loop().time()
                await link.flush(timeout_s=max(LAST_FLUSH_S, left_s))
            except BusLostError:
                log.info("acknowledgements_unconfirmed", subject=self.subject)

    async def lag(self, link: Link) -> ConsumerLag:
        """How far all nodes are. UnavailableError."""
        try:
            found = await link.consumer(self._durable)
        except AbsentError:
            raise UnavailableError("The consumer is not made yet.") from None
        return ConsumerLag(
            subject=self.subject,
            waiting=found.num_pending or 0,
            unfinished=found.num_ack_pending or 0,
            redelivered=found.num_redelivered or 0,
        )

    async def _serve(self, link: Link) -> None:
        """Fetch over this link until it is lost."""
        await link.ensure_consumer(self._config())
        reply = link.inbox()
        self._inbox = await link.subscribe(reply, self._on_message)
        self._link = link
        try:
            while True:
                await self._until_room(link)
                await self._pull(link, reply)
        finally:
            self._link = self._inbox = None

    def _config(self) -> api.ConsumerConfig:
        begins = api.DeliverPolicy.BY_START_TIME if self._start_at else api.DeliverPolicy.ALL
        return api.ConsumerConfig(
            name=self._durable,
            durable_name=self._durable,
            filter_subject=self.subject,
            deliver_policy=begins,
            opt_start_time=self._start_at,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_deliver=-1,
            max_ack_pending=UNFINISHED_LIMIT,
        )

    async def _until_room(self, link: Link) -> None:
        """Return when half of the room is free, so that requests are few and large."""
        if self._handling.failing:
            doublings = min(self._handling.failing, 10)
            await asyncio.sleep(min(FIRST_PAUSE_S * 2**doublings, LAST_PAUSE_S))
        while self._stopping or self._handling.held > self._in_flight // 2:
            self._room = asyncio.get_running_loop().create_future()
            try:
                await link.until(self._room, timeout_s=ACK_WAIT_S)
            except TimeoutError:
                continue

    async def _pull(self, link: Link, reply: str) -> None:
        """Ask for as many as there is room for; return when they came, or the request ended."""
        self._wanted = self._in_flight - self._handling.held
        self._pulled = asyncio.get_running_loop().create_future()
        request = {
            "batch": self._wanted,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "max_bytes": max(PULL_BYTES, 2 * link.max_payload_bytes),
        }
        await link.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{self._durable}",
            orjson.dumps(request),
            reply=reply,
        )
        try:
            await link.until(self._pulled, timeout_s=PULL_EXPIRES_S + PULL_GRACE_S)
        except TimeoutError:
            raise UnavailableError("JetStream does not answer.") from None
        if self._refused:
            self._refused = False
            await asyncio.sleep(FIRST_PAUSE_S)

    def _on_message(self, message: Message) -> None:
        """Take what was fetched."""
        if not message.reply:
            self._end_pull(message.headers)
            return
        self._wanted -= 1
        if self._wanted <= 0:
            _resolve(self._pulled)
        self._handling.take(message)

    def _end_pull(self, headers: dict[str, str]) -> None:
        """The server has ended the request: it expired or was full, or the consumer is gone."""
        status = headers.get(STATUS)
        told = headers.get(DESCRIPTION, "")
        gone = status == "503" or "deleted" in told.lower()
        if gone and self._link is not None:
            log.warning("consumer_gone", subject=self.subject)
            self._link.drop()
        if status is not None and status != "100":
            self._refused = status != "408"
            _resolve(self._pulled)

    def _released(self) -> None:
        if self._handling.held <= self._in_flight // 2 and not self._stopping:
            _resolve(self._room)


def _resolve(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
