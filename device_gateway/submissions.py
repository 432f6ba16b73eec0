"""Requests of devices that come over HTTP: to the same sessions that the endpoint feeds.

So one request sent over MQTT and over HTTP has one effect and one answer, and the two stand in one
order. No HTTP here: what the answer's code is there, `glamd.http` says.
"""

from typing import Final

from device_gateway import topics, wire
from device_gateway.gateway import CERTIFICATE_OVER, OTHER_CERTIFICATE, REVOKED, Gateway
from glamd.errors import ForbiddenError, GlamError

_CODES: Final = {
    REVOKED: REVOKED,
    OTHER_CERTIFICATE: "DEVICE_CERTIFICATE_REPLACED",
    CERTIFICATE_OVER: "DEVICE_CERTIFICATE_EXPIRED",
}


class Submissions:
    """What the HTTP side asks of the gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def admission(self, device_id: str, certificate_sha256: str) -> None:
        """Judge a device by its certificate (hex of its DER's SHA-256) as at an MQTT CONNECT.

        Raises ForbiddenError `DEVICE_REVOKED`, `DEVICE_CERTIFICATE_REPLACED` or
        `DEVICE_CERTIFICATE_EXPIRED`, UnavailableError.
        """
        refusal = await self._gateway.admit(device_id, certificate_sha256)
        if refusal is not None:
            code = _CODES[refusal.reason]
            told = "the device is revoked" if code == REVOKED else refusal.reason
            raise ForbiddenError(told, code=code)

    async def submit(self, device_id: str, payload: bytes) -> bytes:
        """The session's answer to one tokenize request, committed before it is given.

        Raises WireError (`MALFORMED`, `UNSUPPORTED`) for what is none; every other error is an
        answer. Giving up, by cancelling this, takes nothing back.
        """
        # Decoded here as well, so that the field which is wrong has a name of its own.
        request = wire.decode_request(payload)
        if not isinstance(request, wire.Tokenize):
            why = "is not one that is served over HTTP"
            raise wire.WireError("type", why, code="UNSUPPORTED", request_id=request.id)
        topic = topics.build(device_id, "request")
        waiting = self._gateway.receive(device_id, topic, payload)
        assert waiting is not None, "a request is always answered"
        try:
            answer = await waiting
        except GlamError as error:
            answer = self._gateway.refusal(topic, payload, error)
        assert answer is not None, "a request is always answered"
        return answer
