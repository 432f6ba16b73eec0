"""What all of glamctl's commands share: `--json` anywhere, errors in one line, questions, tables.

No command stands here. rich is imported only when a table is drawn, so that a command with
`--json` starts without it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from glamd.admin.client import AdminClient, CommandError

SOCKET_VARIABLE = "GLAMD_ADMIN_SOCKET"
DEV_SOCKET = Path(".glamd/dev/admin.sock")
SYSTEM_SOCKET = Path("/run/glamd/admin.sock")

EXIT_FAILED = 1
EXIT_USAGE = 2


@dataclass(slots=True)
class Session:
    """What was said before the command: which socket, and how to answer."""

    socket: Path
    as_json: bool = False

    @property
    def client(self) -> AdminClient:
        """The daemon behind the socket."""
        return AdminClient(self.socket)


def session() -> Session:
    """The running command's session."""
    found: Session = click.get_current_context().find_root().obj
    return found


def default_socket() -> Path:
    """`$GLAMD_ADMIN_SOCKET`, else that of a `glamd dev` run from here, else the system's."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return Path(given)
    return DEV_SOCKET if DEV_SOCKET.exists() else SYSTEM_SOCKET


def _turn_json_on(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj.as_json = True


def _json_option() -> click.Option:
    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=_turn_json_on,
        help="Answer in JSON, for programs.",
    )


class Command(click.Command):
    """A command that takes `--json` behind its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


class Group(click.Group):
    """A group that takes `--json`, and whose commands do."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


class RootGroup(click.Group):
    """glamctl itself: whatever goes wrong is one line on stderr and an exit status."""

    command_class = Command
    group_class = Group

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command line and exit: 0 done, 1 failed, 2 wrongly used."""
        extra["standalone_mode"] = False
        try:
            status = super().main(*args, **extra)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "glamctl"
            _say(f"{path}: {error.format_message()} See '{path} --help'.")
            sys.exit(EXIT_USAGE)
        except click.ClickException as error:
            _say(error.format_message())
            sys.exit(EXIT_FAILED)
        except click.Abort:
            _say("Nothing was done.")
            sys.exit(EXIT_FAILED)
        except CommandError as error:
            _say(str(error))
            sys.exit(EXIT_FAILED)
        except BrokenPipeError:
            # The reader has seen enough; Python would complain when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILED)
        sys.exit(status if isinstance(status, int) else 0)


def _say(message: str) -> None:
    click.echo(" ".join(message.split()), err=True)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before what cannot be undone; without a terminal only `--yes` answers."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Without a terminal, say --yes.")
    click.confirm(question, abort=True, err=True)


def yes_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--yes` for commands that ask first."""
    return click.option("--yes", is_flag=True, help="Do not ask first.")(function)


def limit_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--limit` for lists; more than a page is fetched page by page."""
    option = click.option(
        "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most."
    )
    return option(function)


def pages(
    path: str, name: str, *, limit: int, query: Mapping[str, object] | None = None
) -> list[Mapping[str, object]]:
    """Up to `limit` entries of a list, however many pages that takes."""
    found: list[Mapping[str, object]] = []
    after: object = None
    while len(found) < limit:
        size = min(limit - len(found), 200)
        page = mapping(session().client.get(path, {**(query or {}), "limit": size, "after": after}))
        found += mappings(page.get(name))
        after = page.get("next")
        if after is None:
            break
    return found


def mapping(value: object) -> Mapping[str, object]:
    """An answer that has to be an object."""
    if not isinstance(value, dict):
        raise CommandError("BAD_ANSWER", "The answer is not as expected; is this the same version?")
    return value


def mappings(value: object) -> list[Mapping[str, object]]:
    """An answer that has to be a list of objects."""
    return [mapping(entry) for entry in value] if isinstance(value, list) else [mapping(value)]


def show_json(value: object) -> None:
    """Write an answer for a program."""
    click.echo(json.dumps(value, indent=2))


def show_one(value: Mapping[str, object]) -> None:
    """Show one thing: JSON, or a line for each of its fields."""
    if session().as_json:
        show_json(value)
        return
    width = max((len(name) for name in value), default=0)
    for name, entry in value.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {text_of(entry)}")


def show_list(rows: Sequence[Mapping[str, object]], columns: Iterable[str]) -> None:
    """Show many things: JSON, or a table of these columns."""
    if session().as_json:
        show_json(rows)
        return
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - only where a table is drawn
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = list(columns)
    for name in names:
        # Ids are there to be copied: they are folded, never cut.
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        texts = [text_of(row.get(name)) for name in names]
        table.add_row(*(Text(text, style=_style(text)) for text in texts))
    # Into a pipe a row stays one line, however long.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def text_of(value: object) -> str:
    """A value for people: no JSON where a word will do."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return (
            ", ".join(f"{text_of(name)} {text_of(entry)}" for name, entry in value.items()) or "-"
        )
    if isinstance(value, list):
        return "; ".join(text_of(entry) for entry in value) or "-"
    return _printable(str(value))


def _printable(text: str) -> str:
    """What others wrote, a description say, must not steer the operator's terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


_GOOD = frozenset({"active", "online", "ready", "valid"})
_BAD = frozenset({"revoked", "unavailable", "crashed", "failing", "expired", "refresh-failing"})
_DIM = frozenset({"offline", "idle"})


def _style(value: str) -> str:
    if value in _GOOD:
        return "green"
    if value in _BAD:
        return "red"
    return "dim" if value in _DIM else ""
