"""What the endpoint asks of whoever stands behind it. Nothing of MQTT is in these words."""

import asyncio
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a device may not connect; an MQTT 5 client is shown `reason`, so no secrets."""

    reason: str


class Gateway(Protocol):
    """The intake behind the endpoint. Only `admit` may wait; the others return at once."""

    async def admit(self, device_id: str, certificate_sha256: str) -> Refusal | None:
        """Says whether this device with this certificate (hex of its DER's SHA-256) may connect.

        A TransientError, or no answer in time, tells the client to come again later.
        """

    def receive(
        self, device_id: str, topic: str, payload: bytes
    ) -> asyncio.Future[bytes | None] | None:
        """Takes one message that the device published on a topic of its own, at least once.

        A future's result is the answer for the device (None: there is none), and only then is the
        message acknowledged; without a future it is acknowledged at once. The endpoint never
        cancels the future, which has to finish by itself.
        """

    def refusal(self, topic: str, payload: bytes, error: BaseException) -> bytes | None:
        """Gives the answer for a message whose future failed or was cancelled.

        It is sent and the message acknowledged: the device has been told. None leaves the message
        unacknowledged: the connection is closed, and the device sends again on its next one.
        """

    def connected(self, device_id: str) -> None:
        """The device is online; not called when a new connection takes over an open one."""

    def disconnected(self, device_id: str, reason: str) -> None:
        """The device is offline, for a stable `reason` such as `keep_alive_timeout`."""
