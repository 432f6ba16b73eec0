"""What is told of devices and payment tokens: each change once, in order, as it was agreed."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from nats.aio.client import Client

from device_gateway import store
from device_gateway.model import DeviceChange
from device_gateway.presence import Presence
from device_gateway.registry import DeviceAuthority, Registry
from glamd.crypto import x509
from glamd.crypto.dukpt import Profile
from glamd.db import Database
from glamd.errors import UnavailableError
from glamd.events.bus import Bus
from glamd.events.relay import Relay
from glamd.keys.key_sets.service import Keys
from glamd.payments.counter import CounterWindow
from glamd.payments.model import IssuedToken, SealedCard, Spend
from glamd.payments.tokens import Tokens
from glamd.payments.vault import Vault, new_token
from tests.support.database_proxy import DatabaseProxy
from tests.support.events_world import running, unpublished
from tests.support.keys import local_provider
from tests.support.nats import stored
from tests.support.postgres import eventually
from tests.support.settable_clock import SettableClock

BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")
TABLES = (
    "token_secrets",
    "shred_queue",
    "encryption_keys",
    "payment_tokens",
    "token_idempotency_keys",
    "devices",
    "device_counters",
    "key_sets",
    "merchants",
    "outbox",
)


async def nothing_recorded(*, action: str, subject: str, actor: str, outcome: str) -> None:
    """Stand in for the audit of keys."""


async def nobody_told(change: DeviceChange) -> None:
    """Stand in for the gateway, of which there is none."""


@dataclass(frozen=True)
class World:
    """Devices of one merchant in a database of card data, and what was told of them."""

    database: Database
    registry: Registry
    clock: SettableClock
    merchant_id: UUID
    numbers: "count[int]"

    async def enroll(self) -> str:
        """A new device's id."""
        enrolled = await self.registry.enroll(
            merchant_id=self.merchant_id,
            key_set="set",
            ksn=bytes.fromhex(f"FFFF98765432{next(self.numbers):02X}000000"),
            serial=None,
            model=None,
            csr_pem=None,
            export_initial_key=False,
        )
        return enrolled.device.device_id

    def presence(self, node_id: str = "node-1", database: Database | None = None) -> Presence:
        """The presence of a node."""
        return Presence(database or self.database, node_id=node_id, clock=self.clock)

    async def told(self, device_id: str) -> list[str]:
        """Of which comings and goings the device's events tell, in the order they are sent."""
        rows = await self.database.fetch(
            "SELECT subject FROM cde.outbox WHERE data ->> 'device_id' = $1 AND subject LIKE"
            " 'evt.device.o%line.v1' ORDER BY id",
            device_id,
        )
        return [row[0].split(".")[2] for row in rows]

    async def is_online(self, device_id: str) -> bool:
        """What the registry shows."""
        return (await self.registry.show(device_id)).presence == "online"


@pytest.fixture
async def world(database: Database, clock: SettableClock, tmp_path: Path) -> World:
    """A merchant with a key set and no devices, on a database of which nothing else is left."""
    await database.execute("; ".join(f"DELETE FROM cde.{table}" for table in TABLES))
    merchant_id = uuid4()
    await database.execute("INSERT INTO cde.merchants (merchant_id) VALUES ($1)", merchant_id)
    keys = Keys(
        database=database,
        glam=database,
        providers=local_provider(tmp_path),
        identity_key=bytes(32),
        record=nothing_recorded,
        clock=clock,
    )
    await keys.import_bdk(
        key_set="set", profile=Profile(scheme="tdes-dukpt"), bdk=BDK, actor="test"
    )
    await database.execute(
        "INSERT INTO cde.encryption_keys (keyring, version, wrapped_key, provider, kcv, status)"
        " VALUES ('payment-tokens', 'v1', '\\x01', 'local', '000000', 'active')"
    )
    key, _ = x509.generate_key()
    year = timedelta(days=365)
    root = x509.issue_authority("devices", key=key, now=clock.now(), validity=year)
    registry = Registry(
        database,
        keys=keys,
        authority=DeviceAuthority(certificate=root, key=key, server_ca_pem="", validity=year),
        clock=clock,
        changed=nobody_told,
        export_initial_keys=False,
    )
    return World(database, registry, clock, merchant_id, count(1))


@pytest.fixture
async def proxied(database_url: str) -> AsyncIterator[tuple[DatabaseProxy, Database]]:
    """A way to the database on which answers get lost."""
    async with DatabaseProxy(database_url) as proxy:
        connected = await Database.connect(proxy.url, pool_size=1)
        yield proxy, connected
        await connected.close()


# ---- presence


async def test_an_answer_that_got_lost_makes_no_second_event(
    world: World, proxied: tuple[DatabaseProxy, Database]
) -> None:
    proxy, database = proxied
    device_id = await world.enroll()
    presence = world.presence(database=database)
    presence.arrived(device_id)
    await presence.flush()
    presence.left(device_id)
    proxy.lose_answer = 1
    with pytest.raises(UnavailableError):
        await presence.flush()
    assert await world.told(device_id) == ["online", "offline"]
    await presence.flush()
    assert await world.told(device_id) == ["online", "offline"]


async def test_a_device_that_is_back_before_it_was_noted_was_not_away(world: World) -> None:
    device_id = await world.enroll()
    presence = world.presence()
    presence.arrived(device_id)
    await presence.flush()
    for _ in range(3):
        presence.left(device_id)
        presence.arrived(device_id)
    await presence.flush()
    assert await world.told(device_id) == ["online"]
    assert await world.is_online(device_id)


async def test_a_device_that_was_never_noted_as_here_is_not_told_of_as_gone(world: World) -> None:
    device_id = await world.enroll()
    presence = world.presence()
    presence.arrived(device_id)
    presence.left(device_id)
    await presence.flush()
    assert await world.told(device_id) == []


async def test_a_device_that_moves_to_another_node_was_not_away(world: World) -> None:
    device_id = await world.enroll()
    one, other = world.presence("node-1"), world.presence("node-2")
    for presence in (one, other):
        presence.arrived(device_id)
        await presence.flush()
    one.left(device_id)
    await one.flush()
    assert await world.told(device_id) == ["online"]
    assert await world.is_online(device_id)
    other.left(device_id)
    await other.flush()
    assert await world.told(device_id) == ["online", "offline"]


async def test_after_a_crash_what_was_online_is_told_as_gone_and_as_back(world: World) -> None:
    back, gone, elsewhere = [await world.enroll() for _ in range(3)]
    before, other = world.presence("node-1"), world.presence("node-2")
    for device_id in (back, gone):
        before.arrived(device_id)
    other.arrived(elsewhere)
    await before.flush()
    await other.flush()
    del before
    for life in (1, 2):
        again = world.presence("node-1")
        again.arrived(back)

        async def is_back(life: int = life) -> bool:
            return await world.told(back) == ["online", "offline"] * life + ["online"]

        async with running(again):
            await eventually(is_back)
    assert await world.told(gone) == ["online", "offline"]
    assert await world.told(elsewhere) == ["online"]
    assert not await world.is_online(gone)


async def test_two_nodes_that_trade_devices_do_not_wait_for_one_another(world: World) -> None:
    devices = [await world.enroll() for _ in range(20)]
    nodes = [world.presence("node-1"), world.presence("node-2")]
    half = len(devices) // 2
    for turn in range(6):
        here, there = nodes[turn % 2], nodes[1 - turn % 2]
        for first, second in ((devices[:half], devices[half:]), (devices[half:], devices[:half])):
            _move(here, arrived=first, left=second)
            _move(there, arrived=second, left=first)
            await asyncio.gather(here.flush(), there.flush())
    for device_id in devices:
        _alternate(await world.told(device_id))


async def test_whatever_nodes_do_and_however_they_die_events_alternate_and_end_with_the_truth(
    world: World,
) -> None:
    chance = random.Random(20251112)
    devices = [await world.enroll() for _ in range(5)]
    nodes = {name: world.presence(name) for name in ("node-1", "node-2")}
    for _ in range(150):
        name = chance.choice(list(nodes))
        match chance.choice(("arrived", "arrived", "left", "flush", "flush", "crash")):
            case "arrived":
                nodes[name].arrived(chance.choice(devices))
            case "left":
                nodes[name].left(chance.choice(devices))
            case "crash":
                nodes[name] = world.presence(name)
                await store.forget_node(world.database, name, world.clock.now())
            case _:
                await asyncio.gather(*(node.flush() for node in nodes.values()))
    for device_id in devices:
        told = await world.told(device_id)
        _alternate(told)
        assert (told[-1:] == ["online"]) == await world.is_online(device_id)


def _move(presence: Presence, *, arrived: Sequence[str], left: Sequence[str]) -> None:
    for device_id in arrived:
        presence.arrived(device_id)
    for device_id in left:
        presence.left(device_id)


def _alternate(told: Sequence[str]) -> None:
    assert list(told) == ["online", "offline"] * (len(told) // 2) + ["online"] * (len(told) % 2)


# ---- as they are published


async def test_devices_and_payment_tokens_are_told_of_with_exactly_the_fields_agreed(
    world: World, bus: Bus, client: Client
) -> None:
    device_id = await world.enroll()
    presence = world.presence()
    presence.arrived(device_id)
    await presence.flush()
    token = await issue(world, device_id)
    await Tokens(world.database, clock=world.clock).revoke(
        token, merchant_id=world.merchant_id, correlation_id="c-1"
    )
    await world.registry.suspend(device_id)
    await world.registry.revoke(device_id)
    presence.left(device_id)
    await presence.flush()
    relay = Relay(bus, databases={"cde": world.database}, clock=world.clock)

    async def all_sent() -> bool:
        return await unpublished(world.database, "cde") == 0

    async with running(relay):
        await eventually(all_sent)
    messages = await stored(client)
    about_device = {"merchant_id": str(world.merchant_id), "device_id": device_id}
    a_device = about_device | {"at": world.clock.now().isoformat()}
    a_token = about_device | {"token": token, "brand": "visa", "last4": "1111"}
    assert [(message.subject, message.content["data"]) for message in messages] == [
        ("evt.device.enrolled.v1", a_device),
        ("evt.device.online.v1", a_device),
        ("evt.payment.token.created.v1", a_token),
        ("evt.payment.token.revoked.v1", a_token),
        ("evt.device.suspended.v1", a_device),
        ("evt.device.revoked.v1", a_device),
        ("evt.device.offline.v1", a_device),
    ]
    for message in messages:
        body, headers = message.content, message.headers
        assert set(body) == {
            "event_id",
            "event_type",
            "correlation_id",
            "timestamp",
            "source_service",
            "data",
            "metadata",
        }
        assert body["event_type"] == headers["ce-type"] == message.subject
        assert body["event_id"] == headers["ce-id"] == headers["Nats-Msg-Id"]
        assert body["timestamp"] == headers["ce-time"]
        assert headers["ce-subject"] == str(world.merchant_id)
        assert (headers["ce-specversion"], headers["ce-source"]) == ("1.0", "glamd")
        assert (body["source_service"], body["metadata"]) == ("glamd", {})


async def issue(world: World, device_id: str) -> str:
    """A token of the device, by the vault's own group commit."""
    counter_id = await world.database.fetchval(
        "SELECT counter_id FROM cde.devices WHERE device_id = $1", device_id
    )
    at = datetime.now(UTC)
    card = SealedCard(
        brand="visa",
        bin="41111111",
        last4="1111",
        exp_month=12,
        exp_year=2030,
        fingerprint=bytes(32),
        ciphertext=b"sealed",
        sensitive_ciphertext=None,
        key_version="v1",
    )
    issued = IssuedToken(
        token=new_token(), entry_mode="chip", expires_at=at + timedelta(hours=24), card=card
    )
    spend = Spend(
        counter_id=counter_id,
        counter_version=0,
        window=CounterWindow(1024).spend(1),
        device_id=device_id,
        request_id="r-1",
        content_hash=bytes(32),
        answer=b"{}",
        at=at,
        issued=issued,
    )
    vault = Vault(world.database, connections=1, batch_limit=1)
    await vault.journal.start()
    assert await vault.journal.submit(spend)
    await vault.journal.stop(timeout_s=5.0)
    return issued.token
