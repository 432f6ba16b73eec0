"""`/api/billing` on real billing, PostgreSQL and a stand-in for Shopify: refusals first."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

from glamd.http.billing import BillingRoutes
from glamd.http.idempotent import Once
from glamd.idempotency import IdempotencyKeys
from tests.support.billing_world import Node
from tests.support.billing_world import World as BillingWorld
from tests.support.http_fakes import Reply, Wire, client_jwt, connected, internal_jwt
from tests.support.http_world import World
from tests.support.money_world import api, ask, examples_fit, refusal
from tests.support.shopify import Act

BILLING = "/api/billing"
TRIALS = f"{BILLING}/trials"
PURCHASES = f"{BILLING}/purchases"
RETURN_URL = "https://app.example.com/billing"
NO_RECORD: tuple[int, str, list[str]] = (404, "MERCHANT_NOT_FOUND", [])
NO_PURCHASE: tuple[int, str, list[str]] = (404, "PURCHASE_NOT_FOUND", [])
KEY = {"Idempotency-Key": "k-1"}


def client(merchant_id: UUID) -> str:
    """A merchant's token."""
    return client_jwt(merchant_id=str(merchant_id), shop="shop.example")


def pack(**changes: Any) -> dict[str, Any]:
    """A body that nothing is wrong with; None takes a field away."""
    whole = {"pack": "medium", "platform": "shopify", "return_url": RETURN_URL} | changes
    return {name: value for name, value in whole.items() if value is not None}


@dataclass(slots=True)
class Desk:
    """A listener with these routes, and what stands behind them."""

    billing: BillingWorld
    node: Node
    port: int
    wire: Wire

    async def get(self, merchant_id: UUID, path: str) -> Reply:
        """Look."""
        return await ask(self.wire, "GET", path, client(merchant_id))

    async def post(
        self, merchant_id: UUID, path: str, sent: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Have something begun."""
        return await ask(self.wire, "POST", path, client(merchant_id), sent, headers)


@pytest.fixture
async def desk(world: World, module_database_url: str) -> AsyncIterator[Desk]:
    """A listener, and a connection to it."""
    async with BillingWorld.make(module_database_url) as billing, billing.node() as node:
        await billing.database.execute("DELETE FROM glam.idempotency_keys")
        routes = BillingRoutes(node.billing, once=Once(IdempotencyKeys(node.database))).routes()
        async with api(world, routes) as port, connected(port) as wire:
            yield Desk(billing, node, port, wire)


# ---- who may


async def test_nobody_but_a_client_is_let_in(desk: Desk) -> None:
    routes = [("GET", BILLING), ("GET", TRIALS), ("POST", TRIALS), ("POST", PURCHASES)]
    routes += [("GET", PURCHASES), ("GET", f"{PURCHASES}/{uuid4()}")]
    for method, path in routes:
        for token, status in (
            (None, 401),
            (internal_jwt(scope="bff:call"), 403),
        ):
            assert (await ask(desk.wire, method, path, token)).status == status, path


async def test_a_merchant_without_a_record_has_nothing_and_begins_nothing(desk: Desk) -> None:
    nobody = uuid4()
    for path in (BILLING, TRIALS):
        assert refusal(await desk.get(nobody, path)) == NO_RECORD
    assert refusal(await desk.post(nobody, TRIALS)) == NO_RECORD
    assert refusal(await desk.post(nobody, PURCHASES, pack())) == NO_RECORD
    assert (await desk.get(nobody, PURCHASES)).json["data"] == []
    assert await desk.billing.purchases() == []


async def test_another_merchants_purchase_is_as_unknown_as_one_that_never_was(desk: Desk) -> None:
    merchant_id, other = await desk.billing.merchant(), await desk.billing.merchant()
    theirs = (await desk.node.buy(other)).purchase_id
    for name in (str(theirs), str(uuid4()), "nonsense", theirs.hex, "%00", "9" * 200):
        reply = await desk.get(merchant_id, f"{PURCHASES}/{name}")
        assert refusal(reply) == NO_PURCHASE, name
    assert (await desk.get(merchant_id, PURCHASES)).json["pagination"]["total"] == 0
    assert (await desk.get(other, f"{PURCHASES}/{theirs}")).status == 200


# ---- what cannot be bought


async def test_what_cannot_be_bought_names_its_field_and_leaves_no_trace(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"pack": "huge"}, "INVALID_PACK", "pack"),
        ({"pack": ""}, "INVALID_PACK", "pack"),
        ({"pack": 5}, "VALIDATION_ERROR", "pack"),
        ({"pack": None}, "VALIDATION_ERROR", "pack"),
        ({"platform": "paypal"}, "VALIDATION_ERROR", "platform"),
        ({"platform": None}, "VALIDATION_ERROR", "platform"),
        ({"return_url": "http://app.example.com/"}, "VALIDATION_ERROR", "return_url"),
        ({"return_url": "https://evil.example/"}, "VALIDATION_ERROR", "return_url"),
        ({"return_url": "https://app.example.com@evil.example/"}, "VALIDATION_ERROR", "return_url"),
        ({"return_url": "javascript:alert(1)"}, "VALIDATION_ERROR", "return_url"),
        ({"return_url": None}, "VALIDATION_ERROR", "return_url"),
        ({"amount": "0.01"}, "VALIDATION_ERROR", "amount"),
        ({"credits": 10**6}, "VALIDATION_ERROR", "credits"),
        ({"merchant_id": str(uuid4())}, "VALIDATION_ERROR", "merchant_id"),
        ({"idempotency_key": ""}, "VALIDATION_ERROR", "idempotency_key"),
    ]
    for changes, code, field in wrong:
        reply = await desk.post(merchant_id, PURCHASES, pack(**changes))
        assert refusal(reply) == (422, code, [field])
    assert (await desk.post(merchant_id, PURCHASES)).status == 415
    assert await desk.billing.purchases() == []
    assert desk.billing.shopify.requests == []


async def test_a_platform_that_refuses_or_is_not_configured_is_502_and_the_purchase_is_kept(
    desk: Desk,
) -> None:
    merchant_id = await desk.billing.merchant()
    reply = await desk.post(merchant_id, PURCHASES, pack(platform="stripe"))
    assert refusal(reply) == (502, "PLATFORM_ERROR", [])
    desk.billing.clock.advance(1)
    desk.billing.shopify.misbehave(Act(answer="user-error"))
    reply = await desk.post(merchant_id, PURCHASES, pack())
    assert refusal(reply) == (502, "PLATFORM_ERROR", [])
    assert not any(secret in reply.body.decode() for secret in desk.billing.shopify.secrets)
    rows = await desk.billing.purchases()
    assert [(row["status"], row["failure"]) for row in rows] == [
        ("failed", "NOT_CONFIGURED"),
        ("failed", "INPUT_REFUSED"),
    ]
    listed = (await desk.get(merchant_id, PURCHASES)).json["data"]
    assert [each["status"] for each in listed] == ["failed", "failed"]


async def test_a_refusal_by_the_platform_gives_the_key_back(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    desk.billing.shopify.misbehave(Act(answer="denied"), Act(answer="500", takes_effect=True))
    first = await desk.post(merchant_id, PURCHASES, pack(), KEY)
    assert refusal(first) == (502, "PLATFORM_ERROR", [])
    desk.billing.clock.advance(1)
    second = await desk.post(merchant_id, PURCHASES, pack(), KEY)
    assert refusal(second) == (503, "UNAVAILABLE", [])
    assert second.headers["retry-after"] == "60"
    desk.billing.clock.advance(1)
    third = await desk.post(merchant_id, PURCHASES, pack(), KEY)
    assert third.status == 201
    assert "idempotent-replayed" not in third.headers
    rows = await desk.billing.purchases()
    assert [row["status"] for row in rows] == ["failed", "pending", "pending"]
    assert str(rows[1]["purchase_id"]) in second.json["detail"]


# ---- once


async def test_the_same_key_is_one_purchase_and_another_body_under_it_is_refused(
    desk: Desk,
) -> None:
    merchant_id, other = await desk.billing.merchant(), await desk.billing.merchant()
    first = await desk.post(merchant_id, PURCHASES, pack(), KEY)
    again = await desk.post(merchant_id, PURCHASES, pack(idempotency_key="k-1"))
    assert (first.status, again.status) == (201, 201)
    assert again.json["data"] == first.json["data"]
    assert again.headers["idempotent-replayed"] == "true"
    reused = await desk.post(merchant_id, PURCHASES, pack(pack="large"), KEY)
    assert refusal(reused) == (422, "IDEMPOTENCY_KEY_REUSED", [])
    both = await desk.post(merchant_id, PURCHASES, pack(idempotency_key="k-2"), KEY)
    assert refusal(both) == (422, "VALIDATION_ERROR", ["idempotency_key"])
    assert len(desk.billing.shopify.charges) == 1
    theirs = await desk.post(other, PURCHASES, pack(), KEY)
    assert theirs.json["data"]["purchase_id"] != first.json["data"]["purchase_id"]


async def test_a_wrong_pack_is_the_same_answer_again_under_its_key(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    for _ in range(2):
        reply = await desk.post(merchant_id, PURCHASES, pack(pack="huge"), KEY)
        assert refusal(reply) == (422, "INVALID_PACK", ["pack"])
    assert reply.headers["idempotent-replayed"] == "true"


async def test_a_trial_can_be_had_without_a_body_once(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    assert (await desk.get(merchant_id, TRIALS)).json["data"] == {
        "available": True,
        "active": False,
        "started_at": None,
        "ends_at": None,
    }
    reply = await desk.post(merchant_id, TRIALS)
    assert reply.status == 201
    assert reply.json["data"] == {
        "success": True,
        "ends_at": "2020-11-26T10:30:00Z",
        "credits_granted": 500,
    }
    again = await desk.post(merchant_id, TRIALS, {})
    assert refusal(again) == (409, "TRIAL_ALREADY_USED", [])
    assert (await desk.get(merchant_id, TRIALS)).json["data"] == {
        "available": False,
        "active": True,
        "started_at": "2020-11-12T10:30:00Z",
        "ends_at": "2020-11-26T10:30:00Z",
    }
    assert await desk.billing.balance(merchant_id) == 500


async def test_a_body_of_a_trial_that_is_none_starts_nothing(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    for sent, expected in (
        (b"{}", (415, "UNSUPPORTED_MEDIA_TYPE", [])),
        ({"days": 365}, (422, "VALIDATION_ERROR", ["days"])),
        ({"idempotency_key": "with space"}, (422, "VALIDATION_ERROR", ["idempotency_key"])),
        ([], (422, "VALIDATION_ERROR", ["body"])),
    ):
        assert refusal(await desk.post(merchant_id, TRIALS, sent)) == expected
    broken = await desk.post(merchant_id, TRIALS, b"{", {"Content-Type": "application/json"})
    assert refusal(broken) == (400, "MALFORMED_JSON", [])
    assert await desk.billing.balance(merchant_id) == 0


async def test_a_trials_key_gives_the_first_answer_and_another_key_does_not(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    first = await desk.post(merchant_id, TRIALS, None, KEY)
    again = await desk.post(merchant_id, TRIALS, {"idempotency_key": "k-1"})
    assert (first.status, again.status) == (201, 201)
    assert again.json["data"] == first.json["data"]
    assert again.headers["idempotent-replayed"] == "true"
    other = await desk.post(merchant_id, TRIALS, {"idempotency_key": "k-2"})
    assert refusal(other) == (409, "TRIAL_ALREADY_USED", [])
    assert await desk.billing.balance(merchant_id) == 500


async def test_of_many_trials_at_once_one_begins(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()

    async def one(number: int) -> int:
        headers = {"Idempotency-Key": f"k-{number}"} if number % 2 else None
        async with connected(desk.port) as wire:
            reply = await ask(wire, "POST", TRIALS, client(merchant_id), None, headers)
            return reply.status

    assert sorted(await asyncio.gather(*(one(n) for n in range(8)))) == [201] + [409] * 7
    assert await desk.billing.balance(merchant_id) == 500


# ---- what there is


async def test_a_purchase_is_shown_from_its_beginning_to_its_end(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    begun = (await desk.post(merchant_id, PURCHASES, pack())).json["data"]
    (row,) = await desk.billing.purchases()
    assert begun == {
        "purchase_id": str(row["purchase_id"]),
        "checkout_url": row["checkout_url"],
        "expires_at": "2020-11-13T10:30:00Z",
    }
    path = f"{PURCHASES}/{begun['purchase_id']}"
    shown = (await desk.get(merchant_id, path)).json["data"]
    assert shown == {
        "id": begun["purchase_id"],
        "merchant_id": str(merchant_id),
        "credits": 500,
        "amount": "39.99",
        "status": "pending",
        "platform": "shopify",
        "platform_charge_id": row["platform_charge_id"],
        "created_at": "2020-11-12T10:30:00Z",
        "completed_at": None,
        "expires_at": "2020-11-13T10:30:00Z",
    }
    purchase = await desk.node.billing.purchase_of(merchant_id, row["purchase_id"])
    await desk.node.hear(desk.billing.shopify.webhook(desk.billing.paid(purchase)))
    await desk.node.webhooks.apply_due()
    done = shown | {"status": "completed", "completed_at": "2020-11-12T10:30:00Z"}
    assert (await desk.get(merchant_id, path)).json["data"] == done
    overview = (await desk.get(merchant_id, BILLING)).json["data"]
    assert overview["trial"]["available"] is True
    assert overview["credits_purchased"] == 500
    assert overview["last_purchase_at"] == "2020-11-12T10:30:00Z"
    assert overview["recent_purchases"] == [done]


async def test_purchases_come_newest_first_by_page_and_by_cursor(desk: Desk) -> None:
    merchant_id = await desk.billing.merchant()
    for name in ("small", "medium", "large", "small", "medium", "large"):
        await desk.node.buy(merchant_id, pack=name, platform="custom")
        desk.billing.clock.advance(1)
    first = await desk.get(merchant_id, f"{PURCHASES}?limit=4")
    assert [each["amount"] for each in first.json["data"]] == ["69.99", "39.99", "9.99", "69.99"]
    pagination = first.json["pagination"]
    assert (pagination["total"], pagination["pages"], pagination["has_next"]) == (6, 2, True)
    second = await desk.get(merchant_id, f"{PURCHASES}?limit=4&page=2")
    behind = await desk.get(merchant_id, f"{PURCHASES}?limit=4&cursor={pagination['next_cursor']}")
    assert second.json["data"] == behind.json["data"]
    assert [each["amount"] for each in behind.json["data"]] == ["39.99", "9.99"]
    overview = await desk.get(merchant_id, BILLING)
    assert len(overview.json["data"]["recent_purchases"]) == 5
    for query in ("cursor=x", "cursor=MQ==&page=1", "limit=0", "page=10001"):
        reply = await desk.get(merchant_id, f"{PURCHASES}?{query}")
        assert refusal(reply) == (422, "VALIDATION_ERROR", [query.partition("=")[0]])


def test_what_the_document_shows_is_what_is_taken_and_answered() -> None:
    nobody: Any = None
    examples_fit(BillingRoutes(nobody, once=nobody).routes())
