"""The gateway: where the endpoint's connections meet the sessions, presence and the registry.

Small on purpose: it routes. What a message means is the session's business, what a packet means the
endpoint's.
"""

import asyncio
from typing import Final

import structlog

from device_gateway import session, store, topics, wire
from device_gateway.model import DeviceChange
from device_gateway.mqtt.endpoint import Endpoint, Refusal
from device_gateway.presence import Presence
from device_gateway.session import Uplink
from glamd.actor import ActorSpec, System
from glamd.db import Database
from glamd.errors import GlamError, InternalError

REQUEST_TIMEOUT_S: Final = 15.0
"""A request that takes longer is answered UNAVAILABLE; its effect stands and a resend finds it."""

REVOKED: Final = "DEVICE_REVOKED"
OTHER_CERTIFICATE: Final = "the device has another certificate now"
CERTIFICATE_OVER: Final = "the device's certificate has expired"

log = structlog.get_logger()


class Gateway:
    """Implements what the MQTT endpoint asks of its owner."""

    def __init__(
        self,
        database: Database,
        *,
        system: System,
        sessions: ActorSpec[Uplink, bytes | None],
        presence: Presence,
    ) -> None:
        self._database = database
        self._system = system
        self._sessions = sessions
        self._presence = presence
        self._endpoint: Endpoint | None = None

    def attach(self, endpoint: Endpoint) -> None:
        """Say which endpoint cuts devices off; it in turn was made with this gateway."""
        self._endpoint = endpoint

    async def admit(self, device_id: str, certificate_sha256: str) -> Refusal | None:
        """Refuse a revoked device, and a certificate that is over or not the one it was given last.

        TLS has looked at its dates, but not again where a session was resumed.

        A device that is not in the registry may connect: it is told DEVICE_UNKNOWN at its first
        request, which a screen can show and a refused connection cannot.
        """
        found = await store.admission(self._database, device_id)
        if found is None:
            return None
        if found.status == "revoked":
            return Refusal(REVOKED)
        if certificate_sha256 != found.certificate_sha256:
            return Refusal(OTHER_CERTIFICATE)
        if found.is_over:
            return Refusal(CERTIFICATE_OVER)
        return None

    def receive(
        self, device_id: str, topic: str, payload: bytes
    ) -> asyncio.Future[bytes | None] | None:
        """Hand one message to the device's session; done when its effect is committed."""
        parsed = topics.parse(topic)
        if parsed is None or parsed.channel not in ("request", "status"):
            return None
        ref = self._system.ref(self._sessions, device_id)
        return ref.ask(Uplink(parsed.channel, payload), timeout_s=REQUEST_TIMEOUT_S)

    def refusal(self, topic: str, payload: bytes, error: BaseException) -> bytes | None:
        """The answer to a request whose session could not give one itself."""
        parsed = topics.parse(topic)
        if parsed is None or parsed.channel != "request":
            return None
        known = error if isinstance(error, GlamError) else InternalError("no answer")
        try:
            request_id: str | None = wire.decode_request(payload).id
        except wire.WireError as wrong:
            request_id = wrong.request_id
        return session.refusal(request_id, known)

    def connected(self, device_id: str) -> None:
        """The device has an MQTT connection."""
        self._presence.arrived(device_id)

    def disconnected(self, device_id: str, reason: str) -> None:
        """The device's connection has ended."""
        log.debug("device_disconnected", device_id=device_id, reason=reason)
        self._presence.left(device_id)

    async def changed(self, change: DeviceChange) -> None:
        """A device was changed, here or elsewhere: forget what its session remembers.

        One that is revoked loses its connection, as does one whose certificate is another now.
        """
        self._system.stop(session.KIND, change.device_id)
        if self._endpoint is None:
            return
        if change.status == "revoked":
            self._endpoint.disconnect(change.device_id, REVOKED)
        else:
            self._endpoint.disconnect_others(
                change.device_id, change.certificate_sha256, OTHER_CERTIFICATE
            )
