"""What the owners of sealed rows implement, so that keys can be replaced under them, and share.

Tables, columns and what a row is bound to are the owners' own: nothing here knows a card or a
token. Rows are named by where they lie, in pages of a table or of one of its partitions. That a row
names its version in a column `key_version` is the same for all, and so is how they are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from glamd.db import Connection
from glamd.keys.keyrings import DataKey

_COUNT_UP_TO: Final = """
SELECT count(*) FROM (SELECT FROM {table} WHERE key_version {comparison} $1 LIMIT $2) found
"""


class SealedRow(Protocol):
    """A row with what is sealed in it."""

    @property
    def row_id(self) -> str:
        """What it is called in a log."""

    @property
    def key_version(self) -> str:
        """What it was sealed with."""


R = TypeVar("R", bound=SealedRow)


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or one of its partitions: its name, quoted for SQL, and its length."""

    name: str
    pages: int


@dataclass(frozen=True, slots=True)
class Span:
    """The pages of a part from `first` up to `end`, which is not among them."""

    part: str
    first: int
    end: int


class CountedRows(Protocol):
    """The rows that a keyring's versions have sealed, counted for who decides about a version."""

    async def using(
        self, connection: Connection, version: str, *, limit: int, timeout_s: float
    ) -> int:
        """How many rows are sealed with this version, all at one moment, counted up to `limit`."""

    async def stale(
        self, connection: Connection, target: str, *, limit: int, timeout_s: float
    ) -> int:
        """How many rows are not sealed with `target`, counted up to `limit`."""


class TableOfSealedRows:
    """`CountedRows` of one table, with its partitions; it is named as SQL names it."""

    def __init__(self, table: str) -> None:
        self._using = _COUNT_UP_TO.format(table=table, comparison="=")
        self._stale = _COUNT_UP_TO.format(table=table, comparison="<>")

    async def using(
        self, connection: Connection, version: str, *, limit: int, timeout_s: float
    ) -> int:
        """How many rows are sealed with this version, in one snapshot, up to `limit`."""
        found: int = await connection.fetchval(self._using, version, limit, timeout_s=timeout_s)
        return found

    async def stale(
        self, connection: Connection, target: str, *, limit: int, timeout_s: float
    ) -> int:
        """How many rows are not sealed with `target`, in one snapshot, up to `limit`."""
        found: int = await connection.fetchval(self._stale, target, limit, timeout_s=timeout_s)
        return found


def resealed(
    ciphertext: bytes, bound_to: Callable[[str], bytes], *, old: DataKey, new: DataKey
) -> bytes:
    """The same under another key, for a row's `reseal`; CryptoError where it does not open.

    `bound_to` is the associated data for a version of the key.
    """
    clear = old.sealer.open_sealed(ciphertext, associated_data=bound_to(old.version))
    try:
        return new.sealer.seal(clear, associated_data=bound_to(new.version))
    finally:
        clear[:] = bytes(len(clear))


class SealedRows(CountedRows, Protocol[R]):
    """The same rows for who seals them anew. Raises UnavailableError where it asks."""

    async def parts(self) -> Sequence[Part]:
        """Where the rows lie now."""

    async def count(self, span: Span, *, target: str) -> int:
        """How many rows there are not sealed with `target`."""

    async def fetch(self, span: Span, *, target: str) -> Sequence[R]:
        """The rows there that are not sealed with `target`."""

    def reseal(self, row: R, *, old: DataKey, new: DataKey) -> R:
        """The row as it is to be; CryptoError where it does not open."""

    async def write(self, span: Span, changes: Sequence[tuple[R, R]], *, target: str) -> int:
        """Put the new in place of the old where that is what is there; how many were."""
