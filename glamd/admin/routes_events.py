"""Admin routes about events: what waits, what could not be applied, and sending or doing it again.

A dead letter's payload goes to the operator as it is kept, with what looked like a card number
hidden in it; it goes into no log.
"""

import re
from typing import Annotated
from uuid import UUID

import structlog
from pydantic import AwareDatetime, Field

from glamd.admin.query import DEFAULT_LIMIT, MAX_LIMIT
from glamd.errors import NotFoundError, UnavailableError
from glamd.events.consumer import ConsumerLag, Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.outbox_upkeep import OutboxLag
from glamd.events.relay import Relay
from glamd.events.store import DeadLetter
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.queries import Query
from glamd.http.routes import OPERATOR, Route

SUBJECT_LIMIT = 255
MAX_LETTER_ID = 2**63 - 1

log = structlog.get_logger()

_LETTER_ID = re.compile(r"[1-9][0-9]{0,17}")


class LettersQuery(Query):
    """Which dead letters to list; `after` is the `next` of the page before, an older letter's."""

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    after: Annotated[int, Field(ge=1, le=MAX_LETTER_ID)] | None = None


class ReplayBody(Body):
    """Which events to send again; of all subjects and merchants where none is named."""

    since: AwareDatetime
    subject: Annotated[str, Field(min_length=1, max_length=SUBJECT_LIMIT)] | None = None
    merchant_id: UUID | None = None


class ReplayLettersBody(Body):
    """Whose letters to handle again; of all subjects where none is named."""

    subject: Annotated[str, Field(min_length=1, max_length=SUBJECT_LIMIT)] | None = None


class EventRoutes:
    """Handlers of the routes about events."""

    def __init__(self, *, relay: Relay, consumers: Consumers, dead_letters: DeadLetters) -> None:
        self._relay = relay
        self._consumers = consumers
        self._dead_letters = dead_letters

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        letters = "/v1/events/dead-letters"
        found = (
            ("GET", "/v1/events/lag", self._lag),
            ("POST", "/v1/events/replay", self._replay),
            ("GET", letters, self._letters),
            ("POST", f"{letters}/replay", self._replay_letters),
            ("POST", f"{letters}/{{letter_id}}/replay", self._replay_letter),
            ("POST", f"{letters}/{{letter_id}}/discard", self._discard_letter),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _lag(self, _call: Call) -> Answer:
        outboxes = await self._relay.lag()
        consumers: tuple[ConsumerLag, ...] = ()
        trouble = None
        try:
            consumers = await self._consumers.lag()
        except UnavailableError as error:
            # What waits in the outboxes is worth most while NATS is away.
            trouble = error.message
        data = {
            "outboxes": [_outbox(each) for each in outboxes],
            "consumers": [_consumer(each) for each in consumers],
            "trouble": trouble,
        }
        return Answer(data=data)

    async def _letters(self, call: Call) -> Answer:
        query = call.query(LettersQuery)
        found = await self._dead_letters.listed(limit=query.limit, before=query.after)
        following = found[-1].letter_id if len(found) == query.limit else None
        return Answer(data={"dead_letters": [_letter(each) for each in found], "next": following})

    async def _replay(self, call: Call) -> Answer:
        body = await call.json(ReplayBody)
        replayed = await self._relay.replay(
            since=body.since, subject=body.subject, merchant_id=body.merchant_id
        )
        return Answer(data={"events": replayed})

    async def _replay_letters(self, call: Call) -> Answer:
        body = await call.json(ReplayLettersBody)
        replayed = await self._dead_letters.replay_all(subject=body.subject)
        return Answer(data={"resolved": replayed.resolved, "failed": replayed.failed})

    async def _replay_letter(self, call: Call) -> Answer:
        letter_id = _letter_id(call)
        await self._dead_letters.replay(letter_id)
        return Answer(data=_letter(await self._dead_letters.show(letter_id)))

    async def _discard_letter(self, call: Call) -> Answer:
        letter_id = _letter_id(call)
        await self._dead_letters.discard(letter_id)
        log.info("dead_letter_discarded_by_operator", by=call.operator.name, letter_id=letter_id)
        return Answer(data=_letter(await self._dead_letters.show(letter_id)))


def _letter_id(call: Call) -> int:
    text = call.params["letter_id"]
    if not _LETTER_ID.fullmatch(text):
        raise NotFoundError("There is no such dead letter.", code="DEAD_LETTER_NOT_FOUND")
    return int(text)


def _outbox(lag: OutboxLag) -> dict[str, object]:
    """How much waits in an outbox; `oldest_s` are seconds."""
    return {
        "outbox": lag.outbox,
        "rows": lag.rows,
        "oldest_s": round(lag.oldest_s, 3),
        "sent_here": lag.sent_here,
    }


def _consumer(lag: ConsumerLag) -> dict[str, object]:
    return {
        "subject": lag.subject,
        "waiting": lag.waiting,
        "unfinished": lag.unfinished,
        "redelivered": lag.redelivered,
    }


def _letter(letter: DeadLetter) -> dict[str, object]:
    return {
        "id": letter.letter_id,
        "subject": letter.subject,
        "event_id": letter.event_id,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "received_at": letter.received_at,
        "replayed_at": letter.replayed_at,
        "resolved_at": letter.resolved_at,
        "headers": dict(letter.headers),
        "payload": letter.payload.decode("utf-8", "replace"),
    }
