"""What an import of one merchant's money takes and answers, whichever tables it is out of. Pure.

What becomes of the rows is for the importers; how they get here is for the transports.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

import orjson

from glamd.errors import GlamError

OlderRow: TypeAlias = Mapping[str, str | None]
"""A row by our names of its fields, every value as text; nothing about it is known yet."""

Chunks: TypeAlias = Callable[[], Iterator[Sequence[OlderRow]]]
"""A merchant's rows from the first one on, some at a time, as often as they are asked for."""

Outcome = Literal["taken", "updated", "already", "moved_on", "refused"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

REFUSED_LIMIT: Final = 20
"""Wrong fields of one merchant that are named; they are all in its first wrong rows."""


@dataclass(frozen=True, slots=True)
class OlderColumn:
    """A column of an older table: what it may be called, and how many characters matter of it."""

    names: tuple[str, ...]
    limit: int
    is_needed: bool = True


@dataclass(frozen=True, slots=True)
class OlderTable:
    """An older table: what it is called, and the columns that are read, by our names of them."""

    name: str
    columns: Mapping[str, OlderColumn]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field of an older row that is wrong, and why; never its value."""

    table: str
    id: str
    field: str
    message: str


class RefusedError(GlamError):
    """A merchant whose rows cannot be taken as they are; nothing of it is."""

    default_code = "OLDER_ROWS_REFUSED"

    def __init__(self, refused: Sequence[Refusal]) -> None:
        super().__init__("The older rows cannot be taken.")
        self.refused = tuple(refused[:REFUSED_LIMIT])


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderMerchant:
    """All that an older service had of one merchant.

    `heads` are the rows of which there should be one a merchant (account, billing record), `chunks`
    gives the others (transactions, purchases) in the order of their creation.
    """

    merchant_id: str
    heads: Sequence[OlderRow]
    chunks: Chunks

    def digest(self) -> str:
        """What stands for all of it: the same as long as no value has changed."""
        found = hashlib.sha256(orjson.dumps([dict(head) for head in self.heads]))
        for chunk in self.chunks():
            for row in chunk:
                found.update(orjson.dumps(dict(row)))
        return f"rows:{found.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderShop:
    """Which shop an older row says that the merchant is."""

    platform: str
    shop_id: str
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What became of one merchant.

    `figures` are sums of what the import has written for it, now or before; `notes` is what is
    right here and was not there, by its name.
    """

    merchant_id: str
    outcome: Outcome
    figures: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()
    shop: OlderShop | None = None
