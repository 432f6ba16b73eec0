"""The vault of platform tokens for tests: tokens to store, somebody to do it, keys that rotate."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from glamd.clock import Clock
from glamd.credentials.model import Accessor, NewToken, OpenToken, Platform, Reading, Secret
from glamd.crypto import kcv
from glamd.db import Database, Row
from glamd.keys import keyrings
from glamd.keys.keyrings import DataKey, Keyring
from glamd.keys.providers.interface import Providers

NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
CANARY = "shpat_canary_0d1f2e3c4b5a69788796a5b4c3d2e1f0"
"""Stands in every secret that `new_token` makes, for a search wherever it must not be."""

READER = Accessor(
    kind="internal",
    name="platform-connector",
    ip="192.0.2.7",
    request_id="req-1",
    correlation_id="order-77",
)


def new_token(merchant_id: UUID, platform: Platform = "shopify", **changes: Any) -> NewToken:
    """A token that nothing is wrong with, and that never expires."""
    secret = Secret({"access_token": CANARY, "platform": platform, "merchant": str(merchant_id)})
    plain = NewToken(
        merchant_id=merchant_id,
        platform=platform,
        platform_shop_id="67890",
        domain="shop.example",
        token_type="oauth",
        secret=secret,
        scopes=("read_products", "write_orders"),
        expires_at=None,
    )
    return replace(plain, **changes)


def refreshable(merchant_id: UUID, platform: Platform = "shopify", **changes: Any) -> NewToken:
    """A token that can be renewed."""
    secret = Secret({"access_token": CANARY, "refresh_token": f"{CANARY}-refresh"})
    return new_token(merchant_id, platform, secret=secret, **changes)


async def load_keyring(database: Database, provider: Providers, clock: Clock) -> Keyring[DataKey]:
    """The keyring of platform tokens as a node has it after its start."""
    keyring = keyrings.platform_tokens(database=database, providers=provider)
    await keyring.load(clock, "v1")
    return keyring


async def rotate(database: Database, provider: Providers, version: str) -> None:
    """Make `version` the active one, as another node would: nobody's memory learns of it."""
    key = os.urandom(keyrings.KEY_BYTES)
    wrapped = await provider.current.wrap(key, context=f"{keyrings.PLATFORM_TOKENS}:{version}")
    await database.execute(
        "UPDATE glam.encryption_keys SET status = 'decrypt-only' WHERE status = 'active'"
    )
    await database.execute(
        "INSERT INTO glam.encryption_keys (keyring, version, wrapped_key, provider, kcv, status)"
        " VALUES ($1, $2, $3, 'local', $4, 'active')",
        keyrings.PLATFORM_TOKENS,
        version,
        wrapped,
        kcv.aes(key).hex().upper(),
    )


async def destroy(database: Database, version: str) -> None:
    """Erase a key version for good."""
    await database.execute(
        "UPDATE glam.encryption_keys SET status = 'destroyed', wrapped_key = NULL"
        " WHERE version = $1",
        version,
    )


async def rows_of(database: Database, merchant_id: UUID) -> list[Row]:
    """The merchant's rows of platform tokens, by platform."""
    return await database.fetch(
        "SELECT * FROM glam.platform_tokens WHERE merchant_id = $1 ORDER BY platform", merchant_id
    )


async def log_of(database: Database, merchant_id: UUID) -> list[tuple[Any, ...]]:
    """The merchant's access log: action, platform, actor, success, error; oldest first."""
    rows = await database.fetch(
        "SELECT action, platform, actor, success, error FROM glam.token_access_log"
        " WHERE merchant_id = $1 ORDER BY id",
        merchant_id,
    )
    return [tuple(row) for row in rows]


def by_platform(reading: Reading) -> dict[str, OpenToken]:
    """What opened, by its platform."""
    return {token.connection.platform: token for token in reading.tokens}
