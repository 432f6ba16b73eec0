"""Group commit: who is written when, and that everybody is answered whatever happens.

What is about time and order runs against a database that is only a place to wait; that a batch is
one transaction, and what a lost server does to it, against PostgreSQL.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from glamd.db import Connection, Database
from glamd.errors import GlamError, InputError, UnavailableError
from glamd.journal import Commit, Journal
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import eventually

PATIENCE_S = 5.0
TURNS = 20
"""Turns of the loop after which everything that can happen without time passing has happened."""


class NoDatabase(Database):
    """Lends connections that nobody may use."""

    def __init__(self) -> None:
        self.lent = 0

    @asynccontextmanager
    async def dedicated(self) -> AsyncIterator[Connection]:
        """A connection to nowhere."""
        self.lent += 1
        try:
            yield Connection(None)
        finally:
            self.lent -= 1


class Desk:
    """Where batches come in: each waits until the test lets it go, unless the desk is open."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.is_open = True
        self.errors: dict[str, BaseException] = {}
        """What a batch with this entry in it ends in."""
        self._gates: list[asyncio.Event] = []

    async def commit(self, _connection: Connection, entries: Sequence[str]) -> Sequence[str]:
        """The entries in capitals."""
        self.batches.append(list(entries))
        if not self.is_open:
            gate = asyncio.Event()
            self._gates.append(gate)
            await gate.wait()
        for entry in entries:
            if entry in self.errors:
                raise self.errors[entry]
        return [entry.upper() for entry in entries]

    def let_go(self) -> None:
        """Finish the oldest batch that waits."""
        self._gates.pop(0).set()


async def turns() -> None:
    """Let happen what needs no time."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(
    commit: Commit[str, str],
    *,
    connections: int = 1,
    batch_limit: int = 256,
    queue_limit: int = 1024,
    database: Database | None = None,
) -> AsyncIterator[Journal[str, str]]:
    """A journal that runs, and is stopped at the end."""
    journal = Journal(
        name="test",
        database=database or NoDatabase(),
        commit=commit,
        connections=connections,
        batch_limit=batch_limit,
        queue_limit=queue_limit,
    )
    await journal.start()
    await turns()
    try:
        yield journal
    finally:
        await journal.stop(0.1)


async def answers(futures: Sequence[asyncio.Future[str]]) -> list[str]:
    """What became of each: its result, or its error's code."""
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*futures, return_exceptions=True)
    return [one.code if isinstance(one, GlamError) else str(one) for one in found]


@pytest.fixture
def desk() -> Desk:
    """An open desk."""
    return Desk()


# ---- who goes when


async def test_a_lone_entry_is_written_at_once_and_by_itself(desk: Desk) -> None:
    desk.is_open = False
    async with running(desk.commit) as journal:
        future = journal.submit("a")
        await turns()
        # No timer had to pass.
        assert desk.batches == [["a"]]
        desk.let_go()
        assert await answers([future]) == ["A"]


@pytest.mark.parametrize(
    ("waiting", "sizes"), [(7, [7]), (15, [15]), (16, [8, 8]), (25, [9, 8, 8]), (40, [14, 13, 13])]
)
async def test_idle_connections_share_what_waits_where_each_gets_enough(
    desk: Desk, waiting: int, sizes: list[int]
) -> None:
    desk.is_open = False
    async with running(desk.commit, connections=3) as journal:
        futures = [journal.submit(f"e{number}") for number in range(waiting)]
        await turns()
        assert [len(batch) for batch in desk.batches] == sizes
        for _ in sizes:
            desk.let_go()
        assert await answers(futures) == [f"E{number}" for number in range(waiting)]


async def test_a_connection_that_is_busy_is_left_no_share(desk: Desk) -> None:
    desk.is_open = False
    async with running(desk.commit, connections=2) as journal:
        first = journal.submit("first")
        await turns()
        rest = [journal.submit(f"e{number}") for number in range(20)]
        await turns()
        assert [len(batch) for batch in desk.batches] == [1, 20]
        desk.let_go()
        desk.let_go()
        assert len(await answers([first, *rest])) == 21


async def test_what_comes_during_a_commit_goes_together_in_the_next_one_in_order(
    desk: Desk,
) -> None:
    desk.is_open = False
    async with running(desk.commit) as journal:
        first = journal.submit("a")
        await turns()
        rest = [journal.submit(name) for name in "bcdef"]
        await turns()
        assert desk.batches == [["a"]]
        desk.let_go()
        await turns()
        assert desk.batches == [["a"], ["b", "c", "d", "e", "f"]]
        assert first.done()
        assert not any(future.done() for future in rest)
        desk.let_go()
        assert await answers(rest) == ["B", "C", "D", "E", "F"]


async def test_a_batch_never_exceeds_its_limit_and_nobody_is_forgotten(desk: Desk) -> None:
    async with running(desk.commit, connections=2, batch_limit=4) as journal:
        futures = [journal.submit(str(number)) for number in range(50)]
        assert await answers(futures) == [str(number) for number in range(50)]
    assert max(map(len, desk.batches)) == 4
    written = [entry for batch in desk.batches for entry in batch]
    assert sorted(map(int, written)) == list(range(50))


async def test_while_one_connection_is_stuck_the_other_goes_on(desk: Desk) -> None:
    desk.is_open = False
    async with running(desk.commit, connections=2) as journal:
        stuck = journal.submit("stuck")
        await turns()
        desk.is_open = True
        for name in ("a", "b", "c"):
            assert await answers([journal.submit(name)]) == [name.upper()]
        assert not stuck.done()
        desk.let_go()
        assert await answers([stuck]) == ["STUCK"]


async def test_a_full_queue_refuses_at_once_and_takes_again_when_there_is_room(
    desk: Desk,
) -> None:
    desk.is_open = False
    async with running(desk.commit, queue_limit=3) as journal:
        under_way = journal.submit("a")
        await turns()
        waiting = [journal.submit(name) for name in "bcd"]
        refused = journal.submit("e")
        assert refused.done()
        assert await answers([refused]) == ["UNAVAILABLE"]
        desk.is_open = True
        desk.let_go()
        assert await answers([under_way, *waiting]) == ["A", "B", "C", "D"]
        assert await answers([journal.submit("f")]) == ["F"]
    assert not any("e" in batch for batch in desk.batches)


# ---- when something is wrong


async def test_one_bad_entry_fails_alone(desk: Desk) -> None:
    desk.errors["c"] = InputError("bad", code="BAD")
    async with running(desk.commit) as journal:
        futures = [journal.submit(name) for name in "abcde"]
        assert await answers(futures) == ["A", "B", "BAD", "D", "E"]
    assert desk.batches == [list("abcde"), ["a"], ["b"], ["c"], ["d"], ["e"]]


async def test_a_database_that_is_away_fails_its_whole_batch_with_one_attempt(desk: Desk) -> None:
    desk.errors["b"] = UnavailableError("away")
    async with running(desk.commit) as journal:
        futures = [journal.submit(name) for name in "abc"]
        assert await answers(futures) == ["UNAVAILABLE"] * 3
        del desk.errors["b"]
        assert await answers([journal.submit("d")]) == ["D"]
    assert desk.batches == [list("abc"), ["d"]]


async def test_a_database_that_goes_away_under_a_batch_taken_apart_is_not_asked_for_the_rest(
    desk: Desk,
) -> None:
    desk.errors["b"] = InputError("bad", code="BAD")

    async def goes_away(connection: Connection, entries: Sequence[str]) -> Sequence[str]:
        if entries == ["c"]:
            desk.batches.append(list(entries))
            raise UnavailableError("away")
        return await desk.commit(connection, entries)

    async with running(goes_away) as journal:
        futures = [journal.submit(name) for name in "abcdef"]
        assert await answers(futures) == ["A", "BAD", *["UNAVAILABLE"] * 4]
    assert desk.batches == [list("abcdef"), ["a"], ["b"], ["c"]]


async def test_a_crash_in_the_commit_answers_everybody_and_the_writer_lives(desk: Desk) -> None:
    desk.errors["b"] = ZeroDivisionError("ours")
    with capture_logs() as logs:
        async with running(desk.commit) as journal:
            futures = [journal.submit(name) for name in "abc"]
            assert await answers(futures) == ["INTERNAL_ERROR"] * 3
            assert await answers([journal.submit("d")]) == ["D"]
    assert [each["event"] for each in logs] == ["journal_commit_crashed"]


@pytest.mark.parametrize("results", [[], ["one"], ["one", "two", "three"]])
async def test_another_number_of_results_than_of_entries_tells_nobody_a_neighbours_result(
    results: list[str],
) -> None:
    batches = []

    async def miscounts(_connection: Connection, entries: Sequence[str]) -> Sequence[str]:
        batches.append(list(entries))
        return results

    with capture_logs() as logs:
        async with running(miscounts) as journal:
            futures = [journal.submit(name) for name in "ab"]
            assert await answers(futures) == ["INTERNAL_ERROR"] * 2
    # It was committed, so nothing is written a second time to find out more.
    assert batches == [["a", "b"]]
    assert [each["event"] for each in logs] == ["journal_commit_crashed"]


async def test_who_stops_waiting_changes_nothing_for_the_commit_or_for_the_others(
    desk: Desk,
) -> None:
    desk.is_open = False
    async with running(desk.commit) as journal:
        under_way = journal.submit("a")
        await turns()
        queued = [journal.submit(name) for name in "bc"]
        under_way.cancel()
        queued[0].cancel()
        desk.is_open = True
        desk.let_go()
        assert await answers(queued[1:]) == ["C"]
    assert desk.batches == [["a"], ["b", "c"]]


# ---- the end


async def test_before_its_start_and_after_its_stop_a_journal_refuses(desk: Desk) -> None:
    journal = Journal(name="test", database=NoDatabase(), commit=desk.commit)
    assert await answers([journal.submit("a")]) == ["DRAINING"]
    await journal.start()
    await journal.stop(PATIENCE_S)
    assert await answers([journal.submit("b")]) == ["DRAINING"]
    assert desk.batches == []


async def test_a_stop_writes_what_waits_and_lets_the_connections_go(desk: Desk) -> None:
    desk.is_open = False
    database = NoDatabase()
    journal = Journal(
        name="test", database=database, commit=desk.commit, connections=3, batch_limit=2
    )
    await journal.start()
    await turns()
    assert database.lent == 3
    futures = [journal.submit(str(number)) for number in range(20)]
    await turns()
    stopping = asyncio.create_task(journal.stop(PATIENCE_S))
    await turns()
    assert await answers([journal.submit("late")]) == ["DRAINING"]
    assert not stopping.done()
    desk.is_open = True
    for _ in range(3):
        desk.let_go()
    await stopping
    assert await answers(futures) == [str(number) for number in range(20)]
    assert database.lent == 0


@pytest.mark.parametrize("bad", [None, "b"])
async def test_a_stop_that_runs_out_of_time_answers_whoever_is_left(
    desk: Desk, bad: str | None
) -> None:
    # The same while a batch is being taken apart: its later entries are in no queue any more.
    if bad is not None:
        desk.errors[bad] = InputError("bad", code="BAD")
    stuck = asyncio.Event()

    async def sticks(connection: Connection, entries: Sequence[str]) -> Sequence[str]:
        if entries == ["c"] or bad is None:
            stuck.set()
            await asyncio.Event().wait()
        return await desk.commit(connection, entries)

    journal = Journal(name="test", database=NoDatabase(), commit=sticks, connections=1)
    await journal.start()
    taken = [journal.submit(name) for name in "abcdef"]
    await stuck.wait()
    queued = journal.submit("g")
    await journal.stop(0.0)
    expected = ["DRAINING"] * 6 if bad is None else ["A", "BAD", *["DRAINING"] * 4]
    assert await answers([*taken, queued]) == [*expected, "DRAINING"]


# ---- on PostgreSQL


async def written(connection: Connection, entries: Sequence[str]) -> Sequence[str]:
    """Insert them in one statement; each entry's result is the transaction it was written in."""
    rows = await connection.fetch(
        "INSERT INTO entries (entry) SELECT unnest($1::text[])"
        " RETURNING pg_current_xact_id()::text",
        list(entries),
    )
    return [row[0] for row in rows]


@pytest.fixture
async def table(database: Database) -> Database:
    """A database with a table that refuses what it has already."""
    await database.execute("CREATE TABLE entries (entry text PRIMARY KEY)")
    return database


async def count(database: Database) -> object:
    """How many entries are stored."""
    return await database.fetchval("SELECT count(*) FROM entries")


async def test_a_group_is_one_transaction_and_a_duplicate_costs_its_neighbours_nothing(
    table: Database,
) -> None:
    async with running(written, database=table) as journal:
        together = await answers([journal.submit(str(number)) for number in range(100)])
        assert len(set(together)) == 1
        found = await answers([journal.submit(name) for name in ("a", "7", "b")])
        assert found[1] == "CONFLICT"
        assert len(set(found)) == 3
    assert await count(table) == 102


async def test_a_server_that_was_away_is_used_again_when_it_is_back(
    table: Database, database_url: str
) -> None:
    async with DatabaseProxy(database_url) as proxy:
        database = await Database.connect(proxy.url, pool_size=1)
        async with running(written, database=database) as journal:
            assert await answers([journal.submit("a")]) != ["UNAVAILABLE"]
            proxy.go_down()
            refused = [journal.submit(name) for name in ("b", "c")]
            assert await answers(refused) == ["UNAVAILABLE"] * 2
            proxy.is_down = False

            async def works() -> bool:
                return await answers([journal.submit("d")]) != ["UNAVAILABLE"]

            await eventually(works)
        await database.close()
    assert await count(table) == 2


async def test_a_commit_whose_answer_got_lost_fails_its_batch_and_is_not_tried_again(
    table: Database, database_url: str
) -> None:
    async with DatabaseProxy(database_url) as proxy:
        database = await Database.connect(proxy.url, pool_size=1)
        async with running(written, database=database) as journal:
            assert await answers([journal.submit("a")]) != ["UNAVAILABLE"]
            proxy.lose_answer = 1
            lost = [journal.submit(name) for name in ("b", "c")]
            # An error that may be tried again by whoever can find out what became of it.
            assert await answers(lost) == ["UNAVAILABLE"] * 2
        await database.close()
    assert await count(table) == 3
