"""A load of money, as a process of its own: requests over HTTP and events over JetStream.

`python -m tests.faults.money_load PLAN` begins at once and goes on until its stdin ends; then it
begins nothing new, sees everything to a final answer, and ends with status 0. What was not
answered, or answered as retryable, is asked again under the same reference for as long as it takes.

It is no measurement: a worker waits for its answer, and the rate is what the workers reach at most.
"""

import asyncio
import contextlib
import random
import secrets
import string
import sys
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import nats.errors
import orjson
import uvloop
from nats.aio.client import Client

from tests.faults.money_record import (
    DONE,
    NO_ANSWER,
    RETRYABLE,
    MoneyRecord,
    Told,
    Wanted,
)

HTTP_WORKERS: Final = 24
EVENT_WORKERS: Final = 8
REQUEST_TIMEOUT_S: Final = 15.0
PAUSE_S: Final = 0.05
"""Before something is asked again."""

NATS_PAUSE_S: Final = 0.5
"""Before something is published again: making connections in vain takes the daemon's processor."""

SETTLE_TIMEOUT_S: Final = 180.0
HELD_BACK: Final = 8
"""An event that is reordered is published after so many others at most."""

FUND: Final = 2_000
POOR_FUND: Final = 20
"""The last merchant has so little that many of its debits cannot be paid."""

SUBJECTS: Final = {
    "match": "evt.ai.match.completed.v1",
    "purchase": "evt.billing.credits.purchased.v1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MoneyPlan:
    """What to load; `http_per_s` and `events_per_s` are upper bounds, 0 for none of these."""

    http_url: str
    nats_url: str
    jwt: str
    merchants: tuple[str, ...]
    record: str
    http_per_s: float
    events_per_s: float
    seed: int

    @classmethod
    def read(cls, path: Path) -> "MoneyPlan":
        """From a file, since a JWT has no place on a command line."""
        raw = orjson.loads(path.read_bytes())
        return cls(**{**raw, "merchants": tuple(raw["merchants"])})


class MoneyLoad:
    """Runs one plan."""

    def __init__(self, plan: MoneyPlan, record: MoneyRecord) -> None:
        self._plan = plan
        self._record = record
        self._chance = random.Random(plan.seed)
        # Letters, since what looks like a card number is no correlation id.
        self._run = "".join(secrets.choice(string.ascii_lowercase) for _ in range(12))
        self._numbers = 0
        self._stopping = asyncio.Event()
        self._held: deque[tuple[Wanted, int]] = deque()
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    def stop(self) -> None:
        """Begin nothing new."""
        self._stopping.set()

    async def run(self) -> None:
        """Fund the merchants, load until stopped, and see everything to its end."""
        plan = self._plan
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {plan.jwt}"}
        connector = aiohttp.TCPConnector(limit=2 * HTTP_WORKERS)
        async with aiohttp.ClientSession(
            plan.http_url, timeout=timeout, headers=headers, connector=connector
        ) as session:
            await asyncio.gather(
                *(self._ask(session, self._fund(merchant)) for merchant in plan.merchants)
            )
            work: list[Coroutine[Any, Any, None]] = []
            if plan.http_per_s:
                each_s = HTTP_WORKERS / plan.http_per_s
                work += [self._requests(session, each_s) for _ in range(HTTP_WORKERS)]
            if plan.events_per_s:
                each_s = EVENT_WORKERS / plan.events_per_s
                work += [self._events(each_s) for _ in range(EVENT_WORKERS)]
            async with asyncio.TaskGroup() as group:
                for each in work:
                    group.create_task(each)
            for wanted, copies in self._held:
                await self._publish(wanted, copies)
        if self._client is not None:
            await self._client.close()

    # ---- what is wanted

    def _next(self, operation: str, amount: int, kind: str, way: str, merchant: str) -> Wanted:
        self._numbers += 1
        return Wanted(
            id=f"{self._run}-{self._numbers}",
            merchant=merchant,
            operation="credit" if operation == "credit" else "debit",
            amount=amount,
            kind=kind,
            way="http" if way == "http" else "event",
        )

    def _fund(self, merchant: str) -> Wanted:
        amount = POOR_FUND if merchant == self._plan.merchants[-1] else FUND
        return self._next("credit", amount, "fund", "http", merchant)

    def _some(self, way: str) -> Wanted:
        """Mostly debits, and of the credits enough that most can be paid."""
        chance = self._chance
        merchant = chance.choice(self._plan.merchants)
        if way == "event":
            if chance.random() < 0.05:
                return self._next("credit", chance.randint(20, 60), "purchase", way, merchant)
            return self._next("debit", 1, "match", way, merchant)
        if chance.random() < 0.2:
            return self._next("credit", chance.randint(1, 9), "load-grant", way, merchant)
        return self._next("debit", chance.randint(1, 3), "load", way, merchant)

    # ---- HTTP

    async def _requests(self, session: aiohttp.ClientSession, each_s: float) -> None:
        await self._pause(each_s * self._chance.random())
        while not self._stopping.is_set():
            began_s = time.monotonic()
            wanted = self._some("http")
            asked = 2 if self._chance.random() < 0.1 else 1
            self._record.wanted(wanted)
            await asyncio.gather(*(self._insist(session, wanted) for _ in range(asked)))
            await self._pause(each_s - (time.monotonic() - began_s))

    async def _ask(self, session: aiohttp.ClientSession, wanted: Wanted) -> None:
        self._record.wanted(wanted)
        await self._insist(session, wanted)

    async def _insist(self, session: aiohttp.ClientSession, wanted: Wanted) -> None:
        """Ask until there is a final answer."""
        while True:
            if await self._attempt(session, wanted) not in {NO_ANSWER, *RETRYABLE}:
                return
            await asyncio.sleep(PAUSE_S)

    async def _attempt(self, session: aiohttp.ClientSession, wanted: Wanted) -> int:
        body = {
            "merchant_id": wanted.merchant,
            "amount": wanted.amount,
            "reference_type": wanted.kind,
            "reference_id": wanted.id,
        }
        path = "/api/credits/" + ("grant" if wanted.operation == "credit" else "consume")
        began_s = time.monotonic()
        told: Told | None = None
        try:
            async with session.post(
                path, json=body, headers={"X-Correlation-ID": wanted.id}
            ) as answer:
                content = orjson.loads(await answer.read())
                status = answer.status
        except (aiohttp.ClientError, OSError) as error:
            status, code = NO_ANSWER, type(error).__name__
        else:
            code = "ok" if status == DONE else str(content.get("code"))
            if status == DONE:
                data = content["data"]
                told = Told(data["transaction"]["id"], data["balance"])
        ms = round((time.monotonic() - began_s) * 1e3, 1)
        self._record.answer(wanted, status=status, code=code, ms=ms, told=told)
        return status

    # ---- events

    async def _events(self, each_s: float) -> None:
        chance = self._chance
        await self._pause(each_s * chance.random())
        while not self._stopping.is_set():
            began_s = time.monotonic()
            wanted, copies = self._some("event"), 2 if chance.random() < 0.2 else 1
            self._record.wanted(wanted)
            if chance.random() < 0.15:
                self._held.append((wanted, copies))
            else:
                await self._publish(wanted, copies)
            if len(self._held) > chance.randint(1, HELD_BACK):
                await self._publish(*self._held.popleft())
            await self._pause(each_s - (time.monotonic() - began_s))

    async def _publish(self, wanted: Wanted, copies: int) -> None:
        """Publish until JetStream has it; copies under another message id, or under the same."""
        same = self._chance.random() < 0.3
        for copy in range(copies):
            message_id = wanted.id if same or not copy else f"{wanted.id}-{copy}"
            while True:
                if await self._stored(wanted, message_id):
                    break
                await asyncio.sleep(NATS_PAUSE_S)
        self._record.stored(wanted)

    async def _stored(self, wanted: Wanted, message_id: str) -> bool:
        try:
            client = await self._connected()
            await client.jetstream().publish(
                SUBJECTS[wanted.kind],
                event_body(wanted, shape=self._chance.randrange(3)),
                timeout=2.0,
                headers={"Nats-Msg-Id": message_id},
            )
        except (nats.errors.Error, OSError):
            return False
        return True

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None or not self._client.is_connected:
                if self._client is not None:
                    with contextlib.suppress(nats.errors.Error, OSError):
                        await self._client.close()
                self._client = client = Client()
                await client.connect(
                    self._plan.nats_url,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=2,
                    error_cb=_passed_over,
                )
            return self._client

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until it is to end."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()


def event_body(wanted: Wanted, *, shape: int) -> bytes:
    """The event in one of the three shapes that are taken: ours, CloudEvents, flat."""
    data: dict[str, object] = {"merchant_id": wanted.merchant}
    if wanted.kind == "match":
        data |= {"match_id": wanted.id, "shopper_id": "s-1", "matched_items_count": 3}
    else:
        data |= {"purchase_id": wanted.id, "credits": wanted.amount}
    subject = SUBJECTS[wanted.kind]
    body: dict[str, object] = {**data, "correlation_id": wanted.id}
    if shape == 0:
        body = {
            "event_id": wanted.id,
            "event_type": subject,
            "correlation_id": wanted.id,
            "source_service": "load",
            "data": data,
            "metadata": {},
        }
    elif shape == 1:
        body = {
            "specversion": "1.0",
            "id": wanted.id,
            "type": subject,
            "source": "load",
            "correlationid": wanted.id,
            "data": data,
        }
    return orjson.dumps(body)


async def _passed_over(_error: Exception) -> None:
    """What goes wrong on the connection shows at the next publication."""


async def _run(plan: MoneyPlan) -> None:
    loop = asyncio.get_running_loop()
    with MoneyRecord(Path(plan.record)) as record:
        load = MoneyLoad(plan, record)
        stdin = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        running = asyncio.create_task(load.run(), name="load")
        ended = asyncio.create_task(stdin.read(), name="stdin")
        await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        load.stop()
        ended.cancel()
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            await running


if __name__ == "__main__":
    uvloop.run(_run(MoneyPlan.read(Path(sys.argv[1]))))
