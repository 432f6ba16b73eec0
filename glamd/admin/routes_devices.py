"""Admin routes about devices: enrolment, their keys and certificates, and their status.

What is handed out, a private key say, is handed out once.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

from pydantic import Field

from device_gateway.model import Device, Enrolled
from glamd.admin.query import device_in_path, id_in_query, limit_of, uuid_in_query
from glamd.admin.routes_daemon import Facts
from glamd.admin.services import Registry
from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route

MAX_CSR_CHARS = 16 * 1024

Change = Callable[[str], Awaitable[Device]]


Ksn = Annotated[str, Field(pattern=r"^(?:[0-9A-Fa-f]{20}|[0-9A-Fa-f]{24})$")]
KeySetName = Annotated[str, Field(min_length=1, max_length=64)]
Csr = Annotated[str, Field(min_length=1, max_length=MAX_CSR_CHARS)]


class EnrollBody(Body):
    """A device to be enrolled; `ksn` is the hex KSN that it was injected with."""

    merchant_id: UUID
    key_set: KeySetName
    ksn: Ksn
    serial: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    csr: Csr | None = None
    export_initial_key: bool = False


class RekeyBody(Body):
    """The hex KSN that a device was injected with anew, and under which key set if another."""

    ksn: Ksn
    key_set: KeySetName | None = None
    export_initial_key: bool = False


class CertificateBody(Body):
    """A request to be signed; without one the private key is made here."""

    csr: Csr | None = None


class DeviceRoutes:
    """Handlers of the routes about devices."""

    def __init__(self, registry: Registry, *, facts: Facts) -> None:
        self._registry = registry
        self._facts = facts

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        one = "/v1/devices/{device_id}"
        found = (
            ("POST", "/v1/devices", self._enroll),
            ("GET", "/v1/devices", self._list),
            ("GET", one, self._show),
            ("POST", f"{one}/rekey", self._rekey),
            ("POST", f"{one}/rotate-certificate", self._rotate_certificate),
            ("POST", f"{one}/suspend", self._changing(self._registry.suspend)),
            ("POST", f"{one}/resume", self._changing(self._registry.resume)),
            ("POST", f"{one}/revoke", self._changing(self._registry.revoke)),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _enroll(self, call: Call) -> Answer:
        body = await call.json(EnrollBody)
        enrolled = await self._registry.enroll(
            merchant_id=body.merchant_id,
            key_set=body.key_set,
            ksn=bytes.fromhex(body.ksn),
            serial=body.serial,
            model=body.model,
            csr_pem=None if body.csr is None else body.csr.encode(),
            export_initial_key=body.export_initial_key,
        )
        return Answer(data=self._enrolled(enrolled), status=201)

    async def _rekey(self, call: Call) -> Answer:
        body = await call.json(RekeyBody)
        rekeyed = await self._registry.rekey(
            device_in_path(call),
            ksn=bytes.fromhex(body.ksn),
            key_set=body.key_set,
            export_initial_key=body.export_initial_key,
            actor=call.operator.name,
        )
        return Answer(data={"device": _as_json(rekeyed.device), "initial_key": rekeyed.initial_key})

    async def _rotate_certificate(self, call: Call) -> Answer:
        body = await call.json(CertificateBody)
        enrolled = await self._registry.rotate_certificate(
            device_in_path(call), csr_pem=None if body.csr is None else body.csr.encode()
        )
        return Answer(data=self._enrolled(enrolled))

    def _enrolled(self, enrolled: Enrolled) -> dict[str, object]:
        mqtt = self._facts.mqtt
        return {
            "device": _as_json(enrolled.device),
            "certificate_pem": enrolled.certificate_pem,
            "private_key_pem": enrolled.private_key_pem,
            "ca_pem": enrolled.ca_pem,
            # A terminal trusts whoever signed the endpoint's certificate, not its own authority.
            "server_ca_pem": self._facts.server_ca_pem,
            "mqtt": None if mqtt is None else {"host": mqtt[0], "port": mqtt[1]},
            "initial_key": enrolled.initial_key,
        }

    async def _list(self, call: Call) -> Answer:
        limit = limit_of(call)
        found = await self._registry.list(
            merchant_id=uuid_in_query(call, "merchant_id"),
            limit=limit,
            after=id_in_query(call, "after"),
        )
        following = found[-1].device_id if len(found) == limit else None
        return Answer(data={"devices": [_as_json(d) for d in found], "next": following})

    async def _show(self, call: Call) -> Answer:
        return Answer(data=_as_json(await self._registry.show(device_in_path(call))))

    def _changing(self, change: Change) -> Callable[[Call], Awaitable[Answer]]:
        async def handler(call: Call) -> Answer:
            return Answer(data=_as_json(await change(device_in_path(call))))

        return handler


def _as_json(device: Device) -> dict[str, object]:
    return {
        "device_id": device.device_id,
        "merchant_id": device.merchant_id,
        "serial": device.serial,
        "model": device.model,
        "key_set": device.key_set,
        "scheme": device.scheme,
        "ksn": device.ksn,
        "status": device.status,
        "presence": device.presence,
        "firmware": device.firmware,
        "certificate_sha256": device.certificate_sha256,
        "certificate_expires_at": device.certificate_expires_at,
        "highest_counter": device.highest_counter,
        "last_seen_at": device.last_seen_at,
        "created_at": device.created_at,
    }
