"""Merchants, a stand-in for Shopify, and nodes that bill, all by a clock set by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self
from uuid import UUID, uuid4

from glamd.actor import System
from glamd.billing import store as billing_store
from glamd.billing.jobs import BillingJobs
from glamd.billing.model import BillingSettings, MerchantNotFoundError, Purchase, Shop
from glamd.billing.platforms.custom import Custom, CustomSettings
from glamd.billing.platforms.shopify import ShopAccess, Shopify, ShopifySettings, open_session
from glamd.billing.reconciliation import Reconciliation
from glamd.billing.service import Billing
from glamd.billing.webhooks.service import KEPT_FOR as WEBHOOKS_KEPT_FOR
from glamd.billing.webhooks.service import Webhooks
from glamd.db import Database
from glamd.embedded.demo_shopify import Charge, DemoShop
from glamd.errors import NotFoundError
from glamd.ledger import store as ledger_store
from glamd.ledger.service import Ledger
from tests.support.settable_clock import SettableClock
from tests.support.shopify import ShopifyStandIn

FAST_S: Final = 0.02
CUSTOM_SECRET: Final = "a secret of thirty-two characters"
OLD_API_SECRET: Final = "shpss_the_one_before"
TABLES: Final = (
    "webhooks",
    "credit_purchases",
    "billing_records",
    "credit_transactions",
    "credit_accounts",
    "outbox",
)


@dataclass(frozen=True, slots=True)
class Node:
    """One of several glamds, as far as billing goes; `jobs` run when a test runs them."""

    database: Database
    ledger: Ledger
    billing: Billing
    webhooks: Webhooks
    reconciliation: Reconciliation
    jobs: BillingJobs

    async def buy(self, merchant_id: UUID, **changes: Any) -> Purchase:
        """Begin to buy a medium pack at Shopify."""
        usual = {
            "pack": "medium",
            "platform": "shopify",
            "return_url": "https://app.example.com/billing",
            "correlation_id": "c-1",
        }
        return await self.billing.purchase(merchant_id, **(usual | changes))

    async def hear(self, webhook: Any) -> None:
        """Take a webhook of Shopify's."""
        await self.webhooks.take("shopify", webhook.body, webhook.headers)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """The jobs run; they must not end before."""
        job = asyncio.create_task(self.jobs.run())
        await asyncio.sleep(0)
        try:
            yield
            assert not job.done(), job
        finally:
            job.cancel()
            await asyncio.wait({job})


class World:
    """Everything but the nodes, which `node` makes."""

    def __init__(self, database: Database, url: str, shopify: ShopifyStandIn) -> None:
        self.database = database
        self.url = url
        # Before the database's own, which nothing here may be ahead of; see glamd/billing/store.py.
        self.clock = SettableClock(datetime(2020, 11, 12, 10, 30, tzinfo=UTC))
        self.shopify = shopify
        self.shops: dict[UUID, DemoShop] = {}

    @classmethod
    @asynccontextmanager
    async def make(cls, url: str, *, shopify: ShopifyStandIn | None = None) -> AsyncIterator[Self]:
        """A world on a database of which nothing is left from the test before."""
        database = await Database.connect(url, pool_size=4)
        await database.execute("; ".join(f"DELETE FROM glam.{table}" for table in TABLES))
        world = cls(database, url, shopify or ShopifyStandIn())
        async with world.shopify:
            yield world
        await database.close()

    @asynccontextmanager
    async def node(
        self,
        *,
        url: str | None = None,
        settings: BillingSettings | None = None,
        timeout_s: float = 5.0,
        is_test: bool = False,
        base_url: str | None = None,
        clock: SettableClock | None = None,
        pool_size: int = 4,
        webhooks_kept_for: timedelta = WEBHOOKS_KEPT_FOR,
    ) -> AsyncIterator[Node]:
        """A node with connections of its own, and maybe a clock."""
        clock = clock or self.clock
        database = await Database.connect(
            url or self.url, pool_size=pool_size, statement_timeout_s=2.0
        )
        system = System()
        ledger = Ledger(database, system=system, clock=clock)
        async with open_session(connections=16) as session:
            shopify = Shopify(
                ShopifySettings(
                    api_secrets=(self.shopify.api_secret, OLD_API_SECRET),
                    base_url=base_url or self.shopify.url,
                    timeout_s=timeout_s,
                    is_test=is_test,
                ),
                session=session,
                access_of=self._access_of,
            )
            custom = Custom(
                CustomSettings(checkout_url="https://pay.example.com/", secrets=(CUSTOM_SECRET,))
            )
            platforms = (shopify, custom)
            billing = Billing(
                database,
                ledger=ledger,
                platforms=platforms,
                shop_of=self._shop_of,
                clock=clock,
                settings=settings or BillingSettings(return_hosts=frozenset({"app.example.com"})),
            )
            webhooks = Webhooks(
                database,
                settlement=billing.settlement,
                platforms=platforms,
                clock=clock,
                kept_for=webhooks_kept_for,
            )
            reconciliation = Reconciliation(
                database, settlement=billing.settlement, platforms=platforms, clock=clock
            )
            jobs = BillingJobs(
                database,
                webhooks=webhooks,
                reconciliation=reconciliation,
                clock=clock,
                expiry_interval_s=FAST_S,
                reconciliation_interval_s=FAST_S,
                webhook_interval_s=FAST_S,
            )
            try:
                yield Node(database, ledger, billing, webhooks, reconciliation, jobs)
            finally:
                await system.drain(1.0)
                await database.close()

    async def merchant(self, *, installed: bool = True) -> UUID:
        """A merchant with a record, an account, and a shop that has installed our app."""
        merchant_id = uuid4()
        number = 548_380_000 + len(self.shops)
        shop = DemoShop(f"shop-{number}.myshopify.com", number)
        if installed:
            shop = self.shopify.install(shop.domain, number)
        self.shops[merchant_id] = shop
        async with self.database.transaction() as connection:
            await billing_store.open_record(connection, merchant_id, self.clock.now())
            await ledger_store.open_account(
                connection,
                merchant_id=merchant_id,
                platform_name="shopify",
                platform_id=f"gid://shopify/Shop/{number}",
                platform_domain=shop.domain,
                now=self.clock.now(),
            )
        return merchant_id

    async def balance(self, merchant_id: UUID) -> int:
        """The merchant's balance as it is committed."""
        sql = "SELECT balance FROM glam.credit_accounts WHERE merchant_id = $1"
        return int(await self.database.fetchval(sql, merchant_id))

    async def events(self, subject: str) -> list[dict[str, Any]]:
        """The data of all events with this subject, `evt.` and `.v1` left out."""
        sql = "SELECT data FROM glam.outbox WHERE subject = $1 ORDER BY id"
        return [row[0] for row in await self.database.fetch(sql, f"evt.{subject}.v1")]

    async def purchase(self, purchase_id: UUID) -> dict[str, Any]:
        """The purchase's row."""
        sql = "SELECT * FROM glam.credit_purchases WHERE purchase_id = $1"
        row = await self.database.fetchrow(sql, purchase_id)
        assert row is not None
        return dict(row)

    async def purchases(self) -> list[dict[str, Any]]:
        """All rows of purchases."""
        sql = "SELECT * FROM glam.credit_purchases ORDER BY created_at, purchase_id"
        return [dict(row) for row in await self.database.fetch(sql)]

    async def outcomes(self) -> list[str | None]:
        """What has come of webhooks, in the order of their arrival."""
        sql = "SELECT outcome FROM glam.webhooks ORDER BY id"
        return [row[0] for row in await self.database.fetch(sql)]

    def paid(self, purchase: Purchase) -> Charge:
        """The merchant pays a purchase."""
        charge = self.shopify.charge(purchase.platform_charge_id)
        charge.status = "ACTIVE"
        return charge

    async def _shop_of(self, merchant_id: UUID) -> Shop:
        shop = self.shops.get(merchant_id)
        if shop is None:
            raise MerchantNotFoundError
        return Shop(shop_id=f"gid://shopify/Shop/{shop.number}", domain=shop.domain)

    async def _access_of(self, merchant_id: UUID) -> ShopAccess:
        shop = self.shops.get(merchant_id)
        if shop is None or shop not in self.shopify.shops:
            raise NotFoundError("There is no such platform token.", code="PLATFORM_TOKEN_NOT_FOUND")
        return ShopAccess(
            domain=shop.domain, shop_id=str(shop.number), access_token=shop.access_token
        )
