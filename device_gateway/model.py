"""What the gateway knows of a device: the registry's view and the session's view. Pure data."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

from glamd.payments.counter import CounterWindow
from glamd.payments.model import Scheme

DeviceStatus = Literal["active", "suspended", "revoked"]
Presence = Literal["online", "offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as operators see it. `ksn` is the hex KSN it was injected with."""

    device_id: str
    merchant_id: UUID
    serial: str | None
    model: str | None
    key_set: str
    scheme: Scheme
    ksn: str
    status: DeviceStatus
    presence: Presence
    firmware: str | None
    certificate_sha256: str
    certificate_expires_at: datetime
    highest_counter: int
    last_seen_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChange:
    """What is true of a device since something about it was changed."""

    device_id: str
    status: DeviceStatus
    certificate_sha256: str


@dataclass(frozen=True, slots=True)
class Admission:
    """What a device that connects is judged by: its status, and the certificate it was given last.

    `certificate_sha256` is hex; `is_over` where the certificate's time has ended.
    """

    status: DeviceStatus
    certificate_sha256: str
    is_over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What serving a device takes, read once when its session activates."""

    merchant_id: UUID
    status: DeviceStatus
    key_set: str
    key_set_status: Literal["active", "retired"]
    scheme: Scheme
    initial_ksn: bytes
    initial_key_id: bytes
    counter_id: int
    counter_version: int
    window: CounterWindow
    token_ttl: timedelta | None
    keep_sensitive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """What an enrolment hands over, once: the private key and the initial key are kept nowhere.

    `ca_pem` is the authority that the terminal trusts when it connects.
    """

    device: Device
    certificate_pem: str
    private_key_pem: str | None
    ca_pem: str
    initial_key: str | None

    def __repr__(self) -> str:
        """The device only."""
        return f"Enrolled(device={self.device.device_id!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rekeyed:
    """A device with another initial key; in the clear (hex) where development asked for it."""

    device: Device
    initial_key: str | None

    def __repr__(self) -> str:
        """The device only."""
        return f"Rekeyed(device={self.device.device_id!r})"
