"""One run of an import of money: merchants in, to the daemon and what came of each, the totals.

The daemon imports each merchant whole or not at all, and finds by itself what it has already; a run
that broke off is mended by the same command. Imported late, for it draws with rich.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import click

from glamd.admin.cli_common import mapping, mappings, show_json, show_list
from glamd.admin.client import AdminClient, CommandError
from glamd.admin.older.meter import Meter
from glamd.admin.older.money.store import Entry, OlderText, Snapshot
from glamd.admin.older.money.totals import Kind, Totals
from glamd.ledger.importing.merchant import OUTCOMES

BATCH_BYTES: Final = 240 * 1024
BATCH_VALUES: Final = 9_000
BATCH_PARTS: Final = 200
PART_ROWS: Final = 1_000
"""Of a request; the daemon takes 256 KiB, 10,000 values of JSON, 200 parts of 1,000 rows."""

HEADS: Final = 2
HEADS_BYTES: Final = 16 * 1024
HEADS_VALUES: Final = 100
"""Room for a merchant's heads, which all come with its first part."""

BATCH_TIMEOUT_S: Final = 3600.0
"""A merchant with millions of transactions is one transaction of the daemon's."""

NAMED_LIMIT: Final = 200
"""As many of each kind are named; the others are counted."""

_PART_BYTES: Final = 200
_MEANINGS: Final = {
    "taken": "are here now",
    "updated": "were here from an earlier run, and are as they are there now",
    "already": "were here already",
    "moved_on": "have changed there, and have moved here since: left alone",
    "refused": "have a row that is wrong, and were left out",
}


@dataclass(slots=True, kw_only=True)
class MoneyRun:
    """A run, and what it has come to."""

    kind: Kind
    strict: bool
    dry_run: bool
    totals: Totals
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    failed: int = 0
    refused: list[dict[str, object]] = field(default_factory=list)
    notes: int = 0
    noted: list[dict[str, object]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether everything is here, and both sides' sums agree."""
        return not self.failed and self.totals.agree

    def fail(self, *, table: str, of: str, name: str, reason: str) -> None:
        """Something that somebody has to look at."""
        self.failed += 1
        if len(self.refused) < NAMED_LIMIT:
            self.refused.append({"table": table, "id": of, "field": name, "reason": reason})


@dataclass(slots=True)
class _Part:
    merchant: str
    begins: bool
    heads: list[OlderText] = field(default_factory=list)
    rows: list[OlderText] = field(default_factory=list)
    ends: bool = False

    def as_json(self) -> dict[str, object]:
        return {
            "merchant_id": self.merchant,
            "heads": self.heads,
            "rows": self.rows,
            "begins": self.begins,
            "ends": self.ends,
        }


@dataclass(slots=True)
class _Batch:
    """Parts that fit into one request."""

    parts: list[_Part] = field(default_factory=list)
    rows: int = 0
    size: int = 0
    values: int = 0

    def has_room(self, size: int, values: int) -> bool:
        return self.size + size <= BATCH_BYTES and self.values + values <= BATCH_VALUES

    def add(self, part: _Part) -> None:
        self.parts.append(part)
        self.size += _PART_BYTES
        self.values += 6

    def count(self, size: int, values: int) -> None:
        self.rows += 1
        self.size += size
        self.values += values


def run(client: AdminClient, source: Snapshot, meter: Meter, *, state: MoneyRun) -> None:
    """Give the daemon all of the merchants, and note in `state` what became of them.

    Raises `CommandError`; the merchants that were imported until then are.
    """
    state.totals.counted(heads=source.heads, rows=source.rows)
    try:
        with meter:
            for batch in _batches(source.entries, state.totals):
                body: dict[str, object] = {
                    "run": state.run_id,
                    "strict": state.strict,
                    "dry_run": state.dry_run,
                    "parts": [part.as_json() for part in batch.parts],
                }
                answer = client.post(f"/v1/import/{state.kind}", body, timeout_s=BATCH_TIMEOUT_S)
                _note(state, mapping(answer))
                meter.advance(batch.rows)
    except CommandError as error:
        raise CommandError(error.code, error.message + _so_far(state), error.fields) from None
    except KeyboardInterrupt:
        raise CommandError("INTERRUPTED", "Stopped." + _so_far(state)) from None


def _batches(entries: Iterator[Entry], totals: Totals) -> Iterator[_Batch]:
    """All merchants in requests; one that does not fit into the rest of a request is split."""
    batch = _Batch()
    for merchant, group in groupby(entries, key=lambda entry: entry.merchant):
        totals.merchant()
        if len(batch.parts) == BATCH_PARTS or not batch.has_room(HEADS_BYTES, HEADS_VALUES):
            yield batch
            batch = _Batch()
        part = _Part(merchant, begins=True)
        batch.add(part)
        for entry in group:
            totals.read(entry)
            size, values = len(json.dumps(entry.row)) + 2, len(entry.row) + 1
            if entry.is_head:
                # There is room for them; of several, two show that there is one too many.
                part.heads += [entry.row] if len(part.heads) < HEADS else []
            elif not batch.has_room(size, values) or len(part.rows) == PART_ROWS:
                yield batch
                batch, part = _Batch(), _Part(merchant, begins=False)
                batch.add(part)
            if not entry.is_head:
                part.rows.append(entry.row)
            batch.count(size, values)
        part.ends = True
    if batch.parts:
        yield batch


def show(state: MoneyRun, *, as_json: bool) -> None:
    """Tell what the run came to."""
    totals = state.totals.table()
    if as_json:
        show_json(
            {
                "dry_run": state.dry_run,
                "outcomes": state.outcomes,
                "totals": totals,
                "notes": state.notes,
                "noted": state.noted,
                "failed": state.failed,
                "refused": state.refused,
                "clean": state.clean,
            }
        )
        return
    if state.dry_run:
        click.echo("Nothing was written; this is what would become of them:")
    outcomes = [
        {"outcome": name, "merchants": count, "meaning": _MEANINGS.get(name, "")}
        for name, count in state.outcomes.items()
    ]
    show_list(outcomes, ("outcome", "merchants", "meaning"))
    if state.noted:
        click.echo(f"Merchants whose rows did not agree with one another: {state.notes}.")
        noted = [{**one, "notes": _in_words(one["notes"])} for one in state.noted]
        show_list(noted, ("merchant_id", "notes"))
        _say_the_rest(state.notes, len(state.noted))
    if state.refused:
        click.echo(f"What has to be looked at: {state.failed}.")
        show_list(state.refused, ("table", "id", "field", "reason"))
        _say_the_rest(state.failed, len(state.refused))
    show_list(totals, ("what", "older", "here", "agrees"))
    click.echo("All is here." if state.clean else "Not all is here, or the totals differ.")


def _in_words(notes: object) -> str:
    told = mapping(notes).items()
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told)


def _say_the_rest(count: int, named: int) -> None:
    if count > named:
        click.echo(f"… and {count - named} more.")


def _note(state: MoneyRun, answer: Mapping[str, object]) -> None:
    for result in mappings(answer["results"]):
        merchant, outcome = str(result["merchant_id"]), str(result["outcome"])
        state.outcomes[outcome] = state.outcomes.get(outcome, 0) + 1
        state.totals.taken(_numbers(result["figures"]))
        notes = mapping(result["notes"])
        if notes:
            state.notes += 1
            if len(state.noted) < NAMED_LIMIT:
                state.noted.append({"merchant_id": merchant, "notes": dict(notes)})
        if outcome == "moved_on":
            state.fail(table="-", of=merchant, name="-", reason="It has moved on here.")
        for refused in mappings(result["refused"]):
            state.fail(
                table=str(refused["table"]),
                of=str(refused["id"]),
                name=str(refused["field"]),
                reason=str(refused["message"]),
            )
        if result["merchant"] is not None:
            _no_merchant(state, merchant, mapping(result["merchant"]))


def _no_merchant(state: MoneyRun, merchant: str, why: Mapping[str, object]) -> None:
    """Its money is here, and it is not: as far as the two are apart."""
    fields = mappings(why["fields"])
    said = "; ".join(f"{one['field']}: {one['message']}" for one in fields)
    state.fail(
        table="-",
        of=merchant,
        name="-",
        reason=f"There is no such merchant here ({why['code']}{': ' if said else ''}{said}).",
    )


def _numbers(figures: object) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in mapping(figures).items():
        if not isinstance(value, int):
            raise CommandError("BAD_ANSWER", "The answer is not as expected.")
        found[name] = value
    return found


def _so_far(state: MoneyRun) -> str:
    done = sum(state.outcomes.values())
    if state.dry_run or not done:
        return ""
    return f" {done} merchants are done; the same command finds them and does the others."
