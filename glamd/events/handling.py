"""What becomes of a message that was fetched: applied, tried again later, given up, given back.

It is acknowledged after its handler has returned, which is after the commit. Where the
acknowledgement gets lost the event comes again, and its reference has been used.

JetStream counts the deliveries, we judge them: its own limit (`max_deliver`) would drop an event
without a word when we die during the last one.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import nats.errors
import structlog
from nats.aio.msg import Msg
from prometheus_client import Counter

from glamd.errors import GlamError, UnavailableError
from glamd.events.dead_letters import DeadLetters, reason_of
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

log = structlog.get_logger()

_CONSUMED = Counter(
    "glamd_events_consumed_total",
    "Deliveries by what became of them: applied, own, retried, dead, given_back.",
    ["subject", "outcome"],
)


@dataclass(slots=True)
class _Delivery:
    message: Msg
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
        self._lanes: dict[UUID, deque[_Delivery]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[asyncio.Task[None], float] = {}
        self._overdue: set[asyncio.Task[None]] = set()
        self.held = 0
        """Messages taken and not finished."""

        self.failing = 0
        """Handlings since the last one for which nothing was away."""

        self._outcomes = {
            name: _CONSUMED.labels(subscription.subject, name)
            for name in ("applied", "own", "retried", "dead", "given_back")
        }

    def take(self, message: Msg) -> None:
        """Have a message handled, behind those of the same merchant that are here already."""
        self.held += 1
        if self._closing:
            self._begin(self._only(self._give_back(message)))
            return
        try:
            job = self._subscription.read(message.data, message.headers or {})
        except GlamError as error:
            self._begin(self._only(self._bury(message, reason_of(error))))
            return
        if job is None:
            self._begin(self._only(self._acknowledge(message, "own")))
            return
        delivery = _Delivery(message, job, asyncio.get_running_loop().time())
        if not self._subscription.in_turn:
            self._begin(self._handle(delivery))
        elif (lane := self._lanes.get(job.merchant_id)) is not None:
            lane.append(delivery)
        else:
            self._lanes[job.merchant_id] = deque((delivery,))
            self._begin(self._work_through(job.merchant_id))

    def close(self) -> None:
        """Begin nothing any more: what comes, and what waits for its turn, is given back."""
        self._closing = True

    async def finish(self, timeout_s: float) -> int:
        """Wait for what was begun; how many are left at the end of the time."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        return self.held

    async def watch(self) -> None:
        """Break off handlers that take too long, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            for task, began_s in tuple(self._running.items()):
                if loop.time() - began_s < HANDLER_TIMEOUT_S:
                    break  # they stand in the order in which they were begun
                if task not in self._overdue:
                    self._overdue.add(task)
                    task.cancel()

    async def cancel(self) -> None:
        """Break off what is under way; JetStream repeats it."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work_through(self, merchant_id: UUID) -> None:
        """Handle a merchant's messages one after the other."""
        lane = self._lanes[merchant_id]
        while lane:
            await self._handle(lane.popleft())
        # No await between the check and this, so nobody adds to a lane that is given up.
        del self._lanes[merchant_id]

    async def _handle(self, delivery: _Delivery) -> None:
        """See a message to its end, and make room for another however that is."""
        message, job = delivery.message, delivery.job
        now_s = asyncio.get_running_loop().time()
        try:
            if self._closing or now_s - delivery.at_s > STALE_AFTER_S:
                await self._give_back(message)
                return
            try:
                await self._run(job, now_s)
            except GlamError as error:
                await self._failed(message, job, error)
            else:
                self.failing = 0
                await self._acknowledge(message, "applied")
        except Exception as error:  # noqa: BLE001 - it is logged where it should be
            self._broken(error)
        finally:
            self._release()

    async def _only(self, work: Coroutine[None, None, None]) -> None:
        """Say one word about a message that needs no handling, and make room for another."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - it is logged where it should be
            self._broken(error)
        finally:
            self._release()

    def _broken(self, error: Exception) -> None:
        subject = self._subscription.subject
        if isinstance(error, nats.errors.Error | OSError):
            # Our word did not leave, since the link is lost: the message comes again.
            log.debug("acknowledgement_not_sent", subject=subject)
        else:
            log.error("message_handling_crashed", subject=subject, exc_info=error)

    def _release(self) -> None:
        self.held -= 1
        self._released()

    async def _run(self, job: Job, now_s: float) -> None:
        """Run the job; UnavailableError HANDLER_TIMEOUT where it was broken off for its length."""
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = now_s
        try:
            await job.run()
        except asyncio.CancelledError:
            if task not in self._overdue or task.uncancel() > 0:
                raise
            raise UnavailableError("The handler took too long.", code="HANDLER_TIMEOUT") from None
        finally:
            del self._running[task]
            self._overdue.discard(task)

    async def _failed(self, message: Msg, job: Job, error: GlamError) -> None:
        if isinstance(error, UnavailableError):
            self.failing += 1
        deliveries = message.metadata.num_delivered
        if not may_pass(error) or deliveries >= MAX_DELIVERIES:
            await self._bury(message, reason_of(error))
            return
        log.debug(
            "event_retried",
            subject=job.subject,
            event_id=job.event_id,
            merchant_id=str(job.merchant_id),
            code=error.code,
            deliveries=deliveries,
        )
        await self._retry(message, deliveries)

    async def _acknowledge(self, message: Msg, outcome: str) -> None:
        self._outcomes[outcome].inc()
        await message.ack()

    async def _give_back(self, message: Msg) -> None:
        """Let another node, or our next start, have it at once."""
        self._outcomes["given_back"].inc()
        await message.nak()

    async def _retry(self, message: Msg, deliveries: int) -> None:
        self._outcomes["retried"].inc()
        last = len(self._retry_delays_s) - 1
        await message.nak(delay=self._retry_delays_s[min(deliveries - 1, last)])

    async def _bury(self, message: Msg, reason: str) -> None:
        """Keep a dead letter, and only then let JetStream forget the message."""
        deliveries = message.metadata.num_delivered
        try:
            await self._dead_letters.keep(
                subject=self._subscription.subject,
                payload=message.data,
                headers=message.headers or {},
                reason=reason,
                attempts=deliveries,
            )
        except GlamError as error:
            self.failing += 1
            log.warning("dead_letter_not_kept", code=error.code)
            await self._retry(message, deliveries)
            return
        self._outcomes["dead"].inc()
        await message.term()
