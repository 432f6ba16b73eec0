"""Two older tables read side by side, by merchant, in one snapshot; nothing is written there.

A snapshot, so that an account and its transactions belong together also while the older service
runs. As in the room above, names of columns are looked up and quoted before they are put into a
statement. Imported late, since it brings the database's driver along.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from heapq import merge
from typing import Any, Final, TypeAlias, TypeVar

from glamd.admin.client import CommandError
from glamd.admin.older.store import connected, kinds_of, quoted, quoted_table, told
from glamd.db import Connection, Database, Row
from glamd.errors import GlamError
from glamd.ledger.importing.merchant import OlderTable

PAGE_ROWS: Final = 1_000
QUERY_TIMEOUT_S: Final = 3600.0
"""For sorting a table; and how long the daemon may take for one merchant meanwhile."""

KEY_LIMIT: Final = 64

_SNAPSHOT: Final = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SET LOCAL statement_timeout = '1h';
SET LOCAL idle_in_transaction_session_timeout = '1h';
"""

T = TypeVar("T")
OlderText: TypeAlias = dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """One of the older tables: what it holds, and what it and its columns are called there.

    `columns` are only those that were said; "" is one that is not there.
    """

    table: OlderTable
    name: str
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a merchant; `is_head` tells the one of which there is one from the many."""

    merchant: str
    is_head: bool
    row: OlderText


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Both tables: how many rows each has, and all of them, by merchant, the head first."""

    heads: int
    rows: int
    entries: Iterator[Entry]


@contextmanager
def snapshot(url: str, *, heads: Theirs, rows: Theirs) -> Iterator[Snapshot]:
    """The rows of both, the many in the order of their creation. CommandError, also later on."""
    with connected(url) as (runner, database):
        head_columns = _found(runner, database, heads)
        row_columns = _found(runner, database, rows)
        stack = AsyncExitStack()
        connection = _ask(runner, stack.enter_async_context(database.transaction()))
        try:
            _ask(runner, connection.execute(_SNAPSHOT))
            yield Snapshot(
                _count(runner, connection, heads),
                _count(runner, connection, rows),
                merge(
                    _entries(runner, connection, heads, head_columns, is_head=True),
                    _entries(runner, connection, rows, row_columns, is_head=False),
                    key=lambda entry: (entry.merchant, not entry.is_head),
                ),
            )
        finally:
            with suppress(GlamError):
                # Nothing was written, so that it does not matter how it ends.
                runner.run(stack.aclose())


def _found(runner: asyncio.Runner, database: Database, theirs: Theirs) -> dict[str, str]:
    """The older column of each field that has one. CommandError names what is missing."""
    there = tuple(kinds_of(runner, database, theirs.name, quoted_table(theirs.name)))
    found: dict[str, str] = {}
    missing: list[str] = []
    for field, column in theirs.table.columns.items():
        said = theirs.columns.get(field)
        name = said if said is not None else next((n for n in column.names if n in there), "")
        if name in there:
            found[field] = name
        elif name or column.is_needed:
            missing.append(f"{field} (no column {name})" if name else field)
    if missing:
        label = theirs.table.name
        raise CommandError(
            "COLUMNS_MISSING",
            f"There is nothing for {', '.join(missing)} in {theirs.name}. There are the columns"
            f" {', '.join(there)}; say --column {label}.NAME=THEIRS (or --column {label}.NAME= for"
            " none, where that may be).",
        )
    return found


def _count(runner: asyncio.Runner, connection: Connection, theirs: Theirs) -> int:
    sql = f"SELECT count(*) FROM {quoted_table(theirs.name)}"  # noqa: S608 - a quoted name
    return int(_rows(runner, connection, sql)[0][0])


def _entries(
    runner: asyncio.Runner,
    connection: Connection,
    theirs: Theirs,
    columns: Mapping[str, str],
    *,
    is_head: bool,
) -> Iterator[Entry]:
    """All rows of a table, through a cursor."""
    key = f"coalesce(left(lower({quoted(columns['merchant_id'])}::text), {KEY_LIMIT}), '')"
    pairs = ", ".join(
        f"'{field}', left({quoted(name)}::text, {theirs.table.columns[field].limit + 1})"
        for field, name in columns.items()
    )
    order = "" if is_head else f", {quoted(columns['created_at'])}, {quoted(columns['id'])}"
    cursor = "heads" if is_head else "many"
    # Letter by letter, whatever the database's language: that is how the two are merged here.
    sql = (
        f"DECLARE {cursor} NO SCROLL CURSOR FOR"  # noqa: S608 - quoted names
        f" SELECT {key} AS key, jsonb_build_object({pairs}) AS fields"
        f' FROM {quoted_table(theirs.name)} ORDER BY {key} COLLATE "C"{order}'
    )
    _ask(runner, connection.execute(sql))
    while found := _rows(runner, connection, f"FETCH {PAGE_ROWS} FROM {cursor}"):
        for row in found:
            yield Entry(row["key"], is_head, row["fields"])


def _rows(runner: asyncio.Runner, connection: Connection, sql: str) -> list[Row]:
    return _ask(runner, connection.fetch(sql, timeout_s=QUERY_TIMEOUT_S))


def _ask(runner: asyncio.Runner, question: Coroutine[Any, Any, T]) -> T:
    try:
        return runner.run(question)
    except GlamError as error:
        raise told(error) from None
