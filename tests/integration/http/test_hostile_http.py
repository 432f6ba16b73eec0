"""HTTP that two parsers could read differently, or that only wants to cost us something.

Whatever is doubtful about where a request ends is refused and the connection closed, so that
nothing of it can be taken for the next caller's request.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from glamd.http.bodies import Body
from glamd.http.call import Answer, Call
from glamd.http.limits import HttpLimits
from glamd.http.routes import Route
from tests.support.facade import CALLER, EVERYBODY, post, serving
from tests.support.http_fakes import SHORT_S, Wire, code, connected

LIMITS = HttpLimits(linger_s=0.2)
SHORT = replace(LIMITS, head_timeout_s=0.3, body_timeout_s=0.3)
GOOD = b'{"name":"a"}'
LENGTH = b"Content-Length: 12"
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"c\r\n" + GOOD + b"\r\n0\r\n\r\n"
SMUGGLED = b"GET /things/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


class NameBody(Body):
    """A name."""

    name: str


class Site:
    """Routes that say what they were asked, and remember it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def routes(self) -> Sequence[Route]:
        """One for everybody and one for callers, each with GET and POST."""

        async def show(call: Call) -> Answer:
            self.seen.append(call.params["place"])
            return Answer(data={"place": call.params["place"]})

        async def make(call: Call) -> Answer:
            body = await call.json(NameBody)
            self.seen.append(call.params["place"])
            return Answer(data={"name": body.name}, status=201)

        return [
            Route(method=method, path=path, handler=handler, access=access)
            for path, access in (("/things/{place}", ()), ("/ours/{place}", EVERYBODY))
            for method, handler in (("GET", show), ("POST", make))
        ]


@pytest.fixture
def site() -> Site:
    """A fresh one."""
    return Site()


@pytest.fixture
async def port(site: Site) -> AsyncIterator[int]:
    """The running listener's port."""
    async with serving(site.routes(), limits=LIMITS) as port:
        yield port


@pytest.fixture
async def wire(port: int) -> AsyncIterator[Wire]:
    """A connection to it."""
    async with connected(port) as wire:
        yield wire


def request(*lines: bytes, body: bytes = b"", start: bytes = b"POST /things/1 HTTP/1.1") -> bytes:
    """A request's bytes, with a media type and a host."""
    head = (start, b"Host: x", b"Content-Type: application/json", *lines)
    return b"\r\n".join((*head, b"", body))


class TestWhereItEnds:
    """Lengths and chunks."""

    @pytest.mark.parametrize(
        "data",
        [
            request(LENGTH, CHUNKED, body=CHUNKS),
            request(CHUNKED, LENGTH, body=CHUNKS),
            request(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\n"),
            request(b"Transfer-Encoding: chunked, gzip", body=CHUNKS),
            request(b"Transfer-Encoding: chunked, chunked", body=CHUNKS),
            request(CHUNKED, b"Transfer-Encoding: identity", body=CHUNKS),
            request(b"Transfer-Encoding: identity", LENGTH, body=GOOD),
            request(b"Transfer-Encoding: xchunked", body=CHUNKS),
            request(b"Transfer-Encoding : chunked", body=CHUNKS),
            request(b"Transfer-Encoding: \x0bchunked", body=CHUNKS),
            request(b"X: y\r\n Transfer-Encoding: chunked", LENGTH, body=GOOD),
            request(LENGTH, LENGTH, body=GOOD),
            request(b"Content-Length: 12, 12", body=GOOD),
            request(b"Content-Length: +12", body=GOOD),
            request(b"Content-Length: 0xc", body=GOOD),
            request(b"Content-Length: 1 2", body=GOOD),
            request(b"Content-Length:", body=GOOD),
            request(b"Content-Length: " + b"9" * 30, body=GOOD),
            request(LENGTH, b"X: a\rContent-Length: 0", body=GOOD),
            request(LENGTH, b"X: a\nContent-Length: 0", body=GOOD),
            request(CHUNKED, body=b"-c\r\n" + GOOD + b"\r\n0\r\n\r\n"),
            request(CHUNKED, body=b"0xc\r\n" + GOOD + b"\r\n0\r\n\r\n"),
            request(CHUNKED, body=b"c \x0b\r\n" + GOOD + b"\r\n0\r\n\r\n"),
            request(CHUNKED, body=b"f" * 17 + b"\r\n" + GOOD + b"\r\n0\r\n\r\n"),
            request(CHUNKED, body=b"c\n" + GOOD + b"\n0\n\n"),
            request(CHUNKED, body=b"c\r\n" + GOOD + b"XX0\r\n\r\n"),
            request(CHUNKED, body=b"c;a\nb\r\n" + GOOD + b"\r\n0\r\n\r\n"),
        ],
        ids=range(27),
    )
    async def test_what_two_parsers_may_read_differently_is_refused_and_closed(
        self, site: Site, wire: Wire, data: bytes
    ) -> None:
        await wire.send(data + SMUGGLED)
        assert code(await wire.reply()) == (400, "BAD_REQUEST")
        assert await wire.closed()
        assert not site.seen

    async def test_a_length_that_is_too_short_makes_no_second_request(
        self, site: Site, wire: Wire
    ) -> None:
        await wire.send(request(b"Content-Length: 5", body=GOOD))
        assert (await wire.reply()).status == 400
        assert await wire.closed()
        assert not site.seen

    @pytest.mark.parametrize("length", [2**63 - 1, 2**63, 2**64 - 2])
    @pytest.mark.parametrize("path", [b"/things/1", b"/ours/1"])
    async def test_a_length_beyond_every_body_is_refused_without_waiting_for_it(
        self, wire: Wire, length: int, path: bytes
    ) -> None:
        head = (b"Content-Length: %d" % length, b"Authorization: Bearer " + CALLER.encode())
        await wire.send(request(*head, start=b"POST %s HTTP/1.1" % path))
        assert code(await wire.reply()) == (413, "BODY_TOO_LARGE")
        assert await wire.closed()

    async def test_chunks_in_http_1_0_are_none(self, site: Site, wire: Wire) -> None:
        head = request(
            CHUNKED, b"Connection: keep-alive", body=CHUNKS, start=b"POST /things/1 HTTP/1.0"
        )
        await wire.send(head + SMUGGLED)
        assert code(await wire.reply()) == (400, "BAD_REQUEST")
        assert await wire.closed()
        assert not site.seen

    async def test_chunks_with_extensions_and_trailers_are_a_body_and_nothing_more(
        self, site: Site, wire: Wire
    ) -> None:
        body = (
            b"5;a=b\r\n" + GOOD[:5] + b"\r\n7\r\n" + GOOD[5:] + b"\r\n0\r\nX-Request-ID: t\r\n\r\n"
        )
        await wire.send(request(CHUNKED, b"X-Request-ID: head", body=body))
        reply = await wire.reply()
        assert (reply.status, reply.headers["x-request-id"]) == (201, "head")
        assert (await wire.ask("GET /things/next HTTP/1.1")).status == 200
        assert site.seen == ["1", "next"]

    @pytest.mark.parametrize(
        "line",
        [
            b"Content-Encoding: GZIP",
            b"Content-Encoding: identity\r\nContent-Encoding: gzip",
            b"Content-Encoding: aes128gcm",
            b"Transfer-Encoding: gzip, chunked",
        ],
    )
    @pytest.mark.parametrize("path", [b"/things/1", b"/ours/1"])
    async def test_a_compressed_body_is_not_taken_however_it_is_said(
        self, site: Site, wire: Wire, line: bytes, path: bytes
    ) -> None:
        lines = [line, b"Authorization: Bearer " + CALLER.encode()]
        body = CHUNKS
        if b"Transfer" not in line:
            lines, body = [*lines, LENGTH], GOOD
        await wire.send(request(*lines, body=body, start=b"POST %s HTTP/1.1" % path))
        assert code(await wire.reply()) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert not site.seen

    async def test_a_media_type_that_is_not_json_is_refused(self, wire: Wire) -> None:
        for kind in ("multipart/form-data; boundary=x", "application/xml", "text/json"):
            head = f"POST /things/1 HTTP/1.1\nContent-Length: 12\nContent-Type: {kind}"
            assert code(await wire.ask(head, GOOD)) == (415, "UNSUPPORTED_MEDIA_TYPE")

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("lines", [("Content-Length: 12",), ("Transfer-Encoding: chunked",)])
    async def test_a_body_where_none_belongs_is_not_taken_for_the_next_request(
        self, site: Site, wire: Wire, method: str, lines: tuple[str, ...]
    ) -> None:
        body = GOOD if "Length" in lines[0] else CHUNKS
        head = "\r\n".join([f"{method} /things/1 HTTP/1.1", "Host: x", *lines, "", ""])
        await wire.send(head.encode() + body)
        answer = await wire.reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        async with connected(wire.writer.get_extra_info("peername")[1]) as other:
            assert (await other.ask("GET /things/2 HTTP/1.1")).status == 200
        assert site.seen == ["1", "2"]


class TestTargets:
    """What stands in the request line."""

    @pytest.mark.parametrize(
        "target",
        [
            "//things/1",
            "/things//1",
            "/things/1/",
            "/things/",
            "/x/../things/1",
            "/x/%2e%2e/things/1",
            "/%74hings/1",
            "/things%2F1",
            "/Things/1",
            "http://x//things/1",
        ],
    )
    async def test_a_path_is_taken_as_it_is_written(
        self, site: Site, wire: Wire, target: str
    ) -> None:
        assert code(await wire.ask(f"GET {target} HTTP/1.1")) == (404, "NOT_FOUND")
        assert not site.seen

    @pytest.mark.parametrize(
        ("target", "place"),
        [
            ("http://elsewhere.example/things/1", "1"),
            ("http://elsewhere.example:1/things/1?x#y", "1"),
            ("/things/a%2Fb", "a/b"),
            ("/things/..%2F..%2Fetc%2Fpasswd", "../../etc/passwd"),
            ("/things/a%00b", "a\x00b"),
            ("/things/%ff", "\ufffd"),
            ("/things/%zz%", "%zz%"),
            ("/things/a;b=c?d", "a;b=c"),
            ("/things/a+b", "a+b"),
        ],
    )
    async def test_a_part_of_a_path_is_decoded_once_and_stays_one_part(
        self, site: Site, wire: Wire, target: str, place: str
    ) -> None:
        assert (await wire.ask(f"GET {target} HTTP/1.1")).status == 200
        assert site.seen == [place]

    @pytest.mark.parametrize(
        "start",
        [
            b"GET * HTTP/1.1",
            b"GET things/1 HTTP/1.1",
            b"GET x:443 HTTP/1.1",
            b"GET ?x HTTP/1.1",
            b"GET http:///things/1 HTTP/1.1",
            b"GET http://x:99999/things/1 HTTP/1.1",
            b"GET http://[::1/things/1 HTTP/1.1",
            b"GET /things/\xff\xfe HTTP/1.1",
            b"GET /things/a b HTTP/1.1",
            b"GET /things/a\tb HTTP/1.1",
            b"GET /things/a\x00b HTTP/1.1",
            b"GET \\things\\1 HTTP/1.1",
            b"get /things/1 HTTP/1.1",
            b"GET /things/1 HTTP/1.2",
            b"GET /things/1 http/1.1",
            b"PRI * HTTP/2.0",
            b"A" * 5_000 + b" / HTTP/1.1",
            b": x",
        ],
    )
    async def test_a_request_line_that_is_none_is_refused_and_closed(
        self, site: Site, wire: Wire, start: bytes
    ) -> None:
        await wire.send(request(start=start) + SMUGGLED)
        assert code(await wire.reply()) == (400, "BAD_REQUEST")
        assert await wire.closed()
        assert not site.seen

    async def test_http_0_9_is_not_spoken(self, site: Site, wire: Wire) -> None:
        await wire.send(b"GET /things/1\r\n\r\n")
        assert b'"code":"BAD_REQUEST"' in await wire.reader.read()
        assert not site.seen

    @pytest.mark.parametrize("start", [b"OPTIONS * HTTP/1.1", b"CONNECT x:443 HTTP/1.1"])
    async def test_what_is_for_proxies_is_not_found(self, wire: Wire, start: bytes) -> None:
        await wire.send(request(start=start))
        assert code(await wire.reply()) == (404, "NOT_FOUND")

    @pytest.mark.parametrize("to", [b"websocket", b"h2c", b"TLS/1.3"])
    async def test_nobody_is_upgraded_and_what_follows_is_not_heard(
        self, site: Site, wire: Wire, to: bytes
    ) -> None:
        lines = (b"Upgrade: " + to, b"Connection: Upgrade")
        await wire.send(request(*lines, start=b"GET /things/1 HTTP/1.1") + SMUGGLED)
        reply = await wire.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await wire.closed()
        assert site.seen == ["1"]


class TestHeads:
    """Headers by the thousand, and heads that never end."""

    @pytest.mark.parametrize(
        "line",
        [
            b"Foo",
            b": x",
            b"X: a\x01b",
            b"X: a\x7fb",
            b"X\x00: a",
            b"X Y: a",
            b"X: a\r\n b",
            b"\x1fX: a",
            b"H\xc3\xb6st: a",
        ],
    )
    async def test_a_header_that_is_none_is_refused(self, wire: Wire, line: bytes) -> None:
        await wire.send(request(line, start=b"GET /things/1 HTTP/1.1"))
        assert code(await wire.reply()) == (400, "BAD_REQUEST")
        assert await wire.closed()

    @pytest.mark.parametrize(
        "head",
        [
            b"GET /things/1 HTTP/1.1\r\n\r\n",
            b"GET /things/1 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        ],
        ids=["none", "two"],
    )
    async def test_a_request_names_one_host(self, wire: Wire, head: bytes) -> None:
        await wire.send(head)
        assert code(await wire.reply()) == (400, "BAD_REQUEST")

    async def test_as_many_headers_as_there_may_be_and_one_more(self, wire: Wire) -> None:
        lines = [b"X-%d: 1" % n for n in range(LIMITS.headers - 2)]
        await wire.send(request(*lines, start=b"GET /things/1 HTTP/1.1"))
        assert (await wire.reply()).status == 200
        await wire.send(request(*lines, b"X: 1", start=b"GET /things/1 HTTP/1.1"))
        assert code(await wire.reply()) == (431, "HEADERS_TOO_LARGE")

    async def test_a_header_without_end_is_refused_before_it_ends(self, wire: Wire) -> None:
        await wire.send(b"GET /things/1 HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(2):
            await wire.send(b"4" * 5_000)
        assert code(await wire.reply()) == (431, "HEADERS_TOO_LARGE")
        assert await wire.closed()

    async def test_a_path_without_end_is_refused_before_it_ends(self, wire: Wire) -> None:
        await wire.send(b"GET /things/")
        for _ in range(2):
            await wire.send(b"4" * 5_000)
        assert code(await wire.reply()) == (414, "URI_TOO_LONG")
        assert await wire.closed()

    async def test_empty_lines_for_ever_are_no_request(self, site: Site) -> None:
        async with serving(site.routes(), limits=SHORT) as port, connected(port) as wire:
            assert (await wire.ask("GET /things/1 HTTP/1.1")).status == 200
            async with asyncio.timeout(SHORT_S):
                while not wire.reader.at_eof():
                    try:
                        await wire.send(b"\r\n")
                        await asyncio.wait_for(wire.reader.read(1), 0.02)
                    except TimeoutError:
                        continue
                    except ConnectionError:
                        break

    async def test_a_head_in_many_pieces_is_one_request(self, wire: Wire) -> None:
        for byte in request(start=b"GET /things/1 HTTP/1.1"):
            await wire.send(bytes([byte]))
        assert (await wire.reply()).status == 200


class TestSlowBodies:
    """Bodies byte by byte, or not at all."""

    @pytest.mark.parametrize(
        "lines",
        [(b"Content-Length: 1000",), (CHUNKED,), (LENGTH, b"Expect: 100-continue")],
        ids=["length", "chunks", "expect"],
    )
    async def test_a_body_that_does_not_come_is_cut_off(
        self, site: Site, lines: tuple[bytes, ...]
    ) -> None:
        async with serving(site.routes(), limits=SHORT) as port, connected(port) as wire:
            await wire.send(request(*lines))
            assert await wire.closed()
        assert not site.seen

    async def test_a_body_that_comes_byte_by_byte_is_cut_off(self, site: Site) -> None:
        async with serving(site.routes(), limits=SHORT) as port, connected(port) as wire:
            await wire.send(request(b"Content-Length: 1000"))
            async with asyncio.timeout(SHORT_S):
                while True:
                    try:
                        await wire.send(b" ")
                        if await asyncio.wait_for(wire.reader.read(1), 0.05) == b"":
                            break
                    except TimeoutError:
                        continue
                    except ConnectionError:
                        break
        assert not site.seen


class TestPipelines:
    """Many requests in one piece."""

    async def test_answers_come_in_order_bodies_and_refusals_among_them(
        self, site: Site, wire: Wire
    ) -> None:
        one = request(LENGTH, body=GOOD, start=b"POST /things/a HTTP/1.1")
        two = request(b"Content-Length: 2", body=b"{]", start=b"POST /things/b HTTP/1.1")
        three = request(start=b"GET /nowhere HTTP/1.1")
        four = request(start=b"GET /things/d HTTP/1.1")
        await wire.send((one + two + three + four) * 20)
        for _ in range(20):
            found = [(await wire.reply()).status for _ in range(4)]
            assert found == [201, 400, 404, 200]
        assert site.seen == ["a", "d"] * 20

    async def test_behind_broken_http_nothing_is_served(self, site: Site, wire: Wire) -> None:
        await wire.send(request(start=b"GET /things/a HTTP/1.1") + b"\x00\r\n\r\n" + SMUGGLED)
        replies = [await wire.reply()]
        if replies[0].status == 200:
            replies.append(await wire.reply())
        assert replies[-1].status == 400
        assert await wire.closed()
        assert "smuggled" not in site.seen

    async def test_a_connection_lives_through_every_refusal_of_ours(self, wire: Wire) -> None:
        for body in (b"{", b"[]", b'{"name":1}', b'{"name":"a","x":1}', GOOD):
            await post(wire, "/ours/1", body)
        assert (await post(wire, "/ours/1", GOOD)).status == 201
