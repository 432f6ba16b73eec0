"""The registry against a real PostgreSQL: other keys and certificates for devices, and races."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes, serialization

from device_gateway.model import DeviceChange, DeviceStatus
from device_gateway.registry import DeviceAuthority, Registry
from device_gateway.watch import StatusWatch
from glamd.crypto import x509
from glamd.crypto.dukpt import AES_DUKPT, TDES_DUKPT, Profile
from glamd.db import Connection, Database
from glamd.errors import (
    ConflictError,
    ForbiddenError,
    GlamError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from glamd.keys.key_sets.service import Keys
from glamd.keys.key_sets.store import retire_key_set
from glamd.payments.life.store import request_erasure
from tests.support.keys import local_provider
from tests.support.postgres import eventually, lock_waiters
from tests.support.settable_clock import SettableClock

BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
OTHER_BDK = BDK[::-1]
AES_KSN = bytes.fromhex("123456789ABCDEF000000000")
YEAR = timedelta(days=365)
TABLES = ("devices", "device_counters", "key_sets", "outbox", "merchants")


class World:
    """Two merchants, two key sets, and a gateway that notes what it is told."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        self.told: list[DeviceChange] = []
        self.rows: list[tuple[str, str, str, str]] = []
        self.audit_error: GlamError | None = None
        self.merchant_id = uuid4()
        self.numbers: Iterator[int] = count(1)
        clock = SettableClock()
        self.keys = Keys(
            database=database,
            glam=database,
            providers=local_provider(directory),
            identity_key=bytes(32),
            record=self._record,
            clock=clock,
        )
        key, _ = x509.generate_key()
        root = x509.issue_authority("devices", key=key, now=clock.now(), validity=YEAR)
        self.registry = Registry(
            database,
            keys=self.keys,
            authority=DeviceAuthority(certificate=root, key=key, server_ca_pem="", validity=YEAR),
            clock=clock,
            changed=self.changed,
            export_initial_keys=True,
        )

    async def _record(self, *, action: str, subject: str, actor: str, outcome: str) -> None:
        if self.audit_error is not None:
            raise self.audit_error
        self.rows.append((action, subject, actor, outcome))

    async def changed(self, change: DeviceChange) -> None:
        self.told.append(change)

    async def begin(self) -> None:
        await self.database.execute("; ".join(f"DELETE FROM cde.{table}" for table in TABLES))
        await self.merchant(self.merchant_id)
        await self.keys.import_bdk(
            key_set="tdes", profile=Profile(scheme=TDES_DUKPT), bdk=BDK, actor="test"
        )
        await self.keys.import_bdk(
            key_set="aes", profile=Profile(scheme=AES_DUKPT), bdk=OTHER_BDK, actor="test"
        )
        self.rows.clear()

    async def merchant(self, merchant_id: UUID) -> None:
        await self.database.execute(
            "INSERT INTO cde.merchants (merchant_id) VALUES ($1)", merchant_id
        )

    def ksn(self) -> bytes:
        """A KSN that no device has yet."""
        return bytes.fromhex(f"FFFF98765432{next(self.numbers):02X}000000")

    async def enroll(self, ksn: bytes | None = None, *, merchant_id: UUID | None = None) -> str:
        enrolled = await self.registry.enroll(
            merchant_id=merchant_id or self.merchant_id,
            key_set="tdes",
            ksn=ksn or self.ksn(),
            serial=None,
            model=None,
            csr_pem=None,
            export_initial_key=False,
        )
        return enrolled.device.device_id

    async def rekey(self, device_id: str, ksn: bytes, key_set: str | None = None) -> str | None:
        rekeyed = await self.registry.rekey(
            device_id, ksn=ksn, key_set=key_set, export_initial_key=True, actor="uid:7"
        )
        return rekeyed.initial_key

    async def counters(self) -> list[tuple[int, int]]:
        """Of each initial key that ever was: its id and the highest counter."""
        rows = await self.database.fetch(
            "SELECT counter_id, highest FROM cde.device_counters ORDER BY counter_id"
        )
        return [tuple(row) for row in rows]


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, emptied before each."""
    return module_database_url


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> World:
    made = World(database, tmp_path)
    await made.begin()
    return made


# ---- another initial key


async def refused(world: World, device_id: str, ksn: bytes, key_set: str | None = None) -> str:
    """The code with which a rekeying is refused; nothing is changed by it, and it is recorded."""
    before = await world.database.fetch("SELECT * FROM cde.devices ORDER BY device_id")
    with pytest.raises(GlamError) as raised:
        await world.rekey(device_id, ksn, key_set)
    assert await world.database.fetch("SELECT * FROM cde.devices ORDER BY device_id") == before
    assert world.rows[-1] == ("device.rekey", device_id, "uid:7", raised.value.code)
    return raised.value.code


async def test_what_cannot_be_a_devices_new_key_is_refused_and_recorded(world: World) -> None:
    used, other_ksn = world.ksn(), world.ksn()
    device_id = await world.enroll(used)
    await world.enroll(other_ksn)
    stranger = uuid4()
    await world.merchant(stranger)
    theirs = world.ksn()
    revoked = await world.enroll(theirs, merchant_id=stranger)
    await world.registry.revoke(revoked)
    world.told.clear()

    assert await refused(world, "dev_nobody", world.ksn()) == "DEVICE_NOT_FOUND"
    assert await refused(world, device_id, world.ksn(), "nobody") == "KEY_SET_UNKNOWN"
    assert await refused(world, device_id, AES_KSN) == "VALIDATION_ERROR"
    assert await refused(world, device_id, used) == "KSN_IN_USE"
    assert await refused(world, device_id, used[:-1] + b"\x07") == "KSN_IN_USE"
    assert await refused(world, device_id, other_ksn) == "KSN_IN_USE"
    assert await refused(world, device_id, theirs) == "KSN_IN_USE"
    assert await refused(world, revoked, world.ksn()) == "DEVICE_REVOKED"
    await world.keys.retire_bdk("aes", actor="test")
    assert await refused(world, device_id, AES_KSN, "aes") == "KEY_SET_RETIRED"
    assert world.told == []


async def test_the_initial_key_is_shown_in_development_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_id = await world.enroll()
    monkeypatch.setattr(world.registry, "_export_initial_keys", False)
    with pytest.raises(ForbiddenError):
        await world.rekey(device_id, world.ksn())


async def test_a_rekeying_that_cannot_be_recorded_is_none(world: World) -> None:
    ksn = world.ksn()
    device_id = await world.enroll(ksn)
    world.audit_error = UnavailableError("The audit is away.")
    with pytest.raises(UnavailableError):
        await world.rekey(device_id, world.ksn())
    assert (await world.registry.show(device_id)).ksn == ksn.hex().upper()


async def test_a_new_key_has_counters_of_its_own_and_the_old_ones_stay_spent(world: World) -> None:
    first = world.ksn()
    device_id = await world.enroll(first)
    await world.database.execute("UPDATE cde.device_counters SET highest = 7")
    before = await world.registry.show(device_id)
    second = bytes.fromhex("FFFF9876543210E00000")
    key = await world.rekey(device_id, second)
    assert key == "6AC292FAA1315B4D858AB3A3D7D5933A"
    after = await world.registry.show(device_id)
    assert (after.ksn, after.highest_counter) == (second.hex().upper(), 0)
    assert after.certificate_sha256 == before.certificate_sha256
    assert [highest for _, highest in await world.counters()] == [7, 0]
    assert world.rows == [("device.rekey", device_id, "uid:7", "ok")]
    assert [change.device_id for change in world.told] == [device_id]
    # Injected with the first one again, it goes on where that key's counters stand.
    await world.rekey(device_id, first)
    assert (await world.registry.show(device_id)).highest_counter == 7
    assert len(await world.counters()) == 2


async def test_a_device_may_get_a_key_of_another_scheme(world: World) -> None:
    device_id = await world.enroll()
    await world.rekey(device_id, AES_KSN, "aes")
    after = await world.registry.show(device_id)
    assert (after.key_set, after.scheme, after.ksn) == ("aes", AES_DUKPT, AES_KSN.hex().upper())


async def test_of_two_devices_that_are_given_one_key_at_once_one_gets_it(world: World) -> None:
    devices = [await world.enroll() for _ in range(4)]
    ksn = world.ksn()
    results = await asyncio.gather(
        *(world.rekey(one, ksn) for one in devices), return_exceptions=True
    )
    conflicts = [found for found in results if isinstance(found, ConflictError)]
    assert {found.code for found in conflicts} == {"KSN_IN_USE"}
    assert len(conflicts) == 3


# ---- another certificate


async def test_a_certificate_is_refused_to_who_is_not_there_or_revoked(world: World) -> None:
    device_id = await world.enroll()
    with pytest.raises(NotFoundError):
        await world.registry.rotate_certificate("dev_nobody", csr_pem=None)
    with pytest.raises(InputError):
        await world.registry.rotate_certificate(device_id, csr_pem=b"no request")
    await world.registry.revoke(device_id)
    with pytest.raises(ConflictError) as raised:
        await world.registry.rotate_certificate(device_id, csr_pem=None)
    assert raised.value.code == "DEVICE_REVOKED"


async def test_a_new_certificate_is_the_only_one_and_the_gateway_is_told_which(
    world: World,
) -> None:
    device_id = await world.enroll()
    before = await world.registry.show(device_id)
    made = await world.registry.rotate_certificate(device_id, csr_pem=None)
    assert made.private_key_pem is not None
    certificate = cx509.load_pem_x509_certificate(made.certificate_pem.encode())
    assert certificate.fingerprint(hashes.SHA256()).hex() == made.device.certificate_sha256
    assert made.device.certificate_sha256 != before.certificate_sha256
    assert world.told[-1].certificate_sha256 == made.device.certificate_sha256
    assert "PRIVATE" not in repr(made)
    assert (made.device.ksn, made.device.key_set) == (before.ksn, before.key_set)


async def test_a_request_gives_its_public_key_and_nothing_else(world: World) -> None:
    device_id = await world.enroll()
    key, public_key = x509.generate_key()
    name = cx509.Name([cx509.NameAttribute(cx509.NameOID.COMMON_NAME, "another")])
    request = cx509.CertificateSigningRequestBuilder().subject_name(name)
    csr = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    made = await world.registry.rotate_certificate(device_id, csr_pem=csr)
    assert made.private_key_pem is None
    certificate = cx509.load_pem_x509_certificate(made.certificate_pem.encode())
    assert certificate.public_key() == public_key
    assert certificate.subject.rfc4514_string() == f"CN={device_id}"


# ---- key sets that are retired


async def test_nobody_is_enrolled_under_a_retired_key_set(world: World) -> None:
    await world.keys.retire_bdk("tdes", actor="test")
    with pytest.raises(ConflictError) as raised:
        await world.enroll()
    assert raised.value.code == "KEY_SET_RETIRED"
    assert await world.counters() == []


@pytest.mark.parametrize("what", ["enrol", "rekey"])
async def test_a_device_that_comes_while_its_key_set_is_being_retired_is_refused(
    world: World, what: str
) -> None:
    device_id = await world.enroll()
    await world.rekey(device_id, AES_KSN, "aes")
    async with world.database.transaction() as connection:
        await retire_key_set(connection, "tdes")
        coming = asyncio.create_task(
            world.enroll() if what == "enrol" else world.rekey(device_id, world.ksn(), "tdes"),
            name="coming",
        )
        await eventually(lambda: lock_waiters(world.database))
    with pytest.raises(ConflictError) as raised:
        await coming
    assert raised.value.code == "KEY_SET_RETIRED"


@pytest.mark.parametrize(
    ("what", "code"), [("enrol", "MERCHANT_NOT_FOUND"), ("rekey", "DEVICE_REVOKED")]
)
async def test_a_device_that_comes_while_its_merchant_is_being_erased_is_refused(
    world: World, what: str, code: str
) -> None:
    device_id = await world.enroll()
    async with world.database.transaction() as connection:
        await request_erasure(
            connection, world.merchant_id, now=datetime.now(UTC), correlation_id="c"
        )
        coming = asyncio.create_task(
            world.enroll() if what == "enrol" else world.rekey(device_id, world.ksn()),
            name="coming",
        )
        await eventually(lambda: lock_waiters(world.database))
    with pytest.raises(GlamError) as raised:
        await coming
    assert raised.value.code == code
    assert (
        await world.database.fetch("SELECT device_id FROM cde.devices WHERE status <> 'revoked'")
        == []
    )


async def test_the_list_counts_the_devices_that_are_not_revoked(world: World) -> None:
    for _ in range(3):
        await world.enroll()
    await world.registry.revoke(await world.enroll())
    listed = {one.key_set.key_set: one.devices for one in await world.keys.list_key_sets()}
    assert listed == {"aes": 0, "tdes": 3}


async def test_the_watch_tells_of_each_device_of_a_retired_key_set_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_gateway.watch.PAGE", 2)
    devices = [await world.enroll() for _ in range(5)]
    await world.database.execute(
        "UPDATE cde.devices SET changed_at = now() - interval '1 hour', status = 'suspended'"
    )
    told: list[DeviceChange] = []
    looks = asyncio.Semaphore(0)

    async def changed(change: DeviceChange) -> None:
        told.append(change)

    watch = StatusWatch(world.database, interval_s=0.01, changed=changed)
    look = watch._look

    async def looked(connection: Connection) -> None:
        await look(connection)
        looks.release()

    monkeypatch.setattr(watch, "_look", looked)
    running = asyncio.create_task(watch.run(), name="watch")
    try:
        async with asyncio.timeout(10):
            await looks.acquire()
            assert told == []
            await world.keys.retire_bdk("tdes", actor="test")
            for _ in range(4):
                await looks.acquire()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert sorted(change.device_id for change in told) == sorted(devices)
    assert {change.status for change in told} == {"suspended"}


# ---- status


@pytest.mark.parametrize("status", ["suspended", "revoked"])
async def test_of_many_who_ask_for_one_status_at_once_one_event_tells(
    world: World, status: DeviceStatus
) -> None:
    device_id = await world.enroll()
    ask = world.registry.suspend if status == "suspended" else world.registry.revoke
    found = await asyncio.gather(*(ask(device_id) for _ in range(5)))
    assert {device.status for device in found} == {status}
    events = await world.database.fetchval(
        "SELECT count(*) FROM cde.outbox WHERE subject = $1", f"evt.device.{status}.v1"
    )
    assert events == 1
    # Each of them is made to hold at once, though one alone changed it.
    assert len(world.told) == 5


async def test_a_revoked_device_stays_revoked_whatever_is_asked_at_once(world: World) -> None:
    device_id = await world.enroll()
    registry = world.registry
    await asyncio.gather(
        *(registry.revoke(device_id), registry.resume(device_id), registry.suspend(device_id)),
        return_exceptions=True,
    )
    assert (await registry.show(device_id)).status == "revoked"
    for ask in (registry.suspend, registry.resume):
        with pytest.raises(ConflictError) as raised:
            await ask(device_id)
        assert raised.value.code == "DEVICE_REVOKED"
    with pytest.raises(NotFoundError):
        await registry.suspend("dev_nobody")
