"""What the admin routes need of the rest of the daemon, said as narrowly as they use it.

The real classes fit these; so do the small in-memory ones of the tests. No logic.
"""

from typing import Protocol
from uuid import UUID

from device_gateway.model import Device, Enrolled
from glamd.actor.reports import SystemStats
from glamd.crypto.dukpt import Profile
from glamd.http.services import Tokens
from glamd.keys.store import KeySet, KeyVersion
from glamd.merchants.store import Merchant
from glamd.payments.audit import AuditReport
from glamd.payments.audit_chain import Head

__all__ = ["Actors", "Audit", "Keys", "Merchants", "Registry", "Tokens"]


class Actors(Protocol):
    """The kernel's table."""

    def stats(
        self, *, kind: str | None = None, key: str | None = None, limit: int = ...
    ) -> SystemStats:
        """Counts by kind, and up to `limit` actors."""

    def stop(self, kind: str, key: str) -> None:
        """Passivate one; nothing happens where it is not there."""


class Merchants(Protocol):
    """Merchants by id."""

    async def create(
        self, *, platform: str, shop_id: str, domain: str, merchant_id: UUID | None = None
    ) -> Merchant:
        """Make one; raises `InputError`, `ConflictError`."""

    async def list(self, *, limit: int = ..., after: UUID | None = None) -> tuple[Merchant, ...]:
        """The next ones by id."""

    async def show(self, merchant_id: UUID) -> Merchant:
        """One; raises `NotFoundError`."""


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

    async def suspend(self, device_id: str) -> Device:
        """Refuse its requests; raises `NotFoundError`, `ConflictError`."""

    async def resume(self, device_id: str) -> Device:
        """Serve it again; raises `NotFoundError`, `ConflictError`."""

    async def revoke(self, device_id: str) -> Device:
        """Cut it off for good; raises `NotFoundError`."""


class Keys(Protocol):
    """Key sets and data keys by name; never a key."""

    async def import_bdk(
        self, *, key_set: str, profile: Profile, bdk: bytes, actor: str, counter_window: int = ...
    ) -> KeySet:
        """Keep a BDK; raises `InputError`, `ConflictError`."""

    async def refused_import(self, *, key_set: str, actor: str, code: str) -> None:
        """Record an import that was refused before it came to a key."""

    async def list_keys(self) -> tuple[KeyVersion, ...]:
        """Every version of every keyring."""

    async def list_key_sets(self) -> tuple[KeySet, ...]:
        """Every key set."""


class Audit(Protocol):
    """The audit chain."""

    async def verify(self, *, head: Head | None = None) -> AuditReport:
        """Walk it; it must hold the row of `head`, an end that was logged earlier."""
