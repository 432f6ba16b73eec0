"""The schema's history: run whole or not at all, in halves, forth and back, on PostgreSQL 15."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
import structlog

from glamd.admin import migrate
from glamd.admin.migrate import Relation
from glamd.db import VERSION_TABLE, Database
from glamd.embedded.children import Child, Program, run
from glamd.embedded.postgres import free_port, unprivileged_identity
from glamd.errors import ConfigError, InputError, InternalError, UnavailableError
from migrations.support import Schemas
from tests.support.postgres import execute

ROOT = Path(__file__).resolve().parents[2]

NEXT = '''"""A revision of the test's own."""

from migrations.support import apply

revision = "9999"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(cde="{cde}", glam="{glam}")


def downgrade() -> None:
    apply(cde="DROP TABLE cde.later", glam="DROP TABLE IF EXISTS glam.later")
'''


async def tables(url: str) -> set[str]:
    """The tables and sequences of our schemas and of `public`, with their schema."""
    connection = await asyncpg.connect(url, timeout=5)
    try:
        rows = await connection.fetch(
            "SELECT c.relnamespace::regnamespace || '.' || c.relname AS name FROM pg_class c"
            " WHERE c.relnamespace::regnamespace::text IN ('cde', 'glam', 'public')"
            " AND c.relkind IN ('r', 'p', 'S')"
        )
    finally:
        await connection.close(timeout=5)
    return {str(row["name"]) for row in rows}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the scripts, for revisions that a test adds."""
    copy = tmp_path / "migrations"
    shutil.copytree(migrate.SCRIPTS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrate, "SCRIPTS", copy)
    migrate.expected_revision.cache_clear()
    yield copy
    migrate.expected_revision.cache_clear()


def add_revision(scripts: Path, *, cde: str, glam: str = "") -> str:
    """Put a newest revision with this SQL into the scripts; returns the one before it."""
    head = migrate.expected_revision()
    text = NEXT.format(head=head, cde=cde, glam=glam)
    (scripts / "versions" / "9999_next.py").write_text(text)
    migrate.expected_revision.cache_clear()
    return head


async def test_a_failing_revision_changes_nothing_and_quotes_nothing(
    scripts: Path, empty_database_url: str
) -> None:
    add_revision(scripts, cde="CREATE TABLE cde.later (n text); SELECT 'secret'::integer;")
    with structlog.testing.capture_logs() as logs, pytest.raises(InternalError) as caught:
        await migrate.upgrade(empty_database_url)
    assert "22P02" in caught.value.message
    assert "secret" not in f"{caught.value} {logs}"
    assert await tables(empty_database_url) == set()


async def test_a_lock_that_is_held_ends_the_migration_in_bounded_time(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.05)
    holder = await asyncpg.connect(database_url, timeout=5)
    try:
        await holder.execute(f"SELECT pg_advisory_lock({migrate.LOCK_KEY})")
        with pytest.raises(UnavailableError, match="Another migration runs"):
            await migrate.downgrade(database_url, revision="base")
    finally:
        await holder.close(timeout=5)
    assert (await migrate.check(database_url)).relation is Relation.SAME


async def test_an_unknown_revision_is_refused(empty_database_url: str) -> None:
    with pytest.raises(InputError):
        await migrate.upgrade(empty_database_url, revision="no-such-revision")


async def test_a_wrong_login_and_an_absent_server_are_told_apart(database_url: str) -> None:
    password = database_url.split(":")[2].partition("@")[0]
    with pytest.raises(ConfigError):
        await migrate.upgrade(database_url.replace(password, "wrong"))
    port = database_url.rpartition(":")[2].partition("/")[0]
    with pytest.raises(UnavailableError):
        await migrate.upgrade(database_url.replace(f":{port}/", f":{free_port()}/"))


async def test_two_migrations_at_once_make_one_schema(empty_database_url: str) -> None:
    upgrade = "import asyncio, sys; from glamd.admin import migrate; "
    upgrade += "asyncio.run(migrate.upgrade(sys.argv[1]))"
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", upgrade, empty_database_url)
        for _ in range(2)
    ]
    async with asyncio.timeout(30):
        assert [await process.wait() for process in processes] == [0, 0]
    assert (await migrate.check(empty_database_url)).relation is Relation.SAME


async def test_down_and_up_again_leaves_the_same_schema(empty_database_url: str) -> None:
    await migrate.upgrade(empty_database_url)
    made = await tables(empty_database_url)
    await migrate.downgrade(empty_database_url, revision="base")
    assert await tables(empty_database_url) == {f"public.{VERSION_TABLE}"}
    await migrate.upgrade(empty_database_url)
    assert await tables(empty_database_url) == made


@pytest.mark.parametrize(("half", "other"), [("cde", "glam"), ("glam", "cde")])
async def test_a_server_of_one_half_gets_nothing_of_the_other(
    empty_database_url: str, half: Schemas, other: str
) -> None:
    await migrate.upgrade(empty_database_url, schemas=half)
    made = await tables(empty_database_url)
    assert any(name.startswith(f"{half}.") for name in made)
    assert not any(name.startswith(f"{other}.") for name in made)
    await migrate.downgrade(empty_database_url, revision="base", schemas=half)
    assert await tables(empty_database_url) == {f"public.{VERSION_TABLE}"}


async def test_a_schema_that_is_older_or_newer_is_told_with_what_mends_it(
    scripts: Path, database_url: str, empty_database_url: str
) -> None:
    empty = await migrate.check(empty_database_url)
    assert (empty.current, empty.relation) == (None, Relation.OLDER)
    assert empty.mend == "glamctl db upgrade"
    assert (await migrate.check(database_url)).relation is Relation.SAME
    head = add_revision(
        scripts, cde="CREATE TABLE cde.later (n text); CREATE INDEX ON cde.later (n)"
    )
    older = await migrate.check(database_url)
    assert (older.current, older.expected, older.relation) == (head, "9999", Relation.OLDER)
    await migrate.upgrade(database_url)
    assert "cde.later" in await tables(database_url)
    (scripts / "versions" / "9999_next.py").unlink()
    migrate.expected_revision.cache_clear()
    newer = await migrate.check(database_url)
    assert newer.relation is Relation.NEWER
    assert f"downgrade {head}" in newer.mend


async def test_reset_leaves_a_new_schema_without_the_data(database_url: str) -> None:
    await execute(
        database_url,
        "INSERT INTO cde.merchants (merchant_id) VALUES (gen_random_uuid())",
    )
    await migrate.reset(database_url)
    database = await Database.connect(database_url)
    try:
        assert await database.fetchval("SELECT count(*) FROM cde.merchants") == 0
        assert await database.schema_revision() == migrate.expected_revision()
    finally:
        await database.close()


def test_a_new_revision_follows_the_newest_and_is_a_step_of_nothing(
    scripts: Path, empty_database_url: str
) -> None:
    head = migrate.expected_revision()
    made = migrate.revision("add a thing")
    assert made.parent == scripts / "versions"
    assert made.name == f"{int(head) + 1:04d}_add_a_thing.py"
    newest = migrate.history()[0]
    assert (newest.down_revision, newest.title) == (head, "add a thing")
    asyncio.run(migrate.upgrade(empty_database_url))
    assert asyncio.run(migrate.current(empty_database_url)) == newest.revision


def test_plain_alembic_works_in_the_checkout(empty_database_url: str) -> None:
    def alembic(*arguments: str, url: str = empty_database_url) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        return f"{done.returncode} {done.stdout} {done.stderr}"

    assert alembic("-x", "schemas=cde", "upgrade", "head").startswith("0 ")
    made = asyncio.run(tables(empty_database_url))
    assert "cde.merchants" in made
    assert "glam.merchants" not in made
    assert f"0 {migrate.expected_revision()}" in alembic("current")
    assert "DATABASE_URL is not set" in alembic("current", url="")


def open_to_all(directory: Path) -> None:
    """Let the server's user in."""
    directory.chmod(0o755)


@asynccontextmanager
async def debian_server(programs: Path, directory: Path) -> AsyncIterator[str]:
    """Debian's PostgreSQL on a cluster of its own; it wants a directory that its user may reach."""
    identity = unprivileged_identity()
    data = directory / "data"
    data.mkdir(mode=0o700)
    if identity is not None:
        os.chown(data, identity.uid, identity.gid)
    port = free_port()

    def program(name: str, *arguments: str) -> Program:
        return Program(
            name=name,
            command=(str(programs / name), "-D", str(data), *arguments),
            directory=data,
            identity=identity,
            log=directory / "log",
        )

    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"

    async def answers() -> bool:
        try:
            await tables(url)
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    await run(program("initdb", "--username=postgres", "--auth=trust"), timeout_s=30)
    child = Child(
        program("postgres", f"--port={port}", "--unix_socket_directories=", "--fsync=off"), answers
    )
    await child.start()
    try:
        yield url
    finally:
        await child.stop()


@pytest.mark.debian
async def test_debians_own_postgresql_serves_just_as_well(
    debian_program: Callable[[str, str], Path],
) -> None:
    programs = debian_program("/usr/lib/postgresql/15/bin/postgres", "postgresql").parent
    with tempfile.TemporaryDirectory(prefix="glamd-test-") as name:
        directory = Path(name)
        open_to_all(directory)
        async with debian_server(programs, directory) as url:
            await migrate.upgrade(url)
            database = await Database.connect(url)
            assert str(await database.fetchval("SHOW server_version")).startswith("15.")
            assert await database.schema_revision() == migrate.expected_revision()
            await database.close()
            await migrate.downgrade(url, revision="base")
            assert await tables(url) == {f"public.{VERSION_TABLE}"}
