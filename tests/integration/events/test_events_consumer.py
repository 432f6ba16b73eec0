"""From JetStream to the handlers: no event without its effect, none given up without a letter."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from nats.aio.client import Client
from nats.js import api
from structlog.testing import capture_logs

from glamd.clock import SystemClock
from glamd.db import Database
from glamd.embedded.bus import EmbeddedBus
from glamd.errors import (
    ConflictError,
    ForbiddenError,
    GlamError,
    InputError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from glamd.events import consumer, handling
from glamd.events.bus import Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.envelope import Event
from glamd.events.schemas import MatchCompleted, MerchantCreated
from glamd.events.store import DeadLetter
from glamd.events.subscription import Subscription
from tests.support.events_world import merchant, running, running_bus
from tests.support.nats import STREAM, delete_stream, nats_client
from tests.support.postgres import eventually
from tests.support.proxy import proxied

MATCHES = "evt.ai.match.completed.v1"
DURABLE = "glamd-evt-ai-match-completed-v1"
TIMEOUT_S = 10.0


@dataclass
class Desk:
    """Handles matches: fails as it is told, may be closed, and remembers what it has applied."""

    applied: list[str] = field(default_factory=list)
    tried: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[str, list[Exception]] = field(default_factory=dict)
    always: dict[str, Exception] = field(default_factory=dict)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: set[str] = field(default_factory=set)
    at_work: int = 0
    most_at_work: int = 0
    after: Callable[[str], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.open.set()

    async def handle(self, event: Event[MatchCompleted]) -> None:
        """Apply a match by its id."""
        name = event.data.match_id
        self.tried[name] += 1
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            await self.open.wait()
            if name in self.cancelled:
                self.cancelled.remove(name)
                raise asyncio.CancelledError
            if name in self.always:
                raise self.always[name]
            if self.errors.get(name):
                raise self.errors[name].pop(0)
            self.applied.append(name)
            if self.after is not None:
                await self.after(name)
        finally:
            self.at_work -= 1


@dataclass
class World:
    """A desk, its letters, and the consumers that a test runs."""

    desk: Desk
    letters: DeadLetters
    subscription: Subscription

    def consumers(self, bus: Bus, **options: Any) -> Consumers:
        """Consumers that try again almost at once."""
        return Consumers(
            bus,
            subscriptions=[self.subscription],
            dead_letters=self.letters,
            **{"retry_delays_s": (0.01,) * 9, **options},
        )


def world_of(database: Database, *, in_turn: bool = True) -> World:
    """A world whose events are matches."""
    desk = Desk()
    subscription = Subscription(MatchCompleted, desk.handle, in_turn=in_turn)
    letters = DeadLetters(database, subscriptions=[subscription], clock=SystemClock())
    return World(desk, letters, subscription)


@pytest.fixture
def world(database: Database) -> World:
    """A world in which a merchant's events take turns."""
    return world_of(database)


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged, in which no payload may be."""
    with capture_logs() as logs:
        yield logs
    assert "shopper" not in repr(logs)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer for which something is away tries again at once."""
    monkeypatch.setattr(consumer, "LAST_PAUSE_S", 0.01)


def a_match(name: str, number: int = 1) -> dict[str, object]:
    """The data of a match."""
    return {
        "merchant_id": str(merchant(number)),
        "match_id": name,
        "shopper_id": "s-1",
        "matched_items_count": 3,
    }


async def send(
    client: Client, *names: str, number: int = 1, headers: dict[str, str] | None = None
) -> None:
    """Publish matches, one after the other."""
    for name in names:
        body = {"event_id": f"e-{name}", "event_type": MATCHES, "data": a_match(name, number)}
        await client.jetstream().publish(MATCHES, orjson.dumps(body), headers=headers)


async def until_applied(world: World, count: int) -> None:
    """Return when so many were applied."""

    async def enough() -> bool:
        return len(world.desk.applied) >= count

    await eventually(enough)


async def until_nothing_is_left(client: Client, durable: str = DURABLE) -> None:
    """Return when JetStream has neither anything to give out nor anything unanswered."""

    async def all_done() -> bool:
        found = await client.jsm().consumer_info(STREAM, durable)
        return (found.num_pending, found.num_ack_pending) == (0, 0)

    await eventually(all_done)


async def all_letters(world: World) -> list[DeadLetter]:
    """The letters that are open, oldest first."""
    return list(reversed(await world.letters.listed(limit=200)))


# ---- what fails


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "EVENT_MALFORMED: The event is not JSON."),
        (b'{"data":', "EVENT_MALFORMED: The event is not JSON."),
        (b"[1]", "EVENT_MALFORMED: The event is not an object."),
        (b"\xff\xfe", "EVENT_MALFORMED: The event is not JSON."),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "deeper than 32 levels"),
        (b'{"pad":"' + b"x" * 70_000 + b'"}', "EVENT_TOO_LARGE"),
        (orjson.dumps({**a_match("m"), "match_id": 5}), "match_id: it is not a text"),
        (orjson.dumps({**a_match("m"), "merchant_id": "me"}), "merchant_id: it is not a UUID"),
        (orjson.dumps({"data": "x", "event_type": MATCHES}), "data: it is not an object"),
    ],
)
async def test_what_can_never_be_applied_is_a_letter_at_once_and_gone_from_jetstream(
    bus: Bus, client: Client, world: World, body: bytes, reason: str
) -> None:
    async with running(world.consumers(bus)):
        await client.jetstream().publish(MATCHES, body, headers={"Nats-Msg-Id": "e-1"})
        await send(client, "good")
        await until_applied(world, 1)
        await until_nothing_is_left(client)
    [letter] = await all_letters(world)
    assert reason in letter.reason
    assert (letter.subject, letter.event_id, letter.attempts) == (MATCHES, "e-1", 1)
    assert letter.payload == body[: 64 * 1024]
    assert world.desk.applied == ["good"]


@pytest.mark.parametrize(
    "error",
    [
        InputError("It is wrong.", code="WRONG"),
        ConflictError("It is another.", code="DUPLICATE_TRANSACTION"),
        ForbiddenError("It may not."),
    ],
)
async def test_what_a_handler_refuses_for_good_is_a_letter_with_its_reason(
    bus: Bus, client: Client, world: World, error: GlamError
) -> None:
    world.desk.always["bad"] = error
    async with running(world.consumers(bus)):
        await send(client, "bad", "good")
        await until_applied(world, 1)
        await until_nothing_is_left(client)
    [letter] = await all_letters(world)
    assert letter.reason == f"{error.code}: {error.message}"
    assert world.desk.tried == {"bad": 1, "good": 1}


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND"),
        UnavailableError("The database is not available."),
        InternalError("A bug of ours."),
        ZeroDivisionError("a bug that we do not know"),
        TimeoutError(),
    ],
)
async def test_what_may_pass_is_tried_again_until_it_has(
    bus: Bus, client: Client, world: World, error: Exception
) -> None:
    world.desk.errors["late"] = [error] * 3
    async with running(world.consumers(bus)):
        await send(client, "late")
        await until_applied(world, 1)
        await until_nothing_is_left(client)
    assert world.desk.tried == {"late": 4}
    assert await all_letters(world) == []


async def test_after_ten_deliveries_it_is_a_letter_and_the_others_have_not_waited(
    bus: Bus, client: Client, world: World
) -> None:
    world.desk.always["poison"] = ZeroDivisionError("4111111111111111")
    async with running(world.consumers(bus)):
        await send(client, "poison", "a", "b")
        await until_applied(world, 2)
        await until_nothing_is_left(client)
    assert world.desk.tried["poison"] == 10
    [letter] = await all_letters(world)
    assert letter.attempts == 10
    assert letter.event_id == "e-poison"
    # Neither a traceback nor what a bug had in its hands.
    assert letter.reason == "INTERNAL_ERROR: The handler failed for a reason of our own."


async def test_a_handler_that_never_ends_is_broken_off_and_tried_again(
    bus: Bus, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(handling, "WATCH_EVERY_S", 0.01)
    world.desk.open.clear()
    async with running(world.consumers(bus)):
        await send(client, "slow")

        async def is_tried_again() -> bool:
            return world.desk.tried["slow"] == 2

        await eventually(is_tried_again)
        world.desk.open.set()
        await until_applied(world, 1)
        await until_nothing_is_left(client)


async def test_a_handler_that_gives_up_by_itself_holds_up_nobody_behind_it(
    bus: Bus, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "ACK_WAIT_S", 0.3)
    # Not ours: whatever it had waited for was cancelled by somebody else.
    world.desk.cancelled.add("first")
    async with running(world.consumers(bus)):
        await send(client, "first", "second", "third")
        await until_applied(world, 3)
        await until_nothing_is_left(client)
    assert world.desk.applied[:2] == ["second", "third"]
    assert world.desk.tried["first"] == 2


# ---- handlers that return futures


@dataclass
class Counter:
    """Handles matches by futures that the test resolves, as an actor would."""

    begun: dict[str, "asyncio.Future[None]"] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    refuses: Exception | None = None

    def handle(self, event: Event[MatchCompleted]) -> "asyncio.Future[None]":
        """Begin at once."""
        name = event.data.match_id
        self.tried.append(name)
        if self.refuses is not None:
            error, self.refuses = self.refuses, None
            raise error
        self.begun[name] = asyncio.get_running_loop().create_future()
        return self.begun[name]

    async def until_begun(self, *names: str) -> None:
        """Return when these have begun."""

        async def all_begun() -> bool:
            return self.begun.keys() >= set(names)

        await eventually(all_begun)


@dataclass
class CounterWorld:
    """A counter behind consumers."""

    counter: Counter
    letters: DeadLetters
    consumers: Consumers


@pytest.fixture
def counting(bus: Bus, database: Database) -> CounterWorld:
    """A counter for which a conflict is an effect as well."""
    counter = Counter()
    subscription = Subscription(
        MatchCompleted, counter.handle, in_turn=False, settled=(ConflictError,)
    )
    letters = DeadLetters(database, subscriptions=[subscription], clock=SystemClock())
    consumers = Consumers(
        bus, subscriptions=[subscription], dead_letters=letters, retry_delays_s=(0.01,) * 9
    )
    return CounterWorld(counter, letters, consumers)


async def test_a_refusal_before_the_future_is_judged_like_any_other(
    counting: CounterWorld, client: Client
) -> None:
    counting.counter.refuses = InputError("It is wrong.", code="WRONG")
    async with running(counting.consumers):
        await send(client, "bad")

        async def is_kept() -> bool:
            return len(await counting.letters.listed()) == 1

        await eventually(is_kept)
        counting.counter.refuses = ZeroDivisionError("a bug")
        await send(client, "good")
        await counting.counter.until_begun("good")
        counting.counter.begun["good"].set_result(None)
        await until_nothing_is_left(client)
    assert counting.counter.tried == ["bad", "good", "good"]


async def test_futures_fail_alike_and_what_is_settled_is_done_with(
    counting: CounterWorld, client: Client
) -> None:
    counter = counting.counter
    async with running(counting.consumers):
        await send(client, "poor", "late", "slow")
        await counter.until_begun("poor", "late", "slow")
        first = dict(counter.begun)
        first["poor"].set_exception(ConflictError("Not enough.", code="INSUFFICIENT_CREDITS"))
        del counter.begun["late"]
        first["late"].set_exception(NotFoundError("There is no account."))
        await counter.until_begun("late")
        counter.begun["late"].set_result(None)
        first["slow"].set_result(None)
        await until_nothing_is_left(client)
        assert await counting.letters.listed() == ()
    assert counter.tried == ["poor", "late", "slow", "late"]


async def test_a_future_that_never_ends_is_cancelled_and_tried_again(
    counting: CounterWorld, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(handling, "WATCH_EVERY_S", 0.01)
    counter = counting.counter
    async with running(counting.consumers):
        await send(client, "slow")
        await counter.until_begun("slow")
        never = counter.begun.pop("slow")
        await counter.until_begun("slow")
        counter.begun["slow"].set_result(None)
        await until_nothing_is_left(client)
    assert never.cancelled()


async def test_a_drain_waits_for_futures_and_sees_their_acknowledgements_off(
    counting: CounterWorld, client: Client
) -> None:
    async with running(counting.consumers):
        await send(client, "a", "b")
        await counting.counter.until_begun("a", "b")
        stopping = asyncio.create_task(counting.consumers.stop(TIMEOUT_S))
        await asyncio.wait((stopping,), timeout=0.05)
        assert not stopping.done()
        for future in counting.counter.begun.values():
            future.set_result(None)
        await stopping
        found = await client.jsm().consumer_info(STREAM, DURABLE)
        assert (found.num_pending, found.num_ack_pending) == (0, 0)


# ---- what is away


async def test_a_letter_that_cannot_be_stored_leaves_the_event_with_jetstream(
    bus: Bus, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, refusals = world.letters.keep, [UnavailableError("away")] * 3

    async def sometimes(**letter: Any) -> int:
        if refusals:
            raise refusals.pop()
        return await keep(**letter)

    monkeypatch.setattr(world.letters, "keep", sometimes)
    async with running(world.consumers(bus)):
        await client.jetstream().publish(MATCHES, b"{}")

        async def is_kept() -> bool:
            return len(await all_letters(world)) == 1

        await eventually(is_kept)
        await until_nothing_is_left(client)
    [letter] = await all_letters(world)
    assert letter.attempts == 4


# ---- what is not handled, or not twice


async def test_our_own_events_are_acknowledged_unread(
    bus: Bus, client: Client, world: World
) -> None:
    async with running(world.consumers(bus)):
        await client.jetstream().publish(MATCHES, b"not read", headers={"ce-source": "glamd"})
        ours = {"source_service": "glamd", "event_type": MATCHES, "data": {"amount": "odd"}}
        await client.jetstream().publish(MATCHES, orjson.dumps(ours))
        back = {"specversion": "1.0", "source": "glamd", "type": MATCHES, "data": {}}
        await client.jetstream().publish(MATCHES, orjson.dumps(back))
        await send(client, "theirs")
        await until_applied(world, 1)
        await until_nothing_is_left(client)
    assert world.desk.tried == {"theirs": 1}
    assert await all_letters(world) == []


async def test_an_event_published_twice_under_one_id_comes_once(
    bus: Bus, client: Client, world: World
) -> None:
    async with running(world.consumers(bus)):
        for _ in range(3):
            await send(client, "a", headers={"Nats-Msg-Id": "e-a"})
        await send(client, "b")
        await until_applied(world, 2)
        await until_nothing_is_left(client)
    assert world.desk.applied == ["a", "b"]


async def test_an_acknowledgement_that_is_lost_brings_the_event_again(
    nats_server: Any, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "ACK_WAIT_S", 0.3)
    async with proxied(nats_server.url) as (proxy, url), running_bus(url) as bus:

        async def cut_once(name: str) -> None:
            if world.desk.tried[name] == 1:
                proxy.cut()
                proxy.mend()

        world.desk.after = cut_once
        async with running(world.consumers(bus)):
            await send(client, "a")
            await until_applied(world, 2)
            await until_nothing_is_left(client)
    # Applied twice here, as this desk has no references; a ledger has.
    assert world.desk.applied == ["a", "a"]


async def test_what_waited_too_long_for_its_turn_is_given_back_unhandled(
    bus: Bus, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "STALE_AFTER_S", 0.1)
    world.desk.open.clear()
    async with running(world.consumers(bus)):
        await send(client, "first", "second")

        async def first_has_begun() -> bool:
            return world.desk.tried["first"] == 1

        await eventually(first_has_begun)
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(0.15, later.set_result, None)
        await later
        world.desk.open.set()
        await until_applied(world, 2)
        await until_nothing_is_left(client)
    found = await client.jsm().consumer_info(STREAM, DURABLE)
    assert found.delivered is not None
    # Three deliveries for two events: the second was not begun the first time.
    assert found.delivered.consumer_seq == 3
    assert world.desk.tried == {"first": 1, "second": 1}


# ---- order and bounds


async def test_a_merchants_events_take_turns_and_merchants_do_not_wait_for_one_another(
    bus: Bus, client: Client, world: World
) -> None:
    names = [[f"{number}-{n}" for n in range(20)] for number in range(5)]
    for turn in zip(*names, strict=True):
        for number, name in enumerate(turn):
            await send(client, name, number=number)
    world.desk.open.clear()
    async with running(world.consumers(bus)):

        async def all_merchants_at_work() -> bool:
            return world.desk.at_work == 5

        await eventually(all_merchants_at_work)
        world.desk.open.set()
        await until_applied(world, 100)
        await until_nothing_is_left(client)
    assert world.desk.most_at_work == 5
    for each in names:
        assert [name for name in world.desk.applied if name in each] == each


async def test_where_the_handler_keeps_the_order_itself_they_are_begun_in_order_and_at_once(
    bus: Bus, client: Client, database: Database
) -> None:
    world = world_of(database, in_turn=False)
    names = [f"m-{n}" for n in range(30)]
    await send(client, *names)
    world.desk.open.clear()
    async with running(world.consumers(bus)):

        async def all_begun() -> bool:
            return world.desk.at_work == 30

        await eventually(all_begun)
        assert list(world.desk.tried) == names
        world.desk.open.set()
        await until_nothing_is_left(client)


async def test_no_more_are_taken_than_there_is_room_for(
    bus: Bus, client: Client, database: Database
) -> None:
    world = world_of(database, in_turn=False)
    await send(client, *(f"m-{n}" for n in range(30)))
    world.desk.open.clear()
    async with running(world.consumers(bus, in_flight=8)):

        async def room_is_used() -> bool:
            return world.desk.at_work == 8

        await eventually(room_is_used)
        found = await client.jsm().consumer_info(STREAM, DURABLE)
        assert (found.num_ack_pending, found.num_pending) == (8, 22)
        world.desk.open.set()
        await until_applied(world, 30)
        await until_nothing_is_left(client)
    assert world.desk.most_at_work == 8


async def test_subjects_do_not_wait_for_one_another(
    bus: Bus, client: Client, database: Database
) -> None:
    world = world_of(database)
    created: list[str] = []

    async def make(event: Event[MerchantCreated]) -> None:
        created.append(event.data.domain)

    both = [world.subscription, Subscription(MerchantCreated, make)]
    letters = DeadLetters(database, subscriptions=both, clock=SystemClock())
    world.desk.open.clear()
    async with running(Consumers(bus, subscriptions=both, dead_letters=letters)):
        await send(client, "stuck")
        body = {
            "merchant_id": str(merchant(1)),
            "platform_name": "shopify",
            "domain": "a.example.com",
            "platform_shop_id": "1",
        }
        await client.jetstream().publish("evt.merchant.created.v1", orjson.dumps(body))

        async def is_created() -> bool:
            return created == ["a.example.com"]

        await eventually(is_created)
        world.desk.open.set()
        await until_nothing_is_left(client)


# ---- beginnings and ends


async def test_events_from_before_the_first_start_are_consumed_or_from_a_given_time(
    bus: Bus, client: Client, world: World
) -> None:
    await send(client, "before")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    async with running(world.consumers(bus, start_at=tomorrow)):

        async def is_made() -> bool:
            return len(await client.jsm().consumers_info(STREAM)) == 1

        await eventually(is_made)
        await until_nothing_is_left(client)
    assert world.desk.applied == []
    await client.jsm().delete_consumer(STREAM, DURABLE)
    async with running(world.consumers(bus)):
        await until_applied(world, 1)


async def test_a_consumer_goes_on_where_it_was_when_the_beginning_is_taken_out_of_the_settings(
    bus: Bus, client: Client, world: World
) -> None:
    a_while_ago = datetime.now(UTC) - timedelta(minutes=5)
    link = bus.current
    for number, start_at in enumerate((a_while_ago, None, a_while_ago + timedelta(minutes=1))):
        consumers = world.consumers(bus, start_at=start_at)
        async with running(consumers):
            await send(client, f"m{number}")
            await until_applied(world, number + 1)
            await until_nothing_is_left(client)
            await consumers.stop(5)
    assert bus.current is link
    assert world.desk.applied == ["m0", "m1", "m2"]


async def test_a_drain_finishes_what_is_begun_and_gives_the_rest_to_others_at_once(
    bus: Bus, client: Client, database: Database
) -> None:
    world = world_of(database)
    await send(client, "a", "b", "c")
    await send(client, "d", number=2)
    world.desk.open.clear()
    first = world.consumers(bus)
    async with running(first):

        async def two_are_begun() -> bool:
            return world.desk.at_work == 2

        await eventually(two_are_begun)
        stopping = asyncio.create_task(first.stop(TIMEOUT_S))
        await asyncio.sleep(0)
        assert not stopping.done()
        world.desk.open.set()
        await stopping
        assert sorted(world.desk.applied) == ["a", "d"]
        found = await client.jsm().consumer_info(STREAM, DURABLE)
        # Every acknowledgement has arrived; what was given back waits for somebody.
        assert found.ack_floor is not None
        assert found.num_ack_pending == 2
        async with running(world.consumers(bus)):
            await until_applied(world, 4)
            await until_nothing_is_left(client)
    assert sorted(world.desk.applied) == ["a", "b", "c", "d"]
    assert set(world.desk.tried.values()) == {1}


async def test_a_drain_with_a_handler_that_does_not_end_is_over_in_time(
    bus: Bus, client: Client, world: World
) -> None:
    await send(client, "stuck")
    world.desk.open.clear()
    consumers = world.consumers(bus)
    async with running(consumers):

        async def is_begun() -> bool:
            return world.desk.at_work == 1

        await eventually(is_begun)
        async with asyncio.timeout(10):
            await consumers.stop(0.05)
    assert world.desk.at_work == 0


async def test_nats_killed_in_the_middle_leaves_no_event_behind(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "ACK_WAIT_S", 0.5)
    server = EmbeddedBus(tmp_path)
    url = (await server.start()).url
    world = world_of(database)
    names = [f"m-{n}" for n in range(300)]
    try:
        async with running_bus(url) as bus:
            async with nats_client(url) as client:
                for number, name in enumerate(names):
                    await send(client, name, number=number % 20)
            async with running(world.consumers(bus, in_flight=16)):
                for kill in range(2):
                    await until_applied(world, 60 * (kill + 1))
                    link = await bus.link()
                    server.kill9()
                    async with asyncio.timeout(TIMEOUT_S):
                        await link.wait_lost()
                        await bus.link()

                async def all_applied() -> bool:
                    return set(world.desk.applied) == set(names)

                await eventually(all_applied)
                async with nats_client(url) as client:
                    await until_nothing_is_left(client)
    finally:
        await server.stop()
    assert await all_letters(world) == []


async def test_a_consumer_that_somebody_deleted_is_made_again(
    bus: Bus, client: Client, world: World
) -> None:
    async with running(world.consumers(bus)):
        await send(client, "a")
        await until_applied(world, 1)
        await client.jsm().delete_consumer(STREAM, DURABLE)
        await send(client, "b")

        async def both_applied() -> bool:
            return {"a", "b"} == set(world.desk.applied)

        await eventually(both_applied)


async def test_a_consumer_that_is_refused_costs_the_others_no_link(
    bus: Bus, client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "LAST_PAUSE_S", 0.05)
    # Somebody has made it, as one that JetStream sends by itself.
    pushed = api.ConsumerConfig(durable_name=DURABLE, deliver_subject="elsewhere")
    await client.jsm().add_consumer(STREAM, pushed)
    await send(client, "a")
    link = bus.current
    with capture_logs() as logs:
        async with running(world.consumers(bus)):

            async def is_told() -> bool:
                return [each["event"] for each in logs].count("consumer_refused") >= 3

            await eventually(is_told)
            await client.jsm().delete_consumer(STREAM, DURABLE)
            await until_applied(world, 1)
    assert bus.current is link


async def test_a_stream_that_somebody_deleted_is_made_again(
    bus: Bus, client: Client, world: World
) -> None:
    async with running(world.consumers(bus)):
        await send(client, "a")
        await until_applied(world, 1)
        await delete_stream(client)

        async def is_there_again() -> bool:
            return len(await client.jsm().consumers_info(STREAM)) == 1

        await eventually(is_there_again, errors=(Exception,))
        await send(client, "b")
        await until_applied(world, 2)


async def test_strangers_who_write_to_our_inbox_change_nothing(
    bus: Bus, client: Client, world: World
) -> None:
    consumers = world.consumers(bus)
    async with running(consumers):
        await send(client, "a")
        await until_applied(world, 1)
        inbox = consumers._consumers[0]._inbox
        assert inbox is not None
        await client.publish(inbox.subject, orjson.dumps(a_match("forged")))
        await client.publish(inbox.subject, b"", headers={"Status": "409 What"})
        await client.publish(inbox.subject, orjson.dumps(a_match("forged")), reply="x")
        await client.flush()
        await send(client, "b")

        async def b_is_applied() -> bool:
            return "b" in world.desk.applied

        await eventually(b_is_applied)
        await until_nothing_is_left(client)


async def test_the_lag_tells_what_waits_and_what_is_unfinished(
    bus: Bus, client: Client, world: World
) -> None:
    await send(client, *(f"m-{n}" for n in range(10)))
    world.desk.open.clear()
    consumers = world.consumers(bus, in_flight=4)
    async with running(consumers):

        async def one_is_begun() -> bool:
            return world.desk.at_work == 1

        await eventually(one_is_begun)
        [lag] = await consumers.lag()
        assert (lag.subject, lag.waiting, lag.unfinished) == (MATCHES, 6, 4)
        world.desk.open.set()
        await until_applied(world, 10)


async def test_without_nats_the_lag_is_an_error_in_words(database: Database) -> None:
    world = world_of(database)
    bus = Bus(["nats://127.0.0.1:1"], name="test")
    with pytest.raises(UnavailableError, match="NATS: not connected yet"):
        await world.consumers(bus).lag()
