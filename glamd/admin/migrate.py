"""The schema's revisions, run from code: for `glamctl db …`, `glamd dev`, the daemon and the tests.

Only the running of Alembic stands here; the SQL is in `migrations/versions`. Where `cde` lives on a
server of its own, call each function once for each server, with `schemas` saying which half: one
after the other, since Alembic's context is global to the process. Processes wait for each other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

import asyncpg
import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection as SyncConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import migrations
from glamd.db import VERSION_TABLE, Database, driver_url
from glamd.db_errors import connect_error
from glamd.errors import InputError, InternalError, UnavailableError
from migrations.support import DEFAULT_SCHEMAS, Schemas

T = TypeVar("T")

log = structlog.get_logger()

SCRIPTS: Final = Path(migrations.__file__).parent
CONNECT_TIMEOUT_S: Final = 10.0
STATEMENT_TIMEOUT_S: Final = 3600.0
"""A step may rewrite a large table; the lock that it waits for has a short limit of its own."""

LOCK_KEY: Final = int.from_bytes(b"glamd")
"""The advisory lock that two migrations of one database take in turn."""

LOCK_TIMEOUT_S: Final = 10.0
"""How long a step waits for that lock, or for a table that others use, before it gives up."""

_LOCK_NOT_AVAILABLE: Final = "55P03"


class Relation(Enum):
    """How a database's schema stands to the one that this release knows."""

    SAME = "same"
    OLDER = "older"
    NEWER = "newer"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """What `check` found: the revisions, and for the operator the command that mends it."""

    current: str | None
    expected: str
    relation: Relation
    mend: str


@dataclass(frozen=True, slots=True)
class Step:
    """One revision of the history, newest first."""

    revision: str
    down_revision: str | None
    title: str


async def upgrade(url: str, *, revision: str = "head", schemas: Schemas = DEFAULT_SCHEMAS) -> None:
    """Bring the schema up to the revision, all of it or nothing."""
    await _run(url, schemas, lambda config: command.upgrade(config, revision))


async def downgrade(url: str, *, revision: str, schemas: Schemas = DEFAULT_SCHEMAS) -> None:
    """Take the schema back to the revision (`base` for nothing at all, `-1` for one step)."""
    await _run(url, schemas, lambda config: command.downgrade(config, revision))


async def reset(url: str, *, schemas: Schemas = DEFAULT_SCHEMAS) -> None:
    """Delete the schemas with all that is in them, then make them anew."""
    halves = ("cde", "glam") if schemas == "both" else (schemas,)
    database = await Database.connect(url, pool_size=1, name="glamd-migrate")
    try:
        async with database.transaction() as connection:
            for half in halves:
                await connection.execute(f"DROP SCHEMA IF EXISTS {half} CASCADE")
            await connection.execute(f"DROP TABLE IF EXISTS public.{VERSION_TABLE}")
    finally:
        await database.close()
    await upgrade(url, schemas=schemas)


async def current(url: str) -> str | None:
    """The revision that the database is at, None when it was never migrated."""
    database = await Database.connect(url, pool_size=1, name="glamd-migrate")
    try:
        return await database.schema_revision()
    finally:
        await database.close()


async def check(url: str) -> SchemaState:
    """Compare the database's schema with the one that this release knows."""
    return compare(await current(url))


def compare(found: str | None) -> SchemaState:
    """Say how a revision that was found in a database stands to the expected one."""
    expected = expected_revision()
    if found == expected:
        return SchemaState(found, expected, Relation.SAME, "")
    if found is None or found in {step.revision for step in history()}:
        return SchemaState(found, expected, Relation.OLDER, "glamctl db upgrade")
    mend = f"glamctl db downgrade {expected} (with the newer glamd that made it)"
    return SchemaState(found, expected, Relation.NEWER, mend)


@functools.cache
def expected_revision() -> str:
    """The newest revision of the packaged scripts, which this release is written for."""
    head = _scripts().get_current_head()
    assert head is not None, "there are no migrations"
    return head


def history() -> list[Step]:
    """Every revision, newest first."""
    return [
        Step(
            revision=script.revision,
            down_revision=None if script.down_revision is None else str(script.down_revision),
            title=script.doc,
        )
        for script in _scripts().walk_revisions()
    ]


def revision(message: str) -> Path:
    """Write a new, empty revision after the newest one and return its file."""
    number = 1 + max((int(step.revision) for step in history()), default=0)
    script = command.revision(_config(), message, rev_id=f"{number:04d}")
    assert script is not None, "Alembic made no revision"
    assert not isinstance(script, list), "Alembic made more than one revision"
    return Path(script.path)


async def on_connection(url: str, work: Callable[[SyncConnection], T]) -> T:
    """Run `work` with a connection of SQLAlchemy's, whose driver is given the URL untouched.

    The URL goes past SQLAlchemy, since options such as `sslmode` are PostgreSQL's, not its own.
    """

    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(
                driver_url(url),
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=STATEMENT_TIMEOUT_S,
                server_settings={"application_name": "glamd-migrate"},
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise connect_error(error) from None

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def _run(url: str, schemas: Schemas, work: Callable[[Config], None]) -> None:
    config = _config()
    config.attributes["schemas"] = schemas

    def with_connection(connection: SyncConnection) -> None:
        config.attributes["connection"] = connection
        work(config)

    try:
        await on_connection(url, with_connection)
    except CommandError as error:
        raise InputError(f"Alembic refuses: {error}") from None
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        state = getattr(getattr(error, "orig", error), "sqlstate", None)
        if state == _LOCK_NOT_AVAILABLE:
            msg = "Another migration runs, or somebody holds a table that this one must change."
            raise UnavailableError(msg) from None
        log.error("migration_failed", sqlstate=state)  # noqa: TRY400 - a traceback may quote rows
        msg = f"The migration failed and changed nothing (SQLSTATE {state})."
        raise InternalError(msg) from None


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
