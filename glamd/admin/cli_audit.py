"""glamctl about the audit log: is the chain whole, what is in it, where does it end.

Rows and heads go through page by page, so that neither a long export nor a long file of heads is
ever held whole.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

import click

from glamd.admin.cli_common import (
    EXIT_FAILED,
    Group,
    confirm,
    mapping,
    mappings,
    session,
    show_json,
    show_list,
    show_one,
    yes_option,
)
from glamd.admin.client import CommandError, segment

VERIFY_TIMEOUT_S: Final = 4 * 3600.0
"""A chain of many millions of rows takes its time."""

EXPORT_PAGE: Final = 1000
TAIL_LIMIT: Final = 1000
HEADS_PAGE: Final = 500
HEAD_LINE_BYTES: Final = 4096
FAULTS_SHOWN: Final = 20
FOLLOW_EVERY_S: Final = 1.0

_TIME: Final = click.DateTime(
    [
        "%Y-%m-%d",
        *("%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"),
        # As the rows themselves have it.
        *("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.%fZ"),
    ]
)
_COLUMNS: Final = ("at", "action", "actor", "subject", "fields", "purpose", "outcome")
_MONTH = re.compile(r"[1-9][0-9]{3}-(?:0[1-9]|1[0-2])")
_HEAD_FIELDS: Final = ("at", "month", "seq", "mac", "key_version", "signature")


class Month(click.ParamType[str]):
    """A month such as 2026-11."""

    name = "month"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The month as it was given."""
        if not _MONTH.fullmatch(value):
            self.fail("It is a month such as 2026-11.", param, ctx)
        return value


@click.group(cls=Group)
def audit() -> None:
    """The audit log: verify, tail, export, and where its chain ends."""


@audit.command()
@click.option(
    "--head",
    metavar="MONTH:SEQ:MAC",
    help="An end of the chain out of the log (audit_head), which it must still hold.",
)
@click.option(
    "--heads",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of heads ([audit] head_file), every one of which it must still hold.",
)
@click.option("--since", type=Month(), help="Leave out the months before this one.")
def verify(head: str | None, heads: Path | None, since: str | None) -> None:
    """Walk the chain and name the first broken row; exit status 1 where there is one."""
    held = None if heads is None else _hold_against(heads)
    given = (("head", head), ("since", since))
    query = "&".join(f"{name}={segment(value)}" for name, value in given if value is not None)
    path = "/v1/audit/verify" + (f"?{query}" if query else "")
    found = dict(mapping(session().client.post(path, timeout_s=VERIFY_TIMEOUT_S)))
    if held is not None:
        found["heads"] = held
        found["ok"] = found.get("ok") is True and not held["faults"]
    if session().as_json:
        show_json(found)
    else:
        _tell(found)
    if not found.get("ok"):
        sys.exit(EXIT_FAILED)


def _tell(found: Mapping[str, object]) -> None:
    held = found.get("heads")
    if held is not None:
        told = mapping(held)
        click.echo(
            f"Heads held against the chain: {told['checked']}, unreadable lines: "
            f"{told['unreadable']}."
        )
        for fault in mappings(told["faults"]):
            click.echo(
                f"BROKEN: the head in line {fault['line']} ({fault['month']}, row {fault['seq']}) "
                f"is {fault['reason']}"
            )
    if found.get("first_broken") is None:
        click.echo(f"All as written: {found['rows']} rows, months: {found['partitions']}.")
        return
    broken = mapping(found["first_broken"])
    click.echo(
        f"BROKEN at row {broken['seq']} of {broken['partition']}: {broken['reason']},"
        f" {broken['detail']} ({found['rows']} rows before it are as written)"
    )


def _hold_against(path: Path) -> dict[str, object]:
    """Ask about every head of the file; the first faults, and how many lines were none."""
    checked, unreadable, count = 0, 0, 0
    faults: list[dict[str, object]] = []
    waiting: list[tuple[int, Mapping[str, object]]] = []

    def ask() -> None:
        nonlocal checked, count
        body = {"heads": [head for _, head in waiting]}
        answer = mapping(session().client.post("/v1/audit/heads", body))
        for fault in mappings(answer["faults"]):
            index = fault["index"]
            assert isinstance(index, int)
            line, head = waiting[index]
            count += 1
            if len(faults) < FAULTS_SHOWN:
                faults.append(
                    {
                        "line": line,
                        "month": head["month"],
                        "seq": head["seq"],
                        "reason": fault["reason"],
                    }
                )
        checked += len(waiting)
        waiting.clear()

    for number, head in _lines_of(path):
        if head is None:
            unreadable += 1
            continue
        waiting.append((number, head))
        if len(waiting) == HEADS_PAGE:
            ask()
    if waiting:
        ask()
    return {"checked": checked, "unreadable": unreadable, "fault_count": count, "faults": faults}


def _lines_of(path: Path) -> Iterator[tuple[int, Mapping[str, object] | None]]:
    """Each line's number and head, None for a line that is none."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(HEAD_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            fits = isinstance(found, dict) and all(name in found for name in _HEAD_FIELDS)
            yield number, {name: found[name] for name in _HEAD_FIELDS} if fits else None


def _filters(function: click.decorators.FC) -> click.decorators.FC:
    """`--worker`, `--subject` and `--outcome`."""
    for name, text in (
        ("--outcome", "Only these, such as ok or FORBIDDEN."),
        ("--subject", "Only what was done to this token or key."),
        ("--worker", "Only what this worker or operator did."),
    ):
        function = click.option(name, help=text)(function)
    return function


@audit.command()
@click.option("-n", "--rows", "count", type=click.IntRange(1, TAIL_LIMIT), default=20)
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@_filters
def tail(
    count: int, follow: bool, worker: str | None, subject: str | None, outcome: str | None
) -> None:
    """The newest rows."""
    sought = {"worker": worker, "subject": subject, "outcome": outcome}
    page = mapping(session().client.get("/v1/audit/tail", {**sought, "limit": count}))
    rows = mappings(page["rows"])
    if not follow:
        shown = rows if session().as_json else [{**row, "fields": _fields(row)} for row in rows]
        show_list(shown, _COLUMNS)
        return
    place = page["next"]
    try:
        while True:
            for row in rows:
                click.echo(json.dumps(row) if session().as_json else _line(row))
            if not page["more"]:
                time.sleep(FOLLOW_EVERY_S)
            query = {**sought, "limit": TAIL_LIMIT, "after": place}
            page = mapping(session().client.get("/v1/audit/rows", query))
            rows, place = mappings(page["rows"]), page["next"]
    except KeyboardInterrupt:
        return


def _line(row: Mapping[str, object]) -> str:
    words = (row["at"], row["actor"], row["action"], row["subject"], _fields(row), row["purpose"])
    text = " ".join(str(word) or "-" for word in (*words, row["outcome"]))
    return "".join(char if char.isprintable() else "?" for char in text)


def _fields(row: Mapping[str, object]) -> str:
    fields = row["fields"]
    return ",".join(map(str, fields)) if isinstance(fields, list) else ""


@audit.command()
@click.option("--since", type=_TIME, help="Only rows from this time on, such as 2030-01-31 (UTC).")
@click.option("--until", type=_TIME, help="Only rows before this time (UTC).")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A new file, not -.")
def export(since: datetime | None, until: datetime | None, out: Path | None) -> None:
    """Write rows as JSON lines, and the chain's head, signed, as the last one."""
    client = session().client
    head = mapping(client.get("/v1/audit/head"))
    place: object = None if since is None else f"{since:%Y-%m}:0"
    began, ended = _text(since), _text(until)
    count, beyond = 0, False
    with _target(out) as file:
        while True:
            page = mapping(client.get("/v1/audit/rows", {"after": place, "limit": EXPORT_PAGE}))
            place = page["next"]
            rows = mappings(page["rows"])
            for row in rows:
                at = str(row["at"])
                beyond = (row["month"], row["seq"]) > (head["month"], head["seq"])
                if not beyond and began <= at and (not ended or at < ended):
                    file.write(json.dumps(row).encode() + b"\n")
                    count += 1
            if not page["more"] or beyond:
                break
        file.write(json.dumps({"head": head, "rows": count}).encode() + b"\n")
        file.flush()
        if out is not None:
            os.fsync(file.fileno())
    if out is not None:
        show_one({"file": str(out), "rows": count, "month": head["month"], "seq": head["seq"]})


def _text(at: datetime | None) -> str:
    """A time as rows have it, empty where there is none."""
    return "" if at is None else at.replace(tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _target(out: Path | None) -> AbstractContextManager[BinaryIO]:
    if out is None:
        return nullcontext(sys.stdout.buffer)
    try:
        # What is exported says who looked at which token: for its owner's eyes.
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError("CANNOT_WRITE", f"{out}: {error.strerror}.") from None
    return os.fdopen(descriptor, "wb")


@audit.command()
def head() -> None:
    """Where the chain ends, signed, as JSON in one line: keep it elsewhere."""
    click.echo(json.dumps(mapping(session().client.get("/v1/audit/head"))))


@audit.command()
def status() -> None:
    """Whether the database lets us change the log, the months made ahead, the head."""
    show_one(mapping(session().client.get("/v1/audit/status")))


@audit.command("drop-month")
@click.argument("month", type=Month())
@yes_option
def drop_month(month: str, yes: bool) -> None:
    """Drop MONTH, the oldest one, once it is older than seven years."""
    confirm(f"Erase the audit rows of {month} for good?", yes=yes)
    show_one(mapping(session().client.post(f"/v1/audit/months/{month}/drop")))
