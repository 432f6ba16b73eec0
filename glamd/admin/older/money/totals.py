"""Sums of what was read there, held to sums of what is said to stand here.

glamctl adds up the older rows by itself, from their texts, so that a mistake of whoever imports
them shows. A value that is no number is nobody's sum: its row is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Final, Literal, TypeAlias

from glamd.admin.older.money.store import Entry, OlderText
from glamd.billing.importing.model import USUAL_CURRENCY
from glamd.billing.money import Money

Kind = Literal["credits", "billing"]
Sums: TypeAlias = dict[str, Decimal]

_AMOUNT: Final = "amount_"
_CREDITS: Final = ("accounts", "transactions", "balance", "credits", "debits")
_BILLING: Final = ("merchants", "trials", "purchases", "completed_credits")
_TOLD: Final = ("total_granted", "total_consumed", "credits_purchased")
"""Sums of what older rows say of others; that they differ is their own mistake, and is shown."""


@dataclass(slots=True)
class Totals:
    """Both sides' sums, by what they are of."""

    kind: Kind
    older: Sums = field(default_factory=dict)
    here: Sums = field(default_factory=dict)

    def counted(self, *, heads: int, rows: int) -> None:
        """How many rows there are there, counted by the database."""
        if self.kind == "credits":
            self.older["accounts"] = Decimal(heads)
            self.older["transactions"] = Decimal(rows)
        else:
            self.older["purchases"] = Decimal(rows)

    def read(self, entry: Entry) -> None:
        """One row that was read there."""
        _READERS[self.kind, entry.is_head](self.older, entry.row)

    def merchant(self) -> None:
        """One merchant more there."""
        if self.kind == "billing":
            _add(self.older, "merchants", "1")

    def taken(self, figures: Mapping[str, int]) -> None:
        """What the import says that it has written for a merchant."""
        found = dict(figures)
        if self.kind == "credits" and found:
            opening, closing = found["opening"], found["closing"]
            found["total_granted"], found["total_consumed"] = found["granted"], found["consumed"]
            found["transactions"] -= found["added"]
            found["credits"] = found["granted"] - opening - max(closing, 0)
            found["debits"] = found["consumed"] - max(-closing, 0)
        for name, value in found.items():
            self.here[name] = self.here.get(name, Decimal(0)) + value

    def table(self) -> list[dict[str, object]]:
        """A line for each sum: what, how much there and here, and whether that agrees.

        That is None where it need not: where sums were kept there that were not the rows' own.
        """
        names = _CREDITS if self.kind == "credits" else _BILLING
        amounts = sorted(name for name in self.older | self.here if name.startswith(_AMOUNT))
        lines = [self._line(name, is_held=True) for name in (*names, *amounts)]
        return lines + [self._line(name, is_held=False) for name in _TOLD if name in self.older]

    @property
    def agree(self) -> bool:
        """Whether all of those agree that have to."""
        return all(line["agrees"] is not False for line in self.table())

    def _line(self, name: str, *, is_held: bool) -> dict[str, object]:
        older, here = self.older.get(name, Decimal(0)), self.here.get(name, Decimal(0))
        if name.startswith(_AMOUNT):
            here = Decimal(Money(int(here), name.removeprefix(_AMOUNT)).amount)
        return {
            "what": name.replace("_", " "),
            "older": f"{older.normalize():f}",
            "here": f"{here.normalize():f}",
            "agrees": older == here if is_held else None,
        }


def _account(sums: Sums, row: OlderText) -> None:
    # One below zero stands for 0 here, and has its adjustment.
    _add(sums, "balance", row["balance"], least=Decimal(0))
    for name in ("total_granted", "total_consumed"):
        if name in row:
            _add(sums, name, row[name])


def _transaction(sums: Sums, row: OlderText) -> None:
    name = "credits" if (row["operation"] or "").strip().lower() == "credit" else "debits"
    _add(sums, name, row["amount"])


def _record(sums: Sums, row: OlderText) -> None:
    if row.get("trial_started_at"):
        _add(sums, "trials", "1")
    if "credits_purchased" in row:
        _add(sums, "credits_purchased", row["credits_purchased"])


def _purchase(sums: Sums, row: OlderText) -> None:
    currency = ((row.get("currency") or "").strip() or USUAL_CURRENCY).upper()
    _add(sums, f"{_AMOUNT}{currency}", row["amount"])
    if (row["status"] or "").strip().lower() == "completed":
        _add(sums, "completed_credits", row["credits"])


_READERS: Final[Mapping[tuple[Kind, bool], Callable[[Sums, OlderText], None]]] = {
    ("credits", True): _account,
    ("credits", False): _transaction,
    ("billing", True): _record,
    ("billing", False): _purchase,
}


def _add(sums: Sums, name: str, text: str | None, *, least: Decimal | None = None) -> None:
    try:
        value = Decimal((text or "0").strip())
    except InvalidOperation:
        return
    if value.is_finite():
        value = value if least is None else max(value, least)
        sums[name] = sums.get(name, Decimal(0)) + value
