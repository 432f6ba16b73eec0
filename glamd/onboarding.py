"""A merchant from nothing to ready: its rows in both schemas, its billing record, its account.

The one way in, for `glamctl merchant create` and for `evt.merchant.created.v1` alike. Above the
rooms whose things it opens, since they do not know one another; no rule and no SQL of its own.
"""

from uuid import UUID

import structlog

from glamd.billing.service import Billing
from glamd.db import Database
from glamd.ledger.service import Ledger
from glamd.merchants.service import Merchants
from glamd.merchants.store import Merchant

log = structlog.get_logger()


class Onboarding:
    """Makes merchants that can be billed; `glam` is where records and accounts are."""

    def __init__(
        self, *, glam: Database, merchants: Merchants, billing: Billing, ledger: Ledger
    ) -> None:
        self._glam = glam
        self._merchants = merchants
        self._billing = billing
        self._ledger = ledger

    async def create(
        self, *, platform: str, shop_id: str, domain: str, merchant_id: UUID | None = None
    ) -> Merchant:
        """Make a merchant, its empty billing record and its empty credit account; each once.

        There is no transaction over both schemas: whatever a crash has left out is made when the
        same is asked again, and what is there stays as it is. Errors are those of
        `Merchants.create`, and UnavailableError.
        """
        merchant = await self._merchants.create(
            platform=platform, shop_id=shop_id, domain=domain, merchant_id=merchant_id
        )
        async with self._glam.transaction() as connection:
            recorded = await self._billing.merchant_created(connection, merchant.merchant_id)
            opened = await self._ledger.open_account(
                connection,
                merchant_id=merchant.merchant_id,
                platform_name=merchant.platform,
                platform_id=merchant.shop_id,
                platform_domain=merchant.domain,
            )
        if recorded or opened:
            log.info("merchant_ready", merchant_id=str(merchant.merchant_id))
        return merchant
