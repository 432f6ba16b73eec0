"""The rows of payment tokens as the re-encryption takes them: opened and sealed in one step.

What is in the clear is there for one row at a time, in a buffer that is overwritten. No rule about
tokens stands here: one that has expired is sealed anew like any other until it is purged.
"""

from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Final, TypeVar

from glamd.db import Database
from glamd.errors import InternalError
from glamd.keys.keyrings import DataKey
from glamd.keys.sealed_rows import Part, Span, TableOfSealedRows, resealed
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.resealing import store
from glamd.payments.resealing.store import SecretRow

T = TypeVar("T")


class PaymentTokenRows(TableOfSealedRows):
    """`SealedRows` of the keyring payment-tokens."""

    def __init__(self, database: Database) -> None:
        super().__init__(store.TABLE)
        self._database: Final = database

    async def parts(self) -> Sequence[Part]:
        """The partitions that there are now."""
        return await store.parts(self._database)

    async def count(self, span: Span, *, target: str) -> int:
        """How many rows there are not sealed with `target`; none where the partition is gone."""
        return await self._unless_gone(span, store.count(self._database, span, target), 0)

    async def fetch(self, span: Span, *, target: str) -> Sequence[SecretRow]:
        """The rows there that are not sealed with `target`; none where the partition is gone."""
        return await self._unless_gone(span, store.fetch(self._database, span, target), [])

    def reseal(self, row: SecretRow, *, old: DataKey, new: DataKey) -> SecretRow:
        """Both ciphertexts under `new`; CryptoError where one does not open in this row."""
        sensitive = row.sensitive_ciphertext
        return SecretRow(
            row.place,
            row.row_id,
            new.version,
            resealed(row.card_ciphertext, partial(associated_data, row.row_id), old=old, new=new),
            None
            if sensitive is None
            else resealed(
                sensitive, partial(sensitive_associated_data, row.row_id), old=old, new=new
            ),
        )

    async def write(
        self, span: Span, changes: Sequence[tuple[SecretRow, SecretRow]], *, target: str
    ) -> int:
        """Put the new in place of the old where nothing has changed meanwhile; how many were."""
        return await self._unless_gone(span, store.write(self._database, span, changes, target), 0)

    async def _unless_gone(self, span: Span, work: Awaitable[T], nothing: T) -> T:
        """What comes of `work`; `nothing` where it fails since the partition is gone."""
        try:
            return await work
        except InternalError:
            if await self._is_there(span):
                raise
            return nothing

    async def _is_there(self, span: Span) -> bool:
        """Whether the partition was not dropped meanwhile, with all that was in it."""
        return any(part.name == span.part for part in await self.parts())
