"""From the outboxes to JetStream: what is not lost, not skipped, not overtaken, and not in the way.

Order is judged as spec 3 has it: as somebody sees it who drops the ids that he has seen.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.js import api

from glamd.clock import Clock, SystemClock
from glamd.db import Database
from glamd.embedded.bus import EmbeddedBus
from glamd.errors import UnavailableError
from glamd.events import outbox_upkeep, publisher, relay
from glamd.events.bus import Bus
from glamd.events.relay import OutboxRelay, Relay
from glamd.events.store import OutboxTable
from tests.support.database_proxy import DatabaseProxy
from tests.support.events_world import (
    add,
    first_seen,
    in_outbox,
    merchant,
    running,
    running_bus,
    unpublished,
)
from tests.support.nats import STREAM, count_stored, delete_stream, nats_client, stored
from tests.support.postgres import eventually
from tests.support.settable_clock import SettableClock


def relay_of(bus: Bus, database: Database, clock: Clock | None = None) -> Relay:
    """A relay that finds rows at once, as it is woken for none."""
    return Relay(
        bus,
        databases={"glam": database, "cde": database},
        clock=clock or SystemClock(),
        poll_s=0.01,
        batch_rows=50,
    )


async def until_published(database: Database, schema: str = "glam") -> None:
    """Return when every row is marked."""

    async def all_marked() -> bool:
        return await unpublished(database, schema) == 0

    await eventually(all_marked)


def glam_part(of: Relay) -> OutboxRelay:
    """What relays the outbox of `glam`."""
    return of._relays["glam"]


# ---- what is sent


async def test_an_event_goes_out_as_the_contract_says(
    bus: Bus, client: Client, database: Database
) -> None:
    [event_id] = await add(database, 7, text='ä "quoted"')
    row = await database.fetchrow("SELECT created_at FROM glam.outbox")
    assert row is not None
    async with running(relay_of(bus, database)):
        await until_published(database)
    [message] = await stored(client)
    assert message.subject == "evt.credits.consumed.v1"
    at = message.content.pop("timestamp")
    assert datetime.fromisoformat(at) == row["created_at"]
    assert message.content == {
        "event_id": event_id,
        "event_type": "evt.credits.consumed.v1",
        "correlation_id": "c-1",
        "timestamp": at,
        "source_service": "glamd",
        "data": {"merchant_id": str(merchant(7)), "text": 'ä "quoted"'},
        "metadata": {},
    }
    assert message.headers == {
        "Nats-Msg-Id": event_id,
        "ce-specversion": "1.0",
        "ce-id": event_id,
        "ce-type": "evt.credits.consumed.v1",
        "ce-source": "glamd",
        "ce-time": at,
        "ce-subject": str(merchant(7)),
    }


async def test_both_outboxes_are_sent_each_in_order(
    bus: Bus, client: Client, database: Database
) -> None:
    for schema in ("glam", "cde"):
        for _ in range(3):
            await add(database, *range(40), schema=schema)
    async with running(relay_of(bus, database)):
        await until_published(database)
        await until_published(database, "cde")
    messages = await stored(client)
    assert len(messages) == 240
    seen = first_seen(messages)
    for schema in ("glam", "cde"):
        for merchant_id, ids in (await in_outbox(database, schema)).items():
            assert [each for each in seen[merchant_id] if each in ids] == ids


async def test_what_was_sent_is_not_sent_again(
    bus: Bus, client: Client, database: Database
) -> None:
    await add(database, 1, 2)
    async with running(relay_of(bus, database)):
        await until_published(database)
    await add(database, 3)
    async with running(relay_of(bus, database)):
        await until_published(database)
    assert await count_stored(client) == 3


async def test_a_wake_is_enough_where_no_poll_comes(
    bus: Bus, client: Client, database: Database
) -> None:
    sender = Relay(bus, databases={"glam": database}, clock=SystemClock(), poll_s=3600)
    async with running(sender):
        await add(database, 1)
        sender.wake()
        await until_published(database)
        await add(database, 1)
        sender.wake()
        await until_published(database)


# ---- nothing is lost, nothing overtakes


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedBus, str]]:
    """A server of the test's own, which may be killed."""
    server = EmbeddedBus(tmp_path)
    url = (await server.start()).url
    yield server, url
    await server.stop()


async def test_nats_killed_and_restarted_in_the_middle_loses_and_reorders_nothing(
    mortal: tuple[EmbeddedBus, str], database: Database
) -> None:
    server, url = mortal
    for _ in range(10):
        await add(database, *range(30))
    async with running_bus(url) as bus, running(relay_of(bus, database)):
        for _ in range(3):
            left = await unpublished(database)

            async def goes_on(left: int = left) -> bool:
                return left == 0 or await unpublished(database) < left

            await eventually(goes_on)
            link = await bus.link()
            server.kill9()
            await add(database, *range(30))
            async with asyncio.timeout(10):
                await link.wait_lost()
                await bus.link()
        await until_published(database)
        async with nats_client(url) as client:
            messages = await stored(client)
    assert first_seen(messages) == await in_outbox(database)


async def test_while_nats_is_away_rows_wait_and_writers_do_not(
    mortal: tuple[EmbeddedBus, str], database: Database
) -> None:
    server, url = mortal
    async with running_bus(url) as bus:
        sender = relay_of(bus, database)
        async with running(sender):
            await add(database, 1)
            await until_published(database)
            await server.stop()

            async def is_noticed() -> bool:
                return bus.trouble() is not None

            await eventually(is_noticed)
            await add(database, *range(20))
            lag = {each.outbox: each for each in await sender.lag()}
            assert (lag["glam"].rows, lag["cde"].rows) == (20, 0)
            assert lag["glam"].oldest_s > 0
            assert lag["glam"].sent_here
            # A drain does not wait for it either.
            async with asyncio.timeout(4):
                await sender.stop(5)
            await server.restart()
            await until_published(database)


async def test_a_database_that_is_away_and_comes_back_loses_and_repeats_nothing_for_the_reader(
    bus: Bus,
    client: Client,
    database: Database,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "LAST_PAUSE_S", 0.05)
    async with DatabaseProxy(database_url) as proxy:
        through = await Database.connect(proxy.url, pool_size=2)
        async with running(relay_of(bus, through)):
            for _ in range(3):
                await add(database, *range(60))
                proxy.lose_answer = 3  # of the lead, the look, the mark
                await until_published(database)
                proxy.go_down()
                await add(database, *range(10))
                proxy.is_down = False
            await until_published(database)
        await through.close()
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_a_row_that_commits_late_is_sent_although_later_ids_went_before(
    bus: Bus, client: Client, database: Database
) -> None:
    async with running(relay_of(bus, database)), database.connection() as late:
        async with late.transaction():
            [first] = await add(late, 1)
            [second] = await add(database, 1)

            async def second_is_sent() -> bool:
                return await count_stored(client) == 1

            await eventually(second_is_sent)
        await until_published(database)
    # They shared no lock, so neither is the cause of the other: commit order is the order.
    assert first_seen(await stored(client)) == {str(merchant(1)): [second, first]}


async def test_a_row_that_commits_after_the_floor_has_passed_it_is_sent_all_the_same(
    bus: Bus, client: Client, database: Database, clock: SettableClock
) -> None:
    sender = relay_of(bus, database, clock)
    async with running(sender), database.connection() as late:
        async with late.transaction():
            await add(late, 1)
            newest = 0
            for _ in range(3):
                await add(database, 2)
                await until_published(database)
                clock.advance(relay.LATE_COMMIT_S)
                newest = await database.fetchval("SELECT max(id) FROM glam.outbox")
            assert 1 < glam_part(sender)._floor < newest
        clock.advance(relay.WHOLE_EVERY_S)
        await until_published(database)
    assert await count_stored(client) == 4


async def test_writers_that_take_the_merchants_lock_are_sent_in_the_order_of_their_commits(
    bus: Bus, client: Client, database: Database
) -> None:
    await database.execute("CREATE TABLE IF NOT EXISTS counters (m int PRIMARY KEY, n int)")
    await database.execute("INSERT INTO counters VALUES (1, 0), (2, 0) ON CONFLICT DO NOTHING")

    async def write(number: int) -> None:
        for _ in range(15):
            async with database.transaction() as connection:
                n = await connection.fetchval(
                    "UPDATE counters SET n = n + 1 WHERE m = $1 RETURNING n", 1 + number % 2
                )
                await add(connection, 1 + number % 2, text=str(n))

    async with running(relay_of(bus, database)):
        await asyncio.gather(*(write(number) for number in range(3)))
        await until_published(database)
    for number in (1, 2):
        texts = [
            int(message.content["data"]["text"])
            for message in await stored(client)
            if message.merchant_id == str(merchant(number))
        ]
        assert texts == list(range(1, len(texts) + 1))


async def test_a_lost_mark_makes_a_repeat_that_jetstream_drops(
    bus: Bus, client: Client, database: Database
) -> None:
    await add(database, 1, 2, 1)
    async with running(relay_of(bus, database)):
        await until_published(database)
        await database.execute("UPDATE glam.outbox SET published_at = NULL")
        await until_published(database)
    assert await count_stored(client) == 3
    assert first_seen(await stored(client)) == await in_outbox(database)


# ---- several relays


@pytest.fixture
async def another_database(database_url: str) -> AsyncIterator[Database]:
    """The same database, connected from another node."""
    connected = await Database.connect(database_url, pool_size=4)
    yield connected
    await connected.close()


async def until_leading(sender: Relay) -> None:
    """Return when this relay sends the outbox of `glam`."""

    async def leads() -> bool:
        return glam_part(sender).is_leading()

    await eventually(leads)


async def test_when_the_relaying_node_dies_another_goes_on(
    bus: Bus,
    client: Client,
    database: Database,
    another_database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "LEAD_CHECK_S", 0.02)
    first, second = relay_of(bus, database), relay_of(bus, another_database)
    async with running(second):
        async with running(first):
            await eventually(lambda: anybody_leads(first, second))
            await add(database, *range(5))
            await until_published(database)
        await until_leading(second)
        await add(database, *range(5))
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def anybody_leads(*senders: Relay) -> bool:
    """Whether exactly one of them sends the outbox of `glam`."""
    return [glam_part(each).is_leading() for each in senders].count(True) == 1


async def test_a_relay_whose_session_is_lost_lets_go_and_somebody_goes_on(
    bus: Bus,
    client: Client,
    database: Database,
    another_database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "LEAD_CHECK_S", 0.02)
    first, second = relay_of(bus, database), relay_of(bus, another_database)
    async with running(first, second):
        for _ in range(3):
            await eventually(lambda: anybody_leads(first, second))
            await database.fetchval(
                "SELECT pg_terminate_backend(pid) FROM pg_locks"
                " WHERE locktype = 'advisory' AND granted AND objid = 2"
            )
            await add(database, *range(5))
            await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_two_relays_that_both_think_they_lead_keep_the_order(
    bus: Bus, client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def always(_self: OutboxTable, _connection: object) -> bool:
        return True

    monkeypatch.setattr(OutboxTable, "lead", always)
    # JetStream must not help.
    await client.jsm().update_stream(
        api.StreamConfig(name=STREAM, subjects=["evt.>", "cmd.>"], duplicate_window=0.1)
    )
    for _ in range(10):
        await add(database, *range(30))
    async with running(relay_of(bus, database), relay_of(bus, database)):
        for _ in range(5):
            await add(database, *range(30))
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_the_session_that_leads_is_freed_when_its_node_loses_its_power(
    database: Database,
) -> None:
    table = OutboxTable("glam")
    async with database.dedicated() as here, database.dedicated() as there:
        assert await table.lead(here)
        assert await table.lead(here)
        assert not await table.lead(there)
        assert await OutboxTable("cde").lead(there)
        settings = [
            await here.fetchval(f"SHOW {name}")
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        ]
        assert settings == ["10", "5", "3"]
        assert await here.fetchval("SHOW synchronous_commit") == "off"
    async with database.dedicated() as here:

        async def is_free() -> bool:
            return await table.lead(here)

        await eventually(is_free)


# ---- JetStream refuses


async def test_a_full_stream_holds_everything_and_takes_it_in_order_when_there_is_room(
    bus: Bus, client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LAST_PAUSE_S", 0.05)
    config = api.StreamConfig(
        name=STREAM, subjects=["evt.>", "cmd.>"], max_msgs=10, discard=api.DiscardPolicy.NEW
    )
    await client.jsm().update_stream(config)
    for _ in range(4):
        await add(database, *range(8))
    async with running(relay_of(bus, database)):

        async def is_full() -> bool:
            return await count_stored(client) == 10

        await eventually(is_full)
        assert await unpublished(database) >= 22
        await client.jsm().update_stream(config.evolve(max_msgs=-1))
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_an_event_that_is_never_taken_stops_its_merchant_alone(
    bus: Bus, client: Client, database: Database, clock: SettableClock
) -> None:
    config = api.StreamConfig(name=STREAM, subjects=["evt.>", "cmd.>"])
    await client.jsm().update_stream(config.evolve(max_msg_size=2000))
    await add(database, 1, 2)
    await add(database, 1, text="x" * 3000)
    await add(database, 1, 2, 3)
    sender = relay_of(bus, database, clock)
    async with running(sender):

        async def others_are_sent() -> bool:
            return await count_stored(client) == 4

        await eventually(others_are_sent)
        await add(database, 2, 3)

        async def still_go() -> bool:
            return await unpublished(database) == 2

        await eventually(still_go)
        assert await count_stored(client) == 6
        await client.jsm().update_stream(config.evolve(max_msg_size=-1))
        clock.advance(relay.LAST_STUCK_S)
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_an_event_beyond_the_servers_limit_does_not_cost_the_connection(
    bus: Bus, client: Client, database: Database
) -> None:
    link = await bus.link()
    await add(database, 1, text="x" * link.max_payload_bytes)
    await add(database, 1, 2)
    async with running(relay_of(bus, database)):

        async def the_other_is_sent() -> bool:
            return await unpublished(database) == 2

        await eventually(the_other_is_sent)
    assert [each.merchant_id for each in await stored(client)] == [str(merchant(2))]
    assert not link.is_lost


async def test_a_subject_that_is_none_of_ours_is_told_and_not_sent(
    bus: Bus, client: Client, database: Database
) -> None:
    await add(database, 1, subject="evt.bad subject\r\nPUB evt.x 0")
    await add(database, 2)
    async with running(relay_of(bus, database)):

        async def the_other_is_sent() -> bool:
            return await unpublished(database) == 1

        await eventually(the_other_is_sent)
    assert [message.merchant_id for message in await stored(client)] == [str(merchant(2))]


async def test_a_stream_that_was_deleted_is_made_again(
    bus: Bus, client: Client, database: Database
) -> None:
    await delete_stream(client)
    await add(database, 1, 2, 1)
    async with running(relay_of(bus, database)):
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


async def test_an_acknowledgement_that_never_comes_is_asked_for_again(
    bus: Bus, client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "ACK_TIMEOUT_S", 0.05)
    config = api.StreamConfig(name=STREAM, subjects=["evt.>", "cmd.>"])
    await client.jsm().update_stream(config.evolve(no_ack=True))
    await add(database, 1, 1, 2)
    async with running(relay_of(bus, database)):

        async def arrives() -> bool:
            return await count_stored(client) == 2

        await eventually(arrives)
        # Without a word from the stream nothing is taken for granted.
        assert await unpublished(database) == 3
        await client.jsm().update_stream(config.evolve(no_ack=False))
        await until_published(database)
    assert first_seen(await stored(client)) == await in_outbox(database)


# ---- the window, the purge, the replay


async def test_the_purge_takes_what_is_older_than_the_window_and_nothing_that_waits(
    bus: Bus, database: Database, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_upkeep, "PURGE_ROWS", 7)
    await add(database, *range(30))
    await database.execute("UPDATE glam.outbox SET published_at = $1 WHERE id % 3 > 0", clock.now())
    upkeep = relay_of(bus, database, clock)._upkeep["glam"]
    clock.advance(timedelta(hours=72).total_seconds())
    assert await upkeep.purge() == 0
    clock.advance(1)
    assert await upkeep.purge() == 20
    assert await upkeep.purge() == 0
    assert await unpublished(database) == 10


async def test_after_jetstream_has_lost_its_data_a_replay_brings_it_back(
    bus: Bus, client: Client, database: Database
) -> None:
    await add(database, 1, 2, 1)
    sender = relay_of(bus, database)
    async with running(sender):
        await until_published(database)
        since = datetime.now(UTC)
        await add(database, 2, 3, 3, 1)
        await add(database, 3, subject="evt.device.online.v1", schema="cde")
        await until_published(database)
        await until_published(database, "cde")
        await lose_everything(client)
        assert await sender.replay(since=since) == 5
        again = [message.merchant_id for message in await stored(client)]
        assert sorted(again) == sorted(str(merchant(each)) for each in (2, 3, 3, 1, 3))


async def lose_everything(client: Client) -> None:
    """What a crash of JetStream before its disk has it comes to, ids and all."""
    await delete_stream(client)
    await client.jsm().add_stream(name=STREAM, subjects=["evt.>", "cmd.>"])


async def test_a_replay_can_be_of_one_subject_or_one_merchant(
    bus: Bus, client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_upkeep, "REPLAY_ROWS", 3)
    since = datetime(2020, 1, 1, tzinfo=UTC)
    for number in range(4):
        await add(database, 1, 2, subject=f"evt.credits.s{number % 2}.v1")
    sender = relay_of(bus, database)
    async with running(sender):
        await until_published(database)
        await lose_everything(client)
        assert await sender.replay(since=since, subject="evt.credits.s1.v1") == 4
        assert {each.subject for each in await stored(client)} == {"evt.credits.s1.v1"}
        await lose_everything(client)
        assert await sender.replay(since=since, merchant_id=merchant(2)) == 4
        assert {each.merchant_id for each in await stored(client)} == {str(merchant(2))}
        assert await sender.replay(since=since, merchant_id=merchant(9)) == 0


@pytest.mark.parametrize("ahead", [timedelta(hours=1), -timedelta(hours=1)])
async def test_a_replay_leaves_nothing_out_that_a_node_with_a_wrong_clock_has_sent(
    bus: Bus, client: Client, database: Database, ahead: timedelta
) -> None:
    since = datetime.now(UTC) - timedelta(minutes=1)
    await add(database, 1, 2, 3)
    async with running(relay_of(bus, database, SettableClock(datetime.now(UTC) + ahead))):
        await until_published(database)
    await lose_everything(client)
    sender = relay_of(bus, database)
    async with running(sender):
        assert await sender.replay(since=since) == 3
    assert await count_stored(client) == 3


async def test_a_clock_that_is_ahead_purges_nothing_early(bus: Bus, database: Database) -> None:
    await add(database, 1, 2, 3)
    await database.execute("UPDATE glam.outbox SET published_at = now()")
    ahead = SettableClock(datetime.now(UTC) + timedelta(days=30))
    assert await relay_of(bus, database, ahead)._upkeep["glam"].purge() == 0


async def test_who_commits_into_one_outbox_wakes_nobody_who_looks_at_the_other(
    bus: Bus, database: Database
) -> None:
    sender = relay_of(bus, database)
    sender.wake("glam")
    assert [part._woken.is_set() for part in sender._relays.values()] == [True, False]
    sender.wake()
    assert all(part._woken.is_set() for part in sender._relays.values())


async def test_a_replay_of_what_is_not_lost_leaves_the_stream_as_it_is(
    bus: Bus, client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_upkeep, "REPLAY_ROWS", 4)
    await add(database, *range(10))
    sender = relay_of(bus, database)
    async with running(sender):
        await until_published(database)
        assert await sender.replay(since=datetime(2020, 1, 1, tzinfo=UTC)) == 10
    assert await count_stored(client) == 10
    assert await unpublished(database) == 0


async def test_a_replay_that_nobody_takes_says_so(
    bus: Bus, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_upkeep, "REPLAY_PATIENCE_S", 0.05)
    await add(database, 1)
    await database.execute("UPDATE glam.outbox SET published_at = now()")
    with pytest.raises(UnavailableError):
        await relay_of(bus, database).replay(since=datetime(2020, 1, 1, tzinfo=UTC))
    assert await unpublished(database) == 1


# ---- the end


async def test_a_stop_sends_what_was_committed_before(
    bus: Bus, client: Client, database: Database
) -> None:
    sender = Relay(
        bus, databases={"glam": database}, clock=SystemClock(), poll_s=3600, batch_rows=5
    )
    async with running(sender):
        await until_leading(sender)
        await add(database, *range(300))
        await sender.stop(10)
        assert await unpublished(database) == 0
        assert await count_stored(client) == 300


async def test_a_stop_that_cannot_succeed_ends_with_its_time(bus: Bus, database: Database) -> None:
    sender = relay_of(bus, database)
    async with asyncio.timeout(10):
        await sender.stop(0.05)  # nothing runs that could send
