"""The database layer: what each failure is called, what is undone, and how it heals."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import structlog

from glamd import db
from glamd.db import Connection, Database, OutcomeUnknownError, UniqueViolationError
from glamd.embedded.postgres import EmbeddedPostgres
from glamd.errors import (
    ConfigError,
    ConflictError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from tests.support.database_proxy import DatabaseProxy
from tests.support.postgres import PostgresServer, database_name, eventually, execute

SECRET = "4111111111111111"

TABLES = """
CREATE TABLE parent (id integer PRIMARY KEY);
CREATE TABLE thing (
    name text NOT NULL CONSTRAINT thing_name_key UNIQUE,
    size integer CONSTRAINT thing_size_check CHECK (size > 0),
    parent integer REFERENCES parent,
    made uuid
);
"""

# COMMIT runs the deferred trigger, and so takes until somebody ends it.
SLOW_COMMIT = """
CREATE TABLE slow (id integer);
CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(60); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON slow
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle();
"""


@pytest.fixture(scope="module")
def tables_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database with the tables of this file."""
    url = postgres_server.create_database(migrated=False)
    postgres_server.execute(url, TABLES + SLOW_COMMIT)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
async def things(tables_url: str) -> AsyncIterator[Database]:
    """A pool of two connections to it; the tables are emptied afterwards."""
    database = await Database.connect(tables_url, pool_size=2)
    yield database
    await database.execute("TRUNCATE thing, parent, slow", timeout_s=5)
    await database.close()


@pytest.fixture
async def mortal(state_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A server that a test may kill."""
    server = EmbeddedPostgres(state_dir)
    yield server
    await server.stop()


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    """The cluster of that server."""
    with tempfile.TemporaryDirectory(prefix="glamd-test-") as directory:
        yield Path(directory) / "state"


async def sleeping(database: Database, query: str) -> bool:
    """Whether a session runs this query right now."""
    found = await database.fetchval(
        "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query = $1"
        " AND datname = current_database() AND wait_event = 'PgSleep'",
        query,
    )
    return found is not None


@pytest.mark.parametrize(
    ("sql", "arguments"),
    [
        ("INSERT INTO thing (name, size) VALUES ($1, -1)", (SECRET,)),
        ("INSERT INTO thing (name, size) VALUES (NULL, $1)", (7,)),
        ("INSERT INTO thing (name, parent) VALUES ($1, 99)", (SECRET,)),
        ("SELECT $1::text::integer * 1000", (SECRET,)),
        ("SELECT $1::integer", (SECRET,)),
        ("SELECT nothing FROM nowhere", ()),
    ],
    ids=["check", "not null", "foreign key", "out of range", "wrong argument", "wrong sql"],
)
async def test_a_fault_of_ours_is_internal_and_gives_no_value_away(
    things: Database, sql: str, arguments: tuple[object, ...]
) -> None:
    with structlog.testing.capture_logs() as logs, pytest.raises(InternalError) as caught:
        await things.execute(sql, *arguments)
    assert [entry["event"] for entry in logs] == ["database_error"]
    assert SECRET not in f"{logs} {caught.value}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert await things.fetchval("SELECT 1") == 1


async def test_a_unique_violation_names_its_constraint_but_not_the_value(things: Database) -> None:
    await things.execute("INSERT INTO thing (name) VALUES ($1)", SECRET)
    with pytest.raises(UniqueViolationError) as caught:
        await things.execute("INSERT INTO thing (name) VALUES ($1)", SECRET)
    assert isinstance(caught.value, ConflictError)
    assert caught.value.code == "CONFLICT"
    assert caught.value.constraint == "thing_name_key"
    assert "thing_name_key" not in caught.value.message
    assert SECRET not in str(caught.value)


async def test_a_raised_error_undoes_the_transaction(things: Database) -> None:
    async def write() -> None:
        async with things.transaction() as connection:
            await connection.execute("INSERT INTO thing (name) VALUES ('gone')")
            raise LookupError

    with pytest.raises(LookupError):
        await write()
    assert await things.fetchval("SELECT count(*) FROM thing") == 0


async def test_a_connection_lost_under_a_rollback_hides_no_error(tables_url: str) -> None:
    async with DatabaseProxy(tables_url) as proxy:
        through = await Database.connect(proxy.url, pool_size=2)

        async def find() -> None:
            async with through.transaction() as connection:
                await connection.fetchval("SELECT 1")
                proxy.lose_question = 1
                raise NotFoundError("It is not there.")

        try:
            with pytest.raises(NotFoundError):
                await find()
            assert await through.fetchval("SELECT 1") == 1
        finally:
            await through.close()


async def test_a_swallowed_error_never_looks_like_a_commit(things: Database) -> None:
    async def write() -> None:
        async with things.transaction() as connection:
            await connection.execute("INSERT INTO thing (name) VALUES ('first')")
            with contextlib.suppress(UniqueViolationError):
                await connection.execute("INSERT INTO thing (name) VALUES ('first')")

    with pytest.raises(InternalError):
        await write()
    assert await things.fetchval("SELECT count(*) FROM thing") == 0


async def test_a_serialization_failure_may_be_tried_again(things: Database) -> None:
    await things.execute("INSERT INTO thing (name, size) VALUES ('one', 1)")
    grow = "UPDATE thing SET size = size + 1"

    async def write() -> None:
        async with things.transaction() as connection:
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await connection.fetchval("SELECT size FROM thing")
            await things.execute(grow)
            await connection.execute(grow)

    with pytest.raises(UnavailableError) as caught:
        await write()
    assert not isinstance(caught.value, OutcomeUnknownError)
    assert caught.value.retryable


async def test_a_slow_statement_is_ended_by_the_server_and_certainly_undone(
    tables_url: str,
) -> None:
    database = await Database.connect(tables_url, pool_size=1, statement_timeout_s=0.05)
    try:
        with pytest.raises(UnavailableError) as caught:
            await database.execute("INSERT INTO thing SELECT 'slow' FROM pg_sleep(60)")
        assert not isinstance(caught.value, OutcomeUnknownError)
        assert await database.fetchval("SELECT count(*) FROM thing") == 0
    finally:
        await database.close()


async def test_a_server_that_is_silent_too_long_leaves_the_outcome_open(things: Database) -> None:
    with pytest.raises(OutcomeUnknownError):
        await things.execute("INSERT INTO thing SELECT 'x' FROM pg_sleep(60)", timeout_s=0.05)
    assert await things.fetchval("SELECT 1") == 1


async def test_a_read_in_a_transaction_that_is_silent_too_long_has_stored_nothing(
    things: Database,
) -> None:
    async def read() -> None:
        async with things.transaction() as connection:
            await connection.fetchval("SELECT pg_sleep(60)", timeout_s=0.05)

    with pytest.raises(UnavailableError) as caught:
        await read()
    assert not isinstance(caught.value, OutcomeUnknownError)
    assert await things.fetchval("SELECT 1") == 1


async def test_a_connection_cut_under_its_commit_leaves_the_outcome_open(things: Database) -> None:
    async def write() -> None:
        async with things.transaction() as connection:
            await connection.execute("INSERT INTO slow VALUES (1)")

    writing = asyncio.create_task(write())
    await eventually(lambda: sleeping(things, "COMMIT"))
    await things.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE query = 'COMMIT' AND state = 'active' AND datname = current_database()"
    )
    with pytest.raises(OutcomeUnknownError):
        await asyncio.wait_for(writing, 5)
    assert await things.fetchval("SELECT count(*) FROM slow") == 0


async def test_a_cancelled_transaction_is_undone_and_frees_its_connection(tables_url: str) -> None:
    database = await Database.connect(tables_url, pool_size=1)
    observer = await Database.connect(tables_url, pool_size=1)
    query = "SELECT pg_sleep(60)"

    async def write() -> None:
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO thing (name) VALUES ('cancelled')")
            await connection.fetchval(query)

    try:
        writing = asyncio.create_task(write())
        await eventually(lambda: sleeping(observer, query))
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert await database.fetchval("SELECT count(*) FROM thing") == 0
        assert not await sleeping(observer, query)
    finally:
        await database.close()
        await observer.close()


async def test_a_commit_that_is_cancelled_does_not_hand_on_its_connection(
    things: Database,
) -> None:
    async def write() -> None:
        async with things.transaction() as connection:
            await connection.execute("INSERT INTO slow VALUES (1)")

    writing = asyncio.create_task(write())
    await eventually(lambda: sleeping(things, "COMMIT"))
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    async with things.transaction() as one, things.transaction() as other:
        assert await one.fetchval("SELECT count(*) FROM slow") == 0
        assert await other.fetchval("SELECT count(*) FROM slow") == 0
    assert not await sleeping(things, "COMMIT")


async def test_an_exhausted_pool_refuses_in_bounded_time(
    things: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "ACQUIRE_TIMEOUT_S", 0.05)
    async with things.connection(), things.connection():
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(things.fetchval("SELECT 1"), 2)
        assert not isinstance(caught.value, OutcomeUnknownError)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(things.health(timeout_s=0.02), 2)
    await things.health()


async def test_a_server_with_no_connection_left_is_unavailable(
    things: Database, tables_url: str, postgres_server: PostgresServer
) -> None:
    limit = f'ALTER DATABASE "{database_name(tables_url)}" CONNECTION LIMIT'
    await execute(postgres_server.url, f"{limit} 1")
    try:
        async with things.connection():
            with pytest.raises(UnavailableError):
                await things.fetchval("SELECT 1")
    finally:
        await execute(postgres_server.url, f"{limit} -1")


@pytest.mark.parametrize(
    "url",
    ["postgresql://glamd:wrong@{address}/glamd", "not a url", "postgresql://h/d?sslmode=perhaps"],
)
async def test_a_login_that_cannot_work_is_a_mistake_of_the_configuration(
    postgres_server: PostgresServer, url: str
) -> None:
    address = postgres_server.url.rpartition("@")[2].partition("/")[0]
    with pytest.raises(ConfigError) as caught:
        await Database.connect(url.format(address=address))
    assert "wrong" not in caught.value.message


async def test_a_server_that_never_answers_is_unavailable_in_bounded_time() -> None:
    silent = asyncio.Event()

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    port: int = listener.sockets[0].getsockname()[1]
    try:
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(
                Database.connect(f"postgresql://u:p@127.0.0.1:{port}/d", connect_timeout_s=0.1), 5
            )
    finally:
        silent.set()
        listener.close()
        await listener.wait_closed()


async def test_a_killed_server_fails_what_runs_and_the_pool_heals_by_itself(
    mortal: EmbeddedPostgres,
) -> None:
    database = await Database.connect((await mortal.start()).app, pool_size=4)
    query = "SELECT pg_sleep(60)"

    async def in_transaction() -> None:
        async with database.transaction() as connection:
            await connection.fetchval(query)

    async def serves() -> bool:
        await database.health()
        return mortal.restarts > 0

    try:
        running = asyncio.create_task(in_transaction())
        await eventually(lambda: sleeping(database, query))
        mortal.kill9()
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(running, 5)
        assert not isinstance(caught.value, OutcomeUnknownError)
        await eventually(serves, errors=(UnavailableError,))
        answers = await asyncio.gather(*(database.fetchval("SELECT 1") for _ in range(20)))
        assert answers == [1] * 20
    finally:
        await database.close()


async def test_while_the_server_is_away_every_call_fails_at_once_as_retryable(
    mortal: EmbeddedPostgres,
) -> None:
    database = await Database.connect((await mortal.start()).app, pool_size=4)
    try:
        await mortal.stop_immediate()
        with structlog.testing.capture_logs() as logs:
            calls = [asyncio.wait_for(database.fetchval("SELECT 1"), 2) for _ in range(50)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {isinstance(outcome, UnavailableError) for outcome in outcomes} == {True}
        assert len(logs) <= 2
        await mortal.restart()
        await eventually(lambda: alive(database), errors=(UnavailableError,))
    finally:
        await database.close()


async def test_a_dedicated_connection_comes_back_by_itself_but_never_inside_a_transaction(
    mortal: EmbeddedPostgres,
) -> None:
    urls = await mortal.start()
    database = await Database.connect(urls.app)
    await execute(urls.app, "CREATE TABLE IF NOT EXISTS journal (entry integer)")

    async def write_across_a_restart(connection: Connection) -> None:
        async with connection.transaction():
            await insert(connection, 2)
            await mortal.restart()
            await insert(connection, 3)

    try:
        async with database.dedicated() as connection:
            await insert(connection, 1)
            with pytest.raises(UnavailableError):
                await write_across_a_restart(connection)
            await eventually(lambda: insert(connection, 4), errors=(UnavailableError,))
            rows = await connection.fetch("SELECT entry FROM journal ORDER BY entry")
            assert [row["entry"] for row in rows] == [1, 4]
    finally:
        await database.close()


async def insert(connection: Connection, entry: int) -> bool:
    """Write one entry; true once it is committed."""
    await connection.execute("INSERT INTO journal VALUES ($1)", entry)
    return True


async def alive(database: Database) -> bool:
    """Whether the database answers."""
    await database.health()
    return True


async def test_a_closed_pool_refuses_and_a_lent_connection_is_cut_in_bounded_time(
    tables_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "CLOSE_TIMEOUT_S", 0.05)
    database = await Database.connect(tables_url)
    async with database.connection() as connection:
        await asyncio.wait_for(database.close(), 2)
        with pytest.raises(UnavailableError):
            await connection.fetchval("SELECT 1")
    with pytest.raises(UnavailableError):
        await database.fetchval("SELECT 1")


async def test_values_come_back_as_they_went_in(things: Database) -> None:
    made = uuid4()
    document = {"id": made, "n": [1, 2.5, None, "ü"]}
    row = await things.fetchrow(
        "SELECT $1::jsonb AS document, $2::uuid AS made, ARRAY[$2::uuid] AS all", document, made
    )
    assert row is not None
    assert row["document"] == {"id": str(made), "n": [1, 2.5, None, "ü"]}
    assert row["made"] == made
    assert isinstance(row["made"], UUID)
    assert row["all"] == [made]
    again = await things.fetchval("SELECT $1::jsonb", {"made": row["made"]})
    assert again == {"made": str(made)}


async def test_many_rows_are_written_all_or_none(things: Database) -> None:
    insert_one = "INSERT INTO thing (name) VALUES ($1)"
    async with things.connection() as connection:
        with pytest.raises(UniqueViolationError):
            await connection.executemany(insert_one, [("a",), ("b",), ("a",)])
        assert await connection.fetchval("SELECT count(*) FROM thing") == 0
        await connection.executemany(insert_one, [("a",), ("b",)])
    assert await things.fetchval("SELECT count(*) FROM thing") == 2


async def test_the_revision_of_a_schema_is_told_and_none_where_there_is_none(
    database: Database, things: Database
) -> None:
    assert await database.schema_revision() is not None
    assert await things.schema_revision() is None


async def test_the_url_may_carry_sqlalchemys_driver_name(tables_url: str) -> None:
    database = await Database.connect(tables_url.replace("://", "+asyncpg://", 1))
    assert await alive(database)
    await database.close()
