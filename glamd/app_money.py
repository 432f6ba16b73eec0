"""The chapters of the start about money: the bus and the relay, credits, billing, the consumers.

A part of the composition root (`glamd.app`), which says when each of them is called. Nothing is
decided here.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID, uuid4

from glamd import config, wiring
from glamd.actor import System
from glamd.admin.routes_import import ImportRoutes
from glamd.billing.importing.service import BillingImporter
from glamd.billing.jobs import BillingJobs
from glamd.billing.model import Shop
from glamd.billing.platforms.custom import Custom
from glamd.billing.platforms.interface import Platform
from glamd.billing.platforms.shopify import ShopAccess, Shopify, open_session
from glamd.billing.reconciliation import Reconciliation
from glamd.billing.service import Billing
from glamd.billing.webhooks.service import Webhooks
from glamd.clock import Clock
from glamd.credentials.model import ACCESS_TOKEN, Accessor
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.errors import NotFoundError, UnavailableError
from glamd.events.bus import Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.handlers import subscriptions
from glamd.events.relay import Relay
from glamd.ledger.importing.service import CreditImporter
from glamd.ledger.service import Ledger
from glamd.lifetime import Lifetime
from glamd.merchants.service import Merchants
from glamd.onboarding import Onboarding

SHOPIFY_CONNECTIONS: Final = 16
HOUR_S: Final = 3600
PURGE_EVERY_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaying:
    """Events on their way out."""

    bus: Bus
    relay: Relay

    async def check(self) -> str | None:
        """Why no event leaves now; None where they do."""
        return self.bus.trouble()


def start_relaying(
    settings: config.Settings, *, glam: Database, cde: Database, lifetime: Lifetime, clock: Clock
) -> Relaying:
    """Connect to NATS and publish what the outboxes hold, for as long as anything writes there."""
    events = settings.events
    bus = Bus(
        [server.get_secret_value() for server in events.servers],
        name=f"glamd-{settings.node_id}",
        user=events.user,
        password=None if events.password is None else events.password.get_secret_value(),
        token=None if events.token is None else events.token.get_secret_value(),
        tls=wiring.bus_tls(events),
        stream_max_age_s=events.stream_max_age_h * HOUR_S,
        stream_replicas=events.stream_replicas,
    )
    relay = Relay(
        bus,
        databases={"cde": cde, "glam": glam},
        clock=clock,
        replay_window=timedelta(hours=events.replay_window_h),
        poll_s=events.poll_s,
    )
    lifetime.task(bus.run(), "bus")
    lifetime.task(relay.run(), "relay")
    lifetime.at_drain(relay.stop)
    return Relaying(bus=bus, relay=relay)


async def start_ledger(
    settings: config.Settings,
    *,
    glam: Database,
    system: System,
    lifetime: Lifetime,
    clock: Clock,
    committed: Callable[[], None],
    observe: Callable[[float], None],
) -> Ledger:
    """The credits of all merchants; its actors are drained before its commits end."""
    ledger = Ledger(
        glam,
        system=system,
        clock=clock,
        low_balance_threshold=settings.credits.low_balance_threshold,
        connections=settings.ledger.commit_connections,
        batch_limit=settings.ledger.commit_batch_limit,
        committed=committed,
        observe=observe,
    )
    await ledger.start()
    lifetime.at_drain(ledger.stop)
    return ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """Trials, purchases, webhooks and what comes in over the bus."""

    billing: Billing
    webhooks: Webhooks
    jobs: BillingJobs
    onboarding: Onboarding
    consumers: Consumers
    dead_letters: DeadLetters
    imports: ImportRoutes

    def begin(self, lifetime: Lifetime, relaying: Relaying, *, consume: bool) -> None:
        """Begin what acts by itself; consuming ends first and is seen off before all else."""
        lifetime.task(self.jobs.run(), "billing")
        lifetime.job(self.dead_letters.purge, every_s=PURGE_EVERY_S, name="dead-letter-purge")
        if consume:
            lifetime.task(self.consumers.run(), "consumers")
            lifetime.at_drain(self.consumers.stop)
        relaying.relay.wake()


def build_money(
    settings: config.Settings,
    *,
    glam: Database,
    ledger: Ledger,
    merchants: Merchants,
    platform_tokens: PlatformTokens,
    relaying: Relaying,
    stack: AsyncExitStack,
    clock: Clock,
) -> Money:
    """Billing on the ledger, with the platforms that are configured."""
    platforms = _platforms(settings, platform_tokens, stack)
    billing = Billing(
        glam,
        ledger=ledger,
        platforms=platforms,
        shop_of=_shop_of(merchants),
        clock=clock,
        settings=wiring.billing(settings),
    )
    webhooks = Webhooks(
        glam,
        settlement=billing.settlement,
        platforms=platforms,
        clock=clock,
        kept_for=timedelta(days=settings.billing.webhook_retention_days),
    )
    reconciliation = Reconciliation(
        glam, settlement=billing.settlement, platforms=platforms, clock=clock
    )
    onboarding = Onboarding(glam=glam, merchants=merchants, billing=billing, ledger=ledger)
    consumed = subscriptions(onboarding=onboarding, ledger=ledger, billing=billing)
    dead_letters = DeadLetters(glam, subscriptions=consumed, clock=clock)
    return Money(
        billing=billing,
        webhooks=webhooks,
        jobs=BillingJobs(glam, webhooks=webhooks, reconciliation=reconciliation, clock=clock),
        onboarding=onboarding,
        consumers=Consumers(
            relaying.bus,
            subscriptions=consumed,
            dead_letters=dead_letters,
            in_flight=settings.events.in_flight,
            start_at=settings.events.start_at,
        ),
        dead_letters=dead_letters,
        imports=ImportRoutes(
            credits=CreditImporter(glam, ledger=ledger, clock=clock),
            billing=BillingImporter(glam, clock=clock),
            merchants=merchants,
            onboarding=onboarding,
        ),
    )


def _platforms(
    settings: config.Settings, platform_tokens: PlatformTokens, stack: AsyncExitStack
) -> tuple[Platform, ...]:
    found: list[Platform] = []
    shopify, custom = wiring.shopify(settings), wiring.custom(settings)
    if shopify is not None:
        session = open_session(connections=SHOPIFY_CONNECTIONS)
        stack.push_async_callback(session.close)
        access_of = _access_of(platform_tokens)
        found.append(Shopify(shopify, session=session, access_of=access_of))
    if custom is not None:
        found.append(Custom(custom))
    return tuple(found)


def _shop_of(merchants: Merchants) -> Callable[[UUID], Awaitable[Shop]]:
    async def shop_of(merchant_id: UUID) -> Shop:
        merchant = await merchants.show(merchant_id)
        return Shop(shop_id=merchant.shop_id, domain=merchant.domain)

    return shop_of


def _access_of(platform_tokens: PlatformTokens) -> Callable[[UUID], Awaitable[ShopAccess]]:
    """The shop's access token out of the vault, which writes down that we have read it."""

    async def access_of(merchant_id: UUID) -> ShopAccess:
        request_id = f"billing-{uuid4()}"
        reader = Accessor(
            kind="glamd",
            name="billing",
            ip="-",
            request_id=request_id,
            correlation_id=request_id,
        )
        found = await platform_tokens.read(merchant_id, platform="shopify", accessor=reader)
        if found.undecryptable:
            raise UnavailableError("The shop's platform token cannot be opened.")
        for token in found.tokens:
            secret = token.secret.data.get(ACCESS_TOKEN)
            if isinstance(secret, str) and secret:
                shop = token.connection
                return ShopAccess(
                    domain=shop.domain, shop_id=shop.platform_shop_id, access_token=secret
                )
        raise NotFoundError("There is no token of the shop.", code="PLATFORM_TOKEN_NOT_FOUND")

    return access_of
