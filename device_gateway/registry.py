"""The device registry: enrolment, another initial key or certificate, suspension, revocation.

A certificate request gives its public key and nothing else; subject, extensions and validity are
ours. The private key, where we make it, and the initial key, where development asks for it, are
handed over once and kept nowhere. What a change does to live connections is for whoever passed
`changed`.
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
from device_gateway.model import Device, DeviceChange, DeviceStatus, Enrolled, Rekeyed
from glamd.clock import Clock
from glamd.crypto import dukpt, x509
from glamd.db import Connection, Database, UniqueViolationError
from glamd.errors import (
    ConflictError,
    FieldError,
    ForbiddenError,
    GlamError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.keys.key_sets.service import Keys
from glamd.outbox import Outbox

ISSUE_TIMEOUT_S: Final = 5.0
ID_RANDOM_BYTES: Final = 10
TEXT_LIMIT_CHARS: Final = 64

Changed = Callable[[DeviceChange], Awaitable[None]]

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
        request that cannot be, ConflictError `KSN_IN_USE` or `KEY_SET_RETIRED`, ForbiddenError for
        an initial key outside development, UnavailableError while the key provider is away.
        """
        self._check_export(export_initial_key)
        _check_text(serial=serial, model=model)
        if not await store.merchant_exists(self._database, merchant_id):
            raise _no_merchant()
        initial_key = await self._initial_key(key_set, ksn)
        device_id = "dev_" + secrets.token_hex(ID_RANDOM_BYTES)
        certificate, private_key_pem = self._issue(device_id, csr_pem)
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
            private_key_pem=private_key_pem,
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
            raise _not_found()
        return found

    async def suspend(self, device_id: str) -> Device:
        """Refuse the device's requests until it is resumed; ConflictError once it is revoked."""
        return await self._set_status(device_id, "suspended")

    async def resume(self, device_id: str) -> Device:
        """Serve a suspended device again; ConflictError once it is revoked."""
        return await self._set_status(device_id, "active")

    async def revoke(self, device_id: str) -> Device:
        """Cut the device off for good."""
        return await self._set_status(device_id, "revoked")

    async def rekey(
        self,
        device_id: str,
        *,
        ksn: bytes,
        key_set: str | None,
        export_initial_key: bool,
        actor: str,
    ) -> Rekeyed:
        """Note that the device was injected anew, with the initial key that `ksn` names.

        Its key set stays where none is named; the counters of the key before stay spent. Raises as
        `enroll`, and ConflictError `DEVICE_REVOKED`, and `KSN_IN_USE` also for the key that it has.
        Each attempt is recorded.
        """
        try:
            self._check_export(export_initial_key)
            named = (await self.show(device_id)).key_set if key_set is None else key_set
            initial_key = await self._initial_key(named, ksn)
            await self._rekey(device_id, ksn, named, initial_key, actor)
        except GlamError as refused:
            await self._keys.write_down("device.rekey", device_id, actor, refused.code)
            raise
        return Rekeyed(
            device=await self._tell(device_id),
            initial_key=initial_key.hex().upper() if export_initial_key else None,
        )

    async def rotate_certificate(self, device_id: str, *, csr_pem: bytes | None) -> Enrolled:
        """Another certificate, and a private key unless one was requested for a key of the device.

        The certificate before is refused from now on, and a connection under it is cut. Raises
        NotFoundError `DEVICE_NOT_FOUND`, InputError for a request that cannot be, ConflictError
        `DEVICE_REVOKED`.
        """
        certificate, private_key_pem = self._issue(device_id, csr_pem)
        async with self._database.transaction() as connection:
            await self._held(connection, device_id)
            await store.certify(
                connection,
                device_id,
                certificate_sha256=x509.fingerprint(certificate),
                expires_at=certificate.not_valid_after_utc,
            )
        log.info("device_certificate_rotated", device_id=device_id)
        return Enrolled(
            device=await self._tell(device_id),
            certificate_pem=x509.certificate_pem(certificate),
            private_key_pem=private_key_pem,
            ca_pem=self._authority.server_ca_pem,
            initial_key=None,
        )

    def _check_export(self, wanted: bool) -> None:
        if wanted and not self._export_initial_keys:
            raise ForbiddenError("Initial keys are only exported in development.")

    async def _initial_key(self, key_set: str, ksn: bytes) -> bytes:
        found = await self._keys.key_set(key_set)
        if found.status != "active":
            raise _retired()
        scheme = found.profile.scheme
        length = dukpt.ksn_length_bytes(scheme)
        if len(ksn) != length:
            raise _wrong("ksn", f"must be {length} bytes for {scheme}")
        try:
            async with asyncio.timeout(ISSUE_TIMEOUT_S):
                return (await self._keys.initial_key(key_set, ksn)).key
        except TimeoutError:
            raise UnavailableError("The key provider does not answer in time.") from None

    def _issue(self, device_id: str, csr_pem: bytes | None) -> tuple[cx509.Certificate, str | None]:
        """A certificate, and the private key in PEM where we made it."""
        private_key, public_key = (
            x509.generate_key() if csr_pem is None else (None, x509.public_key_of(csr_pem))
        )
        certificate = x509.issue_device(
            device_id,
            public_key=public_key,
            ca_certificate=self._authority.certificate,
            ca_key=self._authority.key,
            now=self._clock.now(),
            validity=self._authority.validity,
        )
        return certificate, None if private_key is None else x509.private_key_pem(private_key)

    async def _rekey(
        self, device_id: str, ksn: bytes, key_set: str, initial_key: bytes, actor: str
    ) -> None:
        identity = self._keys.identity_of(initial_key)
        try:
            async with self._database.transaction() as connection:
                found = await self._held(connection, device_id)
                counter_id = await self._claim(connection, key_set, identity, found.merchant_id)
                if counter_id == found.counter_id:
                    raise _in_use("the device has this initial key already")
                await store.rekey(
                    connection, device_id, key_set=key_set, initial_ksn=ksn, counter_id=counter_id
                )
                # As with every key: recorded before it is so, and never the other way round.
                await self._keys.write_down("device.rekey", device_id, actor, "ok")
        except UniqueViolationError as error:  # by the index that lets a key be used once
            raise _in_use() from error
        log.info("device_rekeyed", device_id=device_id, key_set=key_set)

    async def _claim(
        self, connection: Connection, key_set: str, identity: bytes, merchant_id: UUID
    ) -> int:
        """The counters of an initial key, for a device of a key set that is not retired."""
        if not await store.key_set_is_active(connection, key_set):
            raise _retired()
        counter_id = await store.claim_counters(
            connection, initial_key=identity, merchant_id=merchant_id
        )
        if counter_id is None:
            raise _in_use()
        return counter_id

    async def _held(self, connection: Connection, device_id: str) -> store.HeldDevice:
        """The device, which nobody else changes meanwhile; ConflictError once it is revoked."""
        found = await store.hold(connection, device_id)
        if found is None:
            raise _not_found()
        if found.status == "revoked":
            raise _revoked()
        return found

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
        try:
            async with self._database.transaction() as connection:
                # Looked at again: deriving the key may have taken long.
                if not await store.hold_merchant(connection, merchant_id):
                    raise _no_merchant()
                counter_id = await self._claim(connection, key_set, initial_key, merchant_id)
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
        except UniqueViolationError as error:  # by the index that lets a key be used once
            raise _in_use() from error

    async def _set_status(self, device_id: str, status: DeviceStatus) -> Device:
        async with self._database.transaction() as connection:
            # Decided on the row as it is once it is held: of two who ask at once, one changes it.
            found = await store.hold(connection, device_id)
            if found is None:
                raise _not_found()
            if found.status == "revoked" != status:
                raise _revoked()
            if found.status != status:
                await store.set_status(connection, device_id, status)
                if status in _EVENTS:
                    await self._announce(connection, _EVENTS[status], device_id, found.merchant_id)
                log.info("device_status_set", device_id=device_id, status=status)
        # Repeated on purpose: an operator who asks again wants it to hold here and now.
        return await self._tell(device_id)

    async def _tell(self, device_id: str) -> Device:
        """The device as it is now, of which the gateway is told."""
        found = await self.show(device_id)
        await self._changed(
            DeviceChange(
                device_id=device_id,
                status=found.status,
                certificate_sha256=found.certificate_sha256,
            )
        )
        return found

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


def _in_use(why: str = "names an initial key that is in use") -> ConflictError:
    fields = (FieldError("ksn", why),)
    return ConflictError("The initial key is in use.", code="KSN_IN_USE", fields=fields)


def _retired() -> ConflictError:
    fields = (FieldError("key_set", "it is retired"),)
    return ConflictError("The key set is retired.", code="KEY_SET_RETIRED", fields=fields)


def _revoked() -> ConflictError:
    return ConflictError("The device is revoked for good.", code="DEVICE_REVOKED")


def _no_merchant() -> NotFoundError:
    return NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")


def _not_found() -> NotFoundError:
    return NotFoundError("There is no such device.", code="DEVICE_NOT_FOUND")


def _check_text(**texts: str | None) -> None:
    for name, text in texts.items():
        if text is not None and not (0 < len(text) <= TEXT_LIMIT_CHARS and text.isprintable()):
            raise _wrong(name, f"must be 1 to {TEXT_LIMIT_CHARS} printable characters")


def _wrong(field: str, why: str) -> InputError:
    return InputError(f"{field} {why}", fields=(FieldError(field, why),))
