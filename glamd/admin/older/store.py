"""The older service's table, read page by page by its id; nothing is written there.

The names of columns are the older service's own: they are looked up, quoted, and only then put into
a statement. Imported late, since it brings the database's driver along.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from glamd.admin.client import CommandError
from glamd.admin.older.rows import Columns, OlderText, Place, Rows, check, fingerprint, texts
from glamd.credentials.importing.older import LIMITS
from glamd.db import Database, Row
from glamd.errors import ConfigError, GlamError, InternalError

PAGE_ROWS: Final = 500
STATEMENT_TIMEOUT_S: Final = 60.0

_COLUMNS: Final = """
SELECT attname AS name, format_type(atttypid, NULL) AS type, typcategory::text AS category
FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
ORDER BY attnum
"""
_PLACE: Final = """
SELECT jsonb_build_array(current_database(), inet_server_addr(), inet_server_port(),
                         to_regclass($1)::oid::bigint)::text
"""
_STRING: Final = "S"
_ID_TYPES: Final = frozenset({"uuid", "text", "character varying", "character"})


@contextmanager
def of_table(url: str, *, table: str, columns: Columns, after: Place) -> Iterator[Rows]:
    """The rows of a table in PostgreSQL, by id. Raises `CommandError`, also in the middle."""
    with connected(url) as (runner, database):
        # Servers behind forwarded ports may take themselves for one another; no login in it.
        at = urlsplit(url).netloc.rpartition("@")[2]
        yield _table(runner, database, at=at, table=table, columns=columns, after=after)


@contextmanager
def connected(url: str) -> Iterator[tuple[asyncio.Runner, Database]]:
    """The older database, and what to ask it with, one question at a time. CommandError."""
    with asyncio.Runner() as runner:
        try:
            database = runner.run(
                Database.connect(
                    url, pool_size=1, statement_timeout_s=STATEMENT_TIMEOUT_S, name="glamd-import"
                )
            )
        except GlamError as error:
            raise told(error) from None
        try:
            yield runner, database
        finally:
            runner.run(database.close())


def _table(
    runner: asyncio.Runner,
    database: Database,
    *,
    at: str,
    table: str,
    columns: Columns,
    after: Place,
) -> Rows:
    name = quoted_table(table)
    kinds = kinds_of(runner, database, table, name)
    check(columns, tuple(kinds))
    id_type = kinds[columns["id"]][0]
    if id_type not in _ID_TYPES:
        raise CommandError("NO_UUID", f"The ids are of type {id_type}, and not UUIDs.")
    place = str(_read(runner, database, _PLACE, name)[0][0])
    source = fingerprint("table", at, place, columns["id"])
    start = after.within(source)
    if start is not None and id_type == "uuid" and not _is_uuid(start):
        start = None  # the column was of another type; what is here already stays so
    key = quoted(columns["id"])
    behind = f"WHERE {key} > $1::text::{'uuid' if id_type == 'uuid' else 'text'}"
    pairs = ", ".join(
        f"'{field}', {_value(column, kinds[column][1], LIMITS[field])}"
        for field, column in columns.items()
        if column
    )
    page = f"SELECT {key}::text AS id, jsonb_build_object({pairs}) AS fields FROM {name}"  # noqa: S608 - quoted names
    end = f"ORDER BY {key} LIMIT {PAGE_ROWS}"
    count = f"SELECT count(*) FROM {name}"  # noqa: S608 - a quoted name

    def read(select: str, end: str, position: str | None) -> list[Row]:
        if position is None:
            return _read(runner, database, f"{select} {end}")
        return _read(runner, database, f"{select} {behind} {end}", position)

    def rows() -> Iterator[OlderText]:
        position = start
        while found := read(page, end, position):
            for row in found:
                yield texts(row["fields"], {field: field for field in LIMITS})
            position = str(found[-1]["id"])

    return Rows(source, int(read(count, "", start)[0][0]), rows())


def kinds_of(
    runner: asyncio.Runner, database: Database, table: str, name: str
) -> dict[str, tuple[str, str]]:
    """Type and category of every column of the table whose quoted name this is. CommandError."""
    found = _read(runner, database, _COLUMNS, name)
    if not found:
        raise CommandError(
            "NO_TABLE", f"There is no table {table} that this login may see; --table names another."
        )
    return {str(row["name"]): (str(row["type"]), str(row["category"])) for row in found}


def _read(runner: asyncio.Runner, database: Database, sql: str, *args: object) -> list[Row]:
    async def read() -> list[Row]:
        async with database.transaction() as connection:
            await connection.execute("SET TRANSACTION READ ONLY")
            return await connection.fetch(sql, *args)

    try:
        return runner.run(read())
    except GlamError as error:
        raise told(error) from None


def told(error: GlamError) -> CommandError:
    """An error of the older database, which must not be taken for one of the daemon's."""
    if isinstance(error, InternalError):
        return CommandError("REFUSED", "The older database refuses; may this login read the table?")
    code = "CONFIG_ERROR" if isinstance(error, ConfigError) else error.code
    return CommandError(code, f"The older database: {error.message}")


def quoted_table(name: str) -> str:
    """A table's name, perhaps behind its schema's, as it may stand in a statement."""
    return ".".join(quoted(part) for part in name.split("."))


def quoted(name: str) -> str:
    """A name as it may stand in a statement."""
    return '"' + name.replace('"', '""') + '"'


def _value(column: str, category: str, limit: int) -> str:
    """The column as JSON; of a text only as much is sent as shows that it is too long."""
    name = quoted(column)
    return f"to_jsonb(left({name}, {limit + 1}))" if category == _STRING else f"to_jsonb({name})"


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
