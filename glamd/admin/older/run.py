"""One run of an import: rows in, batches to the daemon, how far it is, what came of it.

The daemon says where to go on and keeps how far it has come; a run that broke off is gone on with
by the same command. Imported late, for it draws with rich.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import click

from glamd.admin.cli_common import mapping, mappings, show_json, show_list
from glamd.admin.client import AdminClient, CommandError
from glamd.admin.older.meter import Meter, meter
from glamd.admin.older.rows import OlderText, Place, Rows

__all__ = ["Run", "batches", "begun", "look_at", "meter", "run", "show"]

PATH: Final = "/v1/credentials/import"
BATCH_BYTES: Final = 240 * 1024
"""Of rows as JSON; the daemon takes bodies of 256 KiB."""

BATCH_TIMEOUT_S: Final = 120.0
NAMED_LIMIT: Final = 100
"""As many rows that could not be taken are named; the others are counted."""

FAILURES: Final = ("undecryptable", "invalid")
_MEANINGS: Final = {
    "taken": "sealed under a key of glamd's and kept, with their ids",
    "updated": "came before, and have a newer secret now",
    "already": "were here already",
    "superseded": "left alone: a newer token is here, or it was deleted here",
    "undecryptable": "could not be opened",
    "invalid": "have a field that is wrong",
}


@dataclass(slots=True, kw_only=True)
class Run:
    """What a run came to; `counts` are those of the whole import, but of this run if it is dry."""

    dry_run: bool
    restart: bool
    hold_renewal_h: int
    place: Place = field(default_factory=Place)
    """Where the import stands; a restart begins before any row."""

    other_source: bool = False
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    named: list[dict[str, object]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every row was taken, here already or rightly left alone."""
        return not self.failed and not any(self.counts.get(name) for name in FAILURES)

    def add(self, entry: dict[str, object]) -> None:
        """A row that could not be taken."""
        self.failed += 1
        if len(self.named) < NAMED_LIMIT:
            self.named.append(entry)


def begun(
    progress: Mapping[str, object], *, restart: bool, dry_run: bool, hold_renewal_h: int
) -> Run:
    """A run that begins where the daemon says that the import is."""
    state = Run(dry_run=dry_run, restart=restart, hold_renewal_h=hold_renewal_h)
    if not restart:
        state.place = _place(progress)
    fresh = restart or dry_run
    state.counts = {
        name: 0 if fresh else _number(count) for name, count in mapping(progress["counts"]).items()
    }
    return state


def look_at(source: Rows, state: Run, *, as_json: bool) -> None:
    """Begin anew where the import stands in another source than this one, and say so."""
    if state.place == Place() or state.place.source == source.source:
        return
    state.place, state.restart, state.other_source = Place(), True, True
    state.counts = dict.fromkeys(state.counts, 0)
    if not as_json:
        click.echo("The import stands in another source; this one begins with its first row.")


def run(client: AdminClient, source: Rows, meter: Meter, *, state: Run, batch: int) -> None:
    """Give the daemon all of the rows, and note in `state` what became of them.

    Raises `CommandError`; what was committed until then is.
    """
    try:
        with meter:
            for rows in batches(source, rows=batch, state=state):
                body: dict[str, object] = {
                    "rows": rows,
                    "source": source.source,
                    "after": state.place.position,
                    "restart": state.restart,
                    "hold_renewal_h": state.hold_renewal_h,
                    "dry_run": state.dry_run,
                }
                answer = client.post(PATH, body, timeout_s=BATCH_TIMEOUT_S)
                _note(state, mapping(answer), rows=len(rows))
                state.restart = False
                meter.advance(len(rows))
    except CommandError as error:
        raise CommandError(error.code, error.message + _so_far(state), error.fields) from None
    except KeyboardInterrupt:
        raise CommandError("INTERRUPTED", "Stopped." + _so_far(state)) from None
    for where, why in source.skipped:
        state.add({"id": where, "code": "NO_ROW", "reason": why})


def batches(source: Rows, *, rows: int, state: Run) -> Iterator[list[OlderText]]:
    """The rows in lists of at most so many, which fit into a body as well."""
    found: list[OlderText] = []
    size = 0
    for row in source.rows:
        row_bytes = len(json.dumps(row)) + 2
        if row_bytes > BATCH_BYTES:
            state.add({"id": row["id"], "code": "TOO_LARGE", "reason": "The row is too large."})
            continue
        if len(found) == rows or size + row_bytes > BATCH_BYTES:
            yield found
            found, size = [], 0
        found.append(row)
        size += row_bytes
    if found:
        yield found


def show(state: Run, *, as_json: bool) -> None:
    """Tell what the run came to."""
    if as_json:
        show_json(
            {
                "dry_run": state.dry_run,
                "position": state.place.position,
                "other_source": state.other_source,
                "rows": state.rows,
                "counts": state.counts,
                "failed": state.failed,
                "refused": state.named,
            }
        )
        return
    if state.dry_run:
        click.echo("Nothing was written; this is what would become of them:")
    elif not state.rows and state.place.position is not None:
        click.echo(
            f"There is nothing after {state.place.position}; --restart goes through all again."
        )
    counts = [
        {"outcome": name, "rows": count, "meaning": _MEANINGS.get(name, "")}
        for name, count in state.counts.items()
    ]
    show_list(counts, ("outcome", "rows", "meaning"))
    if state.rows and state.hold_renewal_h and not state.dry_run:
        click.echo(
            f"Their renewal waits for {state.hold_renewal_h} hours; once the older service is off,"
            " --restart --hold-renewal 0 lets it begin."
        )
    if state.named:
        click.echo(f"Rows that could not be taken: {state.failed}.")
        show_list(state.named, ("id", "code", "reason"))
    if state.failed > len(state.named):
        click.echo(f"… and {state.failed - len(state.named)} more.")
    if not state.clean and not state.failed:
        click.echo("Rows of earlier runs could not be taken; --restart names them again.")


def _note(state: Run, answer: object, *, rows: int) -> None:
    found = mapping(answer)
    state.rows += rows
    counts = mapping(found["batch" if state.dry_run else "counts"])
    for name, count in counts.items():
        state.counts[name] = _number(count) + (state.counts.get(name, 0) if state.dry_run else 0)
    if not state.dry_run:
        state.place = _place(found)
    for refused in mappings(found["refused"]):
        fields = mappings(refused["fields"])
        said = "; ".join(f"{one['field']}: {one['message']}" for one in fields)
        state.add(
            {
                "id": refused["id"],
                "code": refused["code"],
                "reason": said or refused["message"],
            }
        )


def _place(answer: Mapping[str, object]) -> Place:
    source, position = answer["source"], answer["position"]
    return Place(
        source=None if source is None else str(source),
        position=None if position is None else str(position),
    )


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise CommandError("BAD_ANSWER", "The answer is not as expected; is this the same version?")
    return value


def _so_far(state: Run) -> str:
    if state.dry_run or not state.rows:
        return ""
    return f" {state.rows} rows are done; the same command, without --restart, goes on from there."
