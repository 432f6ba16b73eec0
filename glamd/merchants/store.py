"""A merchant's two rows: `glam.merchants` (who it is) and `cde.merchants` (for tokenizing).

The schemas may be on two servers, so that no statement here knows of both.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from glamd.db import Database, Row

_COLUMNS: Final = "SELECT merchant_id, platform, shop_id, domain, created_at FROM glam.merchants "

_ADD: Final = """
INSERT INTO glam.merchants (merchant_id, platform, shop_id, domain, created_at)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT DO NOTHING
"""

_ADD_TO_CDE: Final = """
INSERT INTO cde.merchants (merchant_id, created_at)
VALUES ($1, $2)
ON CONFLICT (merchant_id) DO NOTHING
"""

_ALIKE: Final = (
    _COLUMNS + "WHERE merchant_id = $1 OR domain = $4 OR (platform = $2 AND shop_id = $3)"
)
_BY_ID: Final = _COLUMNS + "WHERE merchant_id = $1"
_BY_DOMAIN: Final = _COLUMNS + "WHERE domain = $1"
_PAGE: Final = _COLUMNS + "WHERE $1::uuid IS NULL OR merchant_id > $1 ORDER BY merchant_id LIMIT $2"

_SETTINGS_COLUMNS: Final = "token_ttl_s, sensitive_data, erase_requested_at, erased_at"
_SETTINGS: Final = f"SELECT {_SETTINGS_COLUMNS} FROM cde.merchants WHERE merchant_id = $1"  # noqa: S608 - our own constants
# The devices are touched so that every node's watch makes their sessions read the settings anew; in
# the order of ids, as by whoever else holds several of them.
_SET: Final = f"""
WITH told AS (
    UPDATE cde.devices SET changed_at = clock_timestamp()
    WHERE device_id = ANY (ARRAY(
        SELECT device_id FROM cde.devices WHERE merchant_id = $1 AND status = 'active'
        ORDER BY device_id FOR NO KEY UPDATE))
)
UPDATE cde.merchants
SET token_ttl_s = CASE WHEN $2 THEN $3 ELSE token_ttl_s END,
    sensitive_data = coalesce($4, sensitive_data)
WHERE merchant_id = $1 AND erase_requested_at IS NULL
RETURNING {_SETTINGS_COLUMNS}
"""  # noqa: S608 - our own constants

SensitiveData = Literal["drop", "until-authorized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What tokenizing knows of a merchant; `token_ttl_s` None: the configuration's default."""

    token_ttl_s: int | None
    sensitive_data: SensitiveData
    erase_requested_at: datetime | None
    erased_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merchant:
    """A merchant: one shop on one platform, with the domain that its callers are known by."""

    merchant_id: UUID
    platform: str
    shop_id: str
    domain: str
    created_at: datetime


async def add(database: Database, merchant: Merchant) -> bool:
    """Insert into `glam`; False when one with its id, its domain or its shop is there."""
    tag = await database.execute(
        _ADD,
        merchant.merchant_id,
        merchant.platform,
        merchant.shop_id,
        merchant.domain,
        merchant.created_at,
    )
    return tag == "INSERT 0 1"


async def add_to_cde(database: Database, merchant: Merchant) -> None:
    """Insert into `cde`, unless it is there."""
    await database.execute(_ADD_TO_CDE, merchant.merchant_id, merchant.created_at)


async def alike(database: Database, merchant: Merchant) -> tuple[Merchant, ...]:
    """All with the same id, domain or shop: three at most, since each of these is unique."""
    rows = await database.fetch(
        _ALIKE, merchant.merchant_id, merchant.platform, merchant.shop_id, merchant.domain
    )
    return tuple(_merchant(row) for row in rows)


async def by_id(database: Database, merchant_id: UUID) -> Merchant | None:
    """The merchant with this id, or None."""
    row = await database.fetchrow(_BY_ID, merchant_id)
    return None if row is None else _merchant(row)


async def by_domain(database: Database, domain: str) -> Merchant | None:
    """The merchant with this domain, in lower case, or None."""
    row = await database.fetchrow(_BY_DOMAIN, domain)
    return None if row is None else _merchant(row)


async def page(database: Database, *, limit: int, after: UUID | None) -> tuple[Merchant, ...]:
    """The next `limit` merchants by id."""
    rows = await database.fetch(_PAGE, after, limit)
    return tuple(_merchant(row) for row in rows)


async def settings(database: Database, merchant_id: UUID) -> Settings | None:
    """The merchant's settings in `cde`, or None."""
    row = await database.fetchrow(_SETTINGS, merchant_id)
    return None if row is None else Settings(**row)


async def change_settings(
    database: Database,
    merchant_id: UUID,
    *,
    token_ttl_s: int | Literal["default"] | None,
    sensitive_data: SensitiveData | None,
) -> Settings | None:
    """Change what is not None; None where there is no such merchant or its erasure was asked."""
    row = await database.fetchrow(
        _SET,
        merchant_id,
        token_ttl_s is not None,
        token_ttl_s if isinstance(token_ttl_s, int) else None,
        sensitive_data,
    )
    return None if row is None else Settings(**row)


def _merchant(row: Row) -> Merchant:
    return Merchant(
        merchant_id=row["merchant_id"],
        platform=row["platform"],
        shop_id=row["shop_id"],
        domain=row["domain"],
        created_at=row["created_at"],
    )
