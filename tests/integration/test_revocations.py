"""Revoked JWTs: here at once, on every other node by its next poll, through whatever happens."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from glamd.clock import Clock
from glamd.db import Connection, Database
from glamd.errors import ConflictError, InputError, UnavailableError
from glamd.http.auth import Authenticator
from glamd.http.jws import RefusedTokenError
from glamd.revocations import service, store
from glamd.revocations.service import Revocations
from glamd.revocations.store import Revocation
from tests.support.database_proxy import DatabaseProxy
from tests.support.http_fakes import CLIENT_SECRET, ManualClock, client_jwt
from tests.support.jwt_keys import Shops, request_with
from tests.support.postgres import eventually, execute
from tests.support.settable_clock import SettableClock

INTERVAL_S = 0.02
BY = "uid:1000"


@pytest.fixture
async def db(module_database_url: str) -> AsyncIterator[Database]:
    """The module's database, with no revocation in it."""
    connected = await Database.connect(module_database_url, pool_size=4)
    await connected.execute("TRUNCATE glam.jwt_revocations")
    yield connected
    await connected.close()


@pytest.fixture
async def proxy(module_database_url: str, db: Database) -> AsyncIterator[DatabaseProxy]:
    """What another node's database can be taken away with."""
    async with DatabaseProxy(module_database_url) as standing:
        yield standing


@asynccontextmanager
async def polling(
    database: Database, *, clock: Clock | None = None, interval_s: float = INTERVAL_S
) -> AsyncIterator[Revocations]:
    """A node that has loaded and polls."""
    node = Revocations(database, clock=clock or SettableClock(), interval_s=interval_s)
    await node.load()
    async with running(node):
        yield node


@asynccontextmanager
async def running(node: Revocations) -> AsyncIterator[None]:
    """While it keeps up, and it does so to the end."""
    task = asyncio.create_task(node.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def becomes_revoked(
    node: Revocations, *, jti: str | None = None, kid: str | None = None
) -> None:
    """Wait until this node knows."""

    async def known() -> bool:
        return node.is_revoked(jti=jti, kid=kid)

    await eventually(known, timeout_s=5.0)


class TestRefusals:
    """What cannot be revoked, and when."""

    @pytest.mark.parametrize("value", ["", "x" * 257, "a\nb", "a\x00", "\ud800", "\u202e"])
    async def test_what_no_token_can_carry_is_refused(self, db: Database, value: str) -> None:
        node = Revocations(db, clock=SettableClock())
        with pytest.raises(InputError) as caught:
            await node.revoke("jti", value, by=BY)
        assert [error.field for error in caught.value.fields] == ["jti"]
        assert await node.listed() == ()

    async def test_a_full_table_says_so(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service, "MAX_ROWS", 2)
        node = Revocations(db, clock=SettableClock())
        for value in ("a", "b"):
            await node.revoke("jti", value, by=BY)
        with pytest.raises(ConflictError) as caught:
            await node.revoke("jti", "c", by=BY)
        assert caught.value.code == "REVOCATIONS_FULL"
        assert not node.is_revoked(jti="c", kid=None)

    async def test_without_a_database_nothing_starts_and_nothing_is_revoked(
        self, proxy: DatabaseProxy
    ) -> None:
        database = await Database.connect(proxy.url, pool_size=1, connect_timeout_s=1.0)
        try:
            proxy.go_down()
            node = Revocations(database, clock=SettableClock())
            with pytest.raises(UnavailableError):
                await node.load()
            with pytest.raises(UnavailableError):
                await node.revoke("jti", "a", by=BY)
            assert not node.is_revoked(jti="a", kid=None)
        finally:
            await database.close()


class TestOneNode:
    """The node that got the command."""

    async def test_it_knows_at_once_and_after_a_restart(self, db: Database) -> None:
        node = Revocations(db, clock=SettableClock())
        await node.load()
        assert not node.is_revoked(jti="a", kid="a")
        await node.revoke("jti", "a", by=BY)
        assert node.is_revoked(jti="a", kid=None)
        assert not node.is_revoked(jti=None, kid="a")
        await node.revoke("kid", "schl\u00fcssel 1", by=BY)
        assert node.is_revoked(jti=None, kid="schl\u00fcssel 1")
        assert not node.is_revoked(jti=None, kid=None)
        again = Revocations(db, clock=SettableClock())
        await again.load()
        assert again.is_revoked(jti="a", kid=None)
        assert again.is_revoked(jti=None, kid="schl\u00fcssel 1")

    async def test_again_is_as_good_as_once_and_the_later_end_counts(self, db: Database) -> None:
        clock = SettableClock()
        node = Revocations(db, clock=clock)
        soon, late = clock.now() + timedelta(hours=1), clock.now() + timedelta(hours=9)
        first = await node.revoke("jti", "a", by=BY, expires_at=late)
        clock.advance(60)
        assert await node.revoke("jti", "a", by="uid:0", expires_at=soon) == first
        forever = await node.revoke("jti", "a", by="uid:0")
        assert forever.expires_at is None
        assert (await node.revoke("jti", "a", by=BY, expires_at=late)).expires_at is None
        assert await node.listed() == (forever,)
        assert (forever.revoked_at, forever.revoked_by) == (first.revoked_at, BY)

    async def test_the_newest_are_listed_first(self, db: Database) -> None:
        node = Revocations(db, clock=SettableClock())
        for value in "abc":
            await node.revoke("kid", value, by=BY)
        assert [found.value for found in await node.listed(limit=2)] == ["c", "b"]

    async def test_what_expired_long_ago_is_deleted_and_forgotten(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = SettableClock()
        now = clock.now()
        monkeypatch.setattr(service, "WHOLE_EVERY_S", 0.0)
        async with polling(db, clock=clock) as node:
            await node.revoke("jti", "over", by=BY, expires_at=now - timedelta(days=1, seconds=1))
            await node.revoke("jti", "yesterday", by=BY, expires_at=now - timedelta(hours=23))
            await node.revoke("kid", "for good", by=BY)

            async def forgotten() -> bool:
                return not node.is_revoked(jti="over", kid=None)

            await eventually(forgotten)
            assert node.is_revoked(jti="yesterday", kid=None)
            assert node.is_revoked(jti=None, kid="for good")
            assert {found.value for found in await node.listed()} == {"yesterday", "for good"}

    async def test_a_revocation_while_everything_is_read_anew_is_kept(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = Revocations(db, clock=SettableClock())
        await node.revoke("jti", "first", by=BY)
        read = store.after

        async def revoked_behind_its_back(
            connection: Connection, position: store.Position, **options: Any
        ) -> Sequence[Revocation]:
            page = await read(connection, position, **options)
            await node.revoke("jti", "meanwhile", by=BY)
            return page

        monkeypatch.setattr(store, "after", revoked_behind_its_back)
        await node.load()
        assert node.is_revoked(jti="first", kid=None)
        assert node.is_revoked(jti="meanwhile", kid=None)


class TestNodes:
    """Several nodes on one database."""

    async def test_a_live_cached_token_is_refused_on_every_node(self, db: Database) -> None:
        async with polling(db) as here, polling(db) as there:
            doors = [door(node) for node in (here, there)]
            tokens = [client_jwt(jti="stolen"), client_jwt(jti="mine")]
            for authenticator in doors:
                for token in tokens:
                    await authenticator(request_with(f"Bearer {token}"))
            await here.revoke("jti", "stolen", by=BY)
            stolen, mine = (request_with(f"Bearer {token}") for token in tokens)
            with pytest.raises(RefusedTokenError):
                await doors[0](stolen)
            await becomes_revoked(there, jti="stolen")
            with pytest.raises(RefusedTokenError) as caught:
                await doors[1](stolen)
            assert caught.value.reason == "revoked"
            for authenticator in doors:
                assert authenticator.cached(mine) is not None

    async def test_one_poll_is_enough_and_less_than_five_seconds_away(self, db: Database) -> None:
        here = Revocations(db, clock=SettableClock())
        there = Revocations(db, clock=SettableClock(), interval_s=3600)
        await there.load()
        await here.revoke("kid", "k1", by=BY)
        assert not there.is_revoked(jti=None, kid="k1")
        async with running(there):
            await becomes_revoked(there, kid="k1")
        assert service.INTERVAL_S + service.LOOK_TIMEOUT_S < 5.0

    @pytest.mark.parametrize("hours", [-1, 1, -20 * 24])
    async def test_no_clock_that_is_wrong_hides_a_revocation(
        self, db: Database, hours: int
    ) -> None:
        wrong = SettableClock()
        wrong.set(wrong.now() + timedelta(hours=hours))
        async with polling(db) as right:
            await right.revoke("jti", "before", by=BY)
            node = Revocations(db, clock=wrong)
            await node.revoke("jti", "by the wrong clock", by=BY)
            await becomes_revoked(right, jti="by the wrong clock")
            other = Revocations(db, clock=SettableClock())
            await other.revoke("jti", "after", by=BY)
            await becomes_revoked(right, jti="after")

    async def test_one_that_commits_late_is_not_overtaken(self, db: Database) -> None:
        clock = SettableClock()
        async with polling(db) as reader:
            async with db.transaction() as slow:
                await store.take_turns(slow)
                await store.add(slow, kind="jti", value="a", at=clock.now(), by=BY, expires_at=None)
                quick = asyncio.create_task(Revocations(db, clock=clock).revoke("jti", "b", by=BY))

                async def waits_or_is_done() -> bool:
                    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                    return quick.done() or bool(await db.fetchval(waiting))

                await eventually(waits_or_is_done)
                if quick.done():
                    await becomes_revoked(reader, jti="b")
            await quick
            await becomes_revoked(reader, jti="a")
            await becomes_revoked(reader, jti="b")

    async def test_none_of_many_at_once_is_missed(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service, "PAGE_ROWS", 3)
        values = [f"jti-{n}" for n in range(40)]
        async with polling(db) as reader:
            writers = [Revocations(db, clock=SettableClock()) for _ in range(3)]
            async with asyncio.TaskGroup() as group:
                for number, value in enumerate(values):
                    group.create_task(writers[number % 3].revoke("jti", value, by=BY))
            for value in values:
                await becomes_revoked(reader, jti=value)
        late = Revocations(db, clock=SettableClock())
        await late.load()
        assert all(late.is_revoked(jti=value, kid=None) for value in values)


class TestOutage:
    """The database goes away and comes back."""

    async def test_what_is_known_stays_known_and_its_age_shows(
        self, db: Database, proxy: DatabaseProxy
    ) -> None:
        clock = SettableClock()
        away = await Database.connect(proxy.url, pool_size=1, connect_timeout_s=1.0)
        here = Revocations(db, clock=SettableClock())
        try:
            async with polling(away, clock=clock) as node:
                await here.revoke("jti", "before", by=BY)
                await becomes_revoked(node, jti="before")
                proxy.go_down()
                await until_polls_fail()
                clock.advance(30)
                assert age_s() == 30.0
                await here.revoke("jti", "meanwhile", by=BY)
                assert node.is_revoked(jti="before", kid=None)
                assert not node.is_revoked(jti="meanwhile", kid=None)
                proxy.is_down = False
                await becomes_revoked(node, jti="meanwhile")
                assert node.is_revoked(jti="before", kid=None)
                assert age_s() == 0.0
        finally:
            await away.close()

    async def test_a_standby_that_knows_less_is_read_from_its_start(
        self, db: Database, proxy: DatabaseProxy, module_database_url: str
    ) -> None:
        away = await Database.connect(proxy.url, pool_size=1, connect_timeout_s=1.0)
        try:
            async with polling(away) as node:
                await Revocations(db, clock=SettableClock()).revoke("jti", "lost", by=BY)
                await becomes_revoked(node, jti="lost")
                proxy.go_down()
                await until_polls_fail()
                # What took over had lost the last row, and its next one is stamped before it.
                await execute(
                    module_database_url,
                    "TRUNCATE glam.jwt_revocations;"
                    "INSERT INTO glam.jwt_revocations VALUES ('jti', 'new', '2020-01-01', 'x')",
                )
                proxy.is_down = False
                await becomes_revoked(node, jti="new")
        finally:
            await away.close()

    async def test_a_pool_that_is_used_up_hides_nothing(self, module_database_url: str) -> None:
        database = await Database.connect(module_database_url, pool_size=1)
        elsewhere = await Database.connect(module_database_url, pool_size=1)
        try:
            async with polling(database) as node, database.connection():
                await Revocations(elsewhere, clock=SettableClock()).revoke("jti", "full", by=BY)
                await becomes_revoked(node, jti="full")
        finally:
            await database.close()
            await elsewhere.close()


def door(node: Revocations) -> Authenticator:
    """One node's authenticator."""
    return Authenticator(
        client_secrets=[CLIENT_SECRET],
        internal_secrets=[],
        require_audience=False,
        merchant_by_domain=Shops(),
        clock=ManualClock(),
        is_revoked=node.is_revoked,
    )


def age_s() -> float:
    """The metric of the node that was made last."""
    return REGISTRY.get_sample_value("glamd_http_revocations_age_seconds") or 0.0


async def until_polls_fail() -> None:
    """Wait until one more has failed."""
    name = "glamd_http_revocations_failed_polls_total"
    before = REGISTRY.get_sample_value(name) or 0.0

    async def failed() -> bool:
        return (REGISTRY.get_sample_value(name) or 0.0) > before

    await eventually(failed)
