"""One batch of events on its way: those of a merchant one after the other, many merchants at once.

A merchant's next event leaves when JetStream has acknowledged the one before. So one that is
refused, or lost, is never overtaken, whatever else goes wrong: not by a retry, not by another relay
that works at the same time, not by what a lost connection had still been carrying. Only repeats of
what came before can arrive late, and those are dropped by their id. JetStream's own conditions
(`Nats-Expected-…`) are for a stream with one publisher or for one subject, and fit neither.

nats-py's `publish_async` is not used: it drops answers that are errors, and waits for ever.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import orjson

from glamd.events import envelope
from glamd.events.bus import BusLostError, Link
from glamd.events.message import STATUS, Message
from glamd.events.store import OutboxRow

ACK_TIMEOUT_S: Final = 5.0
"""Without any acknowledgement for so long, what is not acknowledged is given up for this batch."""

YIELD_EVERY: Final = 32
"""Messages handed over before others in this process get their turn: well under a millisecond."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an event was not taken; `lasting` when the same event never will be, as it is."""

    row: OutboxRow
    code: str
    lasting: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a batch: rows acknowledged, and for each merchant at most one failure.

    Rows behind a failure of their merchant are in neither: they were not sent.
    """

    acked: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    lost: bool = False


class Publisher:
    """Sends batches over one link, one batch at a time."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._inbox = link.inbox()
        self._sent = 0
        self._answered = 0
        self._in_flight: dict[str, OutboxRow] = {}
        self._lanes: dict[str, deque[OutboxRow]] = {}
        self._outcome = Outcome()
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def on(cls, link: Link) -> Self:
        """A publisher that hears its acknowledgements; BusLostError."""
        publisher = cls(link)
        await link.subscribe(f"{publisher._inbox}.*", publisher._on_answer)
        return publisher

    async def send(self, batch: Sequence[OutboxRow]) -> Outcome:
        """Send rows in the order of the batch; return when each is acknowledged or given up."""
        self._in_flight.clear()
        self._lanes = {}
        self._outcome = outcome = Outcome()
        self._settled = asyncio.get_running_loop().create_future()
        for row in batch:
            self._lanes.setdefault(row.merchant_id, deque()).append(row)
        try:
            for started, lane in enumerate(tuple(self._lanes.values()), 1):
                self._send_first(lane)
                if started % YIELD_EVERY == 0 or self.link.is_full:
                    await self.link.relief()
            await self._until_settled()
        except BusLostError:
            outcome.lost = True
        # A late answer of this batch finds nothing that it could belong to.
        self._in_flight.clear()
        return outcome

    async def _until_settled(self) -> None:
        while self._lanes:
            answered = self._answered
            try:
                await self.link.until(self._settled, timeout_s=ACK_TIMEOUT_S)
            except TimeoutError:
                if self._answered == answered:
                    for lane in tuple(self._lanes.values()):
                        self._fail(lane, "NO_ACK")

    def _send_first(self, lane: deque[OutboxRow]) -> None:
        """Send the first of a merchant's rows, or give the merchant up for this batch."""
        row = lane[0]
        if not envelope.is_subject(row.subject):
            self._fail(lane, "BAD_SUBJECT", lasting=True)
            return
        at = row.created_at.isoformat()
        body = envelope.outgoing_body(
            event_id=row.event_id,
            subject=row.subject,
            correlation_id=row.correlation_id,
            at=at,
            data=row.data,
        )
        headers = envelope.outgoing_headers(
            event_id=row.event_id, subject=row.subject, merchant_id=row.merchant_id, at=at
        )
        # The server ends the connection of whoever exceeds its limit.
        if len(headers) + len(body) > self.link.max_payload_bytes:
            self._fail(lane, "TOO_LARGE", lasting=True)
            return
        self._sent += 1
        token = str(self._sent)
        self._in_flight[token] = row
        self.link.send_built(row.subject, headers, body, reply=f"{self._inbox}.{token}")

    def _on_answer(self, message: Message) -> None:
        row = self._in_flight.get(token := message.subject.rpartition(".")[2])
        if row is None:
            return
        verdict = _verdict(message)
        if verdict is None:
            return
        del self._in_flight[token]
        self._answered += 1
        lane = self._lanes[row.merchant_id]
        if verdict:
            self._fail(lane, verdict)
            return
        self._outcome.acked.append(row.row_id)
        lane.popleft()
        if lane:
            try:
                self._send_first(lane)
            except BusLostError:
                return  # whoever waits for the batch is told by the link itself
        else:
            self._drop(row.merchant_id)

    def _fail(self, lane: deque[OutboxRow], code: str, *, lasting: bool = False) -> None:
        row = lane[0]
        self._outcome.failures.append(Failure(row, code, lasting))
        self._drop(row.merchant_id)

    def _drop(self, merchant_id: str) -> None:
        del self._lanes[merchant_id]
        if not self._lanes and not self._settled.done():
            self._settled.set_result(None)


def _verdict(message: Message) -> str | None:
    """Empty for an acknowledgement, else the code of the error; None for what is no answer.

    Anybody who listens to our subjects could reply to them, so what does not look like JetStream's
    own word is passed over.
    """
    if message.headers.get(STATUS) == "503":
        return "NO_STREAM"
    try:
        answer = orjson.loads(message.body)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    if isinstance(error := answer.get("error"), dict):
        number = error.get("err_code")
        return f"JETSTREAM_{number}" if isinstance(number, int) else "JETSTREAM"
    return "" if "stream" in answer and "seq" in answer else None
