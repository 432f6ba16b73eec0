"""A subject, the model of its events and who handles them: what the consumers are given."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import structlog

from glamd.errors import GlamError, InternalError, NotFoundError, UnavailableError
from glamd.events import envelope
from glamd.events.envelope import Event
from glamd.events.schemas import EventData

log = structlog.get_logger()

D = TypeVar("D", bound=EventData)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked event with its handler, and the errors of that which are an effect as well."""

    subject: str
    merchant_id: UUID
    event_id: str | None
    handle: Callable[[], Awaitable[object]]
    settled: tuple[type[GlamError], ...]

    def begin(self) -> asyncio.Future[object]:
        """Begin at once; how the future ends is told by `error_of`."""
        loop = asyncio.get_running_loop()
        try:
            begun = self.handle()
        except Exception as error:  # noqa: BLE001 - `error_of` judges it
            failed: asyncio.Future[object] = loop.create_future()
            failed.set_exception(error)
            return failed
        return begun if asyncio.isfuture(begun) else loop.create_task(_awaited(begun))

    def error_of(self, ended: asyncio.Future[object]) -> GlamError | None:
        """Why the event has had no effect; None where it has."""
        if ended.cancelled():
            return UnavailableError("The handler was broken off.")
        try:
            ended.result()
        except self.settled:
            return None
        except GlamError as error:
            return error
        except Exception:
            log.exception("event_handler_crashed", subject=self.subject, event_id=self.event_id)
            return InternalError("The handler failed for a reason of our own.")
        return None

    async def run(self) -> None:
        """Return when the event has had its effect; GlamError, whatever went wrong."""
        ended = self.begin()
        try:
            await asyncio.wait((ended,))
        finally:
            ended.cancel()
        error = self.error_of(ended)
        if error is not None:
            raise error


class Subscription:
    """Who handles the events of a model's subject.

    What `handler` returns is done once the effect is committed, and must bear the same event again:
    what it does is decided by the event's reference. Its exceptions decide what becomes of the
    message (see `may_pass`); those of the classes in `settled` are an effect as well.

    `in_turn` keeps a merchant's events one after the other, as far as JetStream delivers them so.
    Without it they are only begun in order, which is enough where the handler puts them into an
    actor's mailbox before it returns, or first waits. A future costs less than a coroutine.
    """

    def __init__(
        self,
        model: type[D],
        handler: Callable[[Event[D]], Awaitable[object]],
        *,
        in_turn: bool = True,
        settled: tuple[type[GlamError], ...] = (),
    ) -> None:
        self.subject = model.SUBJECT
        self.in_turn = in_turn

        def read(body: bytes, headers: Mapping[str, str]) -> Job | None:
            event = envelope.read(model, body=body, headers=headers)
            if event is None:
                return None
            return Job(
                event.subject,
                event.data.merchant_id,
                event.event_id,
                lambda: handler(event),
                settled,
            )

        self._read = read

    @property
    def durable(self) -> str:
        """The name of the durable consumer, the same on all nodes."""
        return f"glamd-{self.subject.replace('.', '-')}"

    def read(self, body: bytes, headers: Mapping[str, str]) -> Job | None:
        """The work that a message is; None for one of our own events. InputError."""
        return self._read(body, headers)


def may_pass(error: GlamError) -> bool:
    """Whether the same event may succeed later.

    What is not found may come: order between subjects is not guaranteed. What we failed at by
    ourselves or for want of something may go better. Everything else stays wrong.
    """
    return error.retryable or isinstance(error, NotFoundError)


async def _awaited(begun: Awaitable[object]) -> object:
    return await begun
