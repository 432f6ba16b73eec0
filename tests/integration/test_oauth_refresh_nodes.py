"""Renewing platform tokens on several nodes, with a database that goes away, and through time.

Each node has its own connections; the platform counts what it is asked. A lease of 90 s is made to
run out in its row.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from glamd import db_errors
from glamd.credentials.model import ShopConnection
from glamd.credentials.refresh import renewer, service, store
from glamd.credentials.refresh.service import Refresher
from glamd.db import Database
from tests.support.database_proxy import DatabaseProxy
from tests.support.oauth_platform import Act, OAuthPlatform
from tests.support.postgres import eventually
from tests.support.refresh_world import CLIENT, NEVER_S, World

PATIENCE_S = 10.0
LATE = Act(is_late=True, takes_effect=True)
TAKE_OVER_S = service.TAKE_OVER_AFTER_S + 1
ANSWERS_OF_A_COMMIT = 8
"""More than a commit's transaction waits for, so that the last rounds lose nothing."""


@pytest.fixture
async def world(module_database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A platform and an empty vault."""
    async with World.make(module_database_url, tmp_path) as made:
        yield made


async def has_looked(node: Refresher) -> None:
    """Return when the node's job has reached the database."""

    async def look() -> bool:
        return node._reached_since_s is not None

    await eventually(look)


def told(events: list[Any], name: str) -> Callable[[], Any]:
    """An attempt that is true once this event was logged."""

    async def look() -> bool:
        return any(event["event"] == name for event in events)

    return look


# ---- several nodes


async def test_two_nodes_ask_once_for_one_token(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node("a") as a, world.node("b") as b:
        await world.platform.called(1)
        waiting = [asyncio.create_task(node.renew(connection.token_id)) for node in (a, b, a, b)]
        await asyncio.gather(has_looked(a), has_looked(b))
        assert not any(one.done() for one in waiting)
        world.platform.release()
        assert all(await asyncio.gather(*waiting))
    assert len(world.platform.calls) == 1
    assert world.platform.is_good(await world.data(connection))
    assert (await world.now(connection)).generation == 2
    assert await world.refreshes(connection) == [None]


async def test_three_nodes_share_what_is_due_and_use_no_refresh_token_twice(world: World) -> None:
    connections = [await world.connect() for _ in range(40)]
    async with world.node("a"), world.node("b"), world.node("c"):
        for connection in connections:
            await world.is_renewed(connection)
    used = [call.refresh_token for call in world.platform.calls]
    assert len(used) == len(set(used)) == 40


async def test_twenty_readers_of_one_token_are_one_call_and_one_that_goes_away_ends_nothing(
    world: World,
) -> None:
    async with world.node(interval_s=NEVER_S) as node:
        await has_looked(node)
        connection = await world.connect(expires_in_s=-1)
        world.platform.misbehave(LATE)
        readers = [asyncio.create_task(node.renew(connection.token_id)) for _ in range(20)]
        await world.platform.called(1)
        readers[0].cancel()
        await asyncio.wait(readers[:1])
        world.platform.release()
        assert await asyncio.gather(*readers[1:]) == [True] * 19
    assert len(world.platform.calls) == 1


async def test_what_a_client_stores_during_a_renewal_is_what_stays(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    with capture_logs() as events:
        async with world.node():
            await world.platform.called(1)
            again = await world.connect(merchant_id=connection.merchant_id, expires_in_s=3600)
            stored = await world.data(again)
            world.platform.release()
            await eventually(told(events, "platform_token_refresh_superseded"))
    assert await world.data(connection) == stored
    assert await world.now(connection) == again
    assert await world.refreshes(connection) == [store.SUPERSEDED]


async def test_a_failure_says_nothing_of_what_a_client_stored_meanwhile(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(is_late=True, error=(400, "invalid_grant")))
    with capture_logs() as events:
        async with world.node():
            await world.platform.called(1)
            again = await world.connect(merchant_id=connection.merchant_id, expires_in_s=3600)
            world.platform.release()
            await eventually(told(events, "platform_token_refresh_failed"))
    assert await world.now(connection) == again
    assert await world.refreshes(connection) == ["INVALID_GRANT"]


async def test_a_token_deleted_during_a_renewal_does_not_come_back(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    with capture_logs() as events:
        async with world.node():
            await world.platform.called(1)
            await world.vault().delete(connection.merchant_id, "shopify", accessor=CLIENT)
            world.platform.release()
            await eventually(told(events, "platform_token_refresh_superseded"))
    assert await world.database.fetchval("SELECT count(*) FROM glam.platform_tokens") == 0


# ---- claims that run out


async def test_a_claim_that_ran_out_is_taken_over_and_the_answer_that_comes_too_late_is_dropped(
    world: World,
) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    with capture_logs() as events:
        async with world.node("a", interval_s=NEVER_S), world.node("b") as b:
            await world.platform.called(1)
            await has_looked(b)
            await world.let_claims_run_out()
            world.clock.advance(TAKE_OVER_S)
            renewed = await world.is_renewed(connection)
            data = await world.data(connection)
            world.platform.release()
            await eventually(told(events, "platform_token_refresh_superseded"))
    assert len(world.platform.calls) == 2
    assert await world.data(connection) == data
    assert await world.now(connection) == renewed
    assert world.platform.is_good(data)


async def test_a_late_answer_is_stored_where_the_node_that_took_over_was_refused(
    world: World,
) -> None:
    world.platform.retains = False
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node("a", interval_s=NEVER_S), world.node("b") as b:
        await world.platform.called(1)
        await has_looked(b)
        await world.let_claims_run_out()
        world.clock.advance(TAKE_OVER_S)
        failed = await world.has_failed(connection)
        assert failed.refresh_error == "INVALID_GRANT"
        world.platform.release()
        renewed = await world.is_renewed(connection)
    assert (renewed.refresh_failures, renewed.refresh_not_before) == (0, None)
    assert world.platform.is_good(await world.data(connection))


async def test_of_two_answers_the_later_one_stays_however_they_are_committed(
    world: World,
) -> None:
    connection = await world.connect()
    async with DatabaseProxy(world.url) as proxy:
        world.platform.misbehave(LATE)
        with capture_logs() as events:
            async with world.node("a", url=proxy.url, interval_s=NEVER_S):
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                async with world.node("b") as b:
                    await has_looked(b)
                    held = world.platform.hold()
                    await world.let_claims_run_out()
                    world.clock.advance(TAKE_OVER_S)
                    await world.platform.called(2)
                    proxy.is_down = False
                    # The first answer is committed while the second is on its way.
                    await eventually(lambda: _has_generation(world, connection, 2))
                    held.set()
                    await eventually(lambda: _has_generation(world, connection, 3))
    assert world.platform.is_good(await world.data(connection))
    assert await world.refreshes(connection) == [None, None]


async def test_a_refusal_does_not_count_where_a_late_answer_was_stored_meanwhile(
    world: World,
) -> None:
    connection = await world.connect()
    async with DatabaseProxy(world.url) as proxy:
        world.platform.misbehave(LATE)
        with capture_logs() as events:
            async with world.node("a", url=proxy.url, interval_s=NEVER_S):
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                async with world.node("b") as b:
                    await has_looked(b)
                    held = world.platform.hold(error=(400, "invalid_grant"))
                    await world.let_claims_run_out()
                    world.clock.advance(TAKE_OVER_S)
                    await world.platform.called(2)
                    proxy.is_down = False
                    await eventually(lambda: _has_generation(world, connection, 2))
                    held.set()
                    await eventually(told(events, "platform_token_refresh_failed"))
                    renewed = await world.is_renewed(connection)
    assert (renewed.refresh_failures, renewed.refresh_error) == (0, None)
    assert renewed.refresh_not_before is None
    assert await world.refreshes(connection) == [None, "INVALID_GRANT"]


async def test_a_late_failure_does_not_take_the_claim_from_who_took_over(world: World) -> None:
    connection = await world.connect()
    first = world.platform.hold(error=(400, "invalid_grant"))
    second = world.platform.hold()
    with capture_logs() as events:
        async with world.node("a", interval_s=NEVER_S), world.node("b") as b:
            await world.platform.called(1)
            await has_looked(b)
            await world.let_claims_run_out()
            world.clock.advance(TAKE_OVER_S)
            await world.platform.called(2)
            claim = await claim_of(world, connection)
            first.set()
            await eventually(told(events, "platform_token_refresh_failed"))
            await eventually(lambda: _has_refreshes(world, connection, 1))
            assert await claim_of(world, connection) == claim
            assert (await world.now(connection)).refresh_failures == 0
            second.set()
            await world.is_renewed(connection)
    assert await world.refreshes(connection) == ["INVALID_GRANT", None]


async def test_right_after_an_outage_the_holder_of_a_claim_comes_first(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node("a", interval_s=NEVER_S):
        await world.platform.called(1)
        await world.let_claims_run_out()
        claim = await claim_of(world, connection)
        async with world.node("b") as b:
            await has_looked(b)
            assert not await b.renew(connection.token_id)
            assert await claim_of(world, connection) == claim
            world.clock.advance(TAKE_OVER_S)
            await world.platform.called(2)
            await world.is_renewed(connection)


async def test_a_node_that_stood_still_does_not_ask_with_a_claim_that_may_be_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await world.connect()
    real = store.claim_due

    async def slow(*args: Any, **kwargs: Any) -> Any:
        found = await real(*args, **kwargs)
        if found:
            world.clock.advance(store.LEASE_S)
        return found

    monkeypatch.setattr(store, "claim_due", slow)
    async with world.node():
        assert (await world.has_failed(connection)).refresh_error == "STALLED"
    assert world.platform.calls == []


# ---- a database that goes away


async def test_an_answer_is_kept_through_an_outage_and_the_platform_is_not_asked_again(
    world: World,
) -> None:
    connection = await world.connect()
    world.platform.retains = False
    world.platform.misbehave(LATE)
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node(url=proxy.url) as node:
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                waiting = asyncio.create_task(node.renew(connection.token_id))
                assert (await world.now(connection)).generation == 1
                proxy.is_down = False
                assert await waiting
    assert len(world.platform.calls) == 1
    assert world.platform.is_good(await world.data(connection))
    assert await world.refreshes(connection) == [None]


async def test_whatever_answer_of_the_commit_is_lost_the_pair_is_stored_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_errors, "LOG_EVERY_S", 0.0)
    async with (
        DatabaseProxy(world.url) as proxy,
        world.node(url=proxy.url, interval_s=NEVER_S) as node,
    ):
        await has_looked(node)
        unknown = 0
        for lost in range(1, ANSWERS_OF_A_COMMIT + 1):
            connection = await world.connect(expires_in_s=-1)
            calls = len(world.platform.calls)
            held = world.platform.hold()
            renewing = asyncio.create_task(node.renew(connection.token_id))
            await world.platform.called(calls + 1)
            with capture_logs() as events:
                proxy.lose_answer = lost
                held.set()
                async with asyncio.timeout(PATIENCE_S):
                    assert await renewing
            proxy.lose_answer = 0
            unknown += any(event["event"] == "database_outcome_unknown" for event in events)
            assert len(world.platform.calls) == calls + 1
            assert (await world.now(connection)).generation == 2
            assert await world.refreshes(connection) == [None]
            assert world.platform.is_good(await world.data(connection))
        assert unknown >= 1


async def test_a_node_that_dies_with_an_answer_loses_it_and_the_next_one_mends_it(
    world: World,
) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node("a", url=proxy.url) as dying:
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                await dying.stop(timeout_s=0.05)
    assert any(event["event"] == "platform_token_refresh_lost" for event in events)
    assert (await world.now(connection)).generation == 1
    await world.let_claims_run_out()
    async with world.node("b") as b:
        await has_looked(b)
        world.clock.advance(TAKE_OVER_S)
        await world.is_renewed(connection)
    assert world.platform.is_good(await world.data(connection))
    used = [call.refresh_token for call in world.platform.calls]
    assert used[0] == used[1]


async def test_patience_with_the_database_has_an_end(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node(url=proxy.url):
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                world.clock.advance(renewer.COMMIT_PATIENCE_S + 1)
                await eventually(told(events, "platform_token_refresh_lost"))
    assert (await world.now(connection)).generation == 1


async def test_a_failure_that_cannot_be_written_makes_the_claim_wait_instead(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(Act(is_late=True, answer="500"))
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node(url=proxy.url):
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_failure_unwritten"))
                proxy.is_down = False
    assert (await world.now(connection)).refresh_failures == 0
    assert await world.is_claimed(connection)


async def test_the_job_outlives_an_outage(world: World) -> None:
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node(url=proxy.url) as node:
                await has_looked(node)
                proxy.go_down()
                await eventually(told(events, "platform_token_refresh_blind"))
                connection = await world.connect()
                assert not await node.renew(connection.token_id)
                proxy.is_down = False
                await world.is_renewed(connection)


async def test_the_job_outlives_its_own_bugs_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BLIND_PAUSE_LIMIT_S", 0.01)
    bugs = {"claim_due": 2, "claim_one": 1, "commit": 1, "census": 1}
    for name in bugs:
        monkeypatch.setattr(store, name, _buggy(getattr(store, name), name, bugs))
    connection = await world.connect()
    with capture_logs() as events:
        async with world.node() as node:
            await world.platform.called(1)
            await eventually(lambda: _is_idle(node))
            assert not await node.renew(connection.token_id)
            await eventually(lambda: _is_empty(bugs))
            await world.let_claims_run_out()
            world.clock.advance(TAKE_OVER_S)
            await world.is_renewed(connection)
    crashes = [event for event in events if event["event"] == "platform_token_refresh_crashed"]
    assert len(crashes) == 4


def _buggy(real: Any, name: str, bugs: dict[str, int]) -> Any:
    async def call(*args: Any, **kwargs: Any) -> Any:
        if bugs.get(name, 0):
            bugs[name] -= 1
            if not bugs[name]:
                del bugs[name]
            raise ZeroDivisionError
        return await real(*args, **kwargs)

    return call


# ---- slots


async def test_there_are_as_many_calls_at_once_as_slots_and_each_free_slot_is_used(
    world: World,
) -> None:
    connections = [await world.connect() for _ in range(10)]
    world.platform.misbehave(LATE, LATE)
    async with world.node(interval_s=NEVER_S, concurrency=2):
        await world.platform.called(2)
        world.platform.release()
        for connection in connections:
            await world.is_renewed(connection)
    assert world.platform.most_at_once == 2


async def test_a_platform_that_hangs_holds_up_no_other(world: World) -> None:
    hanging = [await world.connect() for _ in range(3)]
    world.platform.misbehave(*[LATE] * 3)
    async with OAuthPlatform() as other:
        quick = await world.connect(platform="bigcommerce", grantor=other)
        settings = [
            world.settings(),
            world.settings(platform="bigcommerce", token_url=other.url),
        ]
        async with world.node(platforms=settings, concurrency=2):
            await world.platform.called(2)
            await world.is_renewed(quick)
            world.platform.release()
            for connection in hanging:
                await world.is_renewed(connection)


async def test_too_many_readers_are_turned_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FLIGHTS_LIMIT", 1)
    async with world.node(interval_s=NEVER_S) as node:
        await has_looked(node)
        first, second = [await world.connect(expires_in_s=-1) for _ in range(2)]
        world.platform.misbehave(LATE)
        renewing = asyncio.create_task(node.renew(first.token_id))
        await world.platform.called(1)
        assert not await node.renew(second.token_id)
        world.platform.release()
        assert await renewing


# ---- the end


async def test_a_stop_waits_for_the_answer_and_its_commit_and_begins_nothing(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node() as node:
        await world.platform.called(1)
        stopping = asyncio.create_task(node.stop(PATIENCE_S))
        await eventually(lambda: _is_stopping(node))
        late = await world.connect()
        assert not await node.renew(late.token_id)
        assert not stopping.done()
        world.platform.release()
        await stopping
        assert (await world.now(connection)).generation == 2
        assert (await world.now(late)).generation == 1
        await node.stop(PATIENCE_S)
    assert len(world.platform.calls) == 1


async def test_a_stop_does_not_wait_for_longer_than_it_is_given(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node() as node:
        await world.platform.called(1)
        reader = asyncio.create_task(node.renew(connection.token_id))
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await node.stop(timeout_s=0.01)
            assert not await reader
    assert await world.is_claimed(connection)


async def test_a_node_that_pauses_claims_nothing_more_and_ends_what_it_has_begun(
    world: World,
) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    async with world.node("a") as leaving:
        await world.platform.called(1)
        reader = asyncio.create_task(leaving.renew(connection.token_id))
        leaving.pause()
        late = await world.connect(expires_in_s=-1)
        assert not await leaving.renew(late.token_id)
        async with world.node("b"):
            await world.is_renewed(late)
        world.platform.release()
        assert await reader
        assert (await world.now(connection)).generation == 2
    assert len(world.platform.calls) == 2
    rows = await world.database.fetch(
        "SELECT actor FROM glam.token_access_log WHERE action = 'refresh' ORDER BY id"
    )
    assert [row["actor"] for row in rows] == ["b", "a"]


async def test_a_renewal_that_is_cut_off_after_the_request_is_told_as_lost(world: World) -> None:
    connection = await world.connect()
    world.platform.misbehave(LATE)
    lost = _lost()
    with capture_logs() as events:
        async with world.node() as node:
            await world.platform.called(1)
            await node.stop(timeout_s=0.01)
    (event,) = [event for event in events if event["event"] == "platform_token_refresh_lost"]
    assert event == {
        "event": "platform_token_refresh_lost",
        "log_level": "error",
        "token_id": str(connection.token_id),
        "merchant_id": str(connection.merchant_id),
        "platform": "shopify",
    }
    assert _lost() == lost + 1


async def test_a_renewal_that_is_cut_off_before_its_commit_is_told_as_lost(world: World) -> None:
    await world.connect()
    world.platform.misbehave(LATE)
    lost = _lost()
    async with DatabaseProxy(world.url) as proxy:
        with capture_logs() as events:
            async with world.node(url=proxy.url) as node:
                await world.platform.called(1)
                proxy.go_down()
                world.platform.release()
                await eventually(told(events, "platform_token_refresh_uncommitted"))
                await node.stop(timeout_s=0.01)
    assert [e["event"] for e in events].count("platform_token_refresh_lost") == 1
    assert _lost() == lost + 1


async def test_a_renewal_that_is_cut_off_before_the_request_has_lost_nothing(world: World) -> None:
    names = _Stuck()
    settings = world.settings(
        token_url=f"http://platform.localhost:{world.platform.port}/admin/oauth/access_token"
    )
    await world.connect()
    lost = _lost()
    with capture_logs() as events:
        async with world.node(platforms=[settings], resolver=names) as node:
            async with asyncio.timeout(PATIENCE_S):
                await names.asked.wait()
            await node.stop(timeout_s=0.01)
    assert not await told(events, "platform_token_refresh_lost")()
    assert (_lost(), world.platform.calls) == (lost, [])


class _Stuck(AbstractResolver):
    """Never finds a name."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Wait for ever."""
        self.asked.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def close(self) -> None:
        """There is nothing to close."""


def _lost() -> float:
    labels = {"platform": "shopify", "outcome": renewer.LOST}
    return REGISTRY.get_sample_value("glamd_credentials_refreshes_total", labels) or 0.0


async def test_before_it_runs_and_after_it_was_cancelled_nothing_is_renewed(world: World) -> None:
    connection = await world.connect()
    database = await Database.connect(world.url, pool_size=1)
    node = Refresher(
        database,
        keyring=world.keyring,
        platforms=[world.settings()],
        clock=world.clock,
        node_id="a",
    )
    assert not await node.renew(connection.token_id)
    world.platform.misbehave(LATE)
    job = asyncio.create_task(node.run())
    await world.platform.called(1)
    job.cancel()
    await asyncio.wait({job})
    assert job.cancelled()
    assert not await node.renew(connection.token_id)
    await node.stop(PATIENCE_S)
    await database.close()


# ---- time


async def test_a_clock_that_jumps_ahead_makes_everything_due_once(world: World) -> None:
    connections = [await world.connect(expires_in_s=3600) for _ in range(5)]
    async with world.node() as node:
        await has_looked(node)
        world.clock.set(world.clock.now() + timedelta(days=1))
        renewed = [await world.is_renewed(connection) for connection in connections]
        assert len(world.platform.calls) == 5
        world.clock.set(world.clock.now() - timedelta(days=1))
        for one in renewed:
            assert not await node.renew(one.token_id)
        assert len(world.platform.calls) == 5


async def test_a_clock_that_jumps_back_during_a_renewal_does_not_lose_it(world: World) -> None:
    connection = await world.connect()
    sent_at = world.clock.now()
    world.platform.misbehave(LATE)
    async with world.node():
        await world.platform.called(1)
        world.clock.set(sent_at - timedelta(days=2))
        world.platform.release()
        renewed = await world.is_renewed(connection)
    assert renewed.expires_at == sent_at + timedelta(hours=1)


async def test_a_pause_that_a_wrong_clock_wrote_does_not_last_for_ever(world: World) -> None:
    connection = await world.connect()
    await world.database.execute(
        "UPDATE glam.platform_tokens SET refresh_failures = 1, refresh_error = 'TIMEOUT',"
        " refresh_not_before = $1",
        world.clock.now() + timedelta(days=365),
    )
    async with world.node():
        await world.is_renewed(connection)


async def test_a_slow_answer_makes_a_token_seem_older_and_never_younger(world: World) -> None:
    connection = await world.connect()
    sent_at = world.clock.now()
    world.platform.misbehave(LATE)
    async with world.node():
        await world.platform.called(1)
        world.clock.advance(9)
        world.platform.release()
        renewed = await world.is_renewed(connection)
    assert renewed.expires_at == sent_at + timedelta(hours=1)
    assert renewed.refreshed_at == sent_at + timedelta(seconds=9)


async def claim_of(world: World, connection: ShopConnection) -> object:
    """Whose claim it is."""
    return await world.database.fetchval(
        "SELECT refresh_claim FROM glam.platform_tokens WHERE token_id = $1", connection.token_id
    )


async def _has_refreshes(world: World, connection: ShopConnection, count: int) -> bool:
    return len(await world.refreshes(connection)) == count


async def _has_generation(world: World, connection: ShopConnection, generation: int) -> bool:
    return (await world.now(connection)).generation == generation


async def _is_empty(bugs: dict[str, int]) -> bool:
    return not bugs


async def _is_idle(node: Refresher) -> bool:
    return not node._flights


async def _is_stopping(node: Refresher) -> bool:
    return node._stopping.is_set()
