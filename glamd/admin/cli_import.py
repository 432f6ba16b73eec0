"""glamctl about moving over: the accounts and bills of older services, read there, given to glamd.

The older database is read by glamctl itself, so that the daemon is never told where it is. What
becomes of a row is decided by the daemon.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glamd.admin.cli_common import EXIT_FAILED, Group, session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from glamd.admin.older.money.totals import Kind
    from glamd.ledger.importing.merchant import OlderTable

URL_VARIABLE = "GLAMD_IMPORT_URL"


@click.group("import", cls=Group)
def imports() -> None:
    """What older services kept of merchants' money: credits, billing."""


def _options(function: "Callable[..., Any]") -> "Callable[..., Any]":
    for option in reversed(
        (
            click.option(
                "--from-url", "url", metavar="URL", help=f"The older database [${URL_VARIABLE}]."
            ),
            click.option(
                "--from-url-file",
                "url_file",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A file with that URL in it, so that its password is in no argument.",
            ),
            click.option(
                "--table",
                "tables",
                multiple=True,
                metavar="TABLE=THEIRS",
                help="What an older table, or a view in its place, is called; may be repeated.",
            ),
            click.option(
                "--column",
                "columns",
                multiple=True,
                metavar="TABLE.NAME=THEIRS",
                help="What an older table calls a field; may be repeated.",
            ),
            click.option(
                "--strict",
                is_flag=True,
                help="Refuse merchants whose rows do not agree, instead of making them.",
            ),
            click.option(
                "--dry-run",
                is_flag=True,
                help="Say what would become of the merchants, keep nothing.",
            ),
        )
    ):
        function = option(function)
    return function


@imports.command()
@_options
def credits(**options: Any) -> None:  # noqa: A001 - the command's name
    """Bring over accounts and transactions, their references too; may be given again."""
    from glamd.ledger.importing import model  # noqa: PLC0415 - the daemon's

    _import("credits", model.ACCOUNTS, model.TRANSACTIONS, **options)


@imports.command()
@_options
def billing(**options: Any) -> None:
    """Bring over billing records and purchases, ids and all; may be given again."""
    from glamd.billing.importing import model  # noqa: PLC0415 - the daemon's

    _import("billing", model.RECORDS, model.PURCHASES, **options)


def _import(
    kind: "Kind",
    heads: "OlderTable",
    rows: "OlderTable",
    *,
    url: str | None,
    url_file: Path | None,
    tables: tuple[str, ...],
    columns: tuple[str, ...],
    strict: bool,
    dry_run: bool,
) -> None:
    from glamd import logs  # noqa: PLC0415 - only what connects to a database logs
    from glamd.admin.older.meter import meter  # noqa: PLC0415 - it draws with rich
    from glamd.admin.older.money import run  # noqa: PLC0415
    from glamd.admin.older.money.store import Theirs, snapshot  # noqa: PLC0415 - with the driver
    from glamd.admin.older.money.totals import Totals  # noqa: PLC0415

    at = _source(url=url, url_file=url_file)
    both = (heads, rows)
    names = _names(tables, {table.name: table.name for table in both}, "TABLE=THEIRS")
    fields = {f"{table.name}.{name}": None for table in both for name in table.columns}
    said = _names(columns, fields, "TABLE.NAME=THEIRS")
    theirs = [
        Theirs(
            table=table,
            name=str(names[table.name]),
            columns=_of_table(table.name, said),
        )
        for table in both
    ]
    # What goes wrong is told by the command; stdout is for its answer.
    logs.configure("critical", "console", sys.stderr)
    client, as_json = session().client, session().as_json
    state = run.MoneyRun(kind=kind, strict=strict, dry_run=dry_run, totals=Totals(kind))
    with snapshot(at, heads=theirs[0], rows=theirs[1]) as source:
        bar = meter(source.heads + source.rows, as_json=as_json)
        run.run(client, source, bar, state=state)
    run.show(state, as_json=as_json)
    if not state.clean:
        sys.exit(EXIT_FAILED)


def _source(*, url: str | None, url_file: Path | None) -> str:
    """The URL of the older database, however it was told."""
    if url is not None and url_file is not None:
        raise click.UsageError("Say one of --from-url, --from-url-file.")
    if url_file is None:
        found = url or os.environ.get(URL_VARIABLE)
        if not found:
            raise click.UsageError(f"Say --from-url, --from-url-file, or ${URL_VARIABLE}.")
        return found
    try:
        text = url_file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise click.UsageError(f"{url_file} cannot be read.") from None
    if not text or len(text.splitlines()) > 1:
        raise click.UsageError(f"{url_file} should hold one line, a URL.")
    return text


def _names(
    given: tuple[str, ...], known: "Mapping[str, str | None]", form: str
) -> dict[str, str | None]:
    """What each of the known ones is called there."""
    found = dict(known)
    for pair in given:
        name, separator, theirs = pair.partition("=")
        if not separator or name not in known:
            raise click.UsageError(f"{pair}: it is {form}, with one of {', '.join(known)}.")
        found[name] = theirs
    return found


def _of_table(table: str, said: "Mapping[str, str | None]") -> dict[str, str]:
    return {
        name.removeprefix(f"{table}."): theirs
        for name, theirs in said.items()
        if theirs is not None and name.startswith(f"{table}.")
    }
