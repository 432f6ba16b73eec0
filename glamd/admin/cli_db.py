"""glamctl db: the schema's revisions, straight at the database, no daemon needed.

Which database is read from the configuration, of which only `[database]` has to be right; the login
is that of the tables' owner where one is named there, since the daemon's own may change none. The
revisions themselves are run by `migrate`, imported late for it brings SQLAlchemy along.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from glamd.admin.cli_common import Group, confirm, show_list, show_one, yes_option
from glamd.admin.client import CommandError
from glamd.errors import GlamError

if TYPE_CHECKING:
    from migrations.support import Schemas

SYSTEM_CONFIG = Path("/etc/glamd/glamd.toml")
DEV_DESCRIPTION = Path(".glamd/dev/dev.json")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Half:
    """A server and the schemas that live on it."""

    url: str
    schemas: "Schemas"


@click.group(cls=Group)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The configuration [/etc/glamd/glamd.toml if it is there]; $DATABASE_URL goes before it.",
)
@click.pass_context
def db(context: click.Context, config: Path | None) -> None:
    """The schema's revisions, straight at the database."""
    context.meta["config"] = config


@db.command()
@click.argument("revision", default="head")
def upgrade(revision: str) -> None:
    """Bring the schema up to REVISION, or to the newest."""
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    for half in _halves():
        _run(migrate.upgrade(half.url, revision=revision, schemas=half.schemas))
    _show_current()


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("revision")
@yes_option
def downgrade(revision: str, yes: bool) -> None:
    """Take the schema back to REVISION (-1: one step; base: to nothing)."""
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    confirm(f"Take the schema back to {revision}, and lose what only the newer one holds?", yes=yes)
    for half in _halves():
        _run(migrate.downgrade(half.url, revision=revision, schemas=half.schemas))
    _show_current()


@db.command()
@yes_option
def reset(yes: bool) -> None:
    """Delete everything and make the schema anew."""
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    confirm("Delete every token, key and merchant in the database?", yes=yes)
    for half in _halves():
        _run(migrate.reset(half.url, schemas=half.schemas))
    _show_current()


@db.command()
def current() -> None:
    """The revision that the database is at."""
    _show_current()


@db.command()
def history() -> None:
    """Every revision, newest first."""
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    rows = [
        {"revision": step.revision, "after": step.down_revision, "title": step.title}
        for step in migrate.history()
    ]
    show_list(rows, ("revision", "after", "title"))


@db.command()
@click.argument("message")
def revision(message: str) -> None:
    """Write an empty revision after the newest one, for a developer to fill in."""
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    made = _told(lambda: migrate.revision(message))
    show_one({"file": str(made)})


def _show_current() -> None:
    from glamd.admin import migrate  # noqa: PLC0415 - it brings SQLAlchemy along

    halves = _halves()
    # With two servers, both have to be at the same revision; the one behind is the one to know of.
    states = [_run(migrate.check(half.url)) for half in halves]
    found = next((state for state in states if state.relation.value != "same"), states[0])
    show_one(
        {
            "current": found.current,
            "expected": found.expected,
            "state": found.relation.value,
            "mend": found.mend or None,
        }
    )


def _halves() -> list[Half]:
    from pydantic import ValidationError  # noqa: PLC0415 - only commands that connect need it

    from glamd import config, config_sources  # noqa: PLC0415

    file: Path | None = click.get_current_context().meta["config"]
    if file is None and SYSTEM_CONFIG.exists():
        file = SYSTEM_CONFIG
    gathered = _told(lambda: config_sources.gather(file, os.environ))
    given = gathered.values.get("database") or _dev_database()
    if not given:
        raise CommandError(
            "CONFIG_ERROR", "No database is configured; say --config FILE or set DATABASE_URL."
        )
    try:
        database = config.Database.model_validate(given)
    except ValidationError as error:
        fields = tuple(
            (".".join(["database", *map(str, e["loc"])]), e["msg"])
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        )
        raise CommandError("CONFIG_ERROR", "The configuration is wrong.", fields) from None
    url, cde_url = database.owner_url.get_secret_value(), database.cde_owner_url.get_secret_value()
    if database.url == database.cde_url:
        return [Half(url, "both")]
    return [Half(url, "glam"), Half(cde_url, "cde")]


def _dev_database() -> dict[str, object]:
    """The database of a `glamd dev` that runs from here."""
    try:
        described = json.loads(DEV_DESCRIPTION.read_bytes())
    except (OSError, ValueError):
        return {}
    database = described["database"]
    return {"url": database["url"], "owner_url": database["admin_url"]}


def _run(work: Coroutine[None, None, T]) -> T:
    from glamd import logs  # noqa: PLC0415 - only what connects to the database logs

    # What goes wrong is told by the command; stdout is for its answer.
    logs.configure("critical", "console", sys.stderr)
    return _told(lambda: asyncio.run(work))


def _told(work: Callable[[], T]) -> T:
    """The result of `work`, its errors told as those of a daemon are."""
    try:
        return work()
    except GlamError as error:
        fields = tuple((field.field, field.message) for field in error.fields)
        raise CommandError(error.code, error.message, fields) from None
