"""THE composition root: who is built from what, in which order, and how it all ends.

`running` enters every part into one AsyncExitStack and leaves it backwards, so that the order of
the start is the order of the drain, reversed. The chapters about keys and card data stand in
`app_vault`, those about money in `app_money`, for length. Nothing decides anything here, and
nothing else in glamd builds its own collaborators.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Final, TypeAlias

import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from device_gateway import session
from device_gateway.gateway import Gateway
from device_gateway.mqtt.endpoint import Endpoint
from device_gateway.presence import Presence
from device_gateway.registry import Registry
from device_gateway.session import SessionParts
from device_gateway.submissions import Submissions
from device_gateway.watch import StatusWatch
from glamd import __version__, app_money, app_vault, config, logs, metrics, wiring
from glamd.actor import ActorCollector, System
from glamd.admin import migrate
from glamd.admin.minting import Mint
from glamd.admin.peers import Operators
from glamd.admin.routes_billing import BillingAdminRoutes
from glamd.admin.routes_daemon import Controls, Facts
from glamd.admin.routes_events import EventRoutes
from glamd.admin.routes_ledger import LedgerRoutes
from glamd.admin.server import AdminServer
from glamd.clock import SystemClock
from glamd.credentials.importing.service import Importer
from glamd.credentials.refresh.service import Refresher
from glamd.credentials.service import PlatformTokens
from glamd.crypto.aead import Sealer
from glamd.db import Database
from glamd.errors import ConfigError, GlamError, TransientError
from glamd.http.auth import Authenticator
from glamd.http.health import Health, Part
from glamd.http.limits import RateLimiter
from glamd.http.server import ApiServer
from glamd.http.worker import WorkerServer
from glamd.idempotency import IdempotencyKeys
from glamd.keys.key_sets.service import Keys
from glamd.lifetime import Lifetime, spare_the_collector
from glamd.merchants.service import Merchants
from glamd.onboarding import Onboarding
from glamd.payments import cipher
from glamd.revocations.service import Revocations

log = structlog.get_logger()

PURGE_EVERY_S: Final = 60.0

Reload: TypeAlias = Callable[[config.Settings], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Daemon:
    """A daemon that runs: where it listens, and the parts that whoever started it may use."""

    merchants: Merchants
    onboarding: Onboarding
    registry: Registry
    keys: Keys
    platform_tokens: PlatformTokens
    http_port: int
    worker_port: int | None
    mqtt_port: int
    stop_requested: asyncio.Event
    reload: Reload
    """Uses these settings' certificates, JWT keys and grants; ConfigError changes nothing."""


@asynccontextmanager
async def running(
    settings: config.Settings,
    stop_requested: asyncio.Event,
    *,
    registry: CollectorRegistry = REGISTRY,
) -> AsyncIterator[Daemon]:
    """Start the daemon; leaving the context drains and ends it.

    `stop_requested` is set by whoever wants it to end: a signal, an operator, or the daemon itself
    when a part of it has died. `registry` is where its own collectors go; a second daemon in one
    process needs another. Raises ConfigError for what an operator must mend, UnavailableError
    for what may pass.
    """
    async with AsyncExitStack() as stack:
        assembly = _Assembly(settings, stack, stop_requested, registry)
        daemon = await assembly.start()
        spare_the_collector()
        log.info("daemon_ready", http_port=daemon.http_port, mqtt_port=daemon.mqtt_port)
        yield daemon
        assembly.begin_drain()


class _Assembly:
    """Builds the parts in order; its methods are the chapters of the start."""

    def __init__(
        self,
        settings: config.Settings,
        stack: AsyncExitStack,
        stop_requested: asyncio.Event,
        registry: CollectorRegistry,
    ) -> None:
        self._collectors = registry
        self._settings = settings
        self._stack = stack
        self._clock = SystemClock()
        self._stop_requested = stop_requested
        self._started_at = self._clock.now()
        self.lifetime = Lifetime(
            stack,
            clock=self._clock,
            drain_timeout_s=settings.drain_timeout_s,
            stop_requested=stop_requested,
        )

    async def start(self) -> Daemon:
        await self._databases()
        await self._key_material()
        self._relaying = app_money.start_relaying(
            self._settings,
            glam=self._glam,
            cde=self._cde,
            lifetime=self.lifetime,
            clock=self._clock,
        )
        await self._payments()
        await self._devices()
        await self._shops()
        self._life()
        self._billing()
        await self._identity()
        await self._http()
        await self._admin()
        self._jobs()
        return Daemon(
            merchants=self._merchants,
            onboarding=self._money.onboarding,
            registry=self._registry,
            keys=self._keys,
            platform_tokens=self._platform_tokens,
            http_port=self._http_port,
            worker_port=self._worker_port,
            mqtt_port=self._endpoint.port,
            stop_requested=self._stop_requested,
            reload=self._reload,
        )

    def begin_drain(self) -> None:
        """Turn readiness off, and begin nothing more that an outsider would have to wait for."""
        self.lifetime.begin_drain()
        self._refresher.pause()

    async def _databases(self) -> None:
        urls = self._settings.database
        cde_url = urls.cde_url.get_secret_value()
        glam_url = urls.url.get_secret_value()
        self._cde = await self._database(cde_url, "cde")
        self._glam = self._cde if cde_url == glam_url else await self._database(glam_url, "glam")

    async def _database(self, url: str, name: str) -> Database:
        limits = self._settings.database
        database = await Database.connect(
            url,
            pool_size=limits.pool_size,
            statement_timeout_s=limits.statement_timeout_s,
            connect_timeout_s=limits.connect_timeout_s,
            name=f"glamd-{name}",
            role=limits.role,
        )
        self._stack.push_async_callback(database.close)
        found = migrate.compare(await database.schema_revision())
        if found.relation is not migrate.Relation.SAME:
            raise ConfigError(
                f"The schema of the {name} database is at {found.current or 'nothing'}, this "
                f"glamd needs {found.expected}: {found.mend}"
            )
        return database

    async def _key_material(self) -> None:
        self._material = material = await app_vault.open_keys(
            self._settings,
            cde=self._cde,
            glam=self._glam,
            lifetime=self.lifetime,
            stack=self._stack,
            clock=self._clock,
        )
        self._keyrings = material.keyrings
        self._audit = material.audit
        self._keys = material.keys
        self._merchants = Merchants(glam=self._glam, cde=self._cde, clock=self._clock)

    async def _payments(self) -> None:
        settings = self._settings
        self._cards = cards = await app_vault.open_cards(
            settings, self._material, cde=self._cde, lifetime=self.lifetime, clock=self._clock
        )
        self._vault = cards.vault
        self._tokens = cards.tokens
        self._detokenizer = cards.detokenizer
        self._system = System(clock=self._clock)
        self._ledger = await app_money.start_ledger(
            settings,
            glam=self._glam,
            system=self._system,
            lifetime=self.lifetime,
            clock=self._clock,
            committed=partial(self._relaying.relay.wake, "glam"),
            observe=self._material.glam_throttle.observe,
        )
        self.lifetime.at_drain(self._system.drain)
        metrics.register(ActorCollector(self._system), self._stack, self._collectors)

    async def _shops(self) -> None:
        settings = self._settings.credentials
        keyring = self._material.platform_tokens
        self._refresher = Refresher(
            self._glam,
            keyring=keyring,
            platforms=wiring.oauth(self._settings),
            clock=self._clock,
            node_id=self._settings.node_id,
            interval_s=settings.refresh_interval_s,
            concurrency=settings.refresh_concurrency,
        )
        self._platform_tokens = PlatformTokens(
            self._glam, keyring=keyring, clock=self._clock, renew=self._refresher.renew
        )
        key = settings.import_key
        self._importer = Importer(
            self._glam,
            keyring=keyring,
            key_text=None if key is None else key.get_secret_value(),
            clock=self._clock,
        )

    def _life(self) -> None:
        self._vault_jobs = app_vault.build_jobs(
            self._settings,
            self._material,
            self._cards,
            cde=self._cde,
            glam=self._glam,
            platform_tokens=self._platform_tokens,
            clock=self._clock,
        )

    def _billing(self) -> None:
        self._money = app_money.build_money(
            self._settings,
            glam=self._glam,
            ledger=self._ledger,
            merchants=self._merchants,
            platform_tokens=self._platform_tokens,
            relaying=self._relaying,
            stack=self._stack,
            clock=self._clock,
        )

    def _jobs(self) -> None:
        """Begin what acts by itself, now that nothing of the start can fail any more.

        A platform that was asked for a new pair must find somebody here who keeps it.
        """
        self.lifetime.task(self._refresher.run(), "refresh")
        self.lifetime.at_drain(self._refresher.stop)
        self.lifetime.job(self._idempotency.purge, every_s=PURGE_EVERY_S, name="idempotency-purge")
        accesses = self._platform_tokens.purge
        self.lifetime.job(accesses, every_s=PURGE_EVERY_S, name="access-log-purge")
        self._vault_jobs.begin(self.lifetime)
        consume = self._settings.events.consume
        self._money.begin(self.lifetime, self._relaying, consume=consume)

    async def _identity(self) -> None:
        auth = self._settings.auth
        self._revocations = Revocations(self._glam, clock=self._clock)
        await self._revocations.load()
        self.lifetime.task(self._revocations.run(), "revocations")
        self._authenticator = Authenticator(
            **wiring.jwt_keys(auth),
            require_audience=auth.require_audience,
            merchant_by_domain=self._merchants.by_domain,
            clock=self._clock,
            is_revoked=self._revocations.is_revoked,
            max_lifetime_s=auth.max_lifetime_h * 3600,
        )

    def _session_parts(self) -> SessionParts:
        keyring = self._keyrings.payment_tokens

        def active_key() -> tuple[str, Sealer]:
            key = keyring.active
            return key.version, key.sealer

        return SessionParts(
            database=self._cde,
            vault=self._vault,
            system=self._system,
            cipher=cipher.spec(
                initial_key=self._keys.initial_key,
                active_key=active_key,
                fingerprint_key=self._keyrings.fingerprints.active.key,
            ),
            clock=self._clock,
            reload_keys=keyring.reload,
            default_ttl=timedelta(hours=self._settings.payments.default_token_ttl_h),
            rate_per_s=self._settings.mqtt.rate_limit_per_s,
            rate_burst=self._settings.mqtt.rate_burst,
        )

    async def _devices(self) -> None:
        settings = self._settings
        presence = Presence(self._cde, node_id=settings.node_id, clock=self._clock)
        self.lifetime.at_drain(partial(_flushed, presence))
        self.lifetime.task(presence.run(), "presence")
        self.lifetime.task(metrics.LoopLag(self._clock).run(), "loop-lag")
        self._gateway = Gateway(
            self._cde,
            system=self._system,
            sessions=session.spec(self._session_parts()),
            presence=presence,
        )
        watch = StatusWatch(
            self._cde, interval_s=settings.devices.status_poll_s, changed=self._gateway.changed
        )
        self.lifetime.task(watch.run(), "device-watch")
        self._authority = wiring.authority(settings.devices)
        self._registry = Registry(
            self._cde,
            keys=self._keys,
            authority=self._authority,
            clock=self._clock,
            changed=self._gateway.changed,
            export_initial_keys=settings.environment == "development",
        )
        mqtt = settings.mqtt
        self._endpoint = Endpoint(
            gateway=self._gateway,
            limits=wiring.endpoint_limits(mqtt),
            ssl_context=wiring.mqtt_tls(mqtt),
            clock=self._clock,
            registry=self._collectors,
        )
        self._gateway.attach(self._endpoint)
        await self._endpoint.start(mqtt.host, mqtt.port)
        self.lifetime.at_drain(self._endpoint.stop)

    async def _reload(self, settings: config.Settings) -> None:
        """Use the certificates, JWT keys and workers' grants of `settings` from now on.

        All of them are read before any is used. Raises ConfigError.
        """
        mqtt = wiring.mqtt_tls(settings.mqtt)
        api = wiring.api_tls(settings.http)
        worker = None
        if settings.worker.enabled:
            worker = wiring.worker_tls(settings.worker, settings.mqtt)
        grants = wiring.grants(settings.worker)
        self._authenticator.replace_keys(**wiring.jwt_keys(settings.auth))
        self._endpoint.replace_tls(mqtt)
        if api is not None and self._settings.http.tls_cert is not None:
            await self._api.replace_tls(api)
        if worker is not None and self._worker_port is not None:
            await self._worker.replace_tls(worker)
        self._detokenizer.replace_grants(grants)

    async def _admin(self) -> None:
        settings = self._settings
        listeners = {
            "http": f"{settings.http.host}:{self._http_port}",
            "mqtt": f"{settings.mqtt.host}:{self._endpoint.port}",
        }
        if self._worker_port is not None:
            listeners["worker"] = f"{settings.worker.host}:{self._worker_port}"
        admin = AdminServer(
            facts=Facts(
                version=__version__,
                environment=settings.environment,
                node_id=settings.node_id,
                started_at=self._started_at,
                listeners=listeners,
                mqtt=(wiring.public_host(settings.mqtt), self._endpoint.port),
                server_ca_pem=self._authority.server_ca_pem,
            ),
            controls=Controls(
                drain=self._stop_requested.set,
                draining=self.lifetime.is_draining,
                get_level=logs.get_level,
                set_level=logs.set_level,
            ),
            operators=Operators.named(
                group=settings.admin.group, users=settings.admin.allowed_users
            ),
            health=self._health,
            actors=self._system,
            merchants=self._merchants,
            onboarding=self._money.onboarding,
            registry=self._registry,
            keys=self._keys,
            key_life=self._vault_jobs.key_life,
            rewrapping=self._material.rewrapping,
            token_life=self._cards.life,
            grants=self._detokenizer,
            erasure=self._vault_jobs.erasure,
            tokens=self._tokens,
            audit=self._audit,
            credentials=self._platform_tokens,
            importer=self._importer,
            revocations=self._revocations,
            money=LedgerRoutes(self._ledger, database=self._glam),
            billing=BillingAdminRoutes(self._money.billing, jobs=self._money.jobs),
            imports=self._money.imports,
            events=EventRoutes(
                relay=self._relaying.relay,
                consumers=self._money.consumers,
                dead_letters=self._money.dead_letters,
            ),
            mint=self._mint(),
            clock=self._clock,
        )
        await admin.start(settings.admin.socket)
        self._stack.push_async_callback(admin.stop)

    def _mint(self) -> Mint | None:
        auth = self._settings.auth
        if self._settings.environment != "development":
            return None
        if not (auth.client_secrets and auth.internal_secrets):
            return None
        return Mint(
            client_secret=auth.client_secrets[0].get_secret_value(),
            internal_secret=auth.internal_secrets[0].get_secret_value(),
            clock=self._clock,
        )

    async def _http(self) -> None:
        settings = self._settings
        parts = [
            Part(name="database", required=True, check=_check(self._cde.health)),
            Part(
                name="key-provider", required=False, check=_check(self._material.providers.health)
            ),
            Part(name="nats", required=False, check=self._relaying.check),
        ]
        if self._glam is not self._cde:
            other = Part(name="database-glam", required=True, check=_check(self._glam.health))
            parts.append(other)
        health = Health(
            parts=parts,
            draining=self.lifetime.is_draining,
            clock=self._clock,
        )
        self._health = health
        limiter = RateLimiter(
            rate_per_s=settings.http.rate_limit_per_s,
            burst=settings.http.rate_burst,
            clock=self._clock,
        )
        self._idempotency = IdempotencyKeys(self._glam)
        submissions = Submissions(self._gateway)
        self._api = ApiServer(
            tokens=self._tokens,
            submissions=submissions,
            platform_tokens=self._platform_tokens,
            readers=settings.credentials.readers,
            ledger=self._ledger,
            billing=self._money.billing,
            webhooks=self._money.webhooks,
            idempotency=self._idempotency,
            authenticator=self._authenticator,
            health=health,
            limiter=limiter,
            trusted_proxies=settings.http.trusted_proxies,
            cors_origins=settings.http.cors_origins,
            draining=self.lifetime.is_draining,
            clock=self._clock,
        )
        self._http_port = await self._api.start(
            settings.http.host, settings.http.port, wiring.api_tls(settings.http)
        )
        self.lifetime.at_drain(self._api.stop)
        self._worker_port: int | None = None
        if settings.worker.enabled:
            self._worker = WorkerServer(
                detokenizer=self._detokenizer,
                submissions=submissions,
                trust_domain=settings.worker.trust_domain,
                health=health,
                limiter=limiter,
                draining=self.lifetime.is_draining,
                clock=self._clock,
            )
            self._worker_port = await self._worker.start(
                settings.worker.host,
                settings.worker.port,
                wiring.worker_tls(settings.worker, settings.mqtt),
            )
            self.lifetime.at_drain(self._worker.stop)


async def _flushed(presence: Presence, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await presence.flush()
    except (TransientError, TimeoutError):
        log.warning("presence_unwritten")


def _check(health: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[str | None]]:
    async def check() -> str | None:
        try:
            await health()
        except GlamError as error:
            return error.message
        return None

    return check
