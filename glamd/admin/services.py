"""What the admin routes need of the rest of the daemon, said as narrowly as they use it.

The real classes fit these; so do the small in-memory ones of the tests. No logic.
"""

from typing import Literal, Protocol
from uuid import UUID

from device_gateway.model import Device, Enrolled, Rekeyed
from glamd.actor.reports import SystemStats
from glamd.credentials.importing.service import OlderBatch, Progress
from glamd.credentials.model import Access, Accessor, Health, Platform, ShopConnection
from glamd.crypto.dukpt import Profile
from glamd.http.services import Tokens
from glamd.keys.key_sets.service import BdkSource
from glamd.keys.key_sets.store import KeySet, ListedKeySet
from glamd.keys.store import KeyVersion
from glamd.merchants.store import Merchant, SensitiveData, Settings
from glamd.revocations.store import Kind, Revocation

__all__ = [
    "Actors",
    "Credentials",
    "KeySets",
    "Keys",
    "Merchants",
    "NewMerchants",
    "OlderTokens",
    "Registry",
    "RevokedJwts",
    "Tokens",
]


class Actors(Protocol):
    """The kernel's table."""

    def stats(
        self, *, kind: str | None = None, key: str | None = None, limit: int = ...
    ) -> SystemStats:
        """Counts by kind, and up to `limit` actors."""

    def stop(self, kind: str, key: str) -> None:
        """Passivate one; nothing happens where it is not there."""


class NewMerchants(Protocol):
    """The making of merchants, with all that one has from its first day on."""

    async def create(
        self, *, platform: str, shop_id: str, domain: str, merchant_id: UUID | None = None
    ) -> Merchant:
        """Make one; raises `InputError`, `ConflictError`."""


class Merchants(Protocol):
    """Merchants by id."""

    async def list(self, *, limit: int = ..., after: UUID | None = None) -> tuple[Merchant, ...]:
        """The next ones by id."""

    async def show(self, merchant_id: UUID) -> Merchant:
        """One; raises `NotFoundError`."""

    async def settings(self, merchant_id: UUID) -> Settings:
        """What is set for its tokens; raises `NotFoundError`."""

    async def configure(
        self,
        merchant_id: UUID,
        *,
        token_ttl_s: int | Literal["default"] | None = None,
        sensitive_data: SensitiveData | None = None,
    ) -> Settings:
        """Change what is not None; raises `InputError`, `NotFoundError`, `ConflictError`."""


class Registry(Protocol):
    """Devices by id."""

    async def enroll(
        self,
        *,
        merchant_id: UUID,
        key_set: str,
        ksn: bytes,
        serial: str | None,
        model: str | None,
        csr_pem: bytes | None,
        export_initial_key: bool,
    ) -> Enrolled:
        """Make one; raises `InputError`, `NotFoundError`, `ConflictError`, `ForbiddenError`."""

    async def list(
        self, *, merchant_id: UUID | None, limit: int, after: str | None
    ) -> list[Device]:
        """The next ones by id."""

    async def show(self, device_id: str) -> Device:
        """One; raises `NotFoundError`."""

    async def rekey(
        self,
        device_id: str,
        *,
        ksn: bytes,
        key_set: str | None,
        export_initial_key: bool,
        actor: str,
    ) -> Rekeyed:
        """Note another initial key; raises as `enroll`."""

    async def rotate_certificate(self, device_id: str, *, csr_pem: bytes | None) -> Enrolled:
        """Give it another certificate; raises `InputError`, `NotFoundError`, `ConflictError`."""

    async def suspend(self, device_id: str) -> Device:
        """Refuse its requests; raises `NotFoundError`, `ConflictError`."""

    async def resume(self, device_id: str) -> Device:
        """Serve it again; raises `NotFoundError`, `ConflictError`."""

    async def revoke(self, device_id: str) -> Device:
        """Cut it off for good; raises `NotFoundError`."""


class KeySets(Protocol):
    """Key sets by name; never a key."""

    async def import_bdk(
        self,
        *,
        key_set: str,
        profile: Profile,
        bdk: BdkSource,
        actor: str,
        reader: str = ...,
        counter_window: int = ...,
    ) -> KeySet:
        """Keep a BDK; raises `InputError`, `ConflictError`."""

    async def refused_import(self, *, key_set: str, actor: str, code: str) -> None:
        """Record an import that was refused before it came to a key."""

    async def retire_bdk(self, key_set: str, *, actor: str) -> KeySet:
        """Take nothing more under it; raises `NotFoundError`."""

    async def list_key_sets(self) -> tuple[ListedKeySet, ...]:
        """Every key set, and how many devices each has."""


class Keys(KeySets, Protocol):
    """Key sets and data keys by name; never a key."""

    async def list_keys(self) -> tuple[KeyVersion, ...]:
        """Every version of every keyring."""


class Credentials(Protocol):
    """Platform tokens without their secrets."""

    async def connections(
        self,
        *,
        merchant_id: UUID | None = None,
        platform: Platform | None = None,
        health: Health | None = None,
        limit: int = ...,
        after: tuple[UUID, Platform] | None = None,
    ) -> tuple[ShopConnection, ...]:
        """The next ones by merchant and platform that fit what is given."""

    async def connection(self, merchant_id: UUID, platform: Platform) -> ShopConnection:
        """One; raises `NotFoundError`."""

    async def access_log(
        self, merchant_id: UUID, *, limit: int = ..., before: int | None = None
    ) -> tuple[Access, ...]:
        """Who touched a merchant's tokens, newest first."""


class OlderTokens(Protocol):
    """The import of what the older token service kept."""

    async def progress(self) -> Progress:
        """How far it has come; raises `ConflictError` where no import is possible."""

    async def take(self, batch: OlderBatch, *, accessor: Accessor) -> Progress:
        """Take some rows; raises `ConflictError`, `UnavailableError`."""


class RevokedJwts(Protocol):
    """JWTs that are not believed any more."""

    async def revoke(self, kind: Kind, value: str, *, by: str) -> Revocation:
        """Add one, for good; raises `InputError`, `ConflictError`."""

    async def listed(self) -> tuple[Revocation, ...]:
        """The newest."""
