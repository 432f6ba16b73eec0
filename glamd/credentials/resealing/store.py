"""The SQL of sealing platform tokens anew: pages of `glam.platform_tokens` in, rows out and back.

By physical order, which no index is needed for: `ctid` is a row's page and place in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from glamd.credentials.model import Platform
from glamd.db import Database
from glamd.keys.sealed_rows import Part, Span

TABLE: Final = "glam.platform_tokens"

_PAGES: Final = f"""
SELECT pg_relation_size('{TABLE}') / current_setting('block_size')::bigint
"""
_COUNT: Final = """
SELECT count(*) FROM glam.platform_tokens WHERE ctid >= $1 AND ctid < $2 AND key_version <> $3
"""
_FETCH: Final = """
SELECT token_id, merchant_id, platform, platform_shop_id, domain, key_version, ciphertext
FROM glam.platform_tokens
WHERE ctid >= $1 AND ctid < $2 AND key_version <> $3
"""
# A row that somebody else has locked is left for the next pass: readers lock several rows of a
# merchant, and each must not wait for what the other has. The trigger of the table sees to it that
# the new key is usable. Neither the generation nor `updated_at` moves: the secret is the same.
_WRITE: Final = """
WITH n AS (
    SELECT * FROM unnest($2::uuid[], $3::text[], $4::bytea[], $5::bytea[])
                  AS n (token_id, version, old, ciphertext)
), free AS MATERIALIZED (
    SELECT token_id FROM glam.platform_tokens WHERE token_id = ANY ($2)
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE glam.platform_tokens t
SET key_version = $1, ciphertext = n.ciphertext
FROM n JOIN free USING (token_id)
WHERE t.token_id = n.token_id AND t.key_version = n.version AND t.ciphertext = n.old
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretRow:
    """A sealed secret, with what of its row it is bound to."""

    token_id: UUID
    merchant_id: UUID
    platform: Platform
    platform_shop_id: str
    domain: str
    key_version: str
    ciphertext: bytes = field(repr=False)

    @property
    def row_id(self) -> str:
        """The token's id."""
        return str(self.token_id)


async def parts(database: Database) -> list[Part]:
    """The table, which is one."""
    return [Part(TABLE, await database.fetchval(_PAGES))]


async def count(database: Database, span: Span, target: str) -> int:
    """How many rows there are sealed with another version."""
    found: int = await database.fetchval(_COUNT, (span.first, 0), (span.end, 0), target)
    return found


async def fetch(database: Database, span: Span, target: str) -> list[SecretRow]:
    """The rows there that are sealed with another version."""
    rows = await database.fetch(_FETCH, (span.first, 0), (span.end, 0), target)
    return [SecretRow(**row) for row in rows]


async def write(
    database: Database, changes: Sequence[tuple[SecretRow, SecretRow]], target: str
) -> int:
    """Replace the old ones that are as they were; how many."""
    tag = await database.execute(
        _WRITE,
        target,
        [old.token_id for old, _ in changes],
        [old.key_version for old, _ in changes],
        [old.ciphertext for old, _ in changes],
        [new.ciphertext for _, new in changes],
    )
    return int(tag.rpartition(" ")[2])
