"""Reads the values of an older row one by one, and remembers every one that is wrong. Pure.

A value comes as the text that PostgreSQL shows of it. What is wrong with one is told by table, row,
field and rule, never by value.
"""

import re
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import orjson

from glamd.errors import InputError
from glamd.ids import as_uuid
from glamd.ledger.importing.merchant import OlderRow, OlderTable, Refusal, RefusedError

_WHOLE: Final = re.compile(r"(-?[0-9]{1,19})(?:\.0{1,30})?", re.ASCII)
_NOTHING: Final = datetime.min.replace(tzinfo=UTC)
_FIRST_YEAR: Final = 1970
_LAST_YEAR: Final = 9000


class Fields:
    """The fields of one row; what a method returns for a wrong one is of its type and no more."""

    def __init__(self, table: OlderTable, row: OlderRow, *, key: str) -> None:
        """`key` is the field that the row is named by."""
        self._table = table
        self._row = row
        self._id = (row.get(key) or "")[:64]
        self._wrong: list[Refusal] = []

    def done(self) -> None:
        """Raise RefusedError where any field was wrong."""
        if self._wrong:
            raise RefusedError(self._wrong)

    def is_wrong(self, name: str, message: str) -> None:
        """Remember that this field is wrong."""
        self._wrong.append(Refusal(self._table.name, self._id, name, message))

    def has(self, name: str) -> bool:
        """Whether there is a value at all."""
        return self._row.get(name) not in (None, "")

    def text(self, name: str) -> str:
        """Printable text of at most the column's limit, without blanks around it."""
        found = (self._row.get(name) or "").strip()
        limit = self._table.columns[name].limit
        if not found:
            self.is_wrong(name, "It is missing.")
        elif len(found) > limit:
            self.is_wrong(name, f"It has more than {limit} characters.")
        elif not found.isprintable():
            self.is_wrong(name, "It has characters that cannot be shown.")
        return found

    def maybe_text(self, name: str) -> str | None:
        """The same, or None where there is nothing."""
        return self.text(name) if self.has(name) else None

    def free_text(self, name: str) -> str | None:
        """Any text, cut at the column's limit."""
        found = self._row.get(name)
        return None if found is None else found[: self._table.columns[name].limit]

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of these, in any case."""
        found = self.text(name).lower()
        if found and found not in choices:
            self.is_wrong(name, f"It is none of {', '.join(choices)}.")
        return found

    def uuid(self, name: str) -> UUID:
        """A UUID."""
        text = self.text(name)
        found = as_uuid(text)
        if text and found is None:
            self.is_wrong(name, "It is no UUID.")
        return found or UUID(int=0)

    def whole(self, name: str, *, least: int, most: int) -> int:
        """A whole number in these bounds; `5.00` is one."""
        text = self.text(name)
        found = _WHOLE.fullmatch(text)
        if text and found is None:
            self.is_wrong(name, "It is no whole number.")
        number = int(found[1]) if found else least
        if not least <= number <= most:
            self.is_wrong(name, f"It is not between {least} and {most}.")
        return number

    def maybe_whole(self, name: str, *, least: int, most: int) -> int | None:
        """The same, or None where there is nothing."""
        return self.whole(name, least=least, most=most) if self.has(name) else None

    def time(self, name: str) -> datetime:
        """A time, which is UTC where it does not say otherwise."""
        text = self.text(name)
        if not text:
            return _NOTHING
        try:
            found = datetime.fromisoformat(text)
            found = found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError):
            self.is_wrong(name, "It is no time in the form of ISO 8601.")
            return _NOTHING
        if not _FIRST_YEAR <= found.year <= _LAST_YEAR:
            self.is_wrong(name, f"Its year is not between {_FIRST_YEAR} and {_LAST_YEAR}.")
        return found

    def maybe_time(self, name: str) -> datetime | None:
        """The same, or None where there is nothing."""
        return self.time(name) if self.has(name) else None

    def truth(self, name: str) -> bool:
        """Yes or no; no where there is nothing."""
        return self.has(name) and self.choice(name, ("true", "false")) == "true"

    def json_object(self, name: str) -> dict[str, object] | None:
        """A JSON object, None where there is none (JSON's null too)."""
        text = self._row.get(name)
        if not text:
            return None
        limit = self._table.columns[name].limit
        if len(text) > limit:
            self.is_wrong(name, f"It has more than {limit} characters.")
            return None
        try:
            found: object = orjson.loads(text)
        except ValueError:
            self.is_wrong(name, "It is no JSON.")
            return None
        if found is None or isinstance(found, dict):
            return found
        self.is_wrong(name, "It is no JSON object.")
        return None

    def refused(self, name: str, error: InputError) -> None:
        """Take over what a rule of ours says against a value."""
        reason = error.fields[0].message if error.fields else error.message
        self.is_wrong(name, f"{reason[:1].upper()}{reason[1:]}.")
