"""A subject, the model of its events and who handles them: what the consumers are given."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import structlog

from glamd.errors import GlamError, InternalError, NotFoundError
from glamd.events import envelope
from glamd.events.envelope import Event
from glamd.events.schemas import EventData

log = structlog.get_logger()

D = TypeVar("D", bound=EventData)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked event with its handler."""

    subject: str
    merchant_id: UUID
    event_id: str | None
    handle: Callable[[], Awaitable[None]]

    async def run(self) -> None:
        """Return when the event has had its effect; GlamError, whatever went wrong."""
        try:
            await self.handle()
        except GlamError:
            raise
        except Exception:
            log.exception("event_handler_crashed", subject=self.subject, event_id=self.event_id)
            raise InternalError("The handler failed for a reason of our own.") from None


class Subscription:
    """Who handles the events of a model's subject.

    `handler` returns once the effect is committed, and must bear the same event again: what it
    does is decided by the event's reference. Its exceptions decide what becomes of the message
    (see `may_pass`).

    `in_turn` keeps a merchant's events one after the other, as far as JetStream delivers them so.
    Without it they are only begun in order, which is enough where the handler puts them into an
    actor's mailbox before it first waits.
    """

    def __init__(
        self,
        model: type[D],
        handler: Callable[[Event[D]], Awaitable[None]],
        *,
        in_turn: bool = True,
    ) -> None:
        self.subject = model.SUBJECT
        self.in_turn = in_turn

        def read(body: bytes, headers: Mapping[str, str]) -> Job | None:
            event = envelope.read(model, body=body, headers=headers)
            if event is None:
                return None
            return Job(
                event.subject, event.data.merchant_id, event.event_id, lambda: handler(event)
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
