"""glamctl about events, with a real outbox and a real NATS: what waits, failed, is redone."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import orjson
import pytest
from nats.aio.client import Client

from glamd.admin.routes_events import EventRoutes
from glamd.clock import SystemClock
from glamd.db import Database
from glamd.errors import NotFoundError, UnavailableError
from glamd.events.bus import Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.envelope import Event
from glamd.events.relay import Relay
from glamd.events.schemas import CreditsPurchased
from glamd.events.subscription import Subscription
from tests.support.admin_world import AdminWorld
from tests.support.events_world import add, merchant, running, running_bus, unpublished
from tests.support.money_world import Admin
from tests.support.nats import NatsServer, count_stored, delete_stream, nats_client
from tests.support.postgres import eventually

PURCHASED = CreditsPurchased.SUBJECT
SINCE = ("events", "replay", "--since")


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    """A client beside the daemon's, on a server without a stream."""
    async with nats_client(nats_server.url) as connected:
        await delete_stream(connected)
        yield connected


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each."""
    connection = await asyncpg.connect(module_database_url)
    await connection.execute("TRUNCATE glam.outbox, cde.outbox, glam.dead_letters")
    await connection.close()
    return module_database_url


@dataclass(slots=True)
class Desk:
    """The parts behind the routes, and who handles purchases."""

    database: Database
    relay: Relay
    consumers: Consumers
    letters: DeadLetters
    handled: list[str]
    knows_nobody: bool = True

    async def keep(self, payload: bytes, reason: str = "CODE: why") -> int:
        """Keep a dead letter."""
        return await self.letters.keep(
            subject=PURCHASED, payload=payload, headers={}, reason=reason, attempts=10
        )


def desk_on(bus: Bus, database: Database) -> Desk:
    """Everything, not running."""
    desk: Desk

    async def handle(event: Event[CreditsPurchased]) -> None:
        if desk.knows_nobody:
            raise NotFoundError("Nobody has this.", code="CREDIT_ACCOUNT_NOT_FOUND")
        desk.handled.append(event.data.purchase_id)

    clock = SystemClock()
    subscriptions = [Subscription(CreditsPurchased, handle)]
    letters = DeadLetters(database, subscriptions=subscriptions, clock=clock)
    desk = Desk(
        database=database,
        relay=Relay(bus, databases={"glam": database, "cde": database}, clock=clock, poll_s=0.01),
        consumers=Consumers(bus, subscriptions=subscriptions, dead_letters=letters),
        letters=letters,
        handled=[],
    )
    return desk


def routes_of(desk: Desk) -> EventRoutes:
    """The routes of these parts."""
    return EventRoutes(relay=desk.relay, consumers=desk.consumers, dead_letters=desk.letters)


@pytest.fixture
async def away(admin: AdminWorld, database: Database) -> AsyncIterator[tuple[Admin, Desk]]:
    """glamctl, with NATS away."""
    desk = desk_on(Bus(["nats://127.0.0.1:1"], name="test"), database)
    glamctl = Admin(admin.path)
    async with glamctl.serving(admin.world, routes_of(desk).routes()):
        yield glamctl, desk


def purchase(name: str, **changes: object) -> bytes:
    """A purchase's event."""
    data = {"merchant_id": str(merchant(1)), "purchase_id": name, "credits": 100} | changes
    return orjson.dumps({"event_id": f"e-{name}", "data": data})


async def test_what_is_used_wrongly_is_2_and_says_how(away: tuple[Admin, Desk]) -> None:
    admin, _ = away
    for words in (
        ("replay",),
        ("replay", "--since", "2030-01-01", "--dead-letter", 1),
        ("replay", "--since", "yesterday"),
        ("replay", "--since", "2030-13-01T00:00:00Z"),
        ("replay", "--dead-letter", 0),
        ("replay", "--dead-letter", 1, "--subject", PURCHASED),
        ("replay", "--dead-letter", 1, "--merchant", merchant(1)),
        ("replay", "--since", "2030-01-01", "--merchant", "nobody"),
        ("dead-letters", "--limit", 201),
        ("dead-letters", "--after", 0),
    ):
        await admin.failed(2, "events", *words)
    told = await admin.failed(1, *SINCE, "2030-01-01", "--subject", "x" * 256)
    assert "subject: " in told


async def test_while_nats_is_away_the_outboxes_are_told_all_the_same(
    away: tuple[Admin, Desk],
) -> None:
    admin, desk = away
    await add(desk.database, 1, 2, 1)
    told = await admin.told("events", "lag")
    waiting = {each["outbox"]: each["rows"] for each in told["outboxes"]}
    assert waiting == {"glam": 3, "cde": 0}
    assert told["consumers"] == []
    assert told["trouble"]
    shown = await admin.run("events", "lag")
    assert shown.exit_code == 0
    assert "oldest s" in shown.stdout
    assert "nothing is known" in shown.stderr


async def test_a_letter_that_is_not_there_or_fails_again_is_1_and_says_why(
    away: tuple[Admin, Desk],
) -> None:
    admin, desk = away
    replay = ("events", "replay", "--dead-letter")
    assert (await admin.failed(1, *replay, 10**17)).startswith("DEAD_LETTER_NOT_FOUND: ")
    early, broken = await desk.keep(purchase("p-1")), await desk.keep(b'{"data": 5}')
    assert (await admin.failed(1, *replay, early)).startswith("CREDIT_ACCOUNT_NOT_FOUND: ")
    assert (await admin.failed(1, *replay, broken)).startswith("VALIDATION_ERROR: ")
    hidden = await desk.keep(purchase("p-2", platform="4111111111111111"))
    assert (await admin.failed(1, *replay, hidden)).startswith("DEAD_LETTER_CHANGED: ")
    assert len(await admin.told("events", "dead-letters")) == 3


async def test_letters_come_newest_first_page_by_page_and_go_when_they_are_replayed(
    away: tuple[Admin, Desk],
) -> None:
    admin, desk = away
    ids = [await desk.keep(purchase(f"p-{number}"), "CODE: [red]why[/red]") for number in range(3)]
    listed = await admin.told("events", "dead-letters", "--limit", 2)
    assert [each["id"] for each in listed] == [ids[2], ids[1]]
    assert orjson.loads(listed[0]["payload"])["data"]["purchase_id"] == "p-2"
    table = await admin.done("events", "dead-letters", "--limit", 2)
    assert "[red]why[/red]" in table
    assert table.endswith(f"Older letters: --after {ids[1]}\n")
    (oldest,) = await admin.told("events", "dead-letters", "--after", ids[1])
    assert oldest["id"] == ids[0]
    desk.knows_nobody = False
    done = await admin.done("events", "replay", "--dead-letter", ids[0])
    assert "resolved at" in done
    assert "payload" not in done
    assert desk.handled == ["p-0"]
    again = await admin.failed(1, "events", "replay", "--dead-letter", ids[0])
    assert again.startswith("DEAD_LETTER_RESOLVED: ")
    assert len(await admin.told("events", "dead-letters")) == 2


async def test_all_letters_of_a_subject_are_replayed_at_once_and_what_fails_is_told(
    away: tuple[Admin, Desk],
) -> None:
    admin, desk = away
    for number in range(2):
        await desk.keep(purchase(f"p-{number}"))
    await desk.keep(b'{"data": 5}')
    desk.knows_nobody = False
    all_of_them = ("events", "replay", "--dead-letters")
    assert await admin.told(*all_of_them, "--subject", "evt.other") == {"resolved": 0, "failed": 0}
    done = await admin.run(*all_of_them, "--subject", PURCHASED)
    assert done.exit_code == 1
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["resolved", "2"],
        ["failed", "1"],
    ]
    assert desk.handled == ["p-0", "p-1"]


async def test_a_letter_is_given_up_only_when_that_is_meant_and_once(
    away: tuple[Admin, Desk],
) -> None:
    admin, desk = away
    letter_id = await desk.keep(b'{"data": 5}')
    assert "say --yes" in await admin.failed(2, "events", "discard", letter_id)
    given_up = await admin.done("events", "discard", letter_id, "--yes")
    assert "payload" not in given_up
    assert await admin.told("events", "dead-letters") == []
    again = await admin.failed(1, "events", "discard", letter_id, "--yes")
    assert again.startswith("DEAD_LETTER_RESOLVED: ")
    unknown = await admin.failed(1, "events", "discard", 10**17, "--yes")
    assert unknown.startswith("DEAD_LETTER_NOT_FOUND: ")
    assert desk.handled == []


async def test_what_was_sent_since_is_sent_again_of_a_subject_or_a_merchant(
    admin: AdminWorld, database: Database, nats_server: NatsServer, client: Client
) -> None:
    glamctl = Admin(admin.path)
    async with running_bus(nats_server.url) as bus:
        desk = desk_on(bus, database)
        parts = (desk.relay, desk.consumers)
        async with running(*parts), glamctl.serving(admin.world, routes_of(desk).routes()):
            await add(database, 1, 2, 1)
            await add(database, 2, subject=PURCHASED)
            await _until_sent(database)
            assert await count_stored(client) == 4
            since = "2020-01-01T02:00:00+02:00"
            assert await glamctl.told(*SINCE, since) == {"events": 4}
            assert await glamctl.told(*SINCE, since, "--subject", PURCHASED) == {"events": 1}
            one = await glamctl.told(*SINCE, "2020-01-01", "--merchant", merchant(1))
            assert one == {"events": 2}
            now = datetime.now(UTC).replace(tzinfo=None).isoformat()
            assert await glamctl.told(*SINCE, now) == {"events": 0}
            await eventually(desk.consumers.lag, errors=(UnavailableError,))
            told = await glamctl.told("events", "lag")
            assert [each["rows"] for each in told["outboxes"]] == [0, 0]
            assert told["trouble"] is None
            assert [each["subject"] for each in told["consumers"]] == [PURCHASED]


async def _until_sent(database: Database) -> None:
    async def all_sent() -> bool:
        return await unpublished(database) == 0

    await eventually(all_sent)
