"""`Idempotency-Key` from outside: real sockets, real transactions, two nodes on one database."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glamd.db import Connection, Database, OutcomeUnknownError
from glamd.errors import (
    ConflictError,
    FieldError,
    ForbiddenError,
    GlamError,
    InputError,
    InternalError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.idempotent import IdempotencyKey, Once
from glamd.http.limits import HttpLimits
from glamd.http.routes import Route
from glamd.idempotency import IdempotencyKeys, Keep
from tests.support.database_proxy import DatabaseProxy
from tests.support.facade import CALLER, EVERYBODY, post, serving
from tests.support.http_fakes import NOW, OTHER_MERCHANT, SHORT_S, Reply, Wire, code, connected


class ThingBody(Body):
    """A thing to make."""

    name: str
    size: int = 1
    idempotency_key: IdempotencyKey | None = None


class Things:
    """A capability that makes things, one row each, and does on the way what a test wants."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.calls = 0
        self.fails: BaseException | None = None
        self.fails_after: BaseException | None = None
        self.forgets = False
        self.entered = asyncio.Event()
        self.gate: asyncio.Event | None = None

    async def make(self, place: str, body: ThingBody, keep: Keep[int] | None) -> int:
        """Make a thing and keep the answer in the same transaction."""
        self.calls += 1
        number = self.calls
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        async with self.database.transaction() as connection:
            await self._write(connection, place, body.name)
            if keep is not None and not self.forgets:
                await keep(connection, number)
        if self.fails_after is not None:
            raise self.fails_after
        return number

    async def _write(self, connection: Connection, place: str, name: str) -> None:
        await connection.execute("INSERT INTO things VALUES ($1, $2)", place, name)

    async def made(self, place: str) -> list[str]:
        """What was made at a place, and committed."""
        rows = await self.database.fetch("SELECT name FROM things WHERE place = $1", place)
        return [row["name"] for row in rows]

    def routes(self) -> list[Route]:
        """POST and PUT of things at a place."""
        once = Once(IdempotencyKeys(self.database))

        async def handle(call: Call) -> Answer:
            body = await call.json(ThingBody)
            place = call.params["place"]

            def work(keep: Keep[int] | None) -> Awaitable[int]:
                return self.make(place, body, keep)

            def answer(number: int) -> Answer:
                return Answer(data={"number": number, "name": body.name, "at": NOW}, status=201)

            return await once(call, body=body, work=work, answer=answer)

        path = "/things/{place}"
        return [
            Route(method=method, path=path, handler=handle, access=EVERYBODY)
            for method in ("POST", "PUT")
        ]


class Nodes:
    """Two daemons on one database, and a place of the test's own."""

    def __init__(self, one: Things, two: Things, ports: tuple[int, int]) -> None:
        self.one = one
        self.two = two
        self.ports = ports
        self.place = uuid4().hex

    @property
    def path(self) -> str:
        """Where this test makes its things."""
        return f"/things/{self.place}"

    async def made(self) -> list[str]:
        """What this test made."""
        return await self.one.made(self.place)

    async def ask(
        self,
        body: object,
        *lines: str,
        key: str | None = "k",
        node: int = 0,
        path: str | None = None,
        caller: str = CALLER,
        method: str = "POST",
    ) -> Reply:
        """One request over a connection of its own."""
        if key is not None:
            lines = (*lines, f"Idempotency-Key: {key}")
        async with connected(self.ports[node]) as wire:
            return await post(wire, path or self.path, body, *lines, caller=caller, method=method)

    async def expire(self, column: str) -> None:
        """Let every lease, or every key's life, be over."""
        await self.one.database.execute(
            f"UPDATE glam.idempotency_keys SET {column} = now() - interval '1 second'"
        )


@pytest.fixture
async def nodes(module_database_url: str) -> AsyncIterator[Nodes]:
    """Both daemons, running."""
    async with AsyncExitStack() as stack:
        things = []
        for _ in range(2):
            database = await Database.connect(module_database_url, pool_size=6)
            stack.push_async_callback(database.close)
            things.append(Things(database))
        await things[0].database.execute(
            "CREATE TABLE IF NOT EXISTS things (place text NOT NULL, name text NOT NULL)"
        )
        ports = [await stack.enter_async_context(serving(t.routes())) for t in things]
        yield Nodes(things[0], things[1], (ports[0], ports[1]))


class TestReplays:
    """The same request again."""

    async def test_the_first_answer_comes_again_with_the_ids_of_the_request_it_answers(
        self, nodes: Nodes
    ) -> None:
        first = await nodes.ask({"name": "a"}, "X-Request-ID: r1")
        again = await nodes.ask({"name": "a"}, "X-Request-ID: r2", node=1)
        assert (first.status, again.status) == (201, 201)
        end = first.body.index(b',"meta"')
        assert again.body[: end + 1] == first.body[: end + 1]
        assert first.json["data"]["at"] == "2030-01-01T12:00:00Z"
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json["meta"]["request_id"] == again.headers["x-request-id"] == "r2"
        assert await nodes.made() == ["a"]

    async def test_without_a_key_every_request_is_a_new_one(self, nodes: Nodes) -> None:
        for _ in range(2):
            assert (await nodes.ask({"name": "a"}, key=None)).status == 201
        assert await nodes.made() == ["a", "a"]

    @pytest.mark.parametrize(
        "again",
        [
            b'{"name":"a","size":2}',
            b' { "size" : 2 , "name" : "\\u0061" } ',
            b'{"size": 2, "name": "a", "idempotency_key": "k"}',
        ],
    )
    async def test_the_same_body_may_be_written_otherwise(self, nodes: Nodes, again: bytes) -> None:
        assert (await nodes.ask({"name": "a", "size": 2})).status == 201
        assert (await nodes.ask(again)).headers["idempotent-replayed"] == "true"
        assert await nodes.made() == ["a"]

    async def test_the_field_of_the_body_is_the_same_key_as_the_header(self, nodes: Nodes) -> None:
        assert (await nodes.ask({"name": "a", "idempotency_key": "k"}, key=None)).status == 201
        again = await nodes.ask({"name": "a"})
        assert again.headers["idempotent-replayed"] == "true"

    async def test_after_a_day_the_key_is_forgotten(self, nodes: Nodes) -> None:
        await nodes.ask({"name": "a"})
        await nodes.expire("expires_at")
        reply = await nodes.ask({"name": "b"})
        assert (reply.status, reply.headers.get("idempotent-replayed")) == (201, None)
        assert await nodes.made() == ["a", "b"]


class TestRefusals:
    """Keys that are wrong, or used for something else."""

    @pytest.mark.parametrize(
        "body", [{"name": "b"}, {"name": "a", "size": 2}, {"name": "a", "size": 1}, {"name": "A"}]
    )
    async def test_another_body_under_the_same_key_is_refused(
        self, nodes: Nodes, body: object
    ) -> None:
        await nodes.ask({"name": "a"})
        reply = await nodes.ask(body, node=1)
        assert code(reply) == (422, "IDEMPOTENCY_KEY_REUSED")
        assert await nodes.made() == ["a"]

    @pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\tb"])
    async def test_a_header_that_is_no_key_is_named(self, nodes: Nodes, key: str) -> None:
        reply = await nodes.ask({"name": "a"}, key=key)
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert [e["field"] for e in reply.json["errors"]] == ["Idempotency-Key"]
        assert await nodes.made() == []

    async def test_two_headers_are_no_key(self, nodes: Nodes) -> None:
        reply = await nodes.ask({"name": "a"}, "Idempotency-Key: k")
        assert [e["field"] for e in reply.json["errors"]] == ["Idempotency-Key"]

    @pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü"])
    async def test_a_field_that_is_no_key_is_named(self, nodes: Nodes, key: str) -> None:
        reply = await nodes.ask({"name": "a", "idempotency_key": key}, key=None)
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert [e["field"] for e in reply.json["errors"]] == ["idempotency_key"]

    async def test_a_header_and_a_field_that_differ_are_refused(self, nodes: Nodes) -> None:
        reply = await nodes.ask({"name": "a", "idempotency_key": "other"})
        assert code(reply) == (422, "VALIDATION_ERROR")
        assert [e["field"] for e in reply.json["errors"]] == ["idempotency_key"]
        same = await nodes.ask({"name": "a", "idempotency_key": "k"})
        assert same.status == 201

    async def test_the_longest_key_of_all_visible_characters_is_one(self, nodes: Nodes) -> None:
        key = "".join(map(chr, range(0x21, 0x7F)))
        assert (await nodes.ask({"name": "a"}, key=(key * 3)[:255])).status == 201

    async def test_other_callers_methods_and_paths_have_keys_of_their_own(
        self, nodes: Nodes
    ) -> None:
        ways = [
            ("POST", CALLER),
            ("POST", f"client:{OTHER_MERCHANT}"),
            ("POST", CALLER.replace("client", "internal")),
            ("PUT", CALLER),
        ]
        for n, (method, caller) in enumerate(ways):
            reply = await nodes.ask({"name": f"way-{n}"}, method=method, caller=caller)
            assert (reply.status, reply.headers.get("idempotent-replayed")) == (201, None)
        elsewhere = f"/things/{nodes.place}%2Fin"
        for path in (f"/things/{nodes.place}-2", elsewhere):
            assert (await nodes.ask({"name": path}, path=path)).status == 201
        # The same place, written otherwise, is the same place.
        again = await nodes.ask({"name": elsewhere}, path=elsewhere.replace("2Fin", "2f%69n"))
        assert again.headers["idempotent-replayed"] == "true"


class TestErrors:
    """What the work refuses for good is kept; what may go better next time is not."""

    @pytest.mark.parametrize(
        ("failure", "status"),
        [
            (ConflictError("It is there.", code="TRIAL_ALREADY_USED"), 409),
            (NotFoundError("There is none.", code="PACK_NOT_FOUND"), 404),
            (ForbiddenError("Not this one."), 403),
            (
                InputError("No.", fields=[FieldError("name", "is taken"), FieldError("a.0", "x")]),
                422,
            ),
        ],
        ids=lambda value: getattr(value, "code", value),
    )
    async def test_a_final_error_is_answered_again_as_it_was(
        self, nodes: Nodes, failure: GlamError, status: int
    ) -> None:
        nodes.one.fails = failure
        first = await nodes.ask({"name": "a"})
        assert code(first) == (status, failure.code)
        again = await nodes.ask({"name": "a"}, node=1)
        assert again.headers["idempotent-replayed"] == "true"
        for reply in (first, again):
            reply.json["meta"].clear()
        assert {**again.json, "meta": 0} == {**first.json, "meta": 0}
        assert (nodes.one.calls, nodes.two.calls) == (1, 0)

    @pytest.mark.parametrize(
        ("failure", "status"),
        [
            (UnavailableError("The database is away."), 503),
            (RateLimitedError("Too often.", retry_after_s=7), 429),
            (InternalError("Ours."), 500),
            (RuntimeError("nobody foresaw it"), 500),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_an_error_that_may_pass_gives_the_key_back(
        self, nodes: Nodes, failure: Exception, status: int
    ) -> None:
        nodes.one.fails = failure
        for _ in range(2):
            assert (await nodes.ask({"name": "a"})).status == status
        assert nodes.one.calls == 2
        nodes.one.fails = None
        reply = await nodes.ask({"name": "quite another"})
        assert (reply.status, reply.headers.get("idempotent-replayed")) == (201, None)

    async def test_a_failure_after_the_commit_does_not_lose_the_answer(self, nodes: Nodes) -> None:
        nodes.one.fails_after = RuntimeError("after it was committed")
        assert (await nodes.ask({"name": "a"})).status == 500
        again = await nodes.ask({"name": "a"}, node=1)
        assert (again.status, again.headers["idempotent-replayed"]) == (201, "true")
        assert await nodes.made() == ["a"]

    async def test_work_that_keeps_nothing_is_a_mistake_that_shows(self, nodes: Nodes) -> None:
        nodes.one.forgets = True
        assert (await nodes.ask({"name": "a"})).status == 500
        assert (await nodes.ask({"name": "a"}, node=1)).status == 201


class TestTogether:
    """Many at once, on both nodes."""

    async def test_while_the_first_works_others_are_told_when_to_come_again(
        self, nodes: Nodes
    ) -> None:
        nodes.one.gate = asyncio.Event()
        first = asyncio.create_task(nodes.ask({"name": "a"}))
        await waited(nodes.one.entered)
        reply = await nodes.ask({"name": "a"}, node=1)
        assert code(reply) == (409, "IDEMPOTENCY_IN_PROGRESS")
        assert reply.headers["retry-after"] == "1"
        assert code(await nodes.ask({"name": "b"}, node=1)) == (422, "IDEMPOTENCY_KEY_REUSED")
        nodes.one.gate.set()
        assert (await first).status == 201
        assert (await nodes.ask({"name": "a"}, node=1)).headers["idempotent-replayed"] == "true"

    @given(
        requests=st.lists(
            st.tuples(st.sampled_from("kl"), st.sampled_from("ab"), st.integers(0, 1)),
            min_size=2,
            max_size=16,
        )
    )
    @settings(
        max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
    )
    async def test_each_key_has_one_effect_and_everybody_that_answer_or_a_refusal(
        self, nodes: Nodes, requests: list[tuple[str, str, int]]
    ) -> None:
        nodes.place = uuid4().hex
        replies = await asyncio.gather(
            *(nodes.ask({"name": name}, key=key, node=node) for key, name, node in requests)
        )
        keys = {key for key, _, _ in requests}
        by_key: dict[str, dict[str, Any]] = {}
        for (key, name, _), reply in zip(requests, replies, strict=True):
            if reply.status == 201:
                # Whoever got an answer got the one answer, and asked for just that.
                data = by_key.setdefault(key, reply.json["data"])
                assert reply.json["data"] == data
                assert data["name"] == name
            else:
                assert code(reply) in {
                    (409, "IDEMPOTENCY_IN_PROGRESS"),
                    (422, "IDEMPOTENCY_KEY_REUSED"),
                }
        assert set(by_key) == keys
        assert Counter(await nodes.made()) == Counter(data["name"] for data in by_key.values())


class TestDeath:
    """A node that dies, hangs, or does not hear the database's word."""

    async def test_a_claim_of_the_dead_holds_for_its_lease_and_the_next_try_does_the_work(
        self, nodes: Nodes
    ) -> None:
        async def ask() -> Reply:
            return await nodes.ask({"name": "a"}, node=1)

        # What kill -9 leaves behind: the claim, and nobody who would answer it.
        nodes.one.gate = asyncio.Event()
        dying = asyncio.create_task(nodes.ask({"name": "a"}))
        await waited(nodes.one.entered)
        assert code(await ask()) == (409, "IDEMPOTENCY_IN_PROGRESS")
        await nodes.expire("claim_until")
        reply = await ask()
        assert (reply.status, reply.headers.get("idempotent-replayed")) == (201, None)
        assert await nodes.made() == ["a"]
        # And if it was not dead but slow: what it did is not committed, and it gets to know.
        nodes.one.gate.set()
        assert code(await dying) == (409, "IDEMPOTENCY_IN_PROGRESS")
        assert await nodes.made() == ["a"]
        assert (await nodes.ask({"name": "a"})).headers["idempotent-replayed"] == "true"

    async def test_a_slow_ones_late_refusal_does_not_replace_the_answer(self, nodes: Nodes) -> None:
        nodes.one.gate = asyncio.Event()
        nodes.one.fails = ConflictError("It is there.", code="ALREADY_THERE")
        slow = asyncio.create_task(nodes.ask({"name": "a"}))
        await waited(nodes.one.entered)
        await nodes.expire("claim_until")
        assert (await nodes.ask({"name": "a"}, node=1)).status == 201
        nodes.one.gate.set()
        assert code(await slow) == (409, "ALREADY_THERE")
        assert (await nodes.ask({"name": "a"})).status == 201

    async def test_work_that_takes_too_long_is_ended_and_gives_its_key_back(
        self, nodes: Nodes
    ) -> None:
        nodes.one.gate = asyncio.Event()
        limits = HttpLimits(handler_timeout_s=0.15)
        async with serving(nodes.one.routes(), limits=limits) as port, connected(port) as wire:
            reply = await post(wire, nodes.path, {"name": "a"}, "Idempotency-Key: k")
            assert code(reply) == (503, "UNAVAILABLE")
        assert (await nodes.ask({"name": "a"}, node=1)).status == 201
        assert await nodes.made() == ["a"]

    async def test_nobody_knows_whether_it_was_committed_and_it_was(
        self, nodes: Nodes, module_database_url: str
    ) -> None:
        async with behind_a_proxy(module_database_url, lose_commit=True) as (proxied, wire):
            reply = await post(wire, nodes.path, {"name": "a"}, "Idempotency-Key: k")
            assert code(reply) == (503, "UNAVAILABLE")
            assert proxied.calls == 1
        again = await nodes.ask({"name": "a"})
        assert (again.status, again.headers["idempotent-replayed"]) == (201, "true")
        assert await nodes.made() == ["a"]

    async def test_nobody_knows_whether_it_was_committed_and_it_was_not(self, nodes: Nodes) -> None:
        nodes.one.fails = OutcomeUnknownError("Whether the database stored it is not known.")
        assert code(await nodes.ask({"name": "a"})) == (503, "UNAVAILABLE")
        assert (await nodes.ask({"name": "a"}, node=1)).status == 201
        assert await nodes.made() == ["a"]

    async def test_without_a_database_nothing_is_done(
        self, nodes: Nodes, module_database_url: str
    ) -> None:
        async with behind_a_proxy(module_database_url, down=True) as (proxied, wire):
            reply = await post(wire, nodes.path, {"name": "a"}, "Idempotency-Key: k")
            assert code(reply) == (503, "UNAVAILABLE")
            assert reply.headers["retry-after"] == "1"
            assert proxied.calls == 0
        assert (await nodes.ask({"name": "a"})).status == 201


class Proxied(Things):
    """A node whose database loses the word on a commit, once."""

    def __init__(self, database: Database, proxy: DatabaseProxy, *, lose_commit: bool) -> None:
        super().__init__(database)
        self._proxy = proxy
        self._lose_commit = lose_commit

    async def make(self, place: str, body: ThingBody, keep: Keep[int] | None) -> int:
        """Make it, and do not hear that it was made."""
        assert keep is not None

        async def and_lose_the_word(connection: Connection, number: int) -> None:
            await keep(connection, number)
            self._proxy.lose_answer = int(self._lose_commit)

        return await super().make(place, body, and_lose_the_word)


@asynccontextmanager
async def behind_a_proxy(
    url: str, *, lose_commit: bool = False, down: bool = False
) -> AsyncIterator[tuple[Things, Wire]]:
    """A node of its own that reaches its database through a proxy, and a connection to it."""
    async with DatabaseProxy(url) as proxy:
        database = await Database.connect(proxy.url, pool_size=1)
        things = Proxied(database, proxy, lose_commit=lose_commit)
        try:
            if down:
                proxy.go_down()
            async with serving(things.routes()) as port, connected(port) as wire:
                yield things, wire
        finally:
            await database.close()


async def waited(event: asyncio.Event) -> None:
    """Wait for what must happen soon."""
    async with asyncio.timeout(SHORT_S):
        await event.wait()
