"""The SQL of sealing payment tokens anew: pages of `cde.token_secrets` in, rows out, rows back.

By physical order, which no index is needed for: `ctid` is a row's page and place in it. A table's
name is put into the text of a statement as the server has quoted it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from glamd.db import Database
from glamd.keys.sealed_rows import Part, Span

TABLE: Final = "cde.token_secrets"

_PARTS: Final = f"""
SELECT format('%I.%I', n.nspname, c.relname) AS name,
       coalesce(pg_relation_size(c.oid), 0) / current_setting('block_size')::bigint AS pages
FROM pg_partition_tree('{TABLE}') t
JOIN pg_class c ON c.oid = t.relid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE t.isleaf
"""  # noqa: S608 - our own constant
_COUNT: Final = """
SELECT count(*) FROM {part} WHERE ctid >= $1 AND ctid < $2 AND key_version <> $3
"""
_FETCH: Final = """
SELECT ctid, token, key_version, card_ciphertext, sensitive_ciphertext FROM {part}
WHERE ctid >= $1 AND ctid < $2 AND key_version <> $3
"""
# Planned anew for each batch: the plan must fit the partition's size, which was nothing when the
# statement was prepared. A commit that the server's crash loses costs a row's second sealing only,
# and none is lost that a later commit, such as the end of its key, was built on.
_SETTINGS: Final = """
SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('synchronous_commit', 'off', true)
"""
# Only what is as it was is replaced: sensitive data that was erased meanwhile does not come back.
# The row of the new key is locked as at every commit of a token, so that it cannot be retired
# meanwhile.
_WRITE: Final = """
WITH usable AS (
    SELECT FROM cde.encryption_keys
    WHERE keyring = 'payment-tokens' AND version = $1 AND status IN ('active', 'decrypt-only')
    FOR KEY SHARE
)
UPDATE {part} s
SET key_version = $1, card_ciphertext = n.card, sensitive_ciphertext = n.sensitive
FROM unnest($2::tid[], $3::text[], $4::bytea[], $5::bytea[], $6::bytea[], $7::bytea[])
     AS n (place, version, old_card, old_sensitive, card, sensitive)
WHERE s.ctid = n.place AND s.key_version = n.version AND s.card_ciphertext = n.old_card
  AND s.sensitive_ciphertext IS NOT DISTINCT FROM n.old_sensitive
  AND (SELECT count(*) FROM usable) > 0
"""


@dataclass(frozen=True, slots=True)
class SecretRow:
    """What is sealed of one token; `place` is its page and its number there."""

    place: tuple[int, int]
    row_id: str
    key_version: str
    card_ciphertext: bytes = field(repr=False)
    sensitive_ciphertext: bytes | None = field(repr=False)


async def parts(database: Database) -> list[Part]:
    """The table's partitions."""
    return [Part(row["name"], row["pages"]) for row in await database.fetch(_PARTS)]


async def count(database: Database, span: Span, target: str) -> int:
    """How many rows there are sealed with another version."""
    found: int = await database.fetchval(
        _COUNT.format(part=span.part), (span.first, 0), (span.end, 0), target
    )
    return found


async def fetch(database: Database, span: Span, target: str) -> list[SecretRow]:
    """The rows there that are sealed with another version."""
    rows = await database.fetch(
        _FETCH.format(part=span.part), (span.first, 0), (span.end, 0), target
    )
    return [SecretRow(*row) for row in rows]


async def write(
    database: Database, span: Span, changes: Sequence[tuple[SecretRow, SecretRow]], target: str
) -> int:
    """Replace the old ones that are as they were; how many."""
    async with database.transaction() as connection:
        await connection.execute(_SETTINGS)
        tag = await connection.execute(
            _WRITE.format(part=span.part),
            target,
            [old.place for old, _ in changes],
            [old.key_version for old, _ in changes],
            [old.card_ciphertext for old, _ in changes],
            [old.sensitive_ciphertext for old, _ in changes],
            [new.card_ciphertext for _, new in changes],
            [new.sensitive_ciphertext for _, new in changes],
        )
    return int(tag.rpartition(" ")[2])
