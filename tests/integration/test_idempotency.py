"""Idempotency keys on a real PostgreSQL: who wins, who waits, who is fenced off, what is kept."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from glamd import idempotency
from glamd.db import Connection, Database, OutcomeUnknownError
from glamd.errors import UnavailableError
from glamd.idempotency import Claim, IdempotencyKeys, InProgressError, KeyReusedError, Remembered
from tests.support.database_proxy import DatabaseProxy

BODY = b'{"amount":1}'
DONE = {"data": {"id": 7}}
PATIENCE_S = 10.0


@pytest.fixture
async def one(module_database_url: str) -> AsyncIterator[Database]:
    """A node's connection to the module's database, with a table for effects in it."""
    database = await Database.connect(module_database_url, pool_size=4)
    await database.execute("CREATE TABLE IF NOT EXISTS effects (scope text NOT NULL)")
    yield database
    await database.close()


@pytest.fixture
async def two(module_database_url: str) -> AsyncIterator[Database]:
    """Another node's."""
    database = await Database.connect(module_database_url, pool_size=4)
    yield database
    await database.close()


@pytest.fixture
def scope() -> str:
    """A caller of the test's own."""
    return f"client:{uuid4()} POST /things"


async def claimed(
    keys: IdempotencyKeys, scope: str, *, key: str = "k", body: bytes = BODY
) -> Claim:
    """A claim that nobody stood in the way of."""
    found = await keys.claim(scope=scope, key=key, content=body)
    assert isinstance(found, Claim)
    return found


async def affect(keys: IdempotencyKeys, database: Database, claim: Claim) -> None:
    """An effect and the answer to it in one transaction, as a capability does it."""
    async with database.transaction() as connection:
        await connection.execute("INSERT INTO effects VALUES ($1)", claim.scope)
        await keys.answer(claim, status=201, answer=DONE, connection=connection)


async def effects(database: Database, scope: str) -> int:
    """How often the effect was committed."""
    found = await database.fetchval("SELECT count(*) FROM effects WHERE scope = $1", scope)
    return int(found)


async def pass_by(database: Database, scope: str, column: str) -> None:
    """Let a lease, or the whole life of a key, be over."""
    await database.execute(
        f"UPDATE glam.idempotency_keys SET {column} = now() - interval '1 second' WHERE scope = $1",
        scope,
    )


async def rows(database: Database, scope: str) -> int:
    """How many keys there are in a scope."""
    found = await database.fetchval(
        "SELECT count(*) FROM glam.idempotency_keys WHERE scope = $1", scope
    )
    return int(found)


class TestOneAtATime:
    """A key belongs to one request until it is answered."""

    async def test_while_the_first_works_the_same_request_is_told_to_wait(
        self, one: Database, two: Database, scope: str
    ) -> None:
        await claimed(IdempotencyKeys(one), scope)
        with pytest.raises(InProgressError) as caught:
            await IdempotencyKeys(two).claim(scope=scope, key="k", content=BODY)
        assert caught.value.code == "IDEMPOTENCY_IN_PROGRESS"
        assert caught.value.retry_after_s == 1

    async def test_of_many_on_two_nodes_one_wins_and_nobody_else_does_anything(
        self, one: Database, two: Database, scope: str
    ) -> None:
        nodes = (IdempotencyKeys(one), IdempotencyKeys(two)) * 12
        found = await asyncio.gather(
            *(node.claim(scope=scope, key="k", content=BODY) for node in nodes),
            return_exceptions=True,
        )
        assert [type(each) for each in found].count(Claim) == 1
        assert [type(each) for each in found].count(InProgressError) == len(nodes) - 1

    async def test_an_answer_is_found_again_by_the_same_request_alone(
        self, one: Database, two: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await affect(keys, one, await claimed(keys, scope))
        other = IdempotencyKeys(two)
        for _ in range(2):
            found = await other.claim(scope=scope, key="k", content=BODY)
            assert found == Remembered(status=201, answer=DONE)
        with pytest.raises(KeyReusedError) as caught:
            await other.claim(scope=scope, key="k", content=b'{"amount":2}')
        assert caught.value.code == "IDEMPOTENCY_KEY_REUSED"

    async def test_another_body_is_refused_while_the_first_works_and_after_its_lease(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await claimed(keys, scope)
        for _ in range(2):
            with pytest.raises(KeyReusedError):
                await keys.claim(scope=scope, key="k", content=b"{}")
            await pass_by(one, scope, "claim_until")

    async def test_keys_of_other_callers_and_other_keys_are_others(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await affect(keys, one, await claimed(keys, scope))
        await claimed(keys, scope, key="K")
        await claimed(keys, scope.replace("POST", "PUT"))
        await claimed(keys, f"{scope}/1")

    async def test_a_scope_of_any_length_is_one(self, one: Database, scope: str) -> None:
        keys = IdempotencyKeys(one)
        long = scope + "/x" * 20_000
        await claimed(keys, long)
        await claimed(keys, f"{long}y")
        with pytest.raises(InProgressError):
            await keys.claim(scope=long, key="k", content=BODY)


class TestWhoeverDies:
    """A claim without an answer holds no longer than its lease, and fences nobody in."""

    async def test_an_abandoned_claim_is_taken_over_after_its_lease_and_not_before(
        self, one: Database, two: Database, scope: str
    ) -> None:
        await claimed(IdempotencyKeys(one), scope)
        keys = IdempotencyKeys(two)
        with pytest.raises(InProgressError):
            await keys.claim(scope=scope, key="k", content=BODY)
        await pass_by(two, scope, "claim_until")
        await affect(keys, two, await claimed(keys, scope))
        assert await effects(two, scope) == 1

    async def test_the_lease_is_as_long_as_it_was_given(self, one: Database, scope: str) -> None:
        await claimed(IdempotencyKeys(one, lease_s=0.0), scope)
        await claimed(IdempotencyKeys(one), scope)

    async def test_of_many_who_come_after_a_lease_one_takes_over(
        self, one: Database, two: Database, scope: str
    ) -> None:
        await claimed(IdempotencyKeys(one), scope)
        await pass_by(one, scope, "claim_until")
        nodes = (IdempotencyKeys(one), IdempotencyKeys(two)) * 8
        found = await asyncio.gather(
            *(node.claim(scope=scope, key="k", content=BODY) for node in nodes),
            return_exceptions=True,
        )
        assert [type(each) for each in found].count(Claim) == 1

    async def test_who_was_taken_over_cannot_commit_its_effect(
        self, one: Database, two: Database, scope: str
    ) -> None:
        slow = await claimed(IdempotencyKeys(one), scope)
        await pass_by(one, scope, "claim_until")
        quick = await claimed(IdempotencyKeys(two), scope)
        with pytest.raises(InProgressError):
            await affect(IdempotencyKeys(one), one, slow)
        assert await effects(one, scope) == 0
        await affect(IdempotencyKeys(two), two, quick)
        with pytest.raises(InProgressError):
            await affect(IdempotencyKeys(one), one, slow)
        assert await effects(one, scope) == 1

    async def test_who_is_late_and_was_not_taken_over_may_still_commit(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        slow = await claimed(keys, scope)
        await pass_by(one, scope, "claim_until")
        await affect(keys, one, slow)
        assert await effects(one, scope) == 1

    async def test_two_who_would_commit_the_same_claim_have_one_effect(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        claim = await claimed(keys, scope)
        await affect(keys, one, claim)
        with pytest.raises(InProgressError):
            await affect(keys, one, claim)
        assert await effects(one, scope) == 1

    async def test_an_effect_that_is_rolled_back_takes_its_answer_with_it(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        claim = await claimed(keys, scope)

        async def fail_after_keeping(connection: Connection) -> None:
            await keys.answer(claim, status=201, answer=DONE, connection=connection)
            raise RuntimeError("after the answer was written")

        with pytest.raises(RuntimeError):
            async with one.transaction() as connection:
                await fail_after_keeping(connection)
        with pytest.raises(InProgressError):
            await keys.claim(scope=scope, key="k", content=BODY)
        await pass_by(one, scope, "claim_until")
        await claimed(keys, scope)


class TestGivingBack:
    """A request that ended without an answer gives its key back at once."""

    async def test_a_key_that_was_given_back_is_free_for_any_request(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await keys.release(await claimed(keys, scope))
        await claimed(keys, scope, body=b"another")

    async def test_an_answer_is_not_given_back(self, one: Database, scope: str) -> None:
        keys = IdempotencyKeys(one)
        claim = await claimed(keys, scope)
        await affect(keys, one, claim)
        await keys.release(claim)
        assert isinstance(await keys.claim(scope=scope, key="k", content=BODY), Remembered)

    async def test_who_was_taken_over_gives_nothing_back(
        self, one: Database, two: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        slow = await claimed(keys, scope)
        await pass_by(one, scope, "claim_until")
        quick = await claimed(keys, scope)
        await keys.release(slow)
        await affect(keys, two, quick)
        assert await effects(one, scope) == 1

    async def test_a_commit_that_is_under_way_is_waited_for(
        self, one: Database, two: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        claim = await claimed(keys, scope)
        async with one.transaction() as connection:
            await keys.answer(claim, status=201, answer=DONE, connection=connection)
            giving_back = asyncio.create_task(IdempotencyKeys(two).release(claim))
            await waits_for_a_lock(one)
            assert not giving_back.done()
        await giving_back
        assert isinstance(await keys.claim(scope=scope, key="k", content=BODY), Remembered)

    async def test_who_asks_during_the_commit_gets_its_answer(
        self, one: Database, two: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        claim = await claimed(keys, scope)
        await pass_by(one, scope, "claim_until")
        async with one.transaction() as connection:
            await keys.answer(claim, status=201, answer=DONE, connection=connection)
            again = asyncio.create_task(
                IdempotencyKeys(two).claim(scope=scope, key="k", content=BODY)
            )
            await waits_for_a_lock(one)
        assert isinstance(await again, Remembered)


class TestTheEnd:
    """24 hours, and then it is as if the key had never been."""

    async def test_an_answer_that_expired_is_not_given_again_though_nobody_purged(
        self, one: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await affect(keys, one, await claimed(keys, scope))
        await pass_by(one, scope, "expires_at")
        claim = await claimed(keys, scope, body=b"quite another")
        await affect(keys, one, claim)
        assert await effects(one, scope) == 2

    async def test_a_key_lives_for_a_day(self, one: Database, scope: str) -> None:
        keys = IdempotencyKeys(one)
        await affect(keys, one, await claimed(keys, scope))
        left = await one.fetchval(
            "SELECT extract(epoch FROM expires_at - now()) FROM glam.idempotency_keys"
            " WHERE scope = $1",
            scope,
        )
        assert 24 * 3600 - PATIENCE_S < left <= 24 * 3600

    async def test_a_purge_takes_what_expired_and_so_much_at_once(
        self, one: Database, scope: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = IdempotencyKeys(one)
        await keys.purge()
        for n in range(7):
            await claimed(keys, scope, key=f"k{n}")
        await pass_by(one, scope, "expires_at")
        await claimed(keys, f"{scope}/1")
        monkeypatch.setattr(idempotency, "PURGE_ROWS", 2)
        monkeypatch.setattr(idempotency, "PURGE_BATCHES", 3)
        assert await keys.purge() == 6
        assert await keys.purge() == 1
        assert await keys.purge() == 0
        assert (await rows(one, scope), await rows(one, f"{scope}/1")) == (0, 1)

    async def test_a_purge_passes_by_what_somebody_is_just_taking(
        self, one: Database, two: Database, scope: str
    ) -> None:
        keys = IdempotencyKeys(one)
        await claimed(keys, scope)
        await pass_by(one, scope, "expires_at")
        async with one.transaction() as connection:
            await connection.execute(
                "SELECT FROM glam.idempotency_keys WHERE scope = $1 FOR UPDATE", scope
            )
            async with asyncio.timeout(PATIENCE_S):
                await IdempotencyKeys(two).purge()
        assert await rows(one, scope) == 1


class TestWhatIsKept:
    """A reader of the table learns neither a key nor a body."""

    @pytest.mark.parametrize("length", [1, 63, 64, 65, 255])
    async def test_neither_key_nor_body_can_be_read_or_tried_out_from_the_row(
        self, one: Database, scope: str, length: int
    ) -> None:
        key = ("secret-key" * 26)[:length]
        await claimed(IdempotencyKeys(one), scope, key=key)
        row = await one.fetchrow(
            "SELECT key_sha256, content_mac, k::text AS everything"
            " FROM glam.idempotency_keys k WHERE scope = $1",
            scope,
        )
        assert row is not None
        assert row["key_sha256"] == hashlib.sha256(key.encode()).digest()
        assert key == "s" or key not in row["everything"]
        assert "amount" not in row["everything"]
        # Neither is the MAC one under anything that stands in the row.
        for known in (row["key_sha256"], row["key_sha256"].hex().encode(), b"", scope.encode()):
            assert hmac.digest(known, BODY, "sha256") != row["content_mac"]
        assert hashlib.sha256(BODY).digest() != row["content_mac"]

    async def test_two_keys_for_one_body_do_not_show_that_it_is_one(
        self, one: Database, scope: str
    ) -> None:
        for key in ("a", "b"):
            await claimed(IdempotencyKeys(one), scope, key=key)
        found = await one.fetch(
            "SELECT content_mac FROM glam.idempotency_keys WHERE scope = $1", scope
        )
        assert len({row["content_mac"] for row in found}) == 2

    def test_nothing_of_it_is_shown(self) -> None:
        claim = Claim(scope="s", key_sha256=b"k" * 32, id=uuid4())
        assert "kkk" not in repr(claim)
        assert "4111" not in repr(Remembered(status=200, answer={"pan": "4111"}))


class TestDatabaseAway:
    """Nothing is claimed, or nobody knows; then nothing is done."""

    async def test_without_a_database_there_is_no_claim(
        self, module_database_url: str, scope: str
    ) -> None:
        async with DatabaseProxy(module_database_url) as proxy:
            database = await Database.connect(proxy.url, pool_size=2)
            try:
                proxy.go_down()
                with pytest.raises(UnavailableError):
                    await IdempotencyKeys(database).claim(scope=scope, key="k", content=BODY)
            finally:
                await database.close()

    async def test_a_commit_whose_word_was_lost_is_found_by_the_next_try(
        self, module_database_url: str, one: Database, scope: str
    ) -> None:
        async with DatabaseProxy(module_database_url) as proxy:
            database = await Database.connect(proxy.url, pool_size=1)
            try:
                keys = IdempotencyKeys(database)
                claim = await claimed(keys, scope)

                async def commit_and_lose_the_word() -> None:
                    async with database.transaction() as connection:
                        await connection.execute("INSERT INTO effects VALUES ($1)", scope)
                        await keys.answer(claim, status=201, answer=DONE, connection=connection)
                        proxy.lose_answer = 1

                with pytest.raises(OutcomeUnknownError):
                    await commit_and_lose_the_word()
                found = await IdempotencyKeys(one).claim(scope=scope, key="k", content=BODY)
                assert found == Remembered(status=201, answer=DONE)
                assert await effects(one, scope) == 1
            finally:
                await database.close()


async def waits_for_a_lock(database: Database) -> None:
    """Return when somebody on this server waits for another's row."""
    async with asyncio.timeout(PATIENCE_S):
        while not await database.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        ):
            pass
