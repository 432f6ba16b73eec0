"""The rows of payment tokens as the re-encryption takes them: opened and sealed in one step.

What is in the clear is there for one row at a time, in a buffer that is overwritten. No rule about
tokens stands here: one that has expired is sealed anew like any other until it is purged.
"""

from collections.abc import Callable, Sequence
from typing import Final

from glamd.db import Database
from glamd.errors import InternalError
from glamd.keys.keyrings import DataKey
from glamd.keys.sealed_rows import Part, Span, TableOfSealedRows
from glamd.payments.cipher import associated_data, sensitive_associated_data
from glamd.payments.resealing import store
from glamd.payments.resealing.store import SecretRow


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
        try:
            return await store.count(self._database, span, target)
        except InternalError:
            if await self._is_there(span):
                raise
            return 0

    async def fetch(self, span: Span, *, target: str) -> Sequence[SecretRow]:
        """The rows there that are not sealed with `target`; none where the partition is gone."""
        try:
            return await store.fetch(self._database, span, target)
        except InternalError:
            if await self._is_there(span):
                raise
            return ()

    def reseal(self, row: SecretRow, *, old: DataKey, new: DataKey) -> SecretRow:
        """Both ciphertexts under `new`; CryptoError where one does not open in this row."""
        sensitive = row.sensitive_ciphertext
        return SecretRow(
            row.place,
            row.row_id,
            new.version,
            _resealed(row.card_ciphertext, associated_data, row.row_id, old=old, new=new),
            None
            if sensitive is None
            else _resealed(sensitive, sensitive_associated_data, row.row_id, old=old, new=new),
        )

    async def write(
        self, span: Span, changes: Sequence[tuple[SecretRow, SecretRow]], *, target: str
    ) -> int:
        """Put the new in place of the old where nothing has changed meanwhile; how many were."""
        try:
            return await store.write(self._database, span, changes, target)
        except InternalError:
            if await self._is_there(span):
                raise
            return 0

    async def _is_there(self, span: Span) -> bool:
        """Whether the partition was not dropped meanwhile, with all that was in it."""
        return any(part.name == span.part for part in await self.parts())


def _resealed(
    ciphertext: bytes,
    bound_to: Callable[[str, str], bytes],
    token: str,
    *,
    old: DataKey,
    new: DataKey,
) -> bytes:
    clear = old.sealer.open_sealed(ciphertext, associated_data=bound_to(token, old.version))
    try:
        return new.sealer.seal(clear, associated_data=bound_to(token, new.version))
    finally:
        clear[:] = bytes(len(clear))
