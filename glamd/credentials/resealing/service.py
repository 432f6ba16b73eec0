"""The rows of platform tokens as the re-encryption takes them: opened and sealed in one step.

What is in the clear is there for one row at a time, in a buffer that is overwritten.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from glamd.credentials import sealing
from glamd.credentials.resealing import store
from glamd.credentials.resealing.store import SecretRow
from glamd.db import Database
from glamd.keys.keyrings import DataKey
from glamd.keys.sealed_rows import Part, Span, TableOfSealedRows


class PlatformTokenRows(TableOfSealedRows):
    """`SealedRows` of the keyring platform-tokens."""

    def __init__(self, database: Database) -> None:
        super().__init__(store.TABLE)
        self._database: Final = database

    async def parts(self) -> Sequence[Part]:
        """The table."""
        return await store.parts(self._database)

    async def count(self, span: Span, *, target: str) -> int:
        """How many rows there are not sealed with `target`."""
        return await store.count(self._database, span, target)

    async def fetch(self, span: Span, *, target: str) -> Sequence[SecretRow]:
        """The rows there that are not sealed with `target`."""
        return await store.fetch(self._database, span, target)

    def reseal(self, row: SecretRow, *, old: DataKey, new: DataKey) -> SecretRow:
        """The secret under `new`; CryptoError where it does not open in this row."""
        ciphertext = sealing.reseal(row.ciphertext, row, old=old, new=new)
        return replace(row, key_version=new.version, ciphertext=ciphertext)

    async def write(
        self, _span: Span, changes: Sequence[tuple[SecretRow, SecretRow]], *, target: str
    ) -> int:
        """Put the new in place of the old where nothing has changed meanwhile; how many were."""
        return await store.write(self._database, changes, target)
