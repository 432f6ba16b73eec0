"""What holds for every route of both listeners, whatever it does: read from their own tables."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog

from glamd.errors import ConflictError, RateLimitedError
from glamd.http.call import Answer, Call, Raw
from glamd.http.cors import Cors
from glamd.http.limits import HttpLimits, RateLimiter
from glamd.http.listener import Listener
from glamd.http.middleware import Pipeline
from glamd.http.routes import Handler, Route
from tests.support.facade import CALLER, EVERYBODY, post, serving
from tests.support.http_fakes import ManualClock, Reply, Wire, client_jwt, connected
from tests.support.http_world import World

ORIGIN = "https://admin.example"
LISTENERS = ("api", "worker")


@asynccontextmanager
async def plain(world: World, name: str) -> AsyncIterator[tuple[int, tuple[Route, ...]]]:
    """The port and the routes of a listener, without TLS: nobody is recognised as a worker."""
    server = world.api_server() if name == "api" else world.worker_server()
    listener: Listener = server._listener
    assert isinstance(listener._dispatch, Pipeline)
    try:
        port = await listener.start_tcp("127.0.0.1", 0, None)
        yield port, listener._dispatch._table.routes
    finally:
        await server.stop(1.0)


def path_of(route: Route) -> str:
    """A path that leads to the route."""
    return "/".join("x" if part.startswith("{") else part for part in route.path.split("/"))


def whole(reply: Reply) -> None:
    """Check what every answer has."""
    headers = reply.headers
    for name in ("x-request-id", "x-correlation-id", "content-security-policy"):
        assert headers[name]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["server"] == "glamd"
    assert not [name for name in headers if name.startswith("access-control-")]
    if reply.status >= 400:
        assert headers["cache-control"] == "no-store"
        assert headers["content-type"] == "application/problem+json"
        body = reply.json
        assert body["meta"]["request_id"] == headers["x-request-id"]
        assert body["meta"]["correlation_id"] == headers["x-correlation-id"]
        assert body["error"]["code"] == body["code"]
    if reply.status in {429, 503}:
        assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize("name", LISTENERS)
class TestEveryRoute:
    """One test for one promise, over all routes."""

    async def test_without_a_caller_it_is_401_or_public(self, world: World, name: str) -> None:
        async with plain(world, name) as (port, routes), connected(port) as wire:
            for route in routes:
                reply = await wire.ask(f"{route.method} {path_of(route)} HTTP/1.1")
                whole(reply)
                signed = route.path.startswith("/webhooks/")
                assert (reply.status == 401) == (not route.public or signed), route.path
                if reply.status == 401:
                    assert reply.headers["www-authenticate"].startswith("bearer")

    async def test_another_method_is_405_and_told_which_there_are(
        self, world: World, name: str
    ) -> None:
        async with plain(world, name) as (port, routes), connected(port) as wire:
            for route in routes:
                reply = await wire.ask(f"PROPPATCH {path_of(route)} HTTP/1.1\nOrigin: {ORIGIN}")
                whole(reply)
                assert (reply.status, reply.json["code"]) == (405, "METHOD_NOT_ALLOWED")
                assert route.method in reply.headers["allow"].upper()

    async def test_no_browser_is_told_anything(self, world: World, name: str) -> None:
        lines = f"Origin: {ORIGIN}\nAccess-Control-Request-Method: GET"
        async with plain(world, name) as (port, routes), connected(port) as wire:
            for route in routes:
                reply = await wire.ask(f"OPTIONS {path_of(route)} HTTP/1.1\n{lines}")
                whole(reply)
                assert reply.status == 405
                assert "vary" not in reply.headers

    async def test_a_body_that_is_too_large_is_413_before_a_handler_sees_it(
        self, world: World, name: str
    ) -> None:
        async with plain(world, name) as (port, routes):
            for route in routes:
                async with connected(port) as wire:
                    head = f"{route.method} {path_of(route)} HTTP/1.1\nContent-Length: 262145"
                    reply = await wire.ask(f"{head}\nAuthorization: Bearer {client_jwt()}")
                    whole(reply)
                    assert reply.status in ({413} if route.public or name == "api" else {401})

    async def test_while_draining_only_public_routes_answer(self, world: World, name: str) -> None:
        world.draining = True
        async with plain(world, name) as (port, routes), connected(port) as wire:
            for route in routes:
                head = f"{route.method} {path_of(route)} HTTP/1.1"
                reply = await wire.ask(f"{head}\nAuthorization: Bearer {client_jwt()}")
                whole(reply)
                if not route.public:
                    assert reply.status == (503 if name == "api" else 401)
                elif route.path.startswith("/webhooks/"):
                    assert reply.status == 503
                elif route.path != "/readyz":
                    assert reply.status in {200, 404}

    async def test_head_says_what_get_says_and_sends_nothing(self, world: World, name: str) -> None:
        async with plain(world, name) as (port, routes), connected(port) as wire:
            for route in routes:
                if route.method != "GET":
                    continue
                lines = ["Host: x", f"Authorization: Bearer {client_jwt()}", "", ""]
                await wire.send("\r\n".join([f"HEAD {path_of(route)} HTTP/1.1", *lines]).encode())
                head = (await wire.reader.readuntil(b"\r\n\r\n")).decode().lower()
                got = await wire.ask(f"GET {path_of(route)} HTTP/1.1\n{lines[1]}")
                assert int(head.split(" ")[1]) == got.status
                assert f"content-type: {got.headers['content-type']}".lower() in head
                # The next answer begins at once, so there was no body in between.
                assert (await wire.ask("GET /healthz HTTP/1.1")).status == 200


class Desk:
    """Handlers that do what a test wants."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.stubborn = False

    def routes(self) -> list[Route]:
        """Its routes."""

        async def wait(_call: Call) -> Answer:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
            return Answer(data="done")

        async def page(_call: Call) -> Raw:
            headers = {"content-security-policy": "default-src 'self'", "Cache-Control": "public"}
            return Raw(body=b"<p>", content_type="text/html; charset=utf-8", headers=headers)

        async def headed(_call: Call) -> Answer:
            return Answer(data=1, headers={"Idempotent-Replayed": "true", "X-Request-ID": "mine"})

        async def split(_call: Call) -> Answer:
            return Answer(data=1, headers={"X-Note": "a\r\nSet-Cookie: b=c"})

        async def refused(_call: Call) -> Answer:
            raise ConflictError("No.", code="SOMETHING_ELSE")

        async def busy(_call: Call) -> Answer:
            raise RateLimitedError("No.", retry_after_s=9)

        handlers: dict[str, Handler] = {
            "wait": wait,
            "page": page,
            "headed": headed,
            "split": split,
            "refused": refused,
            "busy": busy,
        }
        return [
            Route(method="GET", path=f"/{name}", handler=handler, access=access)
            for name, handler in handlers.items()
            for access in [() if name == "page" else EVERYBODY]
        ]


def get(path: str, *lines: str, method: str = "GET") -> str:
    """A caller's request."""
    return "\n".join([f"{method} {path} HTTP/1.1", f"Authorization: Bearer {CALLER}", *lines])


class TestDeadline:
    """No handler goes on for ever."""

    LIMITS = replace(HttpLimits(), handler_timeout_s=0.2)

    async def test_a_handler_that_does_not_end_is_503_and_the_connection_lives(self) -> None:
        desk = Desk()
        with structlog.testing.capture_logs() as logs:
            async with serving(desk.routes(), limits=self.LIMITS) as port, connected(port) as wire:
                reply = await wire.ask(get("/wait"))
                whole(reply)
                assert (reply.status, reply.json["code"]) == (503, "UNAVAILABLE")
                desk.gate.set()
                assert (await wire.ask(get("/wait"))).status == 200
        assert [e["route"] for e in logs if e["event"] == "http_handler_too_slow"] == ["/wait"]
        assert [e["status"] for e in logs if e["event"] == "http_request"] == [503, 200]

    async def test_a_handler_that_comes_to_an_end_though_it_was_cancelled_is_answered(self) -> None:
        desk = Desk()
        desk.stubborn = True
        async with serving(desk.routes(), limits=self.LIMITS) as port, connected(port) as wire:
            assert (await wire.ask(get("/wait"))).json["data"] == "done"
            assert (await wire.ask(get("/refused"))).status == 409

    async def test_a_hundred_that_hang_end_and_leave_the_others_alone(self) -> None:
        desk = Desk()

        async def hang(port: int) -> int:
            async with connected(port) as wire:
                return (await wire.ask(get("/wait"))).status

        async with serving(desk.routes(), limits=self.LIMITS) as port, connected(port) as wire:
            async with asyncio.TaskGroup() as group:
                hanging = [group.create_task(hang(port)) for _ in range(100)]
                assert (await wire.ask(get("/refused"))).status == 409
            assert {task.result() for task in hanging} == {503}


class TestHeaders:
    """A handler's own headers lie over those of every answer."""

    async def test_a_document_may_bring_its_own_policy(self) -> None:
        async with serving(Desk().routes()) as port, connected(port) as wire:
            reply = await wire.ask("GET /page HTTP/1.1")
        assert reply.headers["content-security-policy"] == "default-src 'self'"
        assert reply.headers["cache-control"] == "public"
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.headers["x-content-type-options"] == "nosniff"

    async def test_an_answer_may_add_headers(self) -> None:
        async with serving(Desk().routes()) as port, connected(port) as wire:
            reply = await wire.ask(get("/headed"))
        assert reply.headers["idempotent-replayed"] == "true"

    async def test_a_header_of_two_lines_is_not_sent(self) -> None:
        async with serving(Desk().routes()) as port, connected(port) as wire:
            reply = await wire.ask(get("/split"))
            assert reply.status == 500
            assert "set-cookie" not in reply.headers
            assert (await wire.ask(get("/headed"))).status == 200

    @pytest.mark.parametrize(
        ("version", "asked", "said"),
        [
            ("1.1", None, None),
            ("1.1", "close", "close"),
            ("1.0", None, None),
            ("1.0", "keep-alive", "keep-alive"),
            ("1.0", "close", None),
        ],
    )
    async def test_a_connection_goes_on_as_its_version_wants_it(
        self, version: str, asked: str | None, said: str | None
    ) -> None:
        lines = [] if asked is None else [f"Connection: {asked}"]
        async with serving(Desk().routes()) as port, connected(port) as wire:
            reply = await wire.ask(get("/headed", *lines).replace("HTTP/1.1", f"HTTP/{version}"))
            assert reply.headers.get("connection") in {said, "close"}
            assert reply.headers["date"].endswith(" gmt")
            if said == "keep-alive" or (version, asked) == ("1.1", None):
                assert (await wire.ask(get("/headed"))).status == 200
            else:
                assert await wire.closed()


class TestCors:
    """Browsers of the origins that were named, and of no others."""

    CORS = Cors([ORIGIN, "http://localhost:5173"])
    PREFLIGHT = ("Access-Control-Request-Method: GET", "Access-Control-Request-Headers: x-evil")

    @pytest.fixture
    async def wire(self) -> AsyncIterator[Wire]:
        """A connection to a listener with two origins."""
        limiter = RateLimiter(rate_per_s=0.01, burst=5, clock=ManualClock())
        async with (
            serving(Desk().routes(), cors=self.CORS, limiter=limiter) as port,
            connected(port) as wire,
        ):
            yield wire

    async def test_a_preflight_is_told_what_there_is_without_a_token(self, wire: Wire) -> None:
        lines = "\n".join((f"Origin: {ORIGIN}", *self.PREFLIGHT))
        reply = await wire.ask(f"OPTIONS /busy HTTP/1.1\n{lines}")
        assert (reply.status, reply.body) == (204, b"")
        assert "content-type" not in reply.headers
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert reply.headers["access-control-allow-methods"] == "get, head"
        assert reply.headers["access-control-allow-headers"] == (
            "authorization, content-type, idempotency-key, x-correlation-id, x-request-id, "
            "x-shop-domain, x-shop-platform"
        )
        assert int(reply.headers["access-control-max-age"]) > 0
        assert reply.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in reply.headers
        assert (await wire.ask("GET /page HTTP/1.1")).status == 200

    @pytest.mark.parametrize(
        "origins",
        [
            (),
            ("null",),
            ("https://evil.example",),
            (f"{ORIGIN}:443",),
            (f"{ORIGIN}.evil.example",),
            (ORIGIN.replace("https", "http"),),
            (ORIGIN.upper(),),
            (ORIGIN, ORIGIN),
            (ORIGIN, "https://evil.example"),
            (f"{ORIGIN}, https://evil.example",),
        ],
    )
    async def test_other_origins_are_told_nothing(
        self, wire: Wire, origins: tuple[str, ...]
    ) -> None:
        lines = [f"Origin: {origin}" for origin in origins]
        preflight = await wire.ask("\n".join(("OPTIONS /busy HTTP/1.1", *lines, *self.PREFLIGHT)))
        assert preflight.status == 405
        answer = await wire.ask(get("/headed", *lines))
        assert answer.status == 200
        for reply in (preflight, answer):
            assert reply.headers["vary"] == "origin"
            assert not [name for name in reply.headers if name.startswith("access-control-")]

    @pytest.mark.parametrize(
        ("head", "status"),
        [
            (get("/headed"), 200),
            (get("/refused"), 409),
            (get("/busy"), 429),
            (get("/nowhere"), 404),
            (get("/busy", method="DELETE"), 405),
            (get("/busy", method="OPTIONS"), 405),
            ("GET /busy HTTP/1.1", 401),
            ("GET /page HTTP/1.1", 200),
        ],
    )
    async def test_every_answer_to_a_named_origin_may_be_read_errors_too(
        self, wire: Wire, head: str, status: int
    ) -> None:
        reply = await wire.ask(f"{head}\nOrigin: {ORIGIN}")
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert reply.headers["access-control-expose-headers"] == (
            "idempotent-replayed, retry-after, x-correlation-id, x-request-id"
        )
        assert reply.headers["vary"] == "origin"

    async def test_preflights_are_held_to_a_rate_too(self, wire: Wire) -> None:
        head = "\n".join(("OPTIONS /busy HTTP/1.1", f"Origin: {ORIGIN}", *self.PREFLIGHT))
        found = [(await wire.ask(head)).status for _ in range(6)]
        assert found == [204] * 5 + [429]

    @pytest.mark.parametrize(
        ("data", "status", "code"),
        [
            (b"GET /page HTTP/1.1\r\nHost: x\r\nX:\x00a\r\n\r\n", 400, "BAD_REQUEST"),
            (b"GET /page\r\n\r\n", 400, "BAD_REQUEST"),
            (b"\x16\x03\x01\x02\x00", 400, "BAD_REQUEST"),
            (
                b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
                400,
                "BAD_REQUEST",
            ),
            (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "URI_TOO_LONG"),
            (
                b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
                431,
                "HEADERS_TOO_LARGE",
            ),
        ],
        ids=["nul", "no-version", "tls", "two-lengths", "long-line", "long-header"],
    )
    async def test_what_is_no_http_is_refused_as_without_origins(
        self, wire: Wire, data: bytes, status: int, code: str
    ) -> None:
        with structlog.testing.capture_logs() as logs:
            await wire.send(data)
            reply = await wire.reply()
            assert await wire.closed()
        assert (reply.status, reply.json["code"]) == (status, code)
        assert reply.headers["vary"] == "origin"
        assert "access-control-allow-origin" not in reply.headers
        assert [entry for entry in logs if entry["log_level"] == "error"] == []

    async def test_an_unknown_path_has_no_preflight(self, wire: Wire) -> None:
        head = "\n".join(("OPTIONS /nowhere HTTP/1.1", f"Origin: {ORIGIN}", *self.PREFLIGHT))
        assert (await wire.ask(head)).status == 404


async def test_ids_of_a_request_are_in_every_event_of_it() -> None:
    with structlog.testing.capture_logs(
        processors=[structlog.contextvars.merge_contextvars]
    ) as logs:
        async with serving(Desk().routes()) as port, connected(port) as wire:
            await post(wire, "/nowhere", {}, "X-Request-ID: r1", "X-Correlation-ID: c1")
            await wire.ask(get("/busy"))
    first, second = (entry for entry in logs if entry["event"] == "http_request")
    assert (first["request_id"], first["correlation_id"]) == ("r1", "c1")
    assert second["request_id"] == second["correlation_id"] not in {"r1", "c1"}
    assert "merchant_id" not in first
    assert second["merchant_id"] == second["name"]
