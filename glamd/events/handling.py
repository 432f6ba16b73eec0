"""What becomes of a message that was fetched: applied, tried again later, given up, given back.

It is acknowledged after its handler has returned, which is after the commit. Where the
acknowledgement gets lost the event comes again, and its reference has been used.

JetStream counts the deliveries, we judge them: its own limit (`max_deliver`) would drop an event
without a word when we die during the last one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Final, NamedTuple
from uuid import UUID

import nats.errors
import structlog
from prometheus_client import Counter

from glamd.errors import GlamError, UnavailableError
from glamd.events.dead_letters import DeadLetters, reason_of
from glamd.events.message import Message
from glamd.events.subscription import Job, Subscription, may_pass

MAX_DELIVERIES: Final = 10
RETRY_DELAYS_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""After the first delivery, the second, and so on: eight and a half minutes in all."""

HANDLER_TIMEOUT_S: Final = 10.0
"""For one event; whether it has had its effect then is not known, and it is handled again."""

WATCH_EVERY_S: Final = 1.0
"""How often that is looked at, for all together: a timer for each took a tenth of all time."""

ACK_WAIT_S: Final = 60.0
"""After this JetStream repeats what was neither acknowledged nor given back."""

STALE_AFTER_S: Final = 45.0
"""What waited so long for its turn is given back unhandled: it is about to be repeated."""

BURIALS_AT_ONCE: Final = 4
"""Letters being stored: each takes a connection of the pool, which others need too."""

DONE: Final = b"+ACK"
AGAIN: Final = b"-NAK"
NEVER_AGAIN: Final = b"+TERM"
"""The words of JetStream's protocol; `AGAIN` may be followed by a delay in JSON."""

log = structlog.get_logger()

_CONSUMED = Counter(
    "glamd_events_consumed_total",
    "Deliveries by what became of them: applied, own, retried, dead, given_back.",
    ["subject", "outcome"],
)


class _Delivery(NamedTuple):
    message: Message
    job: Job
    at_s: float


class Handling:
    """The messages of one subject that this node holds."""

    def __init__(
        self,
        subscription: Subscription,
        dead_letters: DeadLetters,
        *,
        retry_delays_s: Sequence[float],
        released: Callable[[], None],
    ) -> None:
        self._subscription = subscription
        self._dead_letters = dead_letters
        self._retry_delays_s = retry_delays_s
        self._released = released
        self._closing = False
        self._burials = asyncio.Semaphore(BURIALS_AT_ONCE)
        self._lanes: dict[UUID, deque[_Delivery]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[asyncio.Future[object], float] = {}
        self._overdue: set[asyncio.Future[object]] = set()
        self._emptied: asyncio.Future[None] | None = None
        self.held = 0
        """Messages taken and not finished."""

        self.failing = 0
        """Handlings since the last one for which nothing was away."""

        self._outcomes = {
            name: _CONSUMED.labels(subscription.subject, name)
            for name in ("applied", "own", "retried", "dead", "given_back")
        }

    def take(self, message: Message) -> None:
        """Have a message handled, behind those of the same merchant that are here already."""
        self.held += 1
        if self._closing:
            self._end(message, "given_back", AGAIN)
            return
        try:
            job = self._subscription.read(message.body, message.headers)
        except GlamError as error:
            self._begin(self._bury(message, reason_of(error)))
            return
        if job is None:
            self._end(message, "own", DONE)
            return
        delivery = _Delivery(message, job, asyncio.get_running_loop().time())
        if not self._subscription.in_turn:
            self._start(delivery)
        elif (lane := self._lanes.get(job.merchant_id)) is not None:
            lane.append(delivery)
        else:
            self._lanes[job.merchant_id] = deque((delivery,))
            self._go_on(job.merchant_id)

    def close(self) -> None:
        """Begin nothing any more: what comes, and what waits for its turn, is given back."""
        self._closing = True

    async def finish(self, timeout_s: float) -> int:
        """Wait for what was begun; how many are left at the end of the time."""
        if self.held:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._emptied,), timeout=timeout_s)
        return self.held

    async def watch(self) -> None:
        """Break off handlers that take too long, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            for begun, began_s in tuple(self._running.items()):
                if loop.time() - began_s < HANDLER_TIMEOUT_S:
                    break  # they stand in the order in which they were begun
                if begun not in self._overdue:
                    self._overdue.add(begun)
                    begun.cancel()

    async def cancel(self) -> None:
        """Break off what is under way; JetStream repeats it."""
        self._closing = True
        left: list[asyncio.Future[object] | asyncio.Task[None]] = [*self._running, *self._tasks]
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # ---- from one step to the next; none of them waits

    def _start(self, delivery: _Delivery) -> bool:
        """Begin with an event; False where it was given back instead."""
        now_s = asyncio.get_running_loop().time()
        if self._closing or now_s - delivery.at_s > STALE_AFTER_S:
            self._end(delivery.message, "given_back", AGAIN)
            return False
        begun = delivery.job.begin()
        self._running[begun] = now_s
        begun.add_done_callback(partial(self._ended, delivery))
        return True

    def _go_on(self, merchant_id: UUID) -> None:
        """Begin with the next event of a merchant's, or give up the lane."""
        lane = self._lanes[merchant_id]
        while lane:
            if self._start(lane.popleft()):
                return
        del self._lanes[merchant_id]

    def _ended(self, delivery: _Delivery, ended: asyncio.Future[object]) -> None:
        """See to it what became of an event, and to the next one."""
        message, job = delivery.message, delivery.job
        del self._running[ended]
        is_overdue = ended in self._overdue
        self._overdue.discard(ended)
        if not ended.cancelled():
            error = job.error_of(ended)
        elif is_overdue:
            error = UnavailableError("The handler took too long.", code="HANDLER_TIMEOUT")
        else:
            error = None
        if error is not None:
            self._failed(message, job, error)
        elif ended.cancelled():
            # Broken off, and not for its length: JetStream repeats what nobody speaks of.
            self._release()
        else:
            self.failing = 0
            self._end(message, "applied", DONE)
        if self._subscription.in_turn:
            self._go_on(job.merchant_id)

    def _failed(self, message: Message, job: Job, error: GlamError) -> None:
        if isinstance(error, UnavailableError):
            self.failing += 1
        deliveries = message.deliveries
        if not may_pass(error) or deliveries >= MAX_DELIVERIES:
            self._begin(self._bury(message, reason_of(error)))
            return
        log.debug(
            "event_retried",
            subject=job.subject,
            event_id=job.event_id,
            merchant_id=str(job.merchant_id),
            code=error.code,
            deliveries=deliveries,
        )
        self._retry(message, deliveries)

    def _retry(self, message: Message, deliveries: int) -> None:
        last = len(self._retry_delays_s) - 1
        delay_s = self._retry_delays_s[min(deliveries - 1, last)]
        self._end(message, "retried", AGAIN + b' {"delay": %d}' % (delay_s * 1e9))

    def _end(self, message: Message, outcome: str, word: bytes) -> None:
        """Say the last word about a message, and make room for another."""
        self._outcomes[outcome].inc()
        try:
            message.answer(word)
        except (nats.errors.Error, OSError):
            # Our word did not leave, since the link is lost: the message comes again.
            log.debug("acknowledgement_not_sent", subject=self._subscription.subject)
        self._release()

    def _release(self) -> None:
        self.held -= 1
        if not self.held and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)
        self._released()

    # ---- dead letters

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bury(self, message: Message, reason: str) -> None:
        """Keep a dead letter, and only then let JetStream forget the message."""
        deliveries = message.deliveries
        try:
            async with self._burials:
                await self._dead_letters.keep(
                    subject=self._subscription.subject,
                    payload=message.body,
                    headers=message.headers,
                    reason=reason,
                    attempts=deliveries,
                )
        except GlamError as error:
            self.failing += 1
            log.warning("dead_letter_not_kept", code=error.code)
            self._retry(message, deliveries)
        except asyncio.CancelledError:
            self._release()
            raise
        except Exception:
            log.exception("dead_letter_crashed", subject=self._subscription.subject)
            self._release()
        else:
            # A letter that is kept says as well as an effect does that nothing is away.
            self.failing = 0
            self._end(message, "dead", NEVER_AGAIN)
