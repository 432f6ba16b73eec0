"""The device registry: enrolment, certificates, suspension, revocation.

A certificate request gives its public key and nothing else; subject, extensions and validity are
ours. The private key, where we make it, and the initial key, where development asks for it, are
handed over once and kept nowhere. What a change of status does to live connections is told to
whoever passed `changed`.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from cryptography import x509 as cx509

from device_gateway import store
from device_gateway.model import Device, DeviceStatus, Enrolled
from glamd.clock import Clock
from glamd.crypto import dukpt, x509
from glamd.db import Connection, Database
from glamd.errors import (
    ConflictError,
    FieldError,
    ForbiddenError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.keys.key_sets.service import Keys
from glamd.outbox import Outbox

ISSUE_TIMEOUT_S: Final = 5.0
ID_RANDOM_BYTES: Final = 10
TEXT_LIMIT_CHARS: Final = 64

Changed = Callable[[str, DeviceStatus], Awaitable[None]]

log = structlog.get_logger()

_EVENTS: Final[dict[DeviceStatus, str]] = {
    "suspended": "evt.device.suspended.v1",
    "revoked": "evt.device.revoked.v1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAuthority:
    """The certificate authority of devices, and how long what it issues is good for.

    `server_ca_pem` is what a terminal trusts when it connects to us; another authority.
    """

    certificate: cx509.Certificate
    key: x509.SigningKey
    server_ca_pem: str
    validity: timedelta


class Registry:
    """The devices of all merchants."""

    def __init__(
        self,
        database: Database,
        *,
        keys: Keys,
        authority: DeviceAuthority,
        clock: Clock,
        changed: Changed,
        export_initial_keys: bool,
    ) -> None:
        self._database = database
        self._keys = keys
        self._authority = authority
        self._clock = clock
        self._changed = changed
        self._export_initial_keys = export_initial_keys
        self._outbox = Outbox("cde")

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
        """Make a device for the initial key that `ksn` (10 bytes TDES, 12 AES) names.

        Raises NotFoundError (`MERCHANT_NOT_FOUND`, `KEY_SET_UNKNOWN`), InputError for a KSN or a
        request that cannot be, ConflictError `KSN_IN_USE`, ForbiddenError for an initial key
        outside development, UnavailableError while the key provider is away.
        """
        if export_initial_key and not self._export_initial_keys:
            raise ForbiddenError("Initial keys are only exported in development.")
        _check_text(serial=serial, model=model)
        if not await store.merchant_exists(self._database, merchant_id):
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        scheme = (await self._keys.key_set(key_set)).profile.scheme
        length = dukpt.ksn_length_bytes(scheme)
        if len(ksn) != length:
            raise _wrong("ksn", f"must be {length} bytes for {scheme}")
        try:
            async with asyncio.timeout(ISSUE_TIMEOUT_S):
                initial_key = (await self._keys.initial_key(key_set, ksn)).key
        except TimeoutError:
            raise UnavailableError("The key provider does not answer in time.") from None
        private_key, public_key = (
            x509.generate_key() if csr_pem is None else (None, x509.public_key_of(csr_pem))
        )
        device_id = "dev_" + secrets.token_hex(ID_RANDOM_BYTES)
        certificate = x509.issue_device(
            device_id,
            public_key=public_key,
            ca_certificate=self._authority.certificate,
            ca_key=self._authority.key,
            now=self._clock.now(),
            validity=self._authority.validity,
        )
        await self._insert(
            device_id,
            merchant_id=merchant_id,
            serial=serial,
            model=model,
            key_set=key_set,
            ksn=ksn,
            initial_key=self._keys.identity_of(initial_key),
            certificate=certificate,
        )
        log.info("device_enrolled", device_id=device_id, merchant_id=str(merchant_id))
        return Enrolled(
            device=await self.show(device_id),
            certificate_pem=x509.certificate_pem(certificate),
            private_key_pem=None if private_key is None else x509.private_key_pem(private_key),
            ca_pem=self._authority.server_ca_pem,
            initial_key=initial_key.hex().upper() if export_initial_key else None,
        )

    async def list(
        self, *, merchant_id: UUID | None, limit: int, after: str | None
    ) -> list[Device]:
        """Devices in the order of their ids, behind `after`."""
        return await store.devices(
            self._database, merchant_id=merchant_id, after=after or "", limit=limit
        )

    async def show(self, device_id: str) -> Device:
        """One device; NotFoundError `DEVICE_NOT_FOUND`."""
        found = await store.show(self._database, device_id)
        if found is None:
            raise NotFoundError("There is no such device.", code="DEVICE_NOT_FOUND")
        return found

    async def suspend(self, device_id: str) -> Device:
        """Refuse the device's requests until it is resumed; ConflictError once it is revoked."""
        return await self._set_status(device_id, "suspended", when=("active", "suspended"))

    async def resume(self, device_id: str) -> Device:
        """Serve a suspended device again; ConflictError once it is revoked."""
        return await self._set_status(device_id, "active", when=("active", "suspended"))

    async def revoke(self, device_id: str) -> Device:
        """Cut the device off for good."""
        return await self._set_status(device_id, "revoked", when=("active", "suspended", "revoked"))

    async def _insert(
        self,
        device_id: str,
        *,
        merchant_id: UUID,
        serial: str | None,
        model: str | None,
        key_set: str,
        ksn: bytes,
        initial_key: bytes,
        certificate: cx509.Certificate,
    ) -> None:
        in_use = ConflictError(
            "Another device has this initial key.",
            code="KSN_IN_USE",
            fields=(FieldError("ksn", "names an initial key that is in use"),),
        )
        try:
            async with self._database.transaction() as connection:
                counter_id = await store.claim_counters(
                    connection,
                    initial_key=initial_key,
                    merchant_id=merchant_id,
                )
                if counter_id is None:
                    raise in_use
                await store.enroll(
                    connection,
                    device_id=device_id,
                    merchant_id=merchant_id,
                    serial=serial,
                    model=model,
                    key_set=key_set,
                    initial_ksn=ksn,
                    counter_id=counter_id,
                    certificate_sha256=x509.fingerprint(certificate),
                    certificate_expires_at=certificate.not_valid_after_utc,
                )
                await self._announce(connection, "evt.device.enrolled.v1", device_id, merchant_id)
        except ConflictError as error:
            raise in_use from error

    async def _set_status(
        self, device_id: str, status: DeviceStatus, *, when: tuple[DeviceStatus, ...]
    ) -> Device:
        before = await self.show(device_id)
        if before.status not in when:
            raise ConflictError("The device is revoked for good.", code="DEVICE_REVOKED")
        if before.status != status:
            async with self._database.transaction() as connection:
                merchant_id = await store.set_status(connection, device_id, status, when=when)
                if merchant_id is None:
                    raise ConflictError("The device is revoked for good.", code="DEVICE_REVOKED")
                if status in _EVENTS:
                    await self._announce(connection, _EVENTS[status], device_id, merchant_id)
            log.info("device_status_set", device_id=device_id, status=status)
        # Repeated on purpose: an operator who asks again wants it to hold here and now.
        await self._changed(device_id, status)
        return await self.show(device_id)

    async def _announce(
        self, connection: Connection, subject: str, device_id: str, merchant_id: UUID
    ) -> None:
        await self._outbox.add(
            connection,
            subject=subject,
            merchant_id=merchant_id,
            correlation_id=device_id,
            data={
                "merchant_id": str(merchant_id),
                "device_id": device_id,
                "at": self._clock.now().isoformat(),
            },
        )


def _check_text(**texts: str | None) -> None:
    for name, text in texts.items():
        if text is not None and not (0 < len(text) <= TEXT_LIMIT_CHARS and text.isprintable()):
            raise _wrong(name, f"must be 1 to {TEXT_LIMIT_CHARS} printable characters")


def _wrong(field: str, why: str) -> InputError:
    return InputError(f"{field} {why}", fields=(FieldError(field, why),))
