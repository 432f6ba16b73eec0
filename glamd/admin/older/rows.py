"""The older service's rows as glamctl reads them, and those that stand in a file of JSON lines.

A row leaves here by the field names of the contract, every value as text or None, none much longer
than it may be; whether it is right is for the daemon to say.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Final, TypeAlias

from glamd.admin.client import CommandError
from glamd.credentials.importing.older import LIMITS

OPTIONAL: Final = frozenset(
    {
        "expires_at",
        "scopes",
        "updated_at",
        "last_accessed_by",
        "last_accessed_at",
        "access_count",
    }
)
"""Fields that an older table may lack; all others are needed."""

LINE_LIMIT_BYTES: Final = 1024 * 1024

OlderText: TypeAlias = dict[str, str | None]
Columns: TypeAlias = Mapping[str, str]
"""The older column of each field, "" for a field that there is no column for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far the import has come: a row's id, in the source with this fingerprint."""

    source: str | None = None
    position: str | None = None

    def within(self, source: str) -> str | None:
        """The position, where it is one in this source."""
        return self.position if source == self.source else None


@dataclass(slots=True)
class Rows:
    """Rows in the order of the import, those after its place where that is one in this source.

    `source` is the source's fingerprint, `total` how many rows there are; `skipped` fills with what
    is no row at all, as (where, why).
    """

    source: str
    total: int
    rows: Iterator[OlderText]
    skipped: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def of_file(path: Path, *, columns: Columns, after: Place) -> Iterator[Rows]:
    """The rows of a file with a JSON object on each line. Raises `CommandError`.

    They come in the order of the file, and behind the first one whose id is that of the place. A
    file of which anything has changed is another source: where it changed nobody knows.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(error) from None
    with file:
        source = _fingerprint_of(file, columns["id"])
        total, start = _surveyed(file, columns["id"], after.within(source))
        file.seek(0)
        found = Rows(source, total - start, iter(()))
        found.rows = _lines(file, columns, found.skipped, start=start)
        yield found


def fingerprint(kind: str, *parts: object) -> str:
    """What stands for a source: the same as long as a position in it means the same."""
    return f"{kind}:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


def check(columns: Columns, there: tuple[str, ...]) -> None:
    """Raise `CommandError` that names what is needed and missing, and what is there."""
    missing = [
        f"{field} (no column {column})" if column not in ("", field) else field
        for field, column in columns.items()
        if column not in there and (column or field not in OPTIONAL)
    ]
    if missing:
        raise CommandError(
            "COLUMNS_MISSING",
            f"There is nothing for {', '.join(missing)}. There are the columns {', '.join(there)};"
            " say --column NAME=THEIRS (or --column NAME= for none, where that may be).",
        )


def _fingerprint_of(file: BufferedReader, id_name: str) -> str:
    try:
        content = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
    except OSError as error:
        raise _unreadable(error) from None
    return fingerprint("file", content, id_name)


def _surveyed(file: BufferedReader, id_name: str, after: str | None) -> tuple[int, int]:
    """How many lines there are, and how many of them come up to the first row with that id.

    The first one: an id may stand there twice, and what is gone through again is only counted.
    """
    total = start = 0
    sought = None if after is None else json.dumps(after).encode()
    for line in _raw_lines(file):
        total += 1
        if not start and sought is not None and line is not None and sought in line:
            found = _parsed(line)
            if found is not None and found.get(id_name) == after:
                start = total
    return total, start


def _lines(
    file: BufferedReader, columns: Columns, skipped: list[tuple[str, str]], *, start: int
) -> Iterator[OlderText]:
    checked = False
    for number, line in enumerate(_raw_lines(file), 1):
        if number <= start or line == b"":
            continue
        if line is None:
            skipped.append((f"line {number}", f"It is longer than {LINE_LIMIT_BYTES} bytes."))
            continue
        found = _parsed(line)
        if found is None:
            skipped.append((f"line {number}", "It is no JSON object."))
            continue
        if not checked:
            given = {field: name for field, name in columns.items() if field not in OPTIONAL}
            check(given, tuple(found))
            checked = True
        yield texts(found, columns)


def _raw_lines(file: BufferedReader) -> Iterator[bytes | None]:
    """Every line without its end; None for one that is too long."""
    try:
        while line := file.readline(LINE_LIMIT_BYTES):
            too_long = False
            while len(line) == LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                too_long = True
                line = file.readline(LINE_LIMIT_BYTES)
            yield None if too_long else line.strip()
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> CommandError:
    return CommandError("UNREADABLE", f"The file cannot be read: {error.strerror}.")


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        found: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def texts(found: Mapping[str, object], columns: Columns) -> OlderText:
    """A row by the names of the fields, as text."""
    return {field: _text(found.get(column), LIMITS[field]) for field, column in columns.items()}


def _text(value: object, limit: int) -> str | None:
    """A value as text, cut where it is too long anyhow."""
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = " ".join(value)
    text = value if isinstance(value, str) else json.dumps(value)
    # Half a character, which JSON can name, cannot be sent on.
    return text[: limit + 1].encode("utf-8", "replace").decode()
