"""A whole daemon in the test's own process, with real TLS, PostgreSQL, MQTT and HTTP under it.

The composition root is the real one and the settings are those of `glamd dev`. What a test changes
it changes through settings, the database, or the wire.
"""

import asyncio
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import aiomqtt
import orjson
from prometheus_client import CollectorRegistry

from device_gateway import topics
from device_gateway.terminal import Answer, Terminal
from device_gateway.terminal_card import CardReader
from device_gateway.terminal_device import Counters, Device, device_from
from glamd import app
from glamd.admin.minting import Mint
from glamd.clock import SystemClock
from glamd.crypto.dukpt import Profile
from glamd.db import Database
from glamd.embedded.certificates import DevelopmentCertificates
from glamd.embedded.settings import (
    LOOPBACK,
    WORKER_URI,
    Ports,
    development_settings,
    jwt_secrets,
)
from glamd.payments.model import Scheme

DOMAIN = "shop.example"
NOBODY = "nats://127.0.0.1:1"
NOBODY_HTTP = "http://127.0.0.1:1"
"""Where no server listens."""

SHOPIFY_SECRET = "shpss_of_the_tests"
CHECKOUT_SECRET = "of the payment page, for both directions"
ANSWER_TIMEOUT_S = 20.0
VISA = "4242424242424242"
KEY_SETS: Mapping[str, Scheme] = {"tdes": "tdes-dukpt", "aes": "aes-dukpt"}
# Odd parity, as a TDES key should have; an AES key does not mind.
BDK = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")


@dataclass(slots=True)
class Site:
    """A running daemon and how to reach it."""

    daemon: app.Daemon
    database: Database
    certificates: DevelopmentCertificates
    merchant_id: UUID
    mint: Mint
    state_dir: Path
    http: aiohttp.ClientSession
    worker: aiohttp.ClientSession
    admin: aiohttp.ClientSession
    _terminals: list[tuple[Terminal, asyncio.Task[None]]] = field(default_factory=list)

    async def enroll(
        self, key_set: str = "aes", *, merchant_id: UUID | None = None, ksn: bytes | None = None
    ) -> Device:
        """A new device with its files, as a terminal has them; `ksn` names its initial key."""
        scheme = KEY_SETS.get(key_set, "aes-dukpt")
        ksn = (
            ksn
            or {
                "tdes-dukpt": b"\xff\xff" + secrets.token_bytes(5) + bytes(3),
                "aes-dukpt": b"\x12\x34\x56\x78" + secrets.token_bytes(4) + bytes(4),
            }[scheme]
        )
        enrolled = await self.daemon.registry.enroll(
            merchant_id=merchant_id or self.merchant_id,
            key_set=key_set,
            ksn=ksn,
            serial=None,
            model=None,
            csr_pem=None,
            export_initial_key=True,
        )
        directory = self.state_dir / enrolled.device.device_id
        directory.mkdir()
        assert enrolled.private_key_pem is not None
        for name, text in (
            ("cert.pem", enrolled.certificate_pem),
            ("key.pem", enrolled.private_key_pem),
            ("ca.pem", enrolled.ca_pem),
        ):
            (directory / name).write_text(text)
        described = {
            "device_id": enrolled.device.device_id,
            "merchant_id": str(enrolled.device.merchant_id),
            "scheme": scheme,
            "key_set": key_set,
            "ksn": enrolled.device.ksn,
            "cert": "cert.pem",
            "key": "key.pem",
            "ca": "ca.pem",
            "mqtt": {"host": LOOPBACK, "port": self.daemon.mqtt_port},
            "initial_key": enrolled.initial_key,
        }
        return device_from(described, directory)

    async def terminal(self, device: Device) -> Terminal:
        """A terminal of this device, connected; it is closed with the site."""
        terminal = Terminal(device, clock=SystemClock())
        running = asyncio.create_task(terminal.run(), name=f"terminal:{device.device_id}")
        self._terminals.append((terminal, running))
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await terminal.connected.wait()
        return terminal

    @asynccontextmanager
    async def wire(self, device: Device) -> AsyncIterator["Wire"]:
        """A connection of this device by a client that nobody here wrote."""
        async with aiomqtt.Client(
            LOOPBACK,
            self.daemon.mqtt_port,
            identifier=device.device_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            tls_context=device.tls(),
            timeout=ANSWER_TIMEOUT_S,
            # paho sends in two segments; Nagle would hold the second back for a delayed ACK.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        ) as client:
            await client.subscribe(topics.build(device.device_id, "response"), qos=1)
            yield Wire(client, topics.build(device.device_id, "request"))

    async def ask(self, device: Device, payload: bytes) -> Answer:
        """Send one request over a connection of its own and return the answer, final or not."""
        async with self.wire(device) as wire:
            return await wire.ask(payload)

    def client(self, merchant_id: UUID | None = None, scope: str = "bff:call") -> dict[str, str]:
        """Headers of a client of a merchant."""
        token = self.mint.client(
            merchant_id=str(merchant_id or self.merchant_id), shop=DOMAIN, scope=scope
        )
        return {"Authorization": f"Bearer {token}"}

    def internal(self, scope: str = "payment:read payment:revoke") -> dict[str, str]:
        """Headers of an internal service."""
        token = self.mint.internal(service="platform-connector", scope=scope)
        return {"Authorization": f"Bearer {token}"}

    async def close(self) -> None:
        """End what the test left open."""
        for terminal, running in self._terminals:
            terminal.close()
            await asyncio.gather(running, return_exceptions=True)
        for session in (self.http, self.worker, self.admin):
            await session.close()


def reader(device: Device) -> CardReader:
    """The card reader of a device, its counters in the device's folder."""
    return CardReader(device, Counters(device))


class Wire:
    """Payloads in, answers out, in the order in which they come."""

    def __init__(self, client: aiomqtt.Client, request_topic: str) -> None:
        self._client = client
        self._request_topic = request_topic

    async def ask(self, payload: bytes) -> Answer:
        """Publish `payload` once and return the next answer of any kind."""
        await self._client.publish(self._request_topic, payload, qos=1)
        return await self.answer()

    async def answer(self) -> Answer:
        """The next answer."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            message = await anext(aiter(self._client.messages))
        assert isinstance(message.payload, bytes)
        return Answer(orjson.loads(message.payload))


@asynccontextmanager
async def running_site(
    state_dir: Path,
    database_url: str,
    *,
    nats_url: str = NOBODY,
    changes: Mapping[str, Mapping[str, object]] | None = None,
) -> AsyncIterator[Site]:
    """Start a daemon on this database with a merchant and two key sets; `changes` to settings.

    Without `nats_url` it does without NATS, as it has to be able to.
    """
    certificates = DevelopmentCertificates(state_dir, SystemClock())
    sold_at: dict[str, dict[str, object]] = {
        "checkout": {"url": "https://pay.example/checkout", "secrets": [CHECKOUT_SECRET]},
        # Where a test goes there it names a stand-in.
        "shopify": {"api_key": "app", "api_secrets": [SHOPIFY_SECRET], "base_url": NOBODY_HTTP},
    }
    settings = development_settings(
        state_dir,
        certificates,
        database_url=database_url,
        nats_url=nats_url,
        ports=Ports(http=0, worker=0, mqtt=0),
        changes={**sold_at, **(changes or {})},
    )
    database = await Database.connect(database_url, pool_size=2)
    try:
        async with app.running(settings, asyncio.Event(), registry=CollectorRegistry()) as daemon:
            site = await _site(daemon, database, certificates, state_dir)
            try:
                yield site
            finally:
                await site.close()
    finally:
        await database.close()


async def _site(
    daemon: app.Daemon,
    database: Database,
    certificates: DevelopmentCertificates,
    state_dir: Path,
) -> Site:
    merchants = await daemon.merchants.list(limit=1)
    if merchants:
        merchant_id = merchants[0].merchant_id
    else:
        merchant_id = uuid4()
        await daemon.onboarding.create(
            platform="custom", shop_id="1", domain=DOMAIN, merchant_id=merchant_id
        )
        for key_set, scheme in KEY_SETS.items():
            await daemon.keys.import_bdk(
                key_set=key_set, profile=Profile(scheme=scheme), bdk=BDK, actor="test"
            )
    made = jwt_secrets(state_dir)
    worker = certificates.worker(WORKER_URI)
    tls = ssl.create_default_context(cafile=str(certificates.server_ca.certificate_file))
    tls.load_cert_chain(worker.certificate_file, worker.key_file)
    return Site(
        daemon=daemon,
        database=database,
        certificates=certificates,
        merchant_id=merchant_id,
        mint=Mint(client_secret=made.client, internal_secret=made.internal, clock=SystemClock()),
        state_dir=state_dir,
        http=aiohttp.ClientSession(f"http://{LOOPBACK}:{daemon.http_port}"),
        worker=aiohttp.ClientSession(
            f"https://{LOOPBACK}:{daemon.worker_port}", connector=aiohttp.TCPConnector(ssl=tls)
        ),
        admin=aiohttp.ClientSession(
            "http://glamd", connector=aiohttp.UnixConnector(str(state_dir / "admin.sock"))
        ),
    )
