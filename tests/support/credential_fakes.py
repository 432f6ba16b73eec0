"""Platform tokens and revoked JWTs in memory, for the tests of who shows them to operators."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from glamd.credentials.importing.service import OlderBatch, Progress
from glamd.credentials.model import Access, Accessor, Health, Platform, ShopConnection
from glamd.errors import ConflictError, FieldError, InputError, NotFoundError
from glamd.revocations.service import is_revocable
from glamd.revocations.store import Kind, Revocation
from tests.support.http_fakes import MERCHANT, NOW


def connection(
    merchant_id: UUID = MERCHANT, platform: Platform = "shopify", **changes: Any
) -> ShopConnection:
    """A connection that nothing is wrong with."""
    whole: dict[str, Any] = {
        "token_id": UUID(int=merchant_id.int ^ len(platform)),
        "merchant_id": merchant_id,
        "platform": platform,
        "platform_shop_id": "67890",
        "domain": "shop.example",
        "token_type": "oauth",
        "scopes": ("read_products", "write_orders"),
        "key_version": "v1",
        "expires_at": NOW + timedelta(hours=1),
        "refreshable": True,
        "generation": 1,
        "refresh_failures": 0,
        "refresh_error": None,
        "refresh_not_before": None,
        "refreshed_at": None,
        "created_at": NOW,
        "updated_at": NOW,
        "last_accessed_by": "catalog-service",
        "last_accessed_at": NOW,
        "access_count": 3,
    }
    return ShopConnection(**(whole | changes))


def access(number: int, **changes: Any) -> Access:
    """A row of the access log."""
    accessor = Accessor(
        kind="internal",
        name="catalog-service",
        ip="192.0.2.7",
        request_id=f"req-{number}",
        correlation_id="order-77",
    )
    whole: dict[str, Any] = {
        "access_id": number,
        "at": NOW,
        "merchant_id": MERCHANT,
        "platform": "shopify",
        "token_id": connection().token_id,
        "action": "read",
        "accessor": accessor,
        "error": None,
    }
    return Access(**(whole | changes))


class FakeCredentials:
    """Connections in a list."""

    def __init__(self) -> None:
        self.all: list[ShopConnection] = []
        self.log: list[Access] = []

    async def connections(
        self,
        *,
        merchant_id: UUID | None = None,
        platform: Platform | None = None,
        health: Health | None = None,
        limit: int = 50,
        after: tuple[UUID, Platform] | None = None,
    ) -> tuple[ShopConnection, ...]:
        """The next ones that fit."""
        found = [
            one
            for one in sorted(self.all, key=lambda one: (one.merchant_id, one.platform))
            if merchant_id in (None, one.merchant_id)
            and platform in (None, one.platform)
            and health in (None, one.health(NOW))
            and (after is None or (one.merchant_id, one.platform) > after)
        ]
        return tuple(found[:limit])

    async def connection(self, merchant_id: UUID, platform: Platform) -> ShopConnection:
        """One."""
        found = await self.connections(merchant_id=merchant_id, platform=platform)
        if not found:
            raise NotFoundError("There is no such platform token.", code="PLATFORM_TOKEN_NOT_FOUND")
        return found[0]

    async def access_log(
        self, merchant_id: UUID, *, limit: int = 50, before: int | None = None
    ) -> tuple[Access, ...]:
        """The newest rows."""
        found = [one for one in self.log if before is None or one.access_id < before]
        return tuple(sorted(found, key=lambda one: -one.access_id)[:limit])


class NoImport:
    """An importer without the older service's key."""

    async def progress(self) -> Progress:
        """Refused."""
        raise ConflictError("credentials.import_key is not set.", code="IMPORT_KEY_MISSING")

    async def take(self, batch: OlderBatch, *, accessor: Accessor) -> Progress:
        """Refused."""
        return await self.progress()


class FakeRevocations:
    """Revoked JWTs in a list."""

    def __init__(self) -> None:
        self.all: list[Revocation] = []

    async def revoke(
        self, kind: Kind, value: str, *, by: str, expires_at: datetime | None = None
    ) -> Revocation:
        """Add one."""
        if not is_revocable(value):
            raise InputError("It cannot be one.", fields=[FieldError(kind, "is not printable")])
        made = Revocation(
            kind=kind, value=value, revoked_at=NOW, revoked_by=by, expires_at=expires_at
        )
        self.all.append(made)
        return made

    async def listed(self) -> tuple[Revocation, ...]:
        """The newest first."""
        return tuple(reversed(self.all))
