"""glamctl about billing, on real billing: what is not there, what is shown, what is ended."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import pytest

from glamd.admin.routes_billing import BillingAdminRoutes
from glamd.billing.model import PlatformError
from tests.support.admin_world import AdminWorld
from tests.support.billing_world import Node
from tests.support.billing_world import World as BillingWorld
from tests.support.money_world import Admin


@dataclass(slots=True)
class Desk:
    """glamctl, and billing behind it."""

    admin: Admin
    billing: BillingWorld
    node: Node


@pytest.fixture
async def desk(admin: AdminWorld, module_database_url: str) -> AsyncIterator[Desk]:
    """The socket with these routes."""
    glamctl = Admin(admin.path)
    async with BillingWorld.make(module_database_url) as billing, billing.node() as node:
        routes = BillingAdminRoutes(node.billing, jobs=node.jobs).routes()
        async with glamctl.serving(admin.world, routes):
            yield Desk(glamctl, billing, node)


async def test_a_merchant_without_a_record_is_not_shown(desk: Desk) -> None:
    for nobody in (uuid4(), "nobody"):
        told = await desk.admin.failed(1, "billing", "show", nobody)
        assert told.startswith("MERCHANT_NOT_FOUND: ")
    await desk.admin.failed(2, "billing", "show")
    await desk.admin.failed(2, "billing", "expire")


async def test_what_a_merchant_has_had_is_shown_to_people_and_to_programs(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    assert "trial available    yes" in await desk.admin.done("billing", "show", merchant_id)
    await desk.node.billing.start_trial(merchant_id, correlation_id="c-1")
    with pytest.raises(PlatformError):
        await desk.node.buy(merchant_id, platform="stripe")
    desk.billing.clock.advance(1)
    offered = await desk.node.buy(merchant_id, pack="large")
    shown = await desk.admin.told("billing", "show", merchant_id)
    assert shown["trial"] == {
        "available": False,
        "active": True,
        "started_at": "2020-11-12T10:30:00Z",
        "ends_at": "2020-11-26T10:30:00Z",
    }
    newest, oldest = shown["recent_purchases"]
    assert (newest["id"], newest["amount"], newest["currency"]) == (
        str(offered.purchase_id),
        "69.99",
        "USD",
    )
    assert (oldest["status"], oldest["failure"]) == ("failed", "NOT_CONFIGURED")
    table = await desk.admin.done("billing", "show", merchant_id)
    assert str(offered.purchase_id) in table
    # Whoever has this address sees the merchant's charge.
    assert str(offered.checkout_url) not in table + str(shown)


async def test_what_is_over_is_ended_at_once_and_once(desk: Desk) -> None:
    for _ in range(2):
        merchant_id = await desk.billing.merchant()
        await desk.node.billing.start_trial(merchant_id, correlation_id="c-1")
    await desk.node.buy(merchant_id, platform="custom")
    nothing = {"trials": 0, "purchases": 0}
    assert await desk.admin.told("billing", "expire-now") == nothing
    desk.billing.clock.advance(timedelta(days=14).total_seconds())
    assert await desk.admin.told("billing", "expire-now") == {"trials": 2, "purchases": 1}
    assert await desk.admin.told("billing", "expire-now") == nothing
    assert len(await desk.billing.events("billing.trial.expired")) == 2
    assert "trials     0" in await desk.admin.done("billing", "expire-now")
