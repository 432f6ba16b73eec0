"""`/api/credits` on a real ledger: who may, what is refused and leaves no trace, what is once."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from glamd.http.credits import CreditRoutes
from glamd.ledger.model import AMOUNT_LIMIT
from tests.support import ledgers
from tests.support.http_fakes import Reply, Wire, client_jwt, connected, internal_jwt
from tests.support.http_world import World
from tests.support.ledgers import Node
from tests.support.money_world import api, ask, examples_fit, refusal

CREDITS = "/api/credits"
TRANSACTIONS = f"{CREDITS}/transactions"
WRITER = internal_jwt(scope="credits:write")
SHOP = "shop.example.com"
NOT_FOUND: tuple[int, str, list[str]] = (404, "CREDIT_ACCOUNT_NOT_FOUND", [])


def client(merchant_id: UUID, shop: str = SHOP) -> str:
    """A merchant's token."""
    return client_jwt(merchant_id=str(merchant_id), shop=shop)


def move(merchant: UUID, **changes: Any) -> dict[str, Any]:
    """A body that nothing is wrong with."""
    usual = {
        "merchant_id": str(merchant),
        "amount": 1,
        "reference_type": "match",
        "reference_id": "m-1",
    }
    return usual | changes


@dataclass(slots=True)
class Desk:
    """A listener with these routes, and the ledger behind them."""

    node: Node
    port: int
    wire: Wire

    async def get(
        self, token: str, path: str = CREDITS, headers: dict[str, str] | None = None
    ) -> Reply:
        """Look."""
        return await ask(self.wire, "GET", path, token, headers=headers)

    async def post(
        self, what: str, body: Any, headers: dict[str, str] | None = None, token: str = WRITER
    ) -> Reply:
        """Move credits."""
        return await ask(self.wire, "POST", f"{CREDITS}/{what}", token, body, headers)

    async def count(self, sql: str) -> int:
        """How many rows there are."""
        return int(await self.node.database.fetchval(f"SELECT count(*) FROM {sql}"))


@pytest.fixture
async def desk(world: World, module_database_url: str) -> AsyncIterator[Desk]:
    """A listener, and a connection to it."""
    async with (
        ledgers.node(module_database_url) as node,
        api(world, CreditRoutes(node.ledger).routes()) as port,
        connected(port) as wire,
    ):
        yield Desk(node, port, wire)


# ---- who may


async def test_whoever_has_no_right_to_it_is_refused(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    grant, consume = f"{CREDITS}/grant", f"{CREDITS}/consume"
    cases: list[tuple[str, str, str | None, int]] = [
        ("GET", CREDITS, None, 401),
        ("GET", CREDITS, client_jwt(scope="other"), 403),
        ("GET", CREDITS, internal_jwt(scope="bff:call credits:write"), 403),
        ("GET", TRANSACTIONS, client_jwt(scope=""), 403),
        ("GET", TRANSACTIONS, WRITER, 403),
        ("POST", grant, client_jwt(scope="bff:call credits:write"), 403),
        ("POST", consume, client_jwt(scope="bff:call credits:write"), 403),
        ("POST", grant, internal_jwt(scope="credits:read"), 403),
        ("POST", consume, internal_jwt(scope=""), 403),
    ]
    for method, path, token, status in cases:
        sent = move(merchant_id) if method == "POST" else None
        assert (await ask(desk.wire, method, path, token, sent)).status == status, path
    assert (await desk.node.ledger.account(merchant_id)).balance == 5


# ---- what is refused


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"amount": 0}, "amount"),
    ({"amount": -1}, "amount"),
    ({"amount": AMOUNT_LIMIT + 1}, "amount"),
    ({"amount": 2**70}, "amount"),
    ({"amount": 1.5}, "amount"),
    ({"amount": 1.0}, "amount"),
    ({"amount": "1"}, "amount"),
    ({"amount": True}, "amount"),
    ({"amount": None}, "amount"),
    ({"merchant_id": "nobody"}, "merchant_id"),
    ({"merchant_id": 5}, "merchant_id"),
    ({"reference_type": ""}, "reference_type"),
    ({"reference_type": "x" * 65}, "reference_type"),
    ({"reference_id": None}, "reference_id"),
    ({"reference_id": "x" * 256}, "reference_id"),
    ({"reference_id": "two\nlines"}, "reference_id"),
    ({"reference_id": "nul\x00"}, "reference_id"),
    ({"description": "x" * 1001}, "description"),
    ({"description": "nul\x00"}, "description"),
    ({"metadata": [1]}, "metadata"),
    ({"metadata": {"n": 2**64}}, "metadata"),
    ({"metadata": {"n": 2**63}}, "metadata"),
    ({"metadata": {"deep": [{"n": -1e19}]}}, "metadata"),
    ({"metadata": {"n": 1e308}}, "metadata"),
    ({"metadata": {"text": "x" * 16_384}}, "metadata"),
    ({"metadata": {"text": "nul\x00"}}, "metadata"),
    ({"idempotency_key": "k"}, "idempotency_key"),
    ({"balance": 5}, "balance"),
]


async def test_what_is_no_transaction_names_its_field_and_leaves_no_trace(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    for changes, field in WRONG:
        for what in ("consume", "grant"):
            reply = await desk.post(what, move(merchant_id, **changes))
            assert refusal(reply) == (422, "VALIDATION_ERROR", [field]), changes
    assert await ledgers.counted(desk.node, merchant_id) == 1


async def test_nothing_of_an_id_that_is_none_comes_back(desk: Desk) -> None:
    reply = await desk.post("consume", move(uuid4()) | {"merchant_id": "\u00e9l4m"})
    assert refusal(reply) == (422, "VALIDATION_ERROR", ["merchant_id"])
    assert reply.json["errors"][0]["message"] == "It should be a UUID."


async def test_an_amount_that_a_json_number_cannot_hold_is_not_rounded(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node)
    body = (
        f'{{"merchant_id": "{merchant_id}", "reference_type": "t", "reference_id": "r", "amount": '
    )
    for number in ("1e3", "9007199254740993", "9007199254740991.0", "1e400"):
        reply = await desk.post(
            "grant", f"{body}{number}}}".encode(), {"Content-Type": "application/json"}
        )
        assert reply.status in {400, 422}, number
    assert await ledgers.counted(desk.node, merchant_id) == 0


async def test_an_unknown_merchant_is_404_and_gets_no_account(desk: Desk) -> None:
    nobody = uuid4()
    for what in ("consume", "grant"):
        assert refusal(await desk.post(what, move(nobody))) == NOT_FOUND
    assert refusal(await desk.get(client(nobody, "nobody.example"))) == NOT_FOUND
    assert refusal(await desk.get(client(nobody, "nobody.example"), TRANSACTIONS)) == NOT_FOUND
    assert await desk.count(f"glam.credit_accounts WHERE merchant_id = '{nobody}'") == 0


async def test_what_is_not_there_is_not_taken_and_the_reference_is_free_for_the_retry(
    desk: Desk,
) -> None:
    merchant_id = await ledgers.merchant(desk.node, 2)
    reply = await desk.post("consume", move(merchant_id, amount=3))
    assert refusal(reply) == (402, "INSUFFICIENT_CREDITS", [])
    assert (reply.json["balance"], reply.json["required"]) == (2, 3)
    assert reply.headers["content-type"] == "application/problem+json"
    assert await ledgers.counted(desk.node, merchant_id) == 1
    await ledgers.grant(desk.node, merchant_id, 1)
    again = await desk.post("consume", move(merchant_id, amount=3))
    assert (again.status, again.json["data"]["balance"]) == (200, 0)


async def test_a_reference_that_was_used_for_something_else_is_409(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    await desk.post("consume", move(merchant_id))
    for what, amount in (("consume", 2), ("grant", 1), ("grant", 2)):
        reply = await desk.post(what, move(merchant_id, amount=amount))
        assert refusal(reply) == (409, "DUPLICATE_TRANSACTION", []), (what, amount)
    assert (await desk.node.ledger.account(merchant_id)).balance == 4


async def test_of_many_at_once_no_more_succeed_than_there_are_credits(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)

    async def one(number: int) -> int:
        async with connected(desk.port) as wire:
            body = move(merchant_id, reference_id=f"m-{number // 2}")
            return (await ask(wire, "POST", f"{CREDITS}/consume", WRITER, body)).status

    statuses = await asyncio.gather(*(one(number) for number in range(20)))
    # Each reference comes twice, and a repetition of one that had its effect succeeds too.
    assert sorted(statuses) == [200] * 10 + [402] * 10
    assert (await desk.node.ledger.account(merchant_id)).balance == 0


# ---- moving


async def test_the_same_reference_again_is_the_first_transaction_and_moves_nothing(
    desk: Desk,
) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    body = move(merchant_id, description="a match", metadata={"shopper_id": "s", "n": 2**53})
    first = await desk.post("consume", body)
    await ledgers.grant(desk.node, merchant_id, 10)
    again = await desk.post("consume", move(merchant_id, description="said otherwise"))
    assert (first.status, again.status) == (200, 200)
    assert again.json["data"] == first.json["data"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    transaction = first.json["data"]["transaction"]
    assert UUID(transaction.pop("id"))
    assert transaction.pop("created_at").endswith("Z")
    assert first.json["data"]["balance"] == 4
    assert transaction == {
        "amount": 1,
        "operation": "debit",
        "balance_before": 5,
        "balance_after": 4,
        "reference_type": "match",
        "reference_id": "m-1",
        "description": "a match",
        "metadata": {"shopper_id": "s", "n": 2**53},
    }


async def test_an_idempotency_key_is_not_looked_at_for_the_reference_is_one(desk: Desk) -> None:
    merchant_id = await ledgers.merchant(desk.node, 5)
    key = {"Idempotency-Key": "k-1"}
    for reference in ("m-1", "m-2"):
        reply = await desk.post("consume", move(merchant_id, reference_id=reference), key)
        assert reply.status == 200
        assert "idempotent-replayed" not in reply.headers
    other = await desk.post("consume", move(merchant_id), {"Idempotency-Key": "k-2"})
    assert other.headers["idempotent-replayed"] == "true"
    assert (await desk.node.ledger.account(merchant_id)).balance == 3
    assert await desk.count("glam.idempotency_keys") == 0


async def test_the_largest_amount_is_granted_and_an_event_has_the_correlation_id(
    desk: Desk,
) -> None:
    merchant_id = await ledgers.merchant(desk.node)
    body = move(merchant_id, amount=AMOUNT_LIMIT, reference_type="purchase")
    reply = await desk.post("grant", body, {"X-Correlation-ID": "order-77"})
    assert reply.json["data"]["balance"] == AMOUNT_LIMIT
    found = await desk.count(
        f"glam.outbox WHERE merchant_id = '{merchant_id}' AND correlation_id = 'order-77'"
    )
    assert found == 1


# ---- looking


async def test_an_account_is_not_had_by_a_domain_that_is_not_both_named_and_the_callers(
    desk: Desk,
) -> None:
    mine = f"mine-{uuid4().hex}.example"
    await ledgers.merchant(desk.node, 5, domain=mine)
    cases: list[tuple[str, dict[str, str]]] = [
        (mine, {}),
        (mine, {"X-Shop-Domain": "other.example"}),
        ("other.example", {"X-Shop-Domain": mine}),
        (mine, {"X-Shop-Domain": ""}),
        (mine, {"X-Shop-Domain": mine, "x-shop-domain": mine}),
    ]
    for shop, headers in cases:
        token = client(uuid4(), shop)
        for path in (CREDITS, TRANSACTIONS):
            assert refusal(await desk.get(token, path, headers)) == NOT_FOUND, headers


async def test_without_an_account_of_its_own_the_caller_has_that_of_its_shop(desk: Desk) -> None:
    domain = f"mine-{uuid4().hex}.example"
    await ledgers.merchant(desk.node, 5, domain=domain)
    token = client(uuid4(), domain.upper())
    with capture_logs() as logs:
        reply = await desk.get(token, headers={"X-Shop-Domain": domain.title()})
        listed = await desk.get(token, TRANSACTIONS, {"X-Shop-Domain": domain})
    assert reply.json["data"]["balance"] == 5
    assert len(listed.json["data"]) == 1
    assert not [each for each in logs if each["log_level"] == "warning"]


async def test_the_own_account_comes_first_and_another_domain_is_a_warning(desk: Desk) -> None:
    await ledgers.merchant(desk.node, 7, domain="second.example")
    merchant_id = await ledgers.merchant(desk.node, 5, domain="first.example")
    token = client(merchant_id, "second.example")
    with capture_logs() as logs:
        reply = await desk.get(token, headers={"X-Shop-Domain": "second.example"})
        await desk.get(token, headers={"X-Shop-Domain": "4111 1111 1111 1111"})
        await desk.get(token, headers={"X-Shop-Domain": "First.Example"})
    assert reply.json["data"] == {
        "balance": 5,
        "total_granted": 5,
        "total_consumed": 0,
        "platform_name": "shopify",
        "shop_domain": "first.example",
    }
    warned = [each for each in logs if each["event"] == "credit_domain_differs"]
    assert [each["named"] for each in warned] == ["second.example", "?"]
    assert {each["merchant_id"] for each in warned} == {str(merchant_id)}


async def test_a_page_that_there_cannot_be_names_its_field(desk: Desk) -> None:
    token = client(await ledgers.merchant(desk.node, 5))
    for query, field in (
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("page=0", "page"),
        ("page=10001", "page"),
        ("cursor=", "cursor"),
        ("cursor=x", "cursor"),
        ("cursor=-1", "cursor"),
        ("cursor=9999999999999999999", "cursor"),
        ("cursor=1&page=1", "cursor"),
        ("limit=1&limit=2", "limit"),
    ):
        reply = await desk.get(token, f"{TRANSACTIONS}?{query}")
        assert refusal(reply) == (422, "VALIDATION_ERROR", [field]), query


async def test_transactions_come_newest_first_by_page_and_by_cursor_and_are_the_callers(
    desk: Desk,
) -> None:
    merchant_id, other = [await ledgers.merchant(desk.node) for _ in range(2)]
    for amount in range(1, 6):
        await ledgers.grant(desk.node, merchant_id, amount)
        await ledgers.grant(desk.node, other, 100)
    token = client(merchant_id)
    first = await desk.get(token, f"{TRANSACTIONS}?limit=2")
    second = await desk.get(token, f"{TRANSACTIONS}?limit=2&page=2")
    assert [each["amount"] for each in first.json["data"]] == [5, 4]
    assert [each["amount"] for each in second.json["data"]] == [3, 2]
    pagination = first.json["pagination"]
    assert (pagination["total"], pagination["pages"], pagination["page"]) == (5, 3, 1)
    cursor = pagination["next_cursor"]
    behind = await desk.get(token, f"{TRANSACTIONS}?limit=200&cursor={cursor}")
    assert [each["amount"] for each in behind.json["data"]] == [3, 2, 1]
    assert behind.json["pagination"]["next_cursor"] is None
    assert behind.json["pagination"]["page"] is None


def test_what_the_document_shows_is_what_is_taken_and_answered() -> None:
    nobody: Any = None
    examples_fit(CreditRoutes(nobody).routes())
