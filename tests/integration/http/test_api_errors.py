"""Every error that the api listener can answer, provoked from outside, as problem+json."""

import json
from typing import Any
from uuid import UUID

import pytest
import structlog
from prometheus_client import REGISTRY

from glamd.errors import ConflictError, CryptoError, RateLimitedError, UnavailableError
from tests.support.http_fakes import (
    MERCHANT,
    OTHER_MERCHANT,
    OTHER_TOKEN,
    TOKEN,
    Reply,
    Wire,
    client_jwt,
    connected,
    internal_jwt,
)
from tests.support.http_world import World

ONE = f"/api/v1/payment-tokens/{TOKEN}"
LIST = "/api/v1/payment-tokens"


def ask(method: str, path: str, token: str | None = None, *lines: str) -> str:
    """A request's head."""
    authorization = [] if token is None else [f"Authorization: Bearer {token}"]
    return "\n".join([f"{method} {path} HTTP/1.1", *authorization, *lines])


def problem(reply: Reply, status: int, code: str) -> Any:
    """Check that an answer is this problem, whole, and give its body."""
    assert (reply.status, reply.json["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json
    assert body["status"] == status
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["detail"]
    assert body["error"] == {
        "code": code,
        "message": body["detail"],
        "details": body.get("errors", []),
    }
    assert body["meta"]["request_id"] == reply.headers["x-request-id"]
    assert body["meta"]["correlation_id"] == reply.headers["x-correlation-id"]
    return body


class TestWhoCalls:
    """401 and 403."""

    async def test_no_token_is_unauthenticated(self, wire: Wire) -> None:
        reply = await wire.ask(ask("GET", ONE))
        problem(reply, 401, "UNAUTHENTICATED")
        assert reply.headers["www-authenticate"].lower().startswith("bearer")

    @pytest.mark.parametrize(
        "header", ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", "token", "Bearer a b"]
    )
    async def test_another_scheme_is_unauthenticated(self, wire: Wire, header: str) -> None:
        problem(
            await wire.ask(ask("GET", ONE, None, f"Authorization: {header}")),
            401,
            "UNAUTHENTICATED",
        )

    async def test_two_authorization_headers_are_unauthenticated(self, wire: Wire) -> None:
        again = f"Authorization: Bearer {client_jwt()}"
        problem(await wire.ask(ask("GET", ONE, client_jwt(), again)), 401, "UNAUTHENTICATED")

    async def test_a_service_without_the_scope_is_forbidden(self, wire: Wire) -> None:
        body = problem(
            await wire.ask(ask("GET", ONE, internal_jwt("payment:revoke"))), 403, "FORBIDDEN"
        )
        assert "payment:read" in body["detail"]

    async def test_reading_does_not_allow_to_revoke(self, wire: Wire) -> None:
        problem(await wire.ask(ask("DELETE", ONE, internal_jwt("payment:read"))), 403, "FORBIDDEN")

    async def test_a_clients_scope_does_not_make_it_a_service(self, wire: Wire) -> None:
        token = client_jwt(scope="payment:read")
        path = f"/api/v1/payment-tokens/{OTHER_TOKEN}"
        problem(await wire.ask(ask("GET", path, token)), 404, "TOKEN_NOT_FOUND")

    async def test_the_database_away_while_looking_up_a_shop_is_no_401(
        self, world: World, wire: Wire
    ) -> None:
        world.domains_away = True
        problem(await wire.ask(ask("GET", ONE, client_jwt(merchant_id=None))), 503, "UNAVAILABLE")


class TestWhatIsThere:
    """404, 405, 409."""

    async def test_an_unknown_path_is_not_found(self, wire: Wire) -> None:
        for path in ("/", "//", "/api", "/api/v1/payment-tokens/", f"{ONE}/", f"{ONE}/x", "/%00"):
            problem(await wire.ask(ask("GET", path)), 404, "NOT_FOUND")

    async def test_another_merchants_token_is_as_unknown_as_none(self, wire: Wire) -> None:
        unknown = await wire.ask(ask("GET", f"{LIST}/ptk_99999999999999999999999999", client_jwt()))
        foreign = await wire.ask(ask("GET", f"{LIST}/{OTHER_TOKEN}", client_jwt()))
        assert problem(unknown, 404, "TOKEN_NOT_FOUND")["detail"] == foreign.json["detail"]
        problem(foreign, 404, "TOKEN_NOT_FOUND")
        problem(
            await wire.ask(ask("DELETE", f"{LIST}/{OTHER_TOKEN}", client_jwt())),
            404,
            "TOKEN_NOT_FOUND",
        )

    @pytest.mark.parametrize(
        "path", ["4111111111111111", "ptk_", "ptk_%00%00%00%00%00%00%00%00%00", "ptk_" + "A" * 300]
    )
    async def test_what_cannot_be_a_token_is_not_even_looked_up(
        self, world: World, wire: Wire, path: str
    ) -> None:
        problem(await wire.ask(ask("GET", f"{LIST}/{path}", client_jwt())), 404, "TOKEN_NOT_FOUND")
        assert not world.tokens.entered.is_set()

    async def test_another_merchants_list_does_not_exist(self, wire: Wire) -> None:
        path = f"{LIST}?merchant_id={OTHER_MERCHANT}"
        problem(await wire.ask(ask("GET", path, client_jwt())), 404, "NOT_FOUND")

    @pytest.mark.parametrize("method", ["PUT", "PATCH", "POST", "OPTIONS", "TRACE", "PROPFIND"])
    async def test_another_method_is_told_which_there_are(self, wire: Wire, method: str) -> None:
        reply = await wire.ask(ask(method, ONE, client_jwt()))
        problem(reply, 405, "METHOD_NOT_ALLOWED")
        assert reply.headers["allow"] == "delete, get, head"

    async def test_a_conflict_is_409(self, world: World, wire: Wire) -> None:
        world.tokens.fails = ConflictError("It contradicts.", code="SOMETHING_ELSE")
        problem(await wire.ask(ask("GET", ONE, client_jwt())), 409, "SOMETHING_ELSE")


class TestBodies:
    """413 and 415, by the headers alone."""

    async def test_a_body_that_announces_too_much_is_refused_unread(self, wire: Wire) -> None:
        reply = await wire.ask(ask("DELETE", ONE, client_jwt(), "Content-Length: 262145"))
        problem(reply, 413, "BODY_TOO_LARGE")
        assert await wire.closed()

    @pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "zstd"])
    async def test_a_compressed_body_is_refused_unread(self, wire: Wire, coding: str) -> None:
        head = ask("DELETE", ONE, client_jwt(), f"Content-Encoding: {coding}", "Content-Length: 4")
        problem(await wire.ask(head, b"\x1f\x8b\x08\x00"), 415, "UNSUPPORTED_MEDIA_TYPE")


class TestQueries:
    """422, naming the field, without its value."""

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ("limit=0", "limit"),
            ("limit=201", "limit"),
            ("limit=ten4111111111111111", "limit"),
            ("limit=1&limit=2", "limit"),
            ("page=0", "page"),
            ("page=-1", "page"),
            ("page=10001", "page"),
            ("page=99999999999999999999999999", "page"),
            ("cursor=", "cursor"),
            ("cursor=4111111111111111x", "cursor"),
            ("cursor=" + "1" * 513, "cursor"),
            ("page=1&cursor=1", "cursor"),
            ("merchant_id=4111111111111111", "merchant_id"),
            ("merchant_id=%00", "merchant_id"),
        ],
    )
    async def test_a_wrong_query_names_the_field_and_not_the_value(
        self, wire: Wire, query: str, field: str
    ) -> None:
        reply = await wire.ask(ask("GET", f"{LIST}?{query}", client_jwt()))
        body = problem(reply, 422, "VALIDATION_ERROR")
        assert [error["field"] for error in body["errors"]] == [field]
        assert b"411111" not in reply.body

    async def test_a_service_has_to_name_the_merchant(self, wire: Wire) -> None:
        body = problem(await wire.ask(ask("GET", LIST, internal_jwt())), 422, "VALIDATION_ERROR")
        assert body["errors"][0]["field"] == "merchant_id"

    async def test_a_query_that_is_not_known_does_not_matter(self, wire: Wire) -> None:
        assert (await wire.ask(ask("GET", f"{LIST}?_=1", client_jwt()))).status == 200


class TestRates:
    """429, by identity."""

    @pytest.fixture(autouse=True)
    def _slow(self, world: World) -> None:
        world.rate_per_s = 0.1
        world.burst = 2

    async def test_over_its_rate_a_caller_is_told_when_to_come_back(
        self, world: World, wire: Wire
    ) -> None:
        for _ in range(2):
            assert (await wire.ask(ask("GET", ONE, client_jwt()))).status == 200
        reply = await wire.ask(ask("GET", ONE, client_jwt()))
        problem(reply, 429, "RATE_LIMITED")
        assert reply.headers["retry-after"] == "10"
        world.clock.advance(10)
        assert (await wire.ask(ask("GET", ONE, client_jwt()))).status == 200

    async def test_one_callers_rate_is_not_anothers(self, wire: Wire) -> None:
        for _ in range(3):
            last = await wire.ask(ask("GET", ONE, client_jwt()))
        assert last.status == 429
        other = client_jwt(merchant_id=str(OTHER_MERCHANT))
        assert (await wire.ask(ask("GET", LIST, other))).status == 200
        assert (await wire.ask(ask("GET", ONE, internal_jwt()))).status == 200

    async def test_another_token_of_the_same_merchant_is_the_same_caller(self, wire: Wire) -> None:
        for _ in range(3):
            last = await wire.ask(ask("GET", ONE, client_jwt(jti=str(_))))
        assert last.status == 429

    async def test_guessing_tokens_is_held_to_a_rate_by_address(self, wire: Wire) -> None:
        for _ in range(2):
            assert (await wire.ask(ask("GET", ONE, "x.y.z"))).status == 401
        problem(await wire.ask(ask("GET", ONE, "x.y.z")), 429, "RATE_LIMITED")
        from_elsewhere = ask("GET", ONE, "x.y.z", "X-Forwarded-For: 203.0.113.9")
        assert (await wire.ask(from_elsewhere)).status == 401

    async def test_a_token_is_not_verified_for_an_address_beyond_its_rate(
        self, world: World, wire: Wire
    ) -> None:
        forged = client_jwt(secret="somebody-else's-secret-of-32-bytes!!")
        for _ in range(2):
            assert (await wire.ask(ask("GET", ONE, forged))).status == 401
        before = refused_for("signature")
        for _ in range(5):
            reply = await wire.ask(ask("GET", ONE, forged))
            problem(reply, 429, "RATE_LIMITED")
            assert reply.headers["retry-after"] == "10"
        assert refused_for("signature") == before
        # Asking in vain cost nothing: after the wait that was told there is a try again.
        world.clock.advance(10)
        assert (await wire.ask(ask("GET", ONE, forged))).status == 401
        assert refused_for("signature") == before + 1

    async def test_a_token_that_is_remembered_passes_whoever_guesses_beside_it(
        self, world: World, wire: Wire
    ) -> None:
        known = client_jwt()
        assert (await wire.ask(ask("GET", ONE, known))).status == 200
        for _ in range(3):
            await wire.ask(ask("GET", ONE, "x.y.z"))
        assert (await wire.ask(ask("GET", ONE, known))).status == 200
        # One that was never seen may be a guess; it is for later, or for another address.
        new = client_jwt(merchant_id=str(OTHER_MERCHANT))
        problem(await wire.ask(ask("GET", LIST, new)), 429, "RATE_LIMITED")
        elsewhere = ask("GET", LIST, new, "X-Forwarded-For: 203.0.113.9")
        assert (await wire.ask(elsewhere)).status == 200

    async def test_good_tokens_take_nothing_from_their_address(self, wire: Wire) -> None:
        for n in range(5):
            token = client_jwt(merchant_id=str(UUID(int=n)))
            assert (await wire.ask(ask("GET", LIST, token))).status == 200
        assert (await wire.ask(ask("GET", ONE, "x.y.z"))).status == 401

    @pytest.mark.parametrize("path", ["/docs", "/docs/swagger-ui-bundle.js", "/openapi.json"])
    async def test_documents_are_held_to_a_rate_by_address(
        self, world: World, wire: Wire, path: str
    ) -> None:
        for _ in range(2):
            assert (await wire.ask(ask("GET", path))).status == 200
        reply = await wire.ask(ask("GET", path))
        problem(reply, 429, "RATE_LIMITED")
        assert reply.headers["retry-after"] == "10"
        world.draining = True
        elsewhere = ask("GET", path, None, "X-Forwarded-For: 203.0.113.9")
        assert (await wire.ask(elsewhere)).status == 200

    async def test_trying_paths_is_held_to_a_rate_by_address(self, wire: Wire) -> None:
        for _ in range(2):
            assert (await wire.ask(ask("GET", "/wp-admin"))).status == 404
        problem(await wire.ask(ask("GET", "/wp-admin")), 429, "RATE_LIMITED")

    async def test_probes_are_not_held_to_a_rate(self, wire: Wire) -> None:
        for path in ("/healthz", "/readyz", "/metrics"):
            for _ in range(5):
                assert (await wire.ask(ask("GET", path))).status == 200


class TestOurSide:
    """500 and 503."""

    async def test_a_draining_daemon_takes_no_new_work(self, world: World, wire: Wire) -> None:
        world.draining = True
        reply = await wire.ask(ask("GET", ONE, client_jwt()))
        problem(reply, 503, "UNAVAILABLE")
        assert reply.headers["retry-after"] == "5"

    async def test_a_part_away_says_when_to_come_back(self, world: World, wire: Wire) -> None:
        world.tokens.fails = UnavailableError("The database is away.", retry_after_s=3)
        reply = await wire.ask(ask("GET", ONE, client_jwt()))
        problem(reply, 503, "UNAVAILABLE")
        assert reply.headers["retry-after"] == "3"

    async def test_a_capabilitys_own_rate_is_429(self, world: World, wire: Wire) -> None:
        world.tokens.fails = RateLimitedError("Too often.", retry_after_s=7)
        reply = await wire.ask(ask("GET", ONE, client_jwt()))
        problem(reply, 429, "RATE_LIMITED")
        assert reply.headers["retry-after"] == "7"

    @pytest.mark.parametrize(
        "failure",
        [
            RuntimeError("SELECT secret FROM cde.tokens WHERE pan = '4111111111111111'"),
            CryptoError("the ciphertext of row 7 does not open"),
            TimeoutError(),
            KeyError("pan"),
            RecursionError(),
        ],
        ids=lambda failure: type(failure).__name__,
    )
    async def test_what_nobody_foresaw_shows_nothing_of_itself(
        self, world: World, wire: Wire, failure: Exception
    ) -> None:
        world.tokens.fails = failure
        with structlog.testing.capture_logs() as logs:
            reply = await wire.ask(ask("GET", ONE, client_jwt(), "X-Request-ID: find-me"))
        body = problem(reply, 500, "INTERNAL_ERROR")
        assert body["meta"]["request_id"] == "find-me"
        for word in (b"SELECT", b"4111", b"Traceback", b"row 7", b"Error'"):
            assert word not in reply.body
        assert any(entry["log_level"] == "error" for entry in logs)

    async def test_the_connection_is_still_good_after_a_500(self, world: World, wire: Wire) -> None:
        world.tokens.fails = RuntimeError("once")
        assert (await wire.ask(ask("GET", ONE, client_jwt()))).status == 500
        world.tokens.fails = None
        assert (await wire.ask(ask("GET", ONE, client_jwt()))).status == 200


class TestLogs:
    """The access log."""

    async def test_one_event_a_request_without_token_or_path(self, wire: Wire) -> None:
        bearer = client_jwt()
        with structlog.testing.capture_logs() as logs:
            await wire.ask(ask("GET", ONE, bearer, "X-Forwarded-For: 203.0.113.9"))
        (event,) = [entry for entry in logs if entry["event"] == "http_request"]
        assert event["route"] == "/api/v1/payment-tokens/{token}"
        assert event["status"] == 200
        assert event["ip"] == "203.0.113.9"
        assert event["name"] == str(MERCHANT)
        written = json.dumps(logs)
        assert TOKEN not in written
        assert bearer.rsplit(".", 1)[1] not in written

    async def test_ids_are_bound_while_a_capability_works(self, world: World, wire: Wire) -> None:
        head = ask("GET", ONE, client_jwt(), "X-Request-ID: r1", "X-Correlation-ID: c1")
        await wire.ask(head)
        assert world.tokens.contexts == [
            {"request_id": "r1", "correlation_id": "c1", "merchant_id": str(MERCHANT)}
        ]


class TestBrokenHttp:
    """What never became a request."""

    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03hello\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET 4111111111111111 HTTP/1.1\r\n\r\n",
            b"NOSUCHMETHOD / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nBad Header: 4111111111111111\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
            b"POST / HTTP/1.1\r\nContent-Length: -3\r\n\r\nabc",
        ],
    )
    async def test_broken_http_is_400_without_a_word_of_it_and_closed(
        self, wire: Wire, data: bytes
    ) -> None:
        await wire.send(data)
        reply = await wire.reply()
        problem(reply, 400, "BAD_REQUEST")
        assert b"41111111" not in reply.body
        assert await wire.closed()

    @pytest.mark.parametrize(
        ("data", "status", "code"),
        [
            (b"GET /" + b"4111111111111111" * 600 + b" HTTP/1.1\r\n\r\n", 414, "URI_TOO_LONG"),
            (b"X: " + b"4111111111111111" * 600 + b"\r\n", 431, "HEADERS_TOO_LARGE"),
            (b"4111111111111111" * 600 + b": x\r\n", 431, "HEADERS_TOO_LARGE"),
            (b"".join(b"X-%d: 1\r\n" % n for n in range(65)), 431, "HEADERS_TOO_LARGE"),
        ],
        ids=["line", "value", "name", "many"],
    )
    async def test_a_head_that_is_too_large_is_told_which_part_of_it(
        self, wire: Wire, data: bytes, status: int, code: str
    ) -> None:
        start = b"" if data.startswith(b"GET") else b"GET / HTTP/1.1\r\nHost: x\r\n"
        await wire.send(start + data + b"\r\n")
        reply = await wire.reply()
        problem(reply, status, code)
        assert b"41111111" not in reply.body
        assert await wire.closed()

    async def test_a_broken_client_costs_the_others_nothing(self, api: int, wire: Wire) -> None:
        async with connected(api) as other:
            await wire.send(b"\x00" * 1000)
            assert (await other.ask(ask("GET", ONE, client_jwt()))).status == 200


def refused_for(reason: str) -> float:
    """How many tokens were looked at and refused for this."""
    labels = {"kind": "unknown", "outcome": reason}
    return REGISTRY.get_sample_value("glamd_http_auth_total", labels) or 0.0
