"""The api listener's successes: envelope, pagination, ids, headers, health."""

import pytest

from glamd.payments.model import PaymentToken
from tests.support.http_fakes import (
    MERCHANT,
    OTHER_MERCHANT,
    OTHER_TOKEN,
    TOKEN,
    Wire,
    client_jwt,
    connected,
    internal_jwt,
    payment_token,
)
from tests.support.http_world import World

ONE = f"/api/v1/payment-tokens/{TOKEN}"
LIST = "/api/v1/payment-tokens"


def bearer(token: str) -> str:
    """The header line."""
    return f"Authorization: Bearer {token}"


def get(path: str, token: str, *lines: str) -> str:
    """A GET's head."""
    return "\n".join([f"GET {path} HTTP/1.1", bearer(token), *lines])


async def test_a_client_sees_its_own_token_in_the_envelope(wire: Wire) -> None:
    reply = await wire.ask(get(ONE, client_jwt()))
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["data"] == {
        "token": TOKEN,
        "brand": "visa",
        "bin": "411111",
        "last4": "1111",
        "exp_month": 12,
        "exp_year": 2031,
        "fingerprint": "f" * 64,
        "entry_mode": "contactless",
        "device_id": "dev_1",
        "status": "active",
        "has_sensitive_data": False,
        "created_at": "2030-01-01T12:00:00Z",
        "expires_at": "2030-01-02T12:00:00Z",
    }
    assert reply.json["meta"]["timestamp"] == "2030-01-01T12:00:00Z"
    assert set(reply.json) == {"data", "meta"}


async def test_an_internal_service_sees_any_merchants_token(wire: Wire) -> None:
    reply = await wire.ask(get(f"/api/v1/payment-tokens/{OTHER_TOKEN}", internal_jwt()))
    assert reply.json["data"]["token"] == OTHER_TOKEN


async def test_head_answers_as_get_does_without_the_body(wire: Wire) -> None:
    await wire.send(f"HEAD {ONE} HTTP/1.1\r\n{bearer(client_jwt())}\r\nHost: x\r\n\r\n".encode())
    head = (await wire.reader.readuntil(b"\r\n\r\n")).decode()
    assert head.startswith("HTTP/1.1 200 ")
    # The next answer on the same connection begins at once, so there was no body in between.
    assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200


async def test_revoking_is_repeatable_and_carries_the_correlation_id(
    world: World, wire: Wire
) -> None:
    head = f"DELETE {ONE} HTTP/1.1\n{bearer(client_jwt())}\nX-Correlation-ID: order-77"
    for _ in range(2):
        reply = await wire.ask(head)
        assert reply.json["data"] == {"token": TOKEN, "status": "revoked"}
    assert world.tokens.revoked_by == ["order-77", "order-77"]


class TestPages:
    """The list of a merchant's tokens."""

    @pytest.fixture(autouse=True)
    def _five_tokens(self, world: World) -> None:
        names = [f"ptk_000000000000000000000000{n}" for n in range(5)]
        world.tokens.tokens = {name: payment_token(name) for name in names}

    async def test_the_first_page_says_where_it_stands(self, wire: Wire) -> None:
        reply = await wire.ask(get(f"{LIST}?limit=2", client_jwt()))
        assert [t["token"][-1] for t in reply.json["data"]] == ["0", "1"]
        assert reply.json["pagination"] == {
            "page": 1,
            "limit": 2,
            "total": 5,
            "pages": 3,
            "has_next": True,
            "has_previous": False,
            "next_cursor": "2",
        }

    async def test_the_last_page_has_no_next(self, wire: Wire) -> None:
        pagination = (await wire.ask(get(f"{LIST}?limit=2&page=3", client_jwt()))).json[
            "pagination"
        ]
        assert pagination["has_next"] is False
        assert pagination["has_previous"] is True
        assert pagination["next_cursor"] is None

    async def test_cursors_lead_through_the_whole_list(self, wire: Wire) -> None:
        seen: list[str] = []
        query = "limit=2"
        for _ in range(3):
            reply = await wire.ask(get(f"{LIST}?{query}", client_jwt()))
            seen += [t["token"][-1] for t in reply.json["data"]]
            query = f"limit=2&cursor={reply.json['pagination']['next_cursor']}"
        assert seen == ["0", "1", "2", "3", "4"]
        assert reply.json["pagination"]["page"] is None

    async def test_the_default_is_page_one_of_fifty(self, wire: Wire) -> None:
        pagination = (await wire.ask(get(LIST, client_jwt()))).json["pagination"]
        assert (pagination["page"], pagination["limit"]) == (1, 50)

    async def test_a_client_may_name_its_own_merchant(self, wire: Wire) -> None:
        reply = await wire.ask(get(f"{LIST}?merchant_id={MERCHANT}", client_jwt()))
        assert reply.json["pagination"]["total"] == 5

    async def test_an_internal_service_names_the_merchant(self, wire: Wire) -> None:
        reply = await wire.ask(get(f"{LIST}?merchant_id={OTHER_MERCHANT}", internal_jwt()))
        assert reply.json["data"] == []


class TestIds:
    """Request and correlation ids."""

    async def test_ids_are_made_where_there_are_none(self, wire: Wire) -> None:
        first = await wire.ask("GET /healthz HTTP/1.1")
        second = await wire.ask("GET /healthz HTTP/1.1")
        assert first.headers["x-request-id"] == first.json["meta"]["request_id"]
        assert first.headers["x-correlation-id"] == first.headers["x-request-id"]
        assert first.headers["x-request-id"] != second.headers["x-request-id"]

    async def test_ids_come_back_as_they_were_sent(self, wire: Wire) -> None:
        reply = await wire.ask("GET /nope HTTP/1.1\nX-Request-ID: r-1\nX-Correlation-ID: c/2")
        assert reply.headers["x-request-id"] == "r-1"
        assert reply.headers["x-correlation-id"] == "c/2"
        assert reply.json["meta"]["correlation_id"] == "c/2"

    @pytest.mark.parametrize(
        "bad",
        [
            "a b",
            "x" * 129,
            '"',
            "é",
            "a;b",
            "<script>",
            "order-4242424242424242",
            "4242-4242-4242-4242",
        ],
    )
    async def test_an_id_that_would_spoil_a_log_is_replaced(self, wire: Wire, bad: str) -> None:
        reply = await wire.ask(f"GET /healthz HTTP/1.1\nX-Request-ID: {bad}")
        assert reply.headers["x-request-id"] != bad
        assert len(reply.headers["x-request-id"]) == 32


class TestHealth:
    """`/healthz`, `/readyz`, `/metrics`."""

    @pytest.mark.parametrize("path", ["/healthz", "/health"])
    async def test_a_live_process_says_so_without_being_asked_who_asks(
        self, wire: Wire, path: str
    ) -> None:
        assert (await wire.ask(f"GET {path} HTTP/1.1")).json["data"] == {"status": "ok"}

    async def test_a_part_that_is_not_required_degrades(self, world: World, wire: Wire) -> None:
        world.bus = "it is away"
        reply = await wire.ask("GET /readyz HTTP/1.1")
        assert reply.status == 200
        assert reply.json["data"] == {"status": "degraded", "degraded": {"nats": "it is away"}}

    async def test_a_required_part_away_is_not_ready(self, world: World, wire: Wire) -> None:
        world.database = "it refuses connections"
        reply = await wire.ask("GET /readyz HTTP/1.1")
        assert reply.status == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json["errors"] == [{"field": "database", "message": "it refuses connections"}]

    async def test_a_flood_of_probes_asks_the_database_once_a_second(
        self, world: World, wire: Wire
    ) -> None:
        for _ in range(10):
            await wire.ask("GET /readyz HTTP/1.1")
        assert world.checks == 1
        world.clock.advance(1.0)
        world.database = "gone"
        assert (await wire.ask("GET /readyz HTTP/1.1")).status == 503

    async def test_a_draining_daemon_lives_and_is_not_ready(self, world: World, wire: Wire) -> None:
        world.draining = True
        assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200
        assert (await wire.ask("GET /readyz HTTP/1.1")).status == 503
        assert (await wire.ask("GET /metrics HTTP/1.1")).status == 200

    async def test_metrics_count_by_route_template_never_by_path(self, wire: Wire) -> None:
        await wire.ask(get(ONE, client_jwt()))
        await wire.ask("GET /what/ever HTTP/1.1")
        await wire.ask("PURGE /pot HTTP/1.1")
        page = (await wire.ask("GET /metrics HTTP/1.1")).body.decode()
        assert (
            'glamd_http_requests_total{listener="api",method="GET",'
            'route="/api/v1/payment-tokens/{token}",status="200"}'
        ) in page
        assert 'route="unmatched",status="404"' in page
        assert TOKEN not in page
        assert "/what/ever" not in page
        assert "PURGE" not in page


async def test_every_answer_has_the_security_headers(wire: Wire) -> None:
    for head in ("GET /healthz HTTP/1.1", "GET /nope HTTP/1.1", get(ONE, "x.y.z")):
        headers = (await wire.ask(head)).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["server"] == "glamd"
        assert "strict-transport-security" not in headers


async def test_the_same_connection_serves_many_requests(api: int) -> None:
    async with connected(api) as wire:
        for _ in range(50):
            assert (await wire.ask(get(ONE, client_jwt()))).status == 200


async def test_pipelined_requests_are_answered_in_their_order(wire: Wire) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: r%d\r\n\r\n"
    await wire.send(b"".join(one % n for n in range(40)))
    for n in range(40):
        assert (await wire.reply()).headers["x-request-id"] == f"r{n}"


def test_a_payment_token_has_nothing_more_than_its_metadata() -> None:
    # A field added to the model must be thought about before it reaches a client.
    assert "pan" not in PaymentToken.__slots__
