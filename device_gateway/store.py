"""The SQL of devices: registry rows, what a session reads, presence.

Counters are written by `glamd.payments.store` in the token's transaction; here they are only read,
and made when a device is enrolled.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from uuid import UUID

from device_gateway.model import Admission, Device, DeviceChange, DeviceStatus, SessionRecord
from glamd.crypto import dukpt
from glamd.db import Connection, Database, Row
from glamd.payments.counter import CounterWindow

_DEVICE: Final = """
SELECT d.device_id, d.merchant_id, d.serial, d.model, d.key_set, k.scheme, d.initial_ksn, d.status,
       d.online_node, d.firmware, d.certificate_sha256, d.certificate_expires_at, c.highest,
       d.last_seen_at, d.created_at
FROM cde.devices d
JOIN cde.key_sets k USING (key_set)
JOIN cde.device_counters c USING (counter_id)
"""
_SHOW: Final = _DEVICE + " WHERE d.device_id = $1"
_LIST: Final = (
    _DEVICE
    + """
WHERE ($1::uuid IS NULL OR d.merchant_id = $1) AND d.device_id > $2
ORDER BY d.device_id LIMIT $3
"""
)
_SESSION: Final = """
SELECT d.merchant_id, d.status, d.key_set, k.status AS key_set_status, k.scheme, k.counter_window,
       d.initial_ksn, c.counter_id, c.version, c.highest, c.seen, m.token_ttl_s,
       m.sensitive_data
FROM cde.devices d
JOIN cde.key_sets k USING (key_set)
JOIN cde.device_counters c USING (counter_id)
JOIN cde.merchants m ON m.merchant_id = d.merchant_id
WHERE d.device_id = $1
"""
_ADMISSION: Final = """
SELECT status, certificate_sha256, certificate_expires_at <= now() AS is_over
FROM cde.devices WHERE device_id = $1
"""
_MERCHANT: Final = """
SELECT EXISTS (SELECT FROM cde.merchants WHERE merchant_id = $1 AND erase_requested_at IS NULL)
"""
# Held until the device is in, so that none comes to a merchant whose devices are being revoked.
_HOLD_MERCHANT: Final = """
SELECT true FROM cde.merchants WHERE merchant_id = $1 AND erase_requested_at IS NULL FOR SHARE
"""
# An initial key stays with the merchant that had it first: its counters are never begun again.
_COUNTERS: Final = """
INSERT INTO cde.device_counters AS c (initial_key, merchant_id) VALUES ($1, $2)
ON CONFLICT (initial_key) DO UPDATE SET merchant_id = c.merchant_id
WHERE c.merchant_id = EXCLUDED.merchant_id
RETURNING counter_id
"""
_ENROLL: Final = """
INSERT INTO cde.devices (
    device_id, merchant_id, serial, model, key_set, initial_ksn, counter_id, certificate_sha256,
    certificate_expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
# Held until the device is in, so that none comes to a key set that is being retired.
_HOLD_KEY_SET: Final = "SELECT status FROM cde.key_sets WHERE key_set = $1 FOR SHARE"
_HOLD: Final = """
SELECT status, merchant_id, counter_id FROM cde.devices WHERE device_id = $1 FOR NO KEY UPDATE
"""
_SET_STATUS: Final = """
UPDATE cde.devices SET status = $2, changed_at = clock_timestamp() WHERE device_id = $1
"""
_REKEY: Final = """
UPDATE cde.devices
SET key_set = $2, initial_ksn = $3, counter_id = $4, changed_at = clock_timestamp()
WHERE device_id = $1
"""
_CERTIFY: Final = """
UPDATE cde.devices
SET certificate_sha256 = $2, certificate_expires_at = $3, changed_at = clock_timestamp()
WHERE device_id = $1
"""
_CHANGED: Final = """
SELECT device_id, status, certificate_sha256, changed_at
FROM cde.devices WHERE changed_at > $1 ORDER BY changed_at
"""
_RETIRED: Final = "SELECT key_set FROM cde.key_sets WHERE retired_at > $1 ORDER BY key_set"
_DEVICES_OF: Final = """
SELECT device_id, status, certificate_sha256
FROM cde.devices WHERE key_set = $1 AND device_id > $2 ORDER BY device_id LIMIT $3
"""
_NOW: Final = "SELECT clock_timestamp()"
# Whether it is news is decided on the row as it is once it is locked, so that no device is told of
# twice, whoever else writes; in the order of ids, so that no two nodes wait for one another.
_PRESENCE: Final = """
WITH before AS MATERIALIZED (
    SELECT d.device_id, d.merchant_id, i.is_here,
           CASE WHEN i.is_here THEN d.online_node IS NULL
                ELSE d.online_node IS NOT DISTINCT FROM $3 END AS is_news
    FROM unnest($1::text[], $2::boolean[]) AS i (device_id, is_here)
    JOIN cde.devices d USING (device_id)
    ORDER BY d.device_id FOR NO KEY UPDATE OF d
), noted AS (
    UPDATE cde.devices d
    SET online_node = CASE WHEN b.is_here THEN $3 END, last_seen_at = $4
    FROM before b WHERE d.device_id = b.device_id AND (b.is_here OR b.is_news)
)
INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
SELECT CASE WHEN is_here THEN 'evt.device.online.v1' ELSE 'evt.device.offline.v1' END, merchant_id,
       device_id,
       jsonb_build_object('merchant_id', merchant_id, 'device_id', device_id, 'at', $5::text)
FROM before WHERE is_news ORDER BY device_id
"""
_FORGET_NODE: Final = """
WITH gone AS (
    UPDATE cde.devices SET online_node = NULL WHERE online_node = $1
    RETURNING merchant_id, device_id
)
INSERT INTO cde.outbox (subject, merchant_id, correlation_id, data)
SELECT 'evt.device.offline.v1', merchant_id, device_id,
       jsonb_build_object('merchant_id', merchant_id, 'device_id', device_id, 'at', $2::text)
FROM gone
"""
_FIRMWARE: Final = """
UPDATE cde.devices SET firmware = $2 WHERE device_id = $1 AND firmware IS DISTINCT FROM $2
"""


class HeldDevice(NamedTuple):
    """A device's row while nobody else can change it."""

    status: DeviceStatus
    merchant_id: UUID
    counter_id: int


async def show(database: Database, device_id: str) -> Device | None:
    """One device."""
    row = await database.fetchrow(_SHOW, device_id)
    return None if row is None else _device(row)


async def devices(
    database: Database, *, merchant_id: UUID | None, after: str, limit: int
) -> list[Device]:
    """Devices in the order of their ids, behind `after`."""
    return [_device(row) for row in await database.fetch(_LIST, merchant_id, after, limit)]


async def session_record(database: Database, device_id: str) -> SessionRecord | None:
    """What a session needs of its device, in one read."""
    row = await database.fetchrow(_SESSION, device_id)
    if row is None:
        return None
    ttl_s = row["token_ttl_s"]
    return SessionRecord(
        merchant_id=row["merchant_id"],
        status=row["status"],
        key_set=row["key_set"],
        key_set_status=row["key_set_status"],
        scheme=row["scheme"],
        initial_ksn=row["initial_ksn"],
        initial_key_id=dukpt.initial_key_id(row["scheme"], row["initial_ksn"]),
        counter_id=row["counter_id"],
        counter_version=row["version"],
        window=CounterWindow.load(
            size_bits=row["counter_window"], highest=row["highest"], seen=row["seen"]
        ),
        token_ttl=None if ttl_s is None else timedelta(seconds=ttl_s),
        keep_sensitive=row["sensitive_data"] == "until-authorized",
    )


async def admission(database: Database, device_id: str) -> Admission | None:
    """What a device is admitted by, or None where there is no such device."""
    row = await database.fetchrow(_ADMISSION, device_id)
    return None if row is None else Admission(*row)


async def merchant_exists(database: Database, merchant_id: UUID) -> bool:
    """Whether tokens can be issued for the merchant."""
    found: bool = await database.fetchval(_MERCHANT, merchant_id)
    return found


async def hold_merchant(connection: Connection, merchant_id: UUID) -> bool:
    """Whether tokens can be issued for the merchant, which holds until the transaction ends."""
    return await connection.fetchval(_HOLD_MERCHANT, merchant_id) is not None


async def claim_counters(
    connection: Connection, *, initial_key: bytes, merchant_id: UUID
) -> int | None:
    """The id of the initial key's counters, or None where they are another merchant's."""
    counter_id: int | None = await connection.fetchval(_COUNTERS, initial_key, merchant_id)
    return counter_id


async def enroll(
    connection: Connection,
    *,
    device_id: str,
    merchant_id: UUID,
    serial: str | None,
    model: str | None,
    key_set: str,
    initial_ksn: bytes,
    counter_id: int,
    certificate_sha256: str,
    certificate_expires_at: datetime,
) -> None:
    """Insert the device; ConflictError when its initial key is in use."""
    await connection.execute(
        _ENROLL,
        device_id,
        merchant_id,
        serial,
        model,
        key_set,
        initial_ksn,
        counter_id,
        certificate_sha256,
        certificate_expires_at,
    )


async def key_set_is_active(connection: Connection, key_set: str) -> bool:
    """Whether devices may be given a key of it, which holds until the transaction ends."""
    status: str | None = await connection.fetchval(_HOLD_KEY_SET, key_set)
    return status == "active"


async def hold(connection: Connection, device_id: str) -> HeldDevice | None:
    """The device as it is and stays until the transaction ends, or None."""
    row = await connection.fetchrow(_HOLD, device_id)
    return None if row is None else HeldDevice(*row)


async def set_status(connection: Connection, device_id: str, status: DeviceStatus) -> None:
    """Give a device that is held another status."""
    await connection.execute(_SET_STATUS, device_id, status)


async def rekey(
    connection: Connection, device_id: str, *, key_set: str, initial_ksn: bytes, counter_id: int
) -> None:
    """Give a device that is held another initial key; ConflictError when that is in use."""
    await connection.execute(_REKEY, device_id, key_set, initial_ksn, counter_id)


async def certify(
    connection: Connection, device_id: str, *, certificate_sha256: str, expires_at: datetime
) -> None:
    """Give a device that is held another certificate; the one before is refused from now on."""
    await connection.execute(_CERTIFY, device_id, certificate_sha256, expires_at)


async def changed_since(
    connection: Connection, since: datetime, *, timeout_s: float
) -> list[tuple[DeviceChange, datetime]]:
    """The devices that were changed after `since`, oldest change first."""
    rows = await connection.fetch(_CHANGED, since, timeout_s=timeout_s)
    return [(_change(row), row["changed_at"]) for row in rows]


async def retired_since(connection: Connection, since: datetime, *, timeout_s: float) -> list[str]:
    """The key sets that were retired after `since`."""
    return [row[0] for row in await connection.fetch(_RETIRED, since, timeout_s=timeout_s)]


async def devices_of(
    connection: Connection, key_set: str, *, after: str, limit: int, timeout_s: float
) -> list[DeviceChange]:
    """Devices of a key set in the order of their ids, behind `after`."""
    rows = await connection.fetch(_DEVICES_OF, key_set, after, limit, timeout_s=timeout_s)
    return [_change(row) for row in rows]


async def database_now(connection: Connection, *, timeout_s: float) -> datetime:
    """The server's clock, by which changes are stamped."""
    now = await connection.fetchval(_NOW, timeout_s=timeout_s)
    assert isinstance(now, datetime)
    return now


async def write_presence(
    database: Database, changes: Mapping[str, bool], *, node_id: str, at: datetime
) -> None:
    """Note who is connected here (True) and who is not any more, with the events of both.

    Another node's devices stay its own. A device that was online somewhere before is no news.
    """
    await database.execute(
        _PRESENCE, list(changes), list(changes.values()), node_id, at, at.isoformat()
    )


async def forget_node(database: Database, node_id: str, at: datetime) -> None:
    """Take every device that this node had when it died as offline, which their events tell."""
    await database.execute(_FORGET_NODE, node_id, at.isoformat())


async def set_firmware(database: Database, device_id: str, firmware: str) -> None:
    """Note what the device says it runs."""
    await database.execute(_FIRMWARE, device_id, firmware)


def _change(row: Row) -> DeviceChange:
    return DeviceChange(
        device_id=row["device_id"],
        status=row["status"],
        certificate_sha256=row["certificate_sha256"],
    )


def _device(row: Row) -> Device:
    return Device(
        device_id=row["device_id"],
        merchant_id=row["merchant_id"],
        serial=row["serial"],
        model=row["model"],
        key_set=row["key_set"],
        scheme=row["scheme"],
        ksn=row["initial_ksn"].hex().upper(),
        status=row["status"],
        presence="offline" if row["online_node"] is None else "online",
        firmware=row["firmware"],
        certificate_sha256=row["certificate_sha256"],
        certificate_expires_at=row["certificate_expires_at"],
        highest_counter=row["highest"],
        last_seen_at=row["last_seen_at"],
        created_at=row["created_at"],
    )
