"""How far an import is: a bar at a terminal, lines for other people, nothing for programs.

Knows rows and time only. Imported late, for it draws with rich.
"""

import sys
import time
from types import TracebackType
from typing import Final, Protocol, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY_S: Final = 2.0


class Meter(Protocol):
    """Shows how far a run is, while it is entered."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""

    def advance(self, rows: int) -> None:
        """So many rows more are done."""


def meter(total: int, *, as_json: bool) -> Meter:
    """A bar at a terminal, lines for other people, nothing for programs."""
    if as_json:
        return _Silent()
    return _Bar(total) if sys.stderr.isatty() else _Lines(total)


class _Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return

    def advance(self, rows: int) -> None:
        """Nobody looks."""


class _Lines(_Silent):
    """A line now and then."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._begun_s = time.monotonic()
        self._said_s = float("-inf")

    def advance(self, rows: int) -> None:
        """Say it, unless it was said just now."""
        self._done += rows
        now_s = time.monotonic()
        if now_s - self._said_s < LINE_EVERY_S and self._done < self._total:
            return
        self._said_s = now_s
        rate = self._done / max(now_s - self._begun_s, 0.001)
        click.echo(f"{self._done} of {self._total} rows, {rate:.0f} rows/s")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Rows a second."""
        return Text("" if task.speed is None else f"{task.speed:,.0f} rows/s")


class _Bar(_Silent):
    """A bar on stderr, with the rate and the time that is left."""

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("rows", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, rows: int) -> None:
        """Move it on."""
        self._progress.advance(self._task, rows)
