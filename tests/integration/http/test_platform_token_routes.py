"""`/api/v1/tokens` over real sockets and a real PostgreSQL: who may, what is refused, what is kept.

No answer, log or row here may ever show the canary that stands in every secret, but the one answer
that is for a reader.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import orjson
import pytest
from pydantic import TypeAdapter
from structlog.testing import capture_logs

from glamd.credentials.model import PLATFORMS, TOKEN_TYPES
from glamd.credentials.service import PlatformTokens
from glamd.db import Database
from glamd.http.addresses import ClientAddress
from glamd.http.idempotent import Once
from glamd.http.limits import HttpLimits
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.platform_tokens import PlatformTokenRoutes
from glamd.http.routes import RouteTable
from glamd.idempotency import IdempotencyKeys
from tests.support.database_proxy import DatabaseProxy
from tests.support.http_fakes import MERCHANT, OTHER_MERCHANT, Reply, Wire, client_jwt, connected
from tests.support.http_fakes import internal_jwt as service_jwt
from tests.support.http_world import World
from tests.support.keys import local_provider
from tests.support.platform_vault import CANARY, load_keyring, log_of, rows_of
from tests.support.postgres import execute

TOKENS = "/api/v1/tokens"
OWN = f"{TOKENS}/{MERCHANT}"
FOREIGN = f"{TOKENS}/{OTHER_MERCHANT}"
READER = "platform-connector"
OTHERS_JWT = client_jwt(merchant_id=str(OTHER_MERCHANT))


def body(**changes: Any) -> dict[str, Any]:
    """A token that nothing is wrong with; None takes a field away."""
    whole = {
        "merchant_id": str(MERCHANT),
        "platform_name": "shopify",
        "platform_shop_id": "67890",
        "domain": "shop.example",
        "token_data": {"access_token": CANARY, "n": 2**63 - 1, "f": 1.5, "l": [None, True, {}]},
        "token_type": "oauth",
    } | changes
    return {name: value for name, value in whole.items() if value is not None}


def reader(service: str = READER) -> str:
    """A service's token, without any scope."""
    return service_jwt(scope="", service=service)


@dataclass(slots=True)
class Shop:
    """A listener with these routes, and what it stands on."""

    world: World
    database: Database
    wire: Wire

    async def ask(
        self, method: str, path: str, token: str, sent: Any = None, **headers: str
    ) -> Reply:
        """One request; every answer but a reader's is searched for the canary."""
        raw = (
            b"" if sent is None else sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        )
        lines = [f"{method} {path} HTTP/1.1", f"Authorization: Bearer {token}"]
        if sent is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        with capture_logs() as logs:
            reply = await self.wire.ask("\n".join(lines), raw)
        assert CANARY not in repr(logs)
        if not (method == "GET" and reply.status == 200):
            assert CANARY.encode() not in reply.body
        return reply

    async def store(self, token: str | None = None, **changes: Any) -> Reply:
        """Store a token."""
        return await self.ask("POST", TOKENS, token or client_jwt(), body(**changes))

    async def read(self, path: str = OWN, token: str | None = None) -> Reply:
        """Read tokens."""
        return await self.ask("GET", path, token or reader())

    async def log(self, merchant_id: UUID = MERCHANT) -> list[tuple[Any, ...]]:
        """The merchant's access log."""
        return await log_of(self.database, merchant_id)


@pytest.fixture(scope="module")
def kek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the key-encryption key of this module's database is."""
    return tmp_path_factory.mktemp("kek")


@pytest.fixture
async def database_url(module_database_url: str) -> str:
    """One database for all tests here, with nothing in it but keys."""
    await execute(
        module_database_url,
        "DELETE FROM glam.platform_tokens; DELETE FROM glam.token_access_log;"
        " DELETE FROM glam.idempotency_keys",
    )
    return module_database_url


@asynccontextmanager
async def listening(world: World, database: Database, kek: Path) -> AsyncIterator[int]:
    """The port of a listener with these routes."""
    keyring = await load_keyring(database, local_provider(kek), world.clock)
    routes = PlatformTokenRoutes(
        PlatformTokens(database, keyring=keyring, clock=world.clock),
        once=Once(IdempotencyKeys(database)),
        clock=world.clock,
    )
    pipeline = Pipeline(
        listener="api",
        table=RouteTable(routes.routes()),
        authenticate=world.authenticator(),
        address=ClientAddress(),
        limits=world.limits,
        limiter=world.limiter(),
        draining=lambda: world.draining,
        clock=world.clock,
        refused=routes.refused,
    )
    listener = Listener(pipeline, name="api", limits=world.limits, refuse=pipeline.refuse)
    try:
        yield await listener.start_tcp("127.0.0.1", 0, None)
    finally:
        await listener.stop(1.0)


@pytest.fixture
async def shop(world: World, database: Database, kek: Path) -> AsyncIterator[Shop]:
    """A listener, and a connection to it."""
    async with listening(world, database, kek) as port, connected(port) as wire:
        yield Shop(world, database, wire)


# ---- who may


@pytest.mark.parametrize(
    ("token", "changes"),
    [
        (client_jwt(), {"domain": "other.example"}),
        (client_jwt(), {"domain": "shop.example.evil.example"}),
        (client_jwt(), {"merchant_id": str(OTHER_MERCHANT)}),
        (client_jwt(shop="other.example", sub="shop.example"), {}),
        (client_jwt(shop=None, sub="other.example"), {}),
        (client_jwt(shop=None), {}),
        (OTHERS_JWT, {}),
        (client_jwt(shop=" shop.example"), {}),
    ],
)
async def test_a_token_of_another_shop_or_merchant_is_a_domain_mismatch_with_a_row(
    shop: Shop, token: str, changes: dict[str, str]
) -> None:
    reply = await shop.store(token, **changes)
    assert (reply.status, reply.json["code"]) == (401, "DOMAIN_MISMATCH")
    # Under the caller's own merchant, whatever the body says.
    callers = OTHER_MERCHANT if token == OTHERS_JWT else MERCHANT
    assert await shop.log(callers) == [("store", "shopify", str(callers), False, "DOMAIN_MISMATCH")]
    assert await rows_of(shop.database, MERCHANT) == []
    assert await rows_of(shop.database, OTHER_MERCHANT) == []


@pytest.mark.parametrize(
    ("token", "domain"),
    [
        (client_jwt(shop="Shop.EXAMPLE"), "sHop.example"),
        (client_jwt(shop=None, sub="shop.example"), "shop.example"),
        (client_jwt(merchant_id=None), "shop.example"),
    ],
)
async def test_the_shop_is_compared_without_case_and_found_in_sub_too(
    shop: Shop, token: str, domain: str
) -> None:
    assert (await shop.store(token, domain=domain)).status == 201
    (row,) = await rows_of(shop.database, MERCHANT)
    assert row["domain"] == "shop.example"


@pytest.mark.parametrize(
    ("method", "path", "token", "status", "code", "row"),
    [
        ("GET", OWN, client_jwt(), 403, "FORBIDDEN", ("read", None, str(MERCHANT))),
        (
            "GET",
            f"{FOREIGN}?platform=custom",
            client_jwt(),
            403,
            "FORBIDDEN",
            ("read", "custom", str(MERCHANT)),
        ),
        ("GET", OWN, reader("spy"), 403, "SERVICE_NOT_ALLOWED", ("read", None, "spy")),
        (
            "GET",
            f"{OWN}?platform=nonsense",
            reader("platform-connector2"),
            403,
            "SERVICE_NOT_ALLOWED",
            ("read", None, "platform-connector2"),
        ),
        ("HEAD", OWN, reader("spy"), 403, None, ("read", None, "spy")),
        ("DELETE", f"{OWN}/magento", reader(), 403, "FORBIDDEN", ("delete", "magento", READER)),
        (
            "DELETE",
            f"{FOREIGN}/shopify",
            client_jwt(),
            404,
            "NOT_FOUND",
            ("delete", "shopify", str(MERCHANT)),
        ),
        (
            "DELETE",
            f"{FOREIGN}/nonsense",
            client_jwt(),
            404,
            "NOT_FOUND",
            ("delete", None, str(MERCHANT)),
        ),
    ],
)
async def test_whoever_may_not_leaves_a_row_under_the_merchant_that_the_path_names(
    shop: Shop,
    method: str,
    path: str,
    token: str,
    status: int,
    code: str | None,
    row: tuple[str, str | None, str],
) -> None:
    await shop.store()
    await shop.store(OTHERS_JWT, merchant_id=str(OTHER_MERCHANT))
    named = UUID(path.split("/")[4].partition("?")[0])
    if method == "HEAD":
        lines = f"HEAD {path} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nHost: x\r\n\r\n"
        await shop.wire.send(lines.encode())
        head = await shop.wire.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 403 ")
    else:
        reply = await shop.ask(method, path, token)
        assert (reply.status, reply.json["code"]) == (status, code)
    assert (await shop.log(named))[1:] == [
        (*row, False, code or "SERVICE_NOT_ALLOWED"),
    ]
    for merchant_id in (MERCHANT, OTHER_MERCHANT):
        assert len(await rows_of(shop.database, merchant_id)) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{TOKENS}/nonsense", 403),
        ("GET", f"{TOKENS}/{MERCHANT.hex}", 403),
        ("DELETE", f"{TOKENS}/%00/shopify", 404),
        ("DELETE", f"{TOKENS}/{'9' * 3000}/shopify", 404),
        ("POST", TOKENS, 403),
        ("GET", TOKENS, 405),
        ("PUT", OWN, 405),
        ("GET", f"{OWN}/shopify", 405),
    ],
)
async def test_what_names_no_merchant_or_no_route_leaves_no_row(
    shop: Shop, method: str, path: str, status: int
) -> None:
    token = reader("spy") if method == "POST" else client_jwt()
    reply = await shop.ask(method, path, token, body() if method == "POST" else None)
    assert reply.status == status
    assert await shop.database.fetchval("SELECT count(*) FROM glam.token_access_log") == 0


async def test_nobody_is_not_logged_under_a_merchant(shop: Shop) -> None:
    for method, path in (("GET", OWN), ("DELETE", f"{OWN}/shopify")):
        assert (await shop.ask(method, path, "no.jwt.at-all")).status == 401
    assert await shop.log() == []


async def test_a_flood_of_refused_requests_is_held_to_its_rate_and_writes_one_row(
    database: Database, kek: Path
) -> None:
    world = World(rate_per_s=1.0, burst=3)
    async with listening(world, database, kek) as port, connected(port) as wire:
        shop = Shop(world, database, wire)
        statuses = [(await shop.read(token=reader("spy"))).status for _ in range(10)]
    assert statuses == [403] * 3 + [429] * 7
    assert len(await shop.log()) == 1


async def test_nobody_fills_another_merchants_access_log(shop: Shop) -> None:
    path = f"{TOKENS}/{OTHER_MERCHANT}"
    for platform in ("shopify", "magento", "custom", "nonsense", "shopify") * 6:
        assert (await shop.ask("DELETE", f"{path}/{platform}", client_jwt())).status == 404
    assert [row[:2] for row in await shop.log(OTHER_MERCHANT)] == [("delete", "shopify")]


async def test_a_reader_with_every_scope_that_is_not_configured_is_refused(shop: Shop) -> None:
    token = service_jwt(scope="payment:read credits:write bff:call", service="platform_connector")
    assert (await shop.read(token=token)).json["code"] == "SERVICE_NOT_ALLOWED"


# ---- storing


async def test_a_stored_token_is_answered_with_its_id_and_read_as_it_was(shop: Shop) -> None:
    reply = await shop.store(
        expires_at="2030-01-01T14:00:00+02:00", scopes="read_products,write_orders read_products"
    )
    assert reply.status == 201
    (row,) = await rows_of(shop.database, MERCHANT)
    assert reply.json["data"] == {"token_id": str(row["token_id"]), "status": "stored"}
    assert UUID(reply.json["data"]["token_id"]).version == 7
    found = await shop.read()
    assert found.status == 200
    assert found.headers["cache-control"] == "no-store"
    assert found.json["data"] == {
        "tokens": [
            {
                "platform_name": "shopify",
                "platform_shop_id": "67890",
                "domain": "shop.example",
                "token_data": body()["token_data"],
                "token_type": "oauth",
                "expires_at": "2030-01-01T12:00:00Z",
                "is_expired": True,  # the world's clock stands at that very moment
                "scopes": ["read_products", "write_orders"],
                "health": "expired",
            }
        ],
        "undecryptable": [],
    }


async def test_every_platform_and_type_is_stored_read_and_deleted(shop: Shop) -> None:
    for platform, token_type in product(PLATFORMS, TOKEN_TYPES):
        assert (await shop.store(platform_name=platform, token_type=token_type)).status == 201
        (token,) = (await shop.read(f"{OWN}?platform={platform}")).json["data"]["tokens"]
        assert (token["platform_name"], token["token_type"]) == (platform, token_type)
        assert token["expires_at"] is None
        assert token["scopes"] == []
        reply = await shop.ask("DELETE", f"{OWN}/{platform}", client_jwt())
        assert (reply.status, reply.json["data"]) == (200, {"status": "deleted"})
        assert (await shop.read()).json["data"]["tokens"] == []


WRONG: list[tuple[str, Any]] = [
    ("merchant_id", 5),
    ("platform_name", "ebay"),
    ("platform_shop_id", "67890\u0000"),
    ("domain", "127.0.0.1"),
    ("token_data", {CANARY: 2**63}),
    ("token_type", "password"),
    ("expires_at", "10000-01-01T00:00:00Z"),
    ("scopes", {CANARY: True}),
    ("idempotency_key", "a b"),
    ("nonsense", 1),
]
"""One of each; every bound of each stands in the models' unit tests."""


@pytest.mark.parametrize(("field", "value"), WRONG)
async def test_what_is_wrong_is_named_and_never_repeated(
    shop: Shop, field: str, value: object
) -> None:
    reply = await shop.ask("POST", TOKENS, client_jwt(), body(**{field: value}))
    assert (reply.status, reply.json["code"]) == (422, "VALIDATION_ERROR")
    assert [error["field"] for error in reply.json["errors"]] == [field]
    assert await shop.log() == []
    assert await rows_of(shop.database, MERCHANT) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"token_data": {"a": -(2**63), "b": 2**63 - 1, "": "\u0000\u2028"}},
        {"token_data": {"a": "x" * (64 * 1024 - 8)}, "platform_shop_id": "\u00e4" * 255},
        {"expires_at": "0001-01-01T00:00:00Z", "scopes": ["x" * 255] * 256},
        {"expires_at": "9999-12-31T23:59:59.9999999Z", "scopes": " ,\t"},
    ],
)
async def test_what_is_just_within_the_bounds_is_stored_and_read(
    shop: Shop, changes: dict[str, Any]
) -> None:
    assert (await shop.store(**changes)).status == 201
    (token,) = (await shop.read()).json["data"]["tokens"]
    assert token["token_data"] == changes.get("token_data", body()["token_data"])


@pytest.mark.parametrize(
    "sent",
    [
        b'{"token_data": {"access_token": "%s", "x": NaN}}',
        b'{"token_data": {"access_token": "%s", "x": 1e999}}',
        b'{"token_data": {"access_token": "%s", "access_token": "b"}}',
        b'{"token_data": {"access_token": "%s\\ud800"}}',
        b'{"token_data": {"access_token": "%s"',
        b'{"token_data": "%s\xff"}',
        b'{"token_data": "%s", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_what_is_no_json_is_refused_without_a_word_of_it(shop: Shop, sent: bytes) -> None:
    reply = await shop.ask("POST", TOKENS, client_jwt(), sent.replace(b"%s", CANARY.encode()))
    assert (reply.status, reply.json["code"]) == (400, "MALFORMED_JSON")


async def test_a_time_without_an_offset_is_utc(shop: Shop) -> None:
    await shop.store(expires_at="2031-05-06T07:08:09")
    (token,) = (await shop.read()).json["data"]["tokens"]
    assert token["expires_at"] == "2031-05-06T07:08:09Z"
    assert (token["is_expired"], token["health"]) == (False, "valid")


async def test_the_same_key_stores_once_whatever_came_after(shop: Shop) -> None:
    first = await shop.ask("POST", TOKENS, client_jwt(), body(), Idempotency_Key="k-1")
    await shop.store(token_data={"access_token": "a newer one"})
    again = await shop.ask("POST", TOKENS, client_jwt(), body(idempotency_key="k-1"))
    assert (first.status, again.status) == (201, 201)
    assert again.json["data"] == first.json["data"]
    assert again.headers["idempotent-replayed"] == "true"
    other = await shop.ask(
        "POST", TOKENS, client_jwt(), body(token_type="bearer"), Idempotency_Key="k-1"
    )
    assert (other.status, other.json["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    (row,) = await rows_of(shop.database, MERCHANT)
    assert row["generation"] == 2
    (token,) = (await shop.read()).json["data"]["tokens"]
    assert token["token_data"] == {"access_token": "a newer one"}
    kept = await shop.database.fetch("SELECT t::text AS all FROM glam.idempotency_keys t")
    assert len(kept) == 1
    assert CANARY not in kept[0]["all"]


# ---- reading and deleting


async def test_a_merchant_without_tokens_has_an_empty_list_and_a_row(shop: Shop) -> None:
    nobody = uuid4()
    reply = await shop.read(f"{TOKENS}/{nobody}")
    assert (reply.status, reply.json["data"]) == (200, {"tokens": [], "undecryptable": []})
    assert await shop.log(nobody) == [("read", None, READER, True, None)]


@pytest.mark.parametrize("merchant", ["nonsense", str(MERCHANT)[:-1], MERCHANT.hex, "%7B%7D", "5"])
async def test_a_merchant_that_can_be_none_is_not_found(shop: Shop, merchant: str) -> None:
    reply = await shop.read(f"{TOKENS}/{merchant}")
    assert (reply.status, reply.json["code"]) == (404, "NOT_FOUND")


async def test_a_merchants_id_is_read_in_any_case(shop: Shop) -> None:
    await shop.store()
    reply = await shop.read(f"{TOKENS}/{str(MERCHANT).upper()}")
    assert len(reply.json["data"]["tokens"]) == 1


@pytest.mark.parametrize(
    "query", ["platform=ebay", "platform=", "platform=Shopify", "platform=custom&platform=custom"]
)
async def test_an_unknown_platform_in_the_query_is_named(shop: Shop, query: str) -> None:
    reply = await shop.read(f"{OWN}?{query}")
    assert reply.status == 422
    assert [error["field"] for error in reply.json["errors"]] == ["platform"]
    assert await shop.log() == []


async def test_an_unknown_platform_in_the_path_is_named(shop: Shop) -> None:
    reply = await shop.ask("DELETE", f"{OWN}/ebay", client_jwt())
    assert (reply.status, reply.json["code"]) == (422, "VALIDATION_ERROR")
    assert [error["field"] for error in reply.json["errors"]] == ["platform"]
    assert await shop.log() == []


async def test_readers_get_one_merchants_tokens_and_no_other(shop: Shop) -> None:
    other = {"access_token": "the other merchant's"}
    await shop.store()
    await shop.store(OTHERS_JWT, merchant_id=str(OTHER_MERCHANT), token_data=other)
    (theirs,) = (await shop.read(FOREIGN)).json["data"]["tokens"]
    assert theirs["token_data"] == other
    (mine,) = (await shop.read()).json["data"]["tokens"]
    assert mine["token_data"] == body()["token_data"]


async def test_a_token_that_does_not_open_is_named_beside_those_that_do(shop: Shop) -> None:
    for platform in ("shopify", "custom"):
        await shop.store(platform_name=platform)
    await shop.database.execute(
        "UPDATE glam.platform_tokens t SET ciphertext = o.ciphertext FROM glam.platform_tokens o"
        " WHERE t.platform = 'shopify' AND o.platform = 'custom'"
    )
    reply = await shop.read()
    assert reply.status == 200
    assert reply.json["data"]["undecryptable"] == ["shopify"]
    assert [one["platform_name"] for one in reply.json["data"]["tokens"]] == ["custom"]
    assert (await shop.log())[-1] == ("read", "shopify", READER, False, "UNDECRYPTABLE")


async def test_deleting_what_is_not_there_is_a_success_with_a_row(shop: Shop) -> None:
    for _ in range(2):
        reply = await shop.ask("DELETE", f"{OWN}/shopify", client_jwt())
        assert (reply.status, reply.json["data"]) == (200, {"status": "deleted"})
    assert await shop.log() == [("delete", "shopify", str(MERCHANT), True, None)] * 2


async def test_ids_and_address_travel_into_the_access_log(shop: Shop) -> None:
    await shop.ask(
        "GET", OWN, reader(), X_Request_ID="req-9", X_Correlation_ID="order-77",
        X_Forwarded_For="203.0.113.9",
    )  # fmt: skip
    row = await shop.database.fetchrow(
        "SELECT actor_kind, actor, ip, request_id, correlation_id FROM glam.token_access_log"
    )
    assert row is not None
    # Nobody is a trusted proxy here, so the header is nobody's word.
    assert tuple(row) == ("internal", READER, "127.0.0.1", "req-9", "order-77")


async def test_a_read_whose_commit_is_lost_shows_nothing(
    database_url: str, world: World, database: Database, kek: Path
) -> None:
    async with DatabaseProxy(database_url) as proxy:
        lossy = await Database.connect(proxy.url, pool_size=1)
        try:
            async with listening(world, lossy, kek) as port, connected(port) as wire:
                shop = Shop(world, lossy, wire)
                await shop.store()
                await shop.read()
                before = proxy.questions
                await shop.read()
                proxy.lose_question = proxy.questions - before
                reply = await shop.read()
                assert (reply.status, reply.json["code"]) == (503, "UNAVAILABLE")
                assert CANARY.encode() not in reply.body
                proxy.go_down()
                for attempt in (
                    shop.read(),
                    shop.store(),
                    shop.ask("DELETE", f"{OWN}/shopify", client_jwt()),
                    # A refusal without its row is no refusal.
                    shop.read(token=reader("spy")),
                    shop.store(domain="other.example"),
                ):
                    async with asyncio.timeout(5):
                        assert (await attempt).status == 503
        finally:
            await lossy.close()
    assert len(await log_of(database, MERCHANT)) == 3


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read(
    database: Database, kek: Path
) -> None:
    world = World(limits=replace(HttpLimits(), body_bytes=1000, linger_s=0.2))
    async with listening(world, database, kek) as port, connected(port) as wire:
        reply = await Shop(world, database, wire).store(token_data={"a": CANARY * 100})
    assert reply.status == 413


def test_the_published_examples_fit_their_models() -> None:
    routes = PlatformTokenRoutes.__new__(PlatformTokenRoutes)
    routes._readers = frozenset()
    for route in routes.routes():
        operation = route.operation
        assert operation is not None
        adapter = TypeAdapter(cast("type[Any]", operation.answer))
        adapter.validate_json(orjson.dumps(operation.example))
        if operation.body is not None:
            operation.body.model_validate_json(orjson.dumps(operation.body_example))
