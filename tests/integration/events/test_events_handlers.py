"""The five consumed events on a real ledger and a real billing: each has its effect, once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID, uuid4

import orjson
import pytest
from nats.aio.client import Client

from glamd.db import Database
from glamd.errors import ConflictError, GlamError, InputError, NotFoundError, UnavailableError
from glamd.events import handlers
from glamd.events.bus import Bus
from glamd.events.consumer import Consumers
from glamd.events.dead_letters import DeadLetters
from glamd.events.subscription import Subscription, may_pass
from glamd.ledger.verify import verify
from glamd.merchants.service import Merchants
from glamd.onboarding import Onboarding
from tests.support.billing_world import Node, World
from tests.support.database_proxy import DatabaseProxy
from tests.support.events_world import running
from tests.support.postgres import eventually

CREATED = "evt.merchant.created.v1"
TRIAL = "evt.billing.trial.started.v1"
PURCHASED = "evt.billing.credits.purchased.v1"
MATCH = "evt.ai.match.completed.v1"
UPDATED = "evt.webhook.app.purchase_updated.v1"
TRIAL_CREDITS = 500

OWNED = ("glam.merchants", "cde.merchants", "glam.billing_records", "glam.credit_accounts")


@dataclass(frozen=True)
class Desk:
    """The handlers of a node, to which a test gives events as JetStream would."""

    world: World
    node: Node
    subscriptions: tuple[Subscription, ...]

    async def take(self, subject: str, **data: object) -> None:
        """Handle one event; its error is raised."""
        found = {each.subject: each for each in self.subscriptions}
        job = found[subject].read(orjson.dumps(data, default=str), {"Nats-Msg-Id": "e-1"})
        assert job is not None
        await job.run()

    async def refused(self, subject: str, **data: object) -> GlamError:
        """The error of an event that is not applied."""
        with pytest.raises(GlamError) as raised:
            await self.take(subject, **data)
        return raised.value

    async def made(self, credits_: int = 0) -> UUID:
        """A merchant by its own event, with so many credits."""
        merchant_id = uuid4()
        await self.take(CREATED, **a_shop(merchant_id))
        if credits_:
            await self.take(
                PURCHASED, merchant_id=merchant_id, purchase_id="first", credits=credits_
            )
        return merchant_id

    async def counts(self, merchant_id: UUID) -> tuple[int, ...]:
        """How many rows each of the tables has that know a merchant by its id."""
        database = self.world.database
        return tuple(
            [
                await database.fetchval(
                    f"SELECT count(*) FROM {table} WHERE merchant_id = $1", merchant_id
                )
                for table in OWNED
            ]
        )

    async def references(self, merchant_id: UUID) -> list[tuple[str, str, str, int]]:
        """The merchant's transactions: operation, reference, amount."""
        rows = await self.world.database.fetch(
            "SELECT operation, reference_type, reference_id, amount FROM glam.credit_transactions"
            " WHERE merchant_id = $1 ORDER BY seq",
            merchant_id,
        )
        return [tuple(row) for row in rows]


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    """An empty database, merchants included."""
    async with World.make(database_url) as made:
        await made.database.execute("DELETE FROM glam.merchants; DELETE FROM cde.merchants")
        yield made


@pytest.fixture
async def node(world: World) -> AsyncIterator[Node]:
    """A node whose ledger runs."""
    async with world.node() as made:
        await made.ledger.start()
        yield made
        await made.ledger.stop(1.0)


def desk_of(world: World, node: Node, *, cde: Database | None = None) -> Desk:
    """The handlers of this node, with card data there or on the same server."""
    merchants = Merchants(glam=node.database, cde=cde or node.database, clock=world.clock)
    onboarding = Onboarding(
        glam=node.database, merchants=merchants, billing=node.billing, ledger=node.ledger
    )
    return Desk(
        world,
        node,
        handlers.subscriptions(
            onboarding=onboarding,
            ledger=node.ledger,
            billing=node.billing,
        ),
    )


@pytest.fixture
def desk(world: World, node: Node) -> Desk:
    """The handlers of the node."""
    return desk_of(world, node)


def a_shop(merchant_id: UUID) -> dict[str, object]:
    """A merchant's event, with a shop of its own."""
    return {
        "merchant_id": merchant_id,
        "platform": "shopify",
        "shop_domain": f"Shop-{merchant_id}.example.com",
        "shop_gid": f"gid://shopify/Shop/{merchant_id}",
    }


def a_match(merchant_id: UUID, match_id: str = "m-1") -> dict[str, object]:
    """The event of a match."""
    return {
        "merchant_id": merchant_id,
        "match_id": match_id,
        "shopper_id": "s-1",
        "matched_items_count": 3,
    }


@asynccontextmanager
async def consuming(desk: Desk, bus: Bus) -> AsyncIterator[DeadLetters]:
    """The desk's handlers behind JetStream; what fails is tried again almost at once."""
    letters = DeadLetters(
        desk.world.database, subscriptions=desk.subscriptions, clock=desk.world.clock
    )
    consumers = Consumers(
        bus,
        subscriptions=desk.subscriptions,
        dead_letters=letters,
        retry_delays_s=(0.05,) * 9,
    )
    async with running(consumers):
        yield letters


async def publish(client: Client, subject: str, **data: object) -> None:
    """Publish an event as another service does."""
    await client.jetstream().publish(subject, orjson.dumps(data, default=str))


# ---- evt.merchant.created.v1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"platform": "Shopify"}, "platform"),
        ({"platform": "etsy"}, "platform"),
        ({"shop_domain": "https://shop.example.com/"}, "domain"),
        ({"shop_domain": "localhost"}, "domain"),
    ],
)
async def test_a_merchant_that_cannot_be_is_refused_for_good_and_leaves_nothing(
    desk: Desk, changes: dict[str, object], field: str
) -> None:
    merchant_id = uuid4()
    error = await desk.refused(CREATED, **a_shop(merchant_id) | changes)
    assert isinstance(error, InputError)
    assert not may_pass(error)
    assert [each.field for each in error.fields] == [field]
    assert await desk.counts(merchant_id) == (0, 0, 0, 0)


async def test_a_shop_or_domain_of_another_merchant_is_refused_for_good_and_named(
    desk: Desk,
) -> None:
    first = await desk.made()
    for taken, field in (("shop_domain", "domain"), ("shop_gid", "shop_id")):
        second = uuid4()
        shop = a_shop(second) | {taken: a_shop(first)[taken]}
        error = await desk.refused(CREATED, **shop)
        assert isinstance(error, ConflictError)
        assert not may_pass(error)
        assert (error.code, [each.field for each in error.fields]) == ("MERCHANT_EXISTS", [field])
        assert await desk.counts(second) == (0, 0, 0, 0)


async def test_a_merchant_that_comes_again_with_another_domain_is_refused_and_stays(
    desk: Desk,
) -> None:
    merchant_id = await desk.made()
    error = await desk.refused(
        CREATED, **a_shop(merchant_id) | {"shop_domain": "elsewhere.example.com"}
    )
    assert error.code == "MERCHANT_EXISTS"
    account = await desk.node.ledger.account(merchant_id)
    assert account.platform_domain == f"shop-{merchant_id}.example.com"


@pytest.mark.parametrize("made", range(len(OWNED)))
async def test_whatever_a_crash_left_out_is_made_when_the_event_comes_again(
    desk: Desk, made: int
) -> None:
    merchant_id = await desk.made()
    for table in OWNED[made:]:
        await desk.world.database.execute(
            f"DELETE FROM {table} WHERE merchant_id = $1", merchant_id
        )
    await desk.take(CREATED, **a_shop(merchant_id))
    assert await desk.counts(merchant_id) == (1, 1, 1, 1)


async def test_the_same_merchant_again_changes_nothing(desk: Desk) -> None:
    merchant_id = await desk.made(5)
    await desk.node.billing.start_trial(merchant_id, correlation_id="c-1")
    await asyncio.gather(*(desk.take(CREATED, **a_shop(merchant_id)) for _ in range(3)))
    assert await desk.counts(merchant_id) == (1, 1, 1, 1)
    assert await desk.world.balance(merchant_id) == 5 + TRIAL_CREDITS
    assert (await desk.node.billing.trial(merchant_id)).active


async def test_two_nodes_that_hear_of_one_merchant_at_once_make_it_once(
    world: World, desk: Desk
) -> None:
    async with world.node() as other_node:
        other = desk_of(world, other_node)
        for _ in range(5):
            shop = a_shop(uuid4())
            await asyncio.gather(*(each.take(CREATED, **shop) for each in (desk, other, desk)))
            assert await desk.counts(UUID(str(shop["merchant_id"]))) == (1, 1, 1, 1)


async def test_a_merchant_waits_while_the_server_of_card_data_is_away(
    world: World, node: Node, database_url: str
) -> None:
    merchant_id = uuid4()
    async with DatabaseProxy(database_url) as proxy:
        cde = await Database.connect(proxy.url, pool_size=1)
        desk = desk_of(world, node, cde=cde)
        proxy.go_down()
        error = await desk.refused(CREATED, **a_shop(merchant_id))
        assert isinstance(error, UnavailableError)
        assert may_pass(error)
        assert await desk.counts(merchant_id) == (1, 0, 0, 0)
        proxy.is_down = False
        await desk.take(CREATED, **a_shop(merchant_id))
        assert await desk.counts(merchant_id) == (1, 1, 1, 1)
        await cde.close()


async def test_a_merchant_is_ready_to_buy_and_to_be_asked_for_by_its_domain(desk: Desk) -> None:
    merchant_id = uuid4()
    names = {"platform_name": "shopify", "domain": "Shop-1.Example.COM", "platform_shop_id": "1"}
    more = {"name": "A shop", "email": None, "installed_at": "2025-11-12T10:30:00", "plan": "pro"}
    await desk.take(CREATED, merchant_id=merchant_id, **names, **more)
    account = await desk.node.ledger.account_by_domain("shop-1.example.com")
    assert (account.merchant_id, account.platform_name, account.platform_id, account.balance) == (
        merchant_id,
        "shopify",
        "1",
        0,
    )
    assert (await desk.node.billing.trial(merchant_id)).available


# ---- trials and purchases of another billing service


async def test_money_for_a_merchant_that_is_not_there_waits_for_it(desk: Desk) -> None:
    merchant_id = uuid4()
    for subject, data in (
        (TRIAL, {"merchant_id": merchant_id, "ends_at": "2025-12-01T00:00:00Z"}),
        (PURCHASED, {"merchant_id": merchant_id, "purchase_id": "p-1", "credits": 5}),
        (MATCH, a_match(merchant_id)),
        (UPDATED, {"merchant_id": merchant_id, "charge_id": 7, "status": "active"}),
    ):
        error = await desk.refused(subject, **data)
        assert isinstance(error, NotFoundError)
        assert may_pass(error)
    assert await desk.world.database.fetchval("SELECT count(*) FROM glam.outbox") == 0


@pytest.mark.parametrize(("said", "granted"), [({}, TRIAL_CREDITS), ({"credits": 7}, 7)])
async def test_a_trial_started_elsewhere_grants_its_credits_once(
    desk: Desk, said: dict[str, object], granted: int
) -> None:
    merchant_id = await desk.made()
    for _ in range(2):
        await desk.take(TRIAL, merchant_id=merchant_id, ends_at="2025-12-01T00:00:00Z", **said)
    assert await desk.references(merchant_id) == [
        ("credit", "trial", f"TRIAL_GRANT_{merchant_id}", granted)
    ]
    assert not (await desk.node.billing.trial(merchant_id)).available


async def test_a_trial_told_of_again_with_other_credits_is_settled_by_the_first(
    desk: Desk,
) -> None:
    merchant_id = await desk.made()
    await desk.node.billing.start_trial(merchant_id, correlation_id="c-1")
    await desk.take(TRIAL, merchant_id=merchant_id, ends_at="2025-12-01T00:00:00Z", credits=9)
    assert await desk.world.balance(merchant_id) == TRIAL_CREDITS


async def test_credits_sold_elsewhere_are_granted_once(desk: Desk) -> None:
    merchant_id = await desk.made()
    sold = {"merchant_id": merchant_id, "purchase_id": "p-1", "credits": 40}
    await desk.take(PURCHASED, **sold)
    await desk.take(PURCHASED, **sold, amount="39.99", platform="stripe")
    assert await desk.references(merchant_id) == [("credit", "purchase", "p-1", 40)]


async def test_one_purchase_with_two_numbers_of_credits_is_for_somebody_to_look_at(
    desk: Desk,
) -> None:
    merchant_id = await desk.made()
    sold = {"merchant_id": merchant_id, "purchase_id": "p-1"}
    await desk.take(PURCHASED, **sold, credits=40)
    error = await desk.refused(PURCHASED, **sold, credits=41)
    assert error.code == "DUPLICATE_TRANSACTION"
    assert not may_pass(error)
    assert await desk.world.balance(merchant_id) == 40


# ---- evt.ai.match.completed.v1


async def test_a_match_takes_one_credit_once_and_keeps_who_it_was_for(desk: Desk) -> None:
    merchant_id = await desk.made(5)
    for _ in range(2):
        await desk.take(MATCH, **a_match(merchant_id))
    assert (await desk.references(merchant_id))[1:] == [("debit", "match", "m-1", 1)]
    page = await desk.node.ledger.transactions(merchant_id, limit=1)
    assert page.items[0].metadata == {"shopper_id": "s-1", "matched_items_count": 3}
    [consumed] = await desk.world.events("credits.consumed")
    assert (consumed["balance"], consumed["reference_id"]) == (4, "m-1")


async def test_a_match_that_cannot_be_paid_is_told_of_and_done_with(desk: Desk) -> None:
    merchant_id = await desk.made()
    await desk.take(MATCH, **a_match(merchant_id))
    assert await desk.world.events("credits.insufficient") == [
        {
            "merchant_id": str(merchant_id),
            "attempted_amount": 1,
            "balance": 0,
            "platform_name": "shopify",
        }
    ]
    assert await desk.references(merchant_id) == []


async def test_a_reference_that_cannot_be_stored_is_refused_for_good(desk: Desk) -> None:
    merchant_id = await desk.made(5)
    error = await desk.refused(MATCH, **a_match(merchant_id, "m\u200b1"))
    assert not may_pass(error)
    assert [each.field for each in error.fields] == ["reference_id"]
    assert await desk.world.balance(merchant_id) == 5


# ---- evt.webhook.app.purchase_updated.v1


async def test_a_charge_that_was_paid_completes_its_purchase_once(desk: Desk) -> None:
    merchant_id = await desk.world.merchant()
    purchase = await desk.node.buy(merchant_id)
    paid = {"merchant_id": merchant_id, "charge_id": purchase.platform_charge_id}
    for status in ("PENDING", "ACTIVE", "active", "declined"):
        await desk.take(UPDATED, **paid, status=status)
    assert await desk.references(merchant_id) == [
        ("credit", "purchase", str(purchase.purchase_id), 500)
    ]
    assert len(await desk.world.events("billing.credits.purchased")) == 1


async def test_a_charge_of_another_merchant_is_refused_for_good(desk: Desk) -> None:
    merchant_id, other = await desk.world.merchant(), await desk.world.merchant()
    purchase = await desk.node.buy(merchant_id)
    error = await desk.refused(
        UPDATED, merchant_id=other, charge_id=purchase.platform_charge_id, status="active"
    )
    assert isinstance(error, InputError)
    assert [each.field for each in error.fields] == ["merchant_id"]
    assert await desk.world.balance(merchant_id) == await desk.world.balance(other) == 0


# ---- through JetStream


async def test_an_event_that_comes_before_its_merchant_has_its_effect_after_it(
    desk: Desk, bus: Bus, client: Client
) -> None:
    merchant_id = uuid4()
    async with consuming(desk, bus) as letters:
        await publish(client, MATCH, **a_match(merchant_id))
        await publish(
            client, TRIAL, merchant_id=merchant_id, ends_at="2025-12-01T00:00:00Z", credits=5
        )
        await publish(client, CREATED, **a_shop(merchant_id))

        async def granted() -> bool:
            return len(await desk.references(merchant_id)) >= 1

        await eventually(granted)
        assert await letters.listed() == ()
    assert await desk.references(merchant_id) in (
        [("credit", "trial", f"TRIAL_GRANT_{merchant_id}", 5), ("debit", "match", "m-1", 1)],
        # The match came between the merchant and the grant, and could not be paid.
        [("credit", "trial", f"TRIAL_GRANT_{merchant_id}", 5)],
    )


async def test_a_platform_that_nobody_knows_is_a_dead_letter_naming_the_field(
    desk: Desk, bus: Bus, client: Client
) -> None:
    async with consuming(desk, bus) as letters:
        await publish(client, CREATED, **a_shop(uuid4()) | {"platform": "etsy"})

        async def kept() -> bool:
            return len(await letters.listed()) == 1

        await eventually(kept)
        [letter] = await letters.listed()
    assert letter.reason.startswith("VALIDATION_ERROR: The merchant cannot be made: platform.")
    assert "etsy" not in letter.reason


async def test_a_burst_of_repeated_matches_is_applied_in_order_once_each_and_adds_up(
    desk: Desk, bus: Bus, client: Client
) -> None:
    merchants = [await desk.made(100) for _ in range(5)]
    names = [f"m-{n}" for n in range(60)]
    async with consuming(desk, bus) as letters:
        for name in names:
            for merchant_id in merchants:
                await publish(client, MATCH, **a_match(merchant_id, name))
                await publish(client, MATCH, **a_match(merchant_id, name))

        async def all_taken() -> bool:
            return all([await desk.world.balance(each) == 40 for each in merchants])

        await eventually(all_taken)
        assert await letters.listed() == ()
    for merchant_id in merchants:
        assert [each[2] for each in (await desk.references(merchant_id))[1:]] == names
    assert (await verify(desk.world.database)).broken == ()
