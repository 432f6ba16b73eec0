"""A platform, a vault of its tokens, and nodes that renew them, all by a clock set by hand."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

from glamd.credentials.model import (
    Accessor,
    NewToken,
    Platform,
    Reading,
    Secret,
    ShopConnection,
    TokenType,
)
from glamd.credentials.refresh.service import Refresher
from glamd.credentials.refresh.settings import OAuthSettings
from glamd.credentials.sealing import open_sealed
from glamd.credentials.service import PlatformTokens, Renew
from glamd.credentials.store import COLUMNS, connection_of
from glamd.crypto import kcv
from glamd.db import Database
from glamd.keys.keyrings import DataKey, Keyring, platform_tokens
from tests.support.keys import local_provider
from tests.support.oauth_platform import OAuthPlatform
from tests.support.postgres import eventually
from tests.support.settable_clock import SettableClock

SOON_S = 300.0
"""What a token that is due has left to live."""

FAST_S = 0.02
NEVER_S = 3600.0
"""An interval after whose first look a job does nothing by itself any more."""

STOP_S = 5.0
CLIENT = Accessor(kind="client", name="bff", ip="-", request_id="r", correlation_id="c")


class World:
    """Everything but the nodes, which `node` makes."""

    def __init__(
        self, database: Database, url: str, keyring: Keyring[DataKey], directory: Path
    ) -> None:
        self.database = database
        self.url = url
        self.keyring = keyring
        self.directory = directory
        self.clock = SettableClock()
        self.platform = OAuthPlatform()

    @classmethod
    @asynccontextmanager
    async def make(cls, url: str, directory: Path) -> AsyncIterator[Self]:
        """A world on a database of which nothing is left from the test before."""
        database = await Database.connect(url, pool_size=4)
        for table in ("platform_tokens", "token_access_log", "encryption_keys"):
            await database.execute(f"DELETE FROM glam.{table}")
        keyring = platform_tokens(database=database, providers=local_provider(directory))
        world = cls(database, url, keyring, directory)
        await keyring.load(world.clock, "v1")
        async with world.platform:
            yield world
        await database.close()

    def settings(self, **changes: Any) -> OAuthSettings:
        """The stand-in's settings, with changes."""
        usual: dict[str, Any] = {
            "platform": "shopify",
            "token_url": self.platform.url,
            "client_id": self.platform.client_id,
            "client_secret": self.platform.client_secret,
            "allow_insecure_loopback": True,
        }
        return OAuthSettings(**{**usual, **changes})

    @asynccontextmanager
    async def node(
        self,
        name: str = "a",
        *,
        url: str | None = None,
        platforms: Sequence[OAuthSettings] | None = None,
        interval_s: float = FAST_S,
        **changes: Any,
    ) -> AsyncIterator[Refresher]:
        """A node with a pool of its own, whose job runs until the end; it must not end before."""
        database = await Database.connect(url or self.url, pool_size=4, statement_timeout_s=2.0)
        keyring = platform_tokens(database=database, providers=local_provider(self.directory))
        await keyring.reload()
        refresher = Refresher(
            database,
            keyring=keyring,
            platforms=[self.settings()] if platforms is None else platforms,
            clock=self.clock,
            node_id=name,
            interval_s=interval_s,
            **changes,
        )
        job = asyncio.create_task(refresher.run(), name=f"node:{name}")
        await asyncio.sleep(0)
        try:
            yield refresher
            assert not job.done(), job
        finally:
            self.platform.release()
            await refresher.stop(STOP_S)
            assert not refresher._flights
            job.cancel()
            await asyncio.wait({job})
            await database.close()

    def vault(self, renew: Renew | None = None) -> PlatformTokens:
        """The vault, as routes have it."""
        return PlatformTokens(self.database, keyring=self.keyring, clock=self.clock, renew=renew)

    async def connect(
        self,
        *,
        merchant_id: UUID | None = None,
        platform: Platform = "shopify",
        token_type: TokenType = "oauth",
        expires_in_s: float | None = SOON_S,
        grantor: OAuthPlatform | None = None,
        changes: dict[str, object] | None = None,
        domain: str = "cool.myshopify.com",
    ) -> ShopConnection:
        """A merchant connects its shop, and the client stores what it got."""
        merchant_id = merchant_id or uuid4()
        data = (grantor or self.platform).grant(f"{merchant_id}.example")
        expires_at = None
        if expires_in_s is not None:
            expires_at = self.clock.now() + timedelta(seconds=expires_in_s)
        new = NewToken(
            merchant_id=merchant_id,
            platform=platform,
            platform_shop_id="77",
            domain=domain,
            token_type=token_type,
            secret=Secret({**data, "shop_note": "kept", **(changes or {})}),
            scopes=("read_products",),
            expires_at=expires_at,
        )
        await self.vault().store(new, accessor=CLIENT)
        return await self.vault().connection(merchant_id, platform)

    async def now(self, connection: ShopConnection) -> ShopConnection:
        """The same connection as it is now."""
        row = await self.database.fetchrow(
            f"SELECT {COLUMNS} FROM glam.platform_tokens WHERE token_id = $1", connection.token_id
        )
        assert row is not None
        return connection_of(row)

    async def data(self, connection: ShopConnection) -> dict[str, object]:
        """The token data that is stored now."""
        row = await self.database.fetchrow(
            "SELECT ciphertext, key_version FROM glam.platform_tokens WHERE token_id = $1",
            connection.token_id,
        )
        assert row is not None
        secret = await open_sealed(
            self.keyring, row["ciphertext"], connection, key_version=row["key_version"]
        )
        return dict(secret.data)

    async def read(self, connection: ShopConnection, renew: Renew | None = None) -> Reading:
        """What a service gets."""
        return await self.vault(renew).read(
            connection.merchant_id, platform=connection.platform, accessor=CLIENT
        )

    async def has_failed(self, connection: ShopConnection, times: int = 1) -> ShopConnection:
        """The connection once its failures are so many."""

        async def look() -> ShopConnection | None:
            found = await self.now(connection)
            return found if found.refresh_failures == times else None

        return _some(await eventually(look))

    async def is_renewed(self, connection: ShopConnection) -> ShopConnection:
        """The connection once its secret is another one and no node has a claim."""

        async def look() -> ShopConnection | None:
            found = await self.now(connection)
            is_idle = not await self.is_claimed(connection)
            return found if found.generation > connection.generation and is_idle else None

        return _some(await eventually(look))

    async def is_claimed(self, connection: ShopConnection) -> bool:
        """Whether some node has a claim, run out or not."""
        return bool(
            await self.database.fetchval(
                "SELECT refresh_claim IS NOT NULL FROM glam.platform_tokens WHERE token_id = $1",
                connection.token_id,
            )
        )

    async def let_claims_run_out(self) -> None:
        """What 90 seconds do."""
        await self.database.execute(
            "UPDATE glam.platform_tokens SET refresh_claim_until = now() - interval '1 s'"
            " WHERE refresh_claim IS NOT NULL"
        )

    async def refreshes(self, connection: ShopConnection) -> list[str | None]:
        """The access rows about renewals of this merchant: None for a success, or the error."""
        rows = await self.vault().access_log(connection.merchant_id)
        return [row.error for row in reversed(rows) if row.action == "refresh"]

    async def rotate(self, *, destroy_first: bool = False) -> None:
        """Another node has made the key version v2, and maybe erased v1."""
        key = bytes(range(32))
        wrapped = await local_provider(self.directory).current.wrap(
            key, context="platform-tokens:v2"
        )
        await self.database.execute(
            "UPDATE glam.encryption_keys SET status = $1, wrapped_key = CASE $1 WHEN 'destroyed'"
            " THEN NULL ELSE wrapped_key END WHERE version = 'v1'",
            "destroyed" if destroy_first else "decrypt-only",
        )
        await self.database.execute(
            "INSERT INTO glam.encryption_keys (keyring, version, wrapped_key, provider, kcv,"
            " status) VALUES ('platform-tokens', 'v2', $1, 'local', $2, 'active')",
            wrapped,
            kcv.aes(key).hex().upper(),
        )


def _some(found: ShopConnection | None) -> ShopConnection:
    assert found is not None
    return found
