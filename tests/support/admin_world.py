"""An admin server on a real unix socket with in-memory capabilities behind, and glamctl to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Literal, cast
from uuid import UUID

from click.testing import CliRunner, Result

from device_gateway.model import Device, DeviceStatus, Enrolled, Rekeyed
from glamd.actor.reports import ActorState, ActorStats, KindStats, SystemStats
from glamd.admin.cli import glamctl
from glamd.admin.minting import Mint
from glamd.admin.peers import Operators
from glamd.admin.routes_audit import AuditLog
from glamd.admin.routes_billing import BillingAdminRoutes
from glamd.admin.routes_daemon import Controls, Facts
from glamd.admin.routes_events import EventRoutes
from glamd.admin.routes_import import ImportRoutes
from glamd.admin.routes_keys import Life
from glamd.admin.routes_ledger import LedgerRoutes
from glamd.admin.routes_rewrap import KeyMover, RewrapRoutes
from glamd.admin.server import AdminServer
from glamd.admin.services import Credentials, OlderTokens, RevokedJwts
from glamd.billing.importing.service import BillingImporter
from glamd.billing.jobs import BillingJobs
from glamd.billing.service import Billing
from glamd.crypto.dukpt import Profile
from glamd.db import Database
from glamd.errors import ConflictError, FieldError, ForbiddenError, NotFoundError
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.relay import Relay
from glamd.keys.key_sets import ceremony
from glamd.keys.key_sets.service import BdkSource
from glamd.keys.key_sets.store import KeySet, ListedKeySet
from glamd.keys.store import KeyVersion
from glamd.ledger.importing.service import CreditImporter
from glamd.ledger.service import Ledger
from glamd.merchants.store import Merchant, SensitiveData, Settings
from glamd.payments.audit import AuditReport
from glamd.payments.audit_chain import Head
from glamd.payments.audit_walk import Break
from tests.support.credential_fakes import FakeCredentials, FakeRevocations, NoImport
from tests.support.fake_token_life import FakeErasure, FakeTokenLife
from tests.support.http_fakes import CLIENT_SECRET, INTERNAL_SECRET, MERCHANT, NOW
from tests.support.http_world import World

KSN = "FFFF9876543210E00000"
PRIVATE_KEY = "-----BEGIN PRIVATE KEY-----\nprivate\n-----END PRIVATE KEY-----\n"
INITIAL_KEY = "6AC292FAA1315B4D858AB3A3D7D5933A"


def make_device(device_id: str, merchant_id: UUID = MERCHANT) -> Device:
    """A device as the registry would give it."""
    return Device(
        device_id=device_id,
        merchant_id=merchant_id,
        serial="s-1",
        model="[bold]Reader[/bold]",
        key_set="ks1",
        scheme="tdes-dukpt",
        ksn=KSN,
        status="active",
        presence="offline",
        firmware=None,
        certificate_sha256="c" * 64,
        certificate_expires_at=NOW,
        highest_counter=7,
        last_seen_at=None,
        created_at=NOW,
    )


class FakeMerchants:
    """Merchants in a dictionary."""

    def __init__(self) -> None:
        self.merchants: dict[UUID, Merchant] = {}
        self.kept: dict[UUID, Settings] = {}

    async def create(
        self, *, platform: str, shop_id: str, domain: str, merchant_id: UUID | None = None
    ) -> Merchant:
        """Make one; one domain is taken already."""
        if domain == "taken.example":
            raise ConflictError(
                "There is another merchant already: domain.",
                code="MERCHANT_EXISTS",
                fields=[FieldError("domain", "another merchant has this domain")],
            )
        made = Merchant(
            merchant_id=merchant_id or UUID(int=len(self.merchants) + 1),
            platform=platform,
            shop_id=shop_id,
            domain=domain,
            created_at=NOW,
        )
        self.merchants[made.merchant_id] = made
        return made

    async def list(self, *, limit: int = 50, after: UUID | None = None) -> tuple[Merchant, ...]:
        """The next ones."""
        ids = [i for i in sorted(self.merchants, key=str) if after is None or str(i) > str(after)]
        return tuple(self.merchants[i] for i in ids[:limit])

    async def show(self, merchant_id: UUID) -> Merchant:
        """One."""
        if merchant_id not in self.merchants:
            raise NotFoundError("There is no such merchant.", code="MERCHANT_NOT_FOUND")
        return self.merchants[merchant_id]

    async def settings(self, merchant_id: UUID) -> Settings:
        """Those of a new merchant, until they are set."""
        await self.show(merchant_id)
        return self.kept.get(merchant_id) or Settings(
            token_ttl_s=None, sensitive_data="drop", erase_requested_at=None, erased_at=None
        )

    async def configure(
        self,
        merchant_id: UUID,
        *,
        token_ttl_s: int | Literal["default"] | None = None,
        sensitive_data: SensitiveData | None = None,
    ) -> Settings:
        """Set them."""
        before = await self.settings(merchant_id)
        if isinstance(token_ttl_s, int):
            before = replace(before, token_ttl_s=token_ttl_s)
        elif token_ttl_s is not None:
            before = replace(before, token_ttl_s=None)
        self.kept[merchant_id] = replace(
            before, sensitive_data=sensitive_data or before.sensitive_data
        )
        return self.kept[merchant_id]


class FakeRegistry:
    """Devices in a dictionary."""

    def __init__(self) -> None:
        self.devices: dict[str, Device] = {}
        self.enrolled: list[dict[str, object]] = []
        self.export = True

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
        """Make one; a KSN can be had once."""
        if export_initial_key and not self.export:
            raise ForbiddenError("Initial keys are only exported in development.")
        if any(d.ksn == ksn.hex().upper() for d in self.devices.values()):
            fields = [FieldError("ksn", "names an initial key that is in use")]
            raise ConflictError("Another device has it.", code="KSN_IN_USE", fields=fields)
        self.enrolled.append({"serial": serial, "model": model, "csr_pem": csr_pem, "ksn": ksn})
        device_id = f"dev_{len(self.devices) + 1}"
        made = replace(make_device(device_id, merchant_id), key_set=key_set, ksn=ksn.hex().upper())
        self.devices[device_id] = made
        return Enrolled(
            device=made,
            certificate_pem="certificate\n",
            private_key_pem=None if csr_pem else PRIVATE_KEY,
            ca_pem="device ca\n",
            initial_key=INITIAL_KEY if export_initial_key else None,
        )

    async def list(
        self, *, merchant_id: UUID | None, limit: int, after: str | None
    ) -> list[Device]:
        """The next ones."""
        found = [
            device
            for name, device in sorted(self.devices.items())
            if (after is None or name > after) and merchant_id in (None, device.merchant_id)
        ]
        return found[:limit]

    async def show(self, device_id: str) -> Device:
        """One."""
        if device_id not in self.devices:
            raise NotFoundError("There is no such device.", code="DEVICE_NOT_FOUND")
        return self.devices[device_id]

    async def rekey(
        self,
        device_id: str,
        *,
        ksn: bytes,
        key_set: str | None,
        export_initial_key: bool,
        actor: str,
    ) -> Rekeyed:
        """Another KSN, noted with who asked."""
        before = await self.show(device_id)
        made = replace(before, key_set=key_set or before.key_set, ksn=ksn.hex().upper())
        self.devices[device_id] = made
        self.enrolled.append({"rekeyed": device_id, "actor": actor})
        return Rekeyed(device=made, initial_key=INITIAL_KEY if export_initial_key else None)

    async def rotate_certificate(self, device_id: str, *, csr_pem: bytes | None) -> Enrolled:
        """Another certificate."""
        return Enrolled(
            device=await self.show(device_id),
            certificate_pem="another certificate\n",
            private_key_pem=None if csr_pem else PRIVATE_KEY,
            ca_pem="device ca\n",
            initial_key=None,
        )

    async def suspend(self, device_id: str) -> Device:
        """Set its status."""
        return await self._set(device_id, "suspended")

    async def resume(self, device_id: str) -> Device:
        """Set its status."""
        return await self._set(device_id, "active")

    async def revoke(self, device_id: str) -> Device:
        """Set its status."""
        return await self._set(device_id, "revoked")

    async def _set(self, device_id: str, status: DeviceStatus) -> Device:
        before = await self.show(device_id)
        if before.status == "revoked":
            raise ConflictError("The device is revoked for good.", code="DEVICE_REVOKED")
        self.devices[device_id] = replace(before, status=status)
        return self.devices[device_id]


class FakeKeys:
    """Key sets in a dictionary; the keys themselves too, for the tests to look at."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str, str]] = []
        self.key_sets: dict[str, KeySet] = {}
        self.bdks: dict[str, BdkSource] = {}
        self.actors: list[str] = []

    async def import_bdk(
        self,
        *,
        key_set: str,
        profile: Profile,
        bdk: BdkSource,
        actor: str,
        reader: str = "generic",
        counter_window: int = 1024,
    ) -> KeySet:
        """Keep it; components as the key that they make."""
        if isinstance(bdk, tuple):
            bdk = ceremony.combine(bdk, ceremony.bdk_ceremony(profile.scheme))
        made = KeySet(
            key_set=key_set,
            profile=profile,
            reader=reader,
            counter_window=counter_window,
            kcv="08D7B4",
            provider="local",
            hsm_label=None,
            status="active",
            created_at=NOW,
            retired_at=None,
        )
        self.key_sets[key_set] = made
        self.bdks[key_set] = bdk
        self.actors.append(actor)
        return made

    async def refused_import(self, *, key_set: str, actor: str, code: str) -> None:
        self.refused.append((key_set, actor, code))

    async def list_keys(self) -> tuple[KeyVersion, ...]:
        """One version, whose wrapped key must not be shown."""
        return (
            KeyVersion(
                keyring="payment-tokens",
                version="v1",
                wrapped_key=b"wrapped-key-bytes",
                provider="local",
                kcv="A1B2C3",
                status="active",
                created_at=NOW,
                activated_at=NOW,
                retired_at=None,
                destroyed_at=None,
            ),
        )

    async def retire_bdk(self, key_set: str, *, actor: str) -> KeySet:
        """Set its status."""
        if key_set not in self.key_sets:
            raise NotFoundError("There is no such key set.", code="KEY_SET_UNKNOWN")
        made = replace(self.key_sets[key_set], status="retired", retired_at=NOW)
        self.key_sets[key_set] = made
        self.actors.append(actor)
        return made

    async def list_key_sets(self) -> tuple[ListedKeySet, ...]:
        """What was imported."""
        return tuple(ListedKeySet(one, 3) for one in self.key_sets.values())


class FakeAudit:
    """A chain that is whole, or is not."""

    def __init__(self) -> None:
        self.broken: Break | None = None
        self.heads: list[Head | None] = []

    async def verify(self, *, head: Head | None = None, since: date | None = None) -> AuditReport:
        """What a walk would find."""
        assert since is None
        self.heads.append(head)
        return AuditReport(rows=12, partitions=2, first_broken=self.broken)

    def damage(self) -> None:
        """Break row 5."""
        self.broken = Break(date(2030, 1, 1), 5, "changed", "its MAC does not fit")


class FakeActors:
    """Two actors."""

    def __init__(self) -> None:
        self.stopped: list[tuple[str, str]] = []
        self.actors = [
            ActorStats(
                kind="device",
                key=key,
                state=ActorState.IDLE,
                mailbox=0,
                handled=3,
                restarts=0,
                idle_s=1.5,
            )
            for key in ("dev_1", "dev/2")
        ]

    def stats(
        self, *, kind: str | None = None, key: str | None = None, limit: int = 100
    ) -> SystemStats:
        """Both of them, or those asked for."""
        found = [a for a in self.actors if kind in (None, a.kind) and key in (None, a.key)]
        counts = KindStats(
            kind="device",
            actors=2,
            mailbox=0,
            handled=6,
            activations=2,
            passivations=0,
            restarts=0,
            timeouts=0,
            unheard=0,
            refused={"MAILBOX_FULL": 1},
        )
        kinds = (counts,) if kind in (None, "device") else ()
        return SystemStats(draining=False, kinds=kinds, actors=tuple(found[:limit]))

    def stop(self, kind: str, key: str) -> None:
        """Remember it."""
        self.stopped.append((kind, key))


@dataclass(slots=True)
class AdminWorld:
    """What stands around the admin socket, for a test to change."""

    path: Path
    world: World = field(default_factory=World)
    merchants: FakeMerchants = field(default_factory=FakeMerchants)
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    keys: FakeKeys = field(default_factory=FakeKeys)
    audit: FakeAudit = field(default_factory=FakeAudit)
    actors: FakeActors = field(default_factory=FakeActors)
    credentials: Credentials = field(default_factory=FakeCredentials)
    importer: OlderTokens = field(default_factory=NoImport)
    revocations: RevokedJwts = field(default_factory=FakeRevocations)
    mover: KeyMover = field(default_factory=lambda: cast("KeyMover", None))
    token_life: FakeTokenLife = field(default_factory=FakeTokenLife)
    erasure: FakeErasure = field(default_factory=FakeErasure)
    operators: Operators = field(default_factory=Operators)
    key_life: Life | None = None
    environment: str = "development"
    server_ca_pem: str | None = "server ca\n"
    level: str = "info"

    def server(self) -> AdminServer:
        """An admin server that is not started."""
        clock = self.world.clock
        mint = Mint(client_secret=CLIENT_SECRET, internal_secret=INTERNAL_SECRET, clock=clock)
        return AdminServer(
            facts=Facts(
                version="9.9.9",
                environment=self.environment,
                node_id="n1",
                started_at=NOW,
                listeners={"http": "127.0.0.1:8080"},
                mqtt=("127.0.0.1", 8883),
                server_ca_pem=self.server_ca_pem,
            ),
            controls=Controls(
                drain=self._drain,
                draining=lambda: self.world.draining,
                get_level=lambda: self.level,
                set_level=self._set_level,
            ),
            operators=self.operators,
            health=self.world.health(),
            actors=self.actors,
            merchants=self.merchants,
            onboarding=self.merchants,
            registry=self.registry,
            # Where nothing gave one, no test asks for it: those of rotation have a database.
            key_life=cast("Life", self.key_life),
            keys=self.keys,
            tokens=self.world.tokens,
            audit=cast("AuditLog", self.audit),  # the rest of it is tried on a database
            credentials=self.credentials,
            importer=self.importer,
            token_life=self.token_life,
            grants=self.token_life,
            erasure=self.erasure,
            revocations=self.revocations,
            # Money is tried where a database is: `test_glamctl_ledger` and its neighbours.
            money=LedgerRoutes(cast("Ledger", None), database=cast("Database", None)),
            billing=BillingAdminRoutes(cast("Billing", None), jobs=cast("BillingJobs", None)),
            events=EventRoutes(
                relay=cast("Relay", None),
                consumers=cast("Consumers", None),
                dead_letters=cast("DeadLetters", None),
            ),
            imports=ImportRoutes(
                credits=cast("CreditImporter", None),
                billing=cast("BillingImporter", None),
                merchants=self.merchants,
                onboarding=self.merchants,
            ),
            rewrapping=RewrapRoutes(self.mover),
            mint=mint if self.environment == "development" else None,
            clock=clock,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The server while it runs."""
        server = self.server()
        await server.start(self.path)
        try:
            yield
        finally:
            await server.stop(1.0)

    async def glamctl(self, *args: str, stdin: str = "") -> Result:
        """Run glamctl against the socket, in a thread for it blocks."""
        whole = ["--socket", str(self.path), *args]
        return await asyncio.to_thread(CliRunner().invoke, glamctl, whole, input=stdin)

    def _drain(self) -> None:
        self.world.draining = True

    def _set_level(self, level: str) -> None:
        self.level = level


def failed(result: Result, status: int) -> str:
    """The one line of a command that was not done."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr.rstrip("\n")
